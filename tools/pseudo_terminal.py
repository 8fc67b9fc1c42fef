"""The installed `aprtui` in a pseudo-terminal: what a person types, and what a person sees."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pexpect
import pyte
from pyte.screens import Char

COMMAND = Path(sys.executable).with_name("aprtui")
# Generous: a busy machine may take seconds to start an interpreter.
PATIENCE_S = 60
# A program that has drawn nothing for so long, and shows what it must, has come to rest.
QUIET_S = 0.6
# One that does not show what it must may only be slow: another program has the processor.
LONG_QUIET_S = 3.0
# So long is waited for output; a tenth of what a person notices would only burn time.
POLL_S = 0.2
# A screen comes in pieces, this far apart.
PIECES_S = 0.02


class Terminal:
    """`aprtui` on a screen that is kept in memory.

    Args:
        arguments: Of its command line.
        columns: Width of the screen, in cells.
        rows: Height of the screen.
        directory: Where it runs; default: here.
        variables: More environment variables, or others.

    Attributes:
        output: Every byte that it has written.
        process: The running program.
    """

    def __init__(
        self,
        *arguments: str,
        columns: int = 120,
        rows: int = 40,
        directory: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.output = b""
        # The size is that of the screen, whatever the tests' own terminal says of its.
        taken = ("NO_COLOR", "COLORTERM", "COLUMNS", "LINES")
        environment = {k: v for k, v in os.environ.items() if k not in taken}
        self.process = pexpect.spawn(
            str(COMMAND), list(arguments), dimensions=(rows, columns), timeout=PATIENCE_S,
            cwd=directory, env={**environment, "TERM": "xterm-256color", **(variables or {})},
        )  # fmt: skip

    def read(self) -> str:
        """What is on the screen now, or as soon as something is drawn."""
        timeout_s = POLL_S
        try:
            while True:
                data = self.process.read_nonblocking(65536, timeout=timeout_s)
                self.output += data
                self._stream.feed(data)
                timeout_s = PIECES_S
        except (pexpect.TIMEOUT, pexpect.EOF):
            return "\n".join(self._screen.display)

    def wait_for(self, *wanted: str | Callable[[str], bool]) -> str:
        """Wait until texts are on the screen, or conditions on it hold, all at one time.

        Raises:
            AssertionError: They did not come.
        """
        end = time.monotonic() + PATIENCE_S
        while True:
            screen = self.read()
            missing = [
                one
                for one in wanted
                if not (one in screen if isinstance(one, str) else one(screen))
            ]
            if not missing:
                return screen
            if time.monotonic() > end:
                raise AssertionError(f"{missing} is not on the screen:\n{screen}")

    def wait_until_still(self, is_known: Callable[[list[list[Char]]], bool] | None = None) -> None:
        """Wait until the screen stays as it is.

        Args:
            is_known: Whether a screen is as it must be, and need not be watched for long.

        Raises:
            AssertionError: It never does.
        """
        quiet_s = QUIET_S if is_known is None else LONG_QUIET_S
        end = time.monotonic() + PATIENCE_S
        before, since = self.cells(), time.monotonic()
        while time.monotonic() - since < quiet_s:
            if time.monotonic() > end:
                raise AssertionError(f"the screen never comes to rest:\n{self.read()}")
            self.read()
            if (now := self.cells()) != before:
                before, since = now, time.monotonic()
            elif is_known is not None and is_known(now):
                return

    def press(self, keys: str) -> None:
        """Type, in the terminal's own codes."""
        self.process.send(keys)

    def end(self) -> int:
        """Wait for the program to end; return its exit code."""
        self.process.expect(pexpect.EOF)
        self.output += self.process.before or b""
        self.process.close()
        assert self.process.exitstatus is not None, f"killed by {self.process.signalstatus}"
        return int(self.process.exitstatus)

    def kill(self) -> None:
        """End the program, whatever it does."""
        if self.process.isalive():
            self.process.close(force=True)

    def cells(self) -> list[list[Char]]:
        """The screen, row by row."""
        columns = range(self._screen.columns)
        return [
            [self._screen.buffer[row][column] for column in columns]
            for row in range(self._screen.lines)
        ]
