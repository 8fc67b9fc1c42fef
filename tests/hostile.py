"""Text that is out to drive a terminal, a page or a reader, and runs that are made of it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

from aprcore.judging.layouts import Layout
from aprcore.network.stages import StageKey

# Writes the clipboard, clears the screen, changes colours by the one-byte introducer and the title,
# turns a line around, breaks it, and is markup of Rich, HTML and Markdown.
HOSTILE = (
    "\x1b]52;c;UFdO\x07\x1b[2J\x9b31m\x1b]0;PWN\x1b\\\u202eevil\u2066\u2028\r\nbad\x08\x7f"
    "[bold]m[/bold][@click=app.quit]q[/]</td><script>pwn()</script>`'\"| ![x](http://pwn.example/)"
)
# As a file may be called: no slash; the last byte is no UTF-8.
HOSTILE_NAME = HOSTILE.replace("/", "\\")[:180] + "\udcff"
# What must not come out as it is, even where colours and a cursor do.
CONTROLS = ("\x1b]52", "\x1b]0", "\x1b[2J\x9b", "\x9b", "\u202e", "\u2066", "\u2028", "\x08")


def assert_harmless(text: str) -> None:
    """Only what prints, and lines."""
    bad = {c for c in text if not c.isprintable() and c not in "\n\t"}
    assert not bad, (bad, text[:2000])


def poisoned(value: Any) -> Any:
    """A record of a run with every text of it followed by `HOSTILE`; keys stay what they are."""
    match value:
        case str() if not isinstance(value, Enum):
            return f"{value}{HOSTILE}"
        case StageKey() | Layout():
            return value
        case tuple():
            parts = map(poisoned, value)
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        case dict():
            return {key: poisoned(one) for key, one in value.items()}
        case _ if is_dataclass(value) and not isinstance(value, type):
            parts = {f.name: poisoned(getattr(value, f.name)) for f in fields(value) if f.init}
            return replace(value, **parts)
    return value
