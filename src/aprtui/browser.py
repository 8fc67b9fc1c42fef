"""Serves the explorer to a browser: one page, one process of the explorer per opened tab.

The page loads nothing from the net: its script and its fonts are those of textual-serve.
"""

from __future__ import annotations

import asyncio
import html
import ipaddress
import logging
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from string import Template
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_runner import GracefulExit

from aprcore.ground.errors import PlanError
from aprtui.page_guard import PARAMETER, PageGuard
from aprtui.page_tab import HEARTBEAT_S, MOST_MESSAGE_BYTES, PageTab

FONT_SIZES_PX = range(6, 49)
DEFAULT_FONT_PX = 16
# Each is a process that holds its run.
MOST_TABS = 32
# A tab's connection never ends by itself: nothing is gained by waiting for it. What is gained is
# time for its explorer to stop its run and leave.
WAIT_FOR_TABS_S, WAIT_FOR_EXPLORERS_S = 0.1, 10

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens, so that an address in use is known before anything is said.

    Raises:
        PlanError: There is no such address here, or it is in use.
    """
    address = f"{host}:{port}"
    try:
        family, _, _, _, where = _resolve(host, port)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise PlanError(f"cannot serve on {address}: {error.strerror}") from error
    try:
        # A port that was left a moment ago is free; one that is listened to is not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen()
    except OSError as error:
        listener.close()
        hint = "choose another with --port, or 0 for any that is free"
        raise PlanError(f"cannot serve on {address}: {error.strerror}", hint=hint) from error
    return listener


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only.

    Raises:
        PlanError: There is no such address.
    """
    try:
        found = _resolve(host, 0)
    except OSError as error:
        raise PlanError(f"cannot serve on {host}: {error.strerror}") from error
    return all(ipaddress.ip_address(where[0]).is_loopback for *_, where in found)


def _resolve(host: str, port: int) -> list[tuple[Any, Any, Any, Any, Any]]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class ExplorerServer:
    """Serves explorers on a socket.

    Args:
        arguments: Of `aprtui`, for each explorer.
        listener: Where to listen.
        title: What the page is called.
        loopback_only: Whether only the names of this machine are answered to.
        token: What the page's address needs; None: nothing.
        folder: Below which explorers may write; None: they may not write.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        listener: socket.socket,
        title: str,
        *,
        loopback_only: bool,
        token: str | None,
        folder: Path | None = None,
    ) -> None:
        self._arguments = arguments
        self._listener = listener
        self._title = title
        self._token = token
        self._folder = folder
        self._guard = PageGuard(token, loopback_only=loopback_only)
        self._open: set[asyncio.Task[Any]] = set()
        self._tabs: set[PageTab] = set()
        self._reserved = 0
        self._page = Template(files("aprtui").joinpath("browser.html").read_text("utf-8"))

    @property
    def address(self) -> str:
        """Where a browser finds it; who has it may open it."""
        host, port = self._listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        query = "" if self._token is None else f"?{PARAMETER}={self._token}"
        return f"http://{host}:{port}/{query}"

    def serve(self) -> None:
        """Serve until SIGINT, SIGTERM or SIGHUP."""
        logging.getLogger("aiohttp.server").addFilter(_is_ours)
        with as_file(files("textual_serve").joinpath("static")) as static:
            web.run_app(
                self._make_app(static),
                sock=self._listener,
                shutdown_timeout=WAIT_FOR_TABS_S,
                access_log=None,
                print=None,
            )

    def _make_app(self, static: Path) -> web.Application:
        app = web.Application(middlewares=[self._let_in])
        app.add_routes([
            web.get("/", self._send_page),
            web.get("/ws", self._open_tab),
            web.static("/static", static),
        ])  # fmt: skip
        app.on_startup.append(self._listen_to_hang_ups)
        app.on_shutdown.append(self._end_tabs)
        return app

    async def _listen_to_hang_ups(self, app: web.Application) -> None:
        """End in order, too, when the terminal goes away; but not under nohup."""
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _exit_gracefully)

    async def _end_tabs(self, app: web.Application) -> None:
        """End every explorer before the server; a signal reaches the server alone."""
        for task in self._open:
            task.cancel()
        if self._open:
            await asyncio.wait(self._open, timeout=2 * WAIT_FOR_EXPLORERS_S)
        for tab in self._tabs:
            tab.kill()

    @web.middleware
    async def _let_in(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._guard.check(request)
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            return await handler(request)
        finally:
            self._open.discard(task)

    async def _open_tab(self, request: web.Request) -> web.WebSocketResponse:
        """An explorer, for as long as the page is open."""
        # Counted until its process has ended, which may be some time after its page.
        if self._reserved >= MOST_TABS:
            raise web.HTTPServiceUnavailable(text=f"aprtui serve: {MOST_TABS} tabs are open")
        self._reserved += 1
        websocket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=MOST_MESSAGE_BYTES)
        try:
            await websocket.prepare(request)
            tab = PageTab(self._arguments, websocket, self._folder)
            self._tabs.add(tab)
            try:
                size = request.query.get("width"), request.query.get("height")
                await tab.run_to_end(*size, WAIT_FOR_EXPLORERS_S)
            finally:
                self._tabs.discard(tab)
            await websocket.close()
        finally:
            self._reserved -= 1
        return websocket

    async def _send_page(self, request: web.Request) -> web.Response:
        nonce = secrets.token_urlsafe(16)
        asked = request.query.get("fontsize", "")
        size = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 3 else 0
        page = self._page.substitute(
            title=html.escape(self._title),
            font_size=size if size in FONT_SIZES_PX else DEFAULT_FONT_PX,
            nonce=nonce,
        )
        headers = {
            "Content-Security-Policy": (
                f"default-src 'self'; script-src 'self' 'nonce-{nonce}'; img-src 'self' data:;"
                " style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
            ),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        response = web.Response(text=page, content_type="text/html", headers=headers)
        self._guard.remember(response)
        return response


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether what is logged is a fault of this program, and not of a malformed request."""
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


def _exit_gracefully() -> None:
    raise GracefulExit
