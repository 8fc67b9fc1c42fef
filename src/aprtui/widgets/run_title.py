"""The title line: what is held against what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text
from textual.widget import Widget

from aprcore.records.telling import plural
from aprtui.run_state import RunState
from aprtui.text import visible
from aprtui.theme import Paint

if TYPE_CHECKING:
    from aprcore.records.report import RunHeader, Side

LEAST_GAP = 2


def base_name(path: str) -> str:
    """The last part of a path, made visible."""
    return visible(PurePath(path).name or path)


class RunTitle(Widget):
    """One line: the program, both sides, the tokens and what computes."""

    def __init__(self, state: RunState, opening: str, id: str | None = None) -> None:
        super().__init__(id=id)
        self._state = state
        self._opening = opening

    def render(self) -> Text:
        """The line for the present width; the right part goes first when it does not fit."""
        paint = Paint(self.app.theme_variables)
        header = self._state.header
        line = Text.assemble((" aprtui  ", paint("ink-oracle", bold=True)))
        line.no_wrap, line.overflow = True, "ellipsis"
        if header is None:
            return line.append(self._opening, paint("ink-quiet"))
        line.append_text(self._side(header.trace, "ink-trace", paint))
        if header.oracle is not None:
            line.append("  vs  ", paint("ink-quiet"))
            line.append_text(self._side(header.oracle, "ink-oracle", paint))
        facts = self._facts(header)
        if header.tested is not None and header.backend:
            # Whether a device computes must not get lost behind what the run's row says anyway.
            while len(facts) > 1 and self._room(line, facts) < LEAST_GAP:
                facts = facts[1:]
        room = self._room(line, facts)
        if room >= LEAST_GAP:
            line.append(" " * room).append(_joined(facts), paint("ink-quiet"))
        return line

    def _room(self, line: Text, facts: Sequence[str]) -> int:
        """Cells that are left between both parts of the line."""
        return self.size.width - line.cell_len - cell_len(_joined(facts))

    @staticmethod
    def _side(side: Side, ink: str, paint: Paint) -> Text:
        text = Text.assemble((base_name(side.path), paint(ink, bold=True)))
        return text.append(f" ({visible(side.label)})" if side.label else "", paint("ink-quiet"))

    def _backend(self, header: RunHeader) -> str | None:
        """What computes: "numpy", or with a device "cpu | gpu: pocl"."""
        if header.tested is None or not header.backend:
            return visible(header.backend) if header.backend else None
        device, rejected = self._state.device, self._state.rejected
        if rejected is not None:
            return "cpu | gpu: rejected"
        return "cpu | gpu: " + ("opening…" if device is None else visible(device.label, 32))

    def _facts(self, header: RunHeader) -> Sequence[str]:
        facts = [visible(header.architecture) if header.architecture else None]
        facts.append(plural(header.num_layers, "layer"))
        facts.append(None if header.tokens is None else plural(len(header.tokens), "token"))
        facts.append(self._backend(header))
        return [fact for fact in facts if fact]


def _joined(facts: Sequence[str]) -> str:
    return "   ".join(facts) + " "
