"""The installed command in a pseudo-terminal, as a person sees it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pseudo_terminal import PATIENCE_S, Terminal

LEAVE_ALTERNATE_SCREEN = b"\x1b[?1049l"
SHOW_CURSOR = b"\x1b[?25h"


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str, **size: int) -> Terminal:
        opened.append(Terminal(*arguments, **size))
        return opened[-1]

    yield start
    for one in opened:
        one.kill()


def assert_restored(one: Terminal) -> None:
    assert one.output.rstrip().endswith((LEAVE_ALTERNATE_SCREEN, SHOW_CURSOR)) or (
        one.output.rfind(LEAVE_ALTERNATE_SCREEN) > one.output.rfind(b"\x1b[?1049h")
    )
    assert one.output.rfind(SHOW_CURSOR) > one.output.rfind(b"\x1b[?25l")
    assert b"Traceback" not in one.output


def test_a_tour_of_the_demo(terminal) -> None:
    one = terminal("demo")
    screen = one.wait_for("next token")
    assert "layer 2 · qkv_matmul" in screen
    assert "rows permuted from pairs to halves" in screen
    one.press("?")
    one.wait_for("─ Help ─", "Go to the next divergence")
    one.press("\x1b")
    one.wait_for(lambda text: "─ Help ─" not in text)
    one.press("/")
    one.press("lm_head\r")
    filtered = one.wait_for(lambda text: "lm_head" in text and "attn_norm" not in text)
    assert "qkv_bias" not in filtered
    one.press("\x1b")
    one.wait_for("attn_norm")
    one.press("n")
    one.wait_for("FAIL")
    one.press("q")
    assert one.end() == 1
    assert_restored(one)


def test_nothing_wrong_ends_with_0(terminal) -> None:
    one = terminal("demo", "--fault", "none")
    one.wait_for("no divergence")
    one.press("q")
    assert one.end() == 0
    assert_restored(one)


def test_what_cannot_be_opened_is_said_on_the_screen(terminal, tmp_path: Path) -> None:
    missing = tmp_path / "missing.apr"
    one = terminal(str(missing))
    assert "missing.apr" in one.wait_for("no such file")
    one.press("q")
    assert one.end() == 2
    assert_restored(one)


@pytest.mark.parametrize("how", ["key", "signal"])
def test_ctrl_c_restores_the_terminal(terminal, how: str) -> None:
    one = terminal("demo")
    one.wait_for("Stages")
    if how == "key":
        one.press("\x03")
    else:
        one.process.kill(signal.SIGINT)
    # Leaving before or after the run has ended: either way nothing is left behind.
    assert one.end() in (0, 1, 130)
    assert_restored(one)


def test_a_terminal_that_goes_away_ends_it(terminal) -> None:
    """A closed window or a lost connection must not leave a process that spins."""
    one = terminal("demo")
    one.wait_for("next token")
    one.process.ptyproc.fileobj.close()
    end = time.monotonic() + PATIENCE_S
    while one.process.ptyproc.isalive():
        assert time.monotonic() < end, "still running without a terminal"
        time.sleep(0.1)
    # By the signal itself: leaving in order would write to what is gone, which may block for ever.
    assert one.process.ptyproc.signalstatus == signal.SIGHUP


def test_a_tiny_terminal(terminal) -> None:
    one = terminal("demo", columns=40, rows=10)
    one.wait_for("FAIL")
    one.press("q")
    assert one.end() == 1
    assert_restored(one)
