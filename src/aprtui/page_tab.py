"""One tab of the page of `aprtui serve`: its explorer, a process, and what may pass between both.

textual-serve has the packets in which they talk.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web
from textual_serve.app_service import AppService
from textual_serve.download_manager import DownloadManager

from aprtui.screen_options import ALLOW_WRITE_VARIABLE

# Of a terminal, in cells: a large screen in a small font. What is larger is drawn in part of it.
MOST_COLUMNS, MOST_ROWS = 500, 200
DEFAULT_SIZE = 80, 24
# A connection that sends more at once is closed; of keys, which a paste is too, so many are taken.
MOST_MESSAGE_BYTES = 1 << 20
MOST_KEYS = 8192
# Characters of messages that a tab may send in a second, for long and at once. A mouse that moves
# sends 4,000; an explorer takes 14,000 keys, and what it has not taken yet would outlive its tab.
RATE, BURST = 16_384, 32_768
# The browser has to answer so often.
HEARTBEAT_S = 15


class PageTab(AppService):
    """An explorer and the web socket that drives it.

    Args:
        arguments: Of `aprtui`.
        websocket: To the page.
        folder: Below which it may write; None: it may not write.
    """

    def __init__(
        self, arguments: Sequence[str], websocket: web.WebSocketResponse, folder: Path | None
    ) -> None:
        super().__init__(
            "",
            write_bytes=websocket.send_bytes,
            write_str=websocket.send_str,
            close=self._close_page,
            download_manager=DownloadManager(),
        )
        self._arguments = arguments
        self._websocket = websocket
        self._folder = folder
        self._closing: asyncio.Task[None] | None = None
        self._credit, self._counted_at = float(BURST), time.monotonic()

    async def run_to_end(self, width: str | None, height: str | None, patience_s: float) -> None:
        """Run the explorer as long as the page is open.

        Args:
            width: Of the terminal, as the page says it.
            height: So too.
            patience_s: Seconds that the explorer has to leave when the page has gone.
        """
        try:
            await self.start(*(terminal_size(width, height) or DEFAULT_SIZE))
            assert self._task is not None
            self._task.add_done_callback(self._close_soon)  # also when it ends without a word
            async for message in self._websocket:
                if message.type is WSMsgType.TEXT and self._has_credit(len(message.data)):
                    await self._take(message.json())
        except (JSONDecodeError, RecursionError, _NotUnderstoodError):
            pass  # it is no page of ours
        except ConnectionError:
            pass  # the page has gone
        finally:
            await self._end(patience_s)

    def kill(self) -> None:
        """End the explorer at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _build_environment(self, width: int = 80, height: int = 24) -> dict[str, str]:
        folder = "" if self._folder is None else str(self._folder)
        return {**super()._build_environment(width, height), ALLOW_WRITE_VARIABLE: folder}

    async def _open_app_process(self, width: int = 80, height: int = 24) -> Process:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "aprtui", *self._arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE,
            env=self._build_environment(width, height),
        )  # fmt: skip
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        return self._process

    async def _close_page(self) -> None:
        await self._websocket.close()

    def _close_soon(self, _: object) -> None:
        self._closing = asyncio.create_task(self._close_page())

    def _has_credit(self, cost: int) -> bool:
        now = time.monotonic()
        self._credit = min(BURST, self._credit + RATE * (now - self._counted_at))
        self._counted_at = now
        if cost > self._credit:
            return False
        self._credit -= cost
        return True

    async def _take(self, message: Any) -> None:
        """Pass on what the page says.

        Raises:
            _NotUnderstoodError: It is not what a page says.
        """
        match message:
            case ["stdin", str(keys)]:
                if len(keys) <= MOST_KEYS:
                    await self.send_bytes(keys.encode("utf-8", "replace"))
            case ["resize", {"width": int(width), "height": int(height)}]:
                await self.set_terminal_size(*_within(width, height))
            case ["ping", str() | int() | float() | None as data]:
                await self._websocket.send_json(["pong", data])
            case ["blur", *_]:
                await self.blur()
            case ["focus", *_]:
                await self.focus()
            case _:
                raise _NotUnderstoodError

    async def _end(self, patience_s: float) -> None:
        """End the explorer: in order if it can, and else by force."""
        process, reading = self._process, self._task
        if process is None or reading is None:
            return
        reading.cancel()
        try:
            async with asyncio.timeout(patience_s):
                await asyncio.gather(reading, return_exceptions=True)
                await self.send_meta({"type": "quit"})
                assert process.stdout is not None
                while await process.stdout.read(65536):
                    pass  # what it still draws, which would hold it up
                await process.wait()
        except TimeoutError:
            pass
        finally:
            self.kill()
            await process.wait()


def terminal_size(width: str | None, height: str | None) -> tuple[int, int] | None:
    """A terminal's size from two texts, within limits; None if they are no numbers."""
    if not all(re.fullmatch("[0-9]{1,9}", side or "") for side in (width, height)):
        return None
    return _within(int(width or 0), int(height or 0))


def _within(columns: int, rows: int) -> tuple[int, int]:
    return max(1, min(columns, MOST_COLUMNS)), max(1, min(rows, MOST_ROWS))


class _NotUnderstoodError(Exception):
    pass
