"""The bindings of this program by their ids, and the keys that they have.

Every binding of ours has an id, by which the settings give it other keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from textual.app import App
from textual.binding import Binding, BindingType
from textual.dom import DOMNode

from aprtui.settings import Settings

# Lines beyond any end: a cursor that is moved by so many stops there.
FAR = 10**9


class Command(NamedTuple):
    """A binding and where it is in force.

    Attributes:
        node: The class that has it.
        binding: What the class says of it.
        keys: Its keys, spelled out.
    """

    node: type[DOMNode]
    binding: Binding
    keys: tuple[str, ...]


def loaded_commands() -> dict[str, Command]:
    """Every binding of what is imported so far, by its id."""
    return {
        binding.id: Command(node, binding, split_keys(binding.key))
        for node in _our_nodes(DOMNode)
        for binding in vars(node).get("BINDINGS", ())
        if isinstance(binding, Binding) and binding.id is not None
    }


def shown_key(app: App[Any], name: str) -> str:
    """The key of an action as the footer shows it: the first that the user chose, else its own."""
    binding = loaded_commands()[name].binding
    settings = getattr(app, "settings", None)
    if isinstance(settings, Settings) and name in settings.keys:
        chosen, *_ = Binding.make_bindings([Binding(settings.keys[name], "")])
        binding = Binding(chosen.key, binding.action)
    return app.get_key_display(binding)


def cursor_keys(
    space: str, line: str, place: str, *sideways: Binding, ends: tuple[str, str] = ("home", "end")
) -> tuple[BindingType, ...]:
    """What moves a cursor through lines: the actions `move` and `page` with a number of them.

    Args:
        space: What the ids begin with.
        line: What a line is.
        place: What the cursor is on.
        sideways: Keys for moving within a line.
        ends: What the ids of the first and the last line end with.
    """
    return (
        Binding("up", "move(-1)", "up", id=f"{space}.up", show=False, tooltip=f"One {line} up"),
        Binding("down", "move(1)", "down", id=f"{space}.down", show=False,
                tooltip=f"One {line} down"),
        *sideways,
        Binding("pageup", "page(-1)", "page up", id=f"{space}.page-up", show=False,
                tooltip="One page up"),
        Binding("pagedown", "page(1)", "page down", id=f"{space}.page-down", show=False,
                tooltip="One page down"),
        Binding("home", f"move({-FAR})", "first", id=f"{space}.{ends[0]}", show=False,
                tooltip=f"The first {place}"),
        Binding("end", f"move({FAR})", "last", id=f"{space}.{ends[1]}", show=False,
                tooltip=f"The last {place}"),
    )  # fmt: skip


def split_keys(keys: str) -> tuple[str, ...]:
    """Keys as the toolkit names them: "?" is question_mark."""
    return tuple(binding.key for binding in Binding.make_bindings([Binding(keys, "")]))


def _our_nodes(node: type[DOMNode]) -> Iterator[type[DOMNode]]:
    for subclass in node.__subclasses__():
        if subclass.__module__.startswith("aprtui."):
            yield subclass
        yield from _our_nodes(subclass)
