"""Serves the explorer to a browser: one page, one process of the explorer per opened tab.

textual-serve runs the processes and pipes their screens through a web socket. This module is what
lies around it: the page, which loads nothing from the net; and who may open it. Who does can read
what the explorer can, so a page of another site must not, be it in the same browser.
"""

from __future__ import annotations

import asyncio
import html
import ipaddress
import secrets
import shlex
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from string import Template
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from textual_serve.app_service import AppService
from textual_serve.server import Server

from aprcore.ground.errors import PlanError

LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
FONT_SIZES_PX = range(6, 49)
DEFAULT_FONT_PX = 16
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


class ExplorerServer(Server):
    """Serves explorers on a socket.

    Args:
        arguments: Of `aprtui`, for each explorer.
        listener: Where to listen.
        title: What the page is called.
        loopback_only: Whether only the names of this machine are answered to.
    """

    def __init__(
        self, arguments: Sequence[str], listener: socket.socket, title: str, *, loopback_only: bool
    ) -> None:
        # A shell runs it: every argument is quoted, and `exec` leaves no shell behind to be killed
        # in the explorer's place.
        command = f"exec {shlex.join([sys.executable, '-m', 'aprtui', *arguments])}"
        host, port = listener.getsockname()[:2]
        super().__init__(command, host=host, port=port, title=title)
        self._listener = listener
        self._loopback_only = loopback_only
        self._open: set[asyncio.Task[Any]] = set()
        self._explorers: list[Process] = []
        self._page = Template(files("aprtui").joinpath("browser.html").read_text("utf-8"))

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/"

    def serve(self, debug: bool = False) -> None:
        """Serve until SIGINT, SIGTERM or SIGHUP."""
        web.run_app(
            self._make_app(),
            sock=self._listener,
            shutdown_timeout=WAIT_FOR_TABS_S,
            print=lambda *_: None,
        )

    async def _make_app(self) -> web.Application:
        app = await super()._make_app()
        app.middlewares.append(self._guard)
        return app

    async def on_startup(self, app: web.Application) -> None:
        """End in order, too, when the terminal goes away; but not under nohup.

        The command says the address, so this does not.
        """
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.request_exit)

    async def on_shutdown(self, app: web.Application) -> None:
        """End every explorer before the server; a signal reaches the server alone."""
        for task in self._open:
            task.cancel()
        if self._open:
            await asyncio.wait(self._open, timeout=WAIT_FOR_EXPLORERS_S)
        # The end of a connection is not yet that of its process, and one may hang.
        for explorer in self._explorers:
            if explorer.returncode is None:
                explorer.kill()
            await explorer.wait()

    async def _process_messages(
        self, websocket: web.WebSocketResponse, app_service: AppService
    ) -> None:
        """Pass on what a tab sends; its explorer has just been started."""
        self._explorers = [one for one in self._explorers if one.returncode is None]
        if app_service._process is not None:
            self._explorers.append(app_service._process)
        await super()._process_messages(websocket, app_service)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer only to the page's own requests.

        A site that the user visits may open web sockets to this machine, with its own origin, or
        let its own name resolve to it.
        """
        host = urlsplit(f"//{request.host}").hostname
        if self._loopback_only and host not in LOOPBACK_NAMES:
            raise web.HTTPForbidden(text="aprtui serve answers to localhost and 127.0.0.1 only")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise web.HTTPForbidden(text="aprtui serve answers to its own page only")
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            return await handler(request)
        finally:
            self._open.discard(task)

    async def handle_index(self, request: web.Request) -> web.Response:
        """The page."""
        nonce = secrets.token_urlsafe(16)
        asked = request.query.get("fontsize", "")
        size = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 3 else 0
        page = self._page.substitute(
            title=html.escape(self.title),
            font_size=size if size in FONT_SIZES_PX else DEFAULT_FONT_PX,
            nonce=nonce,
        )
        headers = {
            "Content-Security-Policy": (
                f"default-src 'self'; script-src 'self' 'nonce-{nonce}'; img-src 'self' data:;"
                " style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
            ),
            "Cache-Control": "no-store",
        }
        return web.Response(text=page, content_type="text/html", headers=headers)
