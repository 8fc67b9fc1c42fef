"""Lists of what there is, for a terminal or for a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from aprtui.drawing import VisibleConsole
from aprtui.text import visible

if TYPE_CHECKING:
    from rich.console import RenderableType


def print_parts(*parts: RenderableType) -> None:
    """Print renderables, one below the other."""
    console = VisibleConsole()
    if console.is_terminal:
        console.print(Group(*parts))
        return
    # A pipe has no width: lines are neither folded nor padded, for grep and diff.
    wide = VisibleConsole(width=10_000)
    with wide.capture() as captured:
        wide.print(Group(*parts))
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def field_table(fields: Mapping[str, str]) -> Table:
    """Fields by their names; text that does not print is spelled out."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(Text(visible(name)), Text(visible(value)))
    return table
