"""What every text passes on its way to a terminal, when who prints it has taken no care."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from textual.color import Color

import aprtui
from aprcore.ground.visible import visible, visible_lines
from aprtui.drawing import VisibleConsole
from aprtui.outgoing import Gate, gated, is_terminal, overwrite
from aprtui.screen_gate import ScreenGate
from hostile import HOSTILE, assert_harmless


def test_text_is_spelled_out_and_read_as_before() -> None:
    assert visible("a\x1b[2J\n\u202e\udcff") == r"a\x1b[2J\n\u202e\udcff"
    assert visible_lines("a\t日本\n\x1b[2J\r\nb\x9b") == "a\t日本\n\\x1b[2J\\r\nb\\x9b"
    assert visible_lines("\n\n") == "\n\n" and visible_lines("") == ""
    assert_harmless(visible_lines(HOSTILE))


def test_nothing_but_text_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with gated():
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
    for printed in capsys.readouterr():
        assert_harmless(printed)
        assert r"\x1b]52;c;UFdO\x07" in printed


def test_a_gate_within_a_gate_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with gated(), gated():
        print("\\ \x1b")
    assert capsys.readouterr().out == "\\ \\x1b\n"


def test_the_streams_are_put_back() -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), gated():
        assert isinstance(sys.stdout, Gate)
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no pseudo-terminals")
def test_what_draws_is_told_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with gated():
            assert not sys.stderr.isatty() and is_terminal(sys.stderr)
            overwrite(f"loading {HOSTILE}")
            console = VisibleConsole(stderr=True, width=400, color_system="truecolor")
            console.print(Text(f"{HOSTILE}x", "bold red"), HOSTILE)
    shown = os.read(reader, 65536).decode()
    os.close(reader)
    assert shown.startswith("\r\x1b[Kloading \\x1b]52")
    assert "\x1b[1;31m" in shown
    assert_harmless(shown.replace("\r", "").replace("\x1b[", ""))


def test_a_table_shows_what_is_in_a_cell() -> None:
    console = VisibleConsole(width=500)
    table = Table("name")
    table.add_row(Text(HOSTILE))
    table.add_row(HOSTILE)
    with console.capture() as captured:
        console.print(table)
    assert_harmless(captured.get())
    assert captured.get().count("[bold]m[/bold]") == 2


def test_a_screen_drops_what_takes_no_cell() -> None:
    background = Color(0, 0, 0)
    plain = [Segment("日本 a\u00a0b")]
    assert ScreenGate().apply(plain, background) is plain
    (drawn,) = ScreenGate().apply([Segment("a\x1b]52;c;x\x07\u202e\n\x9b\u00a0b")], background)
    assert drawn.text == "a]52;c;x\u00a0b"
    assert drawn.cell_length == Segment("a\x1b]52;c;x\x07\u202e\n\x9b\u00a0b").cell_length


def test_a_stream_that_cannot_say_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    below = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(below, "ascii"))
    with gated():
        print("✓", flush=True)
    assert below.getvalue() == b"\\u2713\n"


def test_only_the_gates_speak_to_a_terminal() -> None:
    """Who writes a control code or asks for a terminal elsewhere has gone around them."""
    root = Path(aprtui.__file__).parent
    sources = {path.name: path.read_text("utf-8") for path in root.rglob("*.py")}
    for words in (
        r"\x1b",
        ".beneath",
        "stdout.isatty",
        "stderr.isatty",
        "__stdout__",
        "__stderr__",
    ):
        assert {name for name, text in sources.items() if words in text} <= {"outgoing.py"}, words
    assert {n for n, t in sources.items() if " Console(" in t or "import Console" in t} <= {
        "drawing.py", "stage_table.py",
    }  # fmt: skip
