"""Keys that a user has given to other actions: which ids there are, and what cannot be.

The toolkit puts a user's keys in place of a binding's own. It would also drop, without a word,
whatever had those keys before: so what clashes is an error here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from textual.app import App
from textual.dom import DOMNode
from textual.keys import Keys, format_key
from textual.screen import ModalScreen, Screen

from aprcore.ground.errors import nearest
from aprtui.bindings import Command, loaded_commands, split_keys
from aprtui.settings import SettingsError
from aprtui.widgets.tabs import DetailTab

MODIFIERS = {"ctrl", "shift", "alt", "super", "hyper", "meta"}
_NAMED_KEYS = {key.value for key in Keys}


def commands() -> dict[str, Command]:
    """Every binding of this program, by its id."""
    # What is imported when it is opened has keys, too.
    from aprtui.screens import changes, devices, error, export, help, parity, profile  # noqa: F401

    for tab in DetailTab:
        tab.load_picture()
    return loaded_commands()


def check_keys(keys: Mapping[str, str], where: Path | None) -> None:
    """Hold a user's keys against the bindings that there are.

    Args:
        keys: Id of a binding to its keys, separated by commas.
        where: The file that says so.

    Raises:
        SettingsError: There is no such id or key, or two actions would share one key.
    """
    if not keys:
        return
    known = commands()
    for name, names in keys.items():
        if name not in known:
            raise SettingsError(
                f"there is no action {name!r} to give a key to", where=where,
                hint=f"did you mean {nearest(name, known)}? There are {', '.join(sorted(known))}",
            )  # fmt: skip
        for key in split_keys(names):
            if not _is_key(key):
                raise SettingsError(
                    f"keys.{name}: there is no key {key!r}", where=where,
                    hint="write a character, or a name such as f5, ctrl+n, space or comma",
                )  # fmt: skip
        known[name] = known[name]._replace(keys=split_keys(names))
    for name in keys:
        _check_clashes(name, known, where)


def _check_clashes(name: str, known: Mapping[str, Command], where: Path | None) -> None:
    """Two actions on one key, of which the user has chosen at least one."""
    ours = known[name]
    for key in ours.keys:
        if key == App.COMMAND_PALETTE_BINDING:
            raise SettingsError(f"keys.{name}: {key} opens the palette", where=where)
        for other, theirs in known.items():
            if other != name and key in theirs.keys and _meet(ours, theirs, known):
                raise SettingsError(
                    f"keys.{name}: {key} is the key of {other} too", where=where,
                    hint=f"choose another, or give {other} another",
                )  # fmt: skip


def _meet(ours: Command, theirs: Command, known: Mapping[str, Command]) -> bool:
    """Whether two bindings can be in force at once, so that one key cannot serve both."""
    if ours.node is theirs.node or ours.binding.priority or theirs.binding.priority:
        return True
    nodes = (ours.node, theirs.node)
    if any(issubclass(node, ModalScreen) for node in nodes):
        return False  # it lies over all else
    screens = sum(issubclass(node, Screen) for node in nodes)
    if not any(issubclass(node, App) for node in nodes) and screens != 1:
        return False  # of two screens one is shown, of two widgets one has the focus
    # A widget and a screen that it is not on have the same arrows; those never meet.
    first, second = (_own_keys(node, known) for node in nodes)
    return not first & second


def _own_keys(node: type[DOMNode], known: Mapping[str, Command]) -> set[str]:
    """The keys of a class as it comes."""
    return {
        key for one in known.values() if one.node is node for key in split_keys(one.binding.key)
    }


def _is_key(name: str) -> bool:
    """Whether a terminal can send a key of this name."""
    *modifiers, key = name.split("+")
    if not key or not MODIFIERS.issuperset(modifiers):
        return False
    # What is shown of a key that is a character is the character.
    return key in _NAMED_KEYS or len(format_key(key)) == 1
