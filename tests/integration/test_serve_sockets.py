"""`aprtui serve` and who means it harm: real sockets, nothing that a browser would hold back."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pyte
import pytest

from aprtui.demo import demo_path, load_faults
from aprtui.page_tab import MOST_COLUMNS, MOST_KEYS, MOST_MESSAGE_BYTES, MOST_ROWS, terminal_size

PATIENCE_S = 60
FAULT = load_faults()["rope-pairs"]
OVER = "next token"  # what the screen says when its run is over


class Server:
    """A server in a process of its own.

    Attributes:
        url: What it printed.
        process: It.
    """

    def __init__(self, *words: str | Path, code: str = "") -> None:
        command = ["-m", "aprtui"] if not code else ["-c", code]
        self.process = subprocess.Popen(
            [sys.executable, *command, "serve", FAULT.model, "--oracle", demo_path() / "oracle",
             "--port", "0", *words],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        found = re.search(r"http://\S+", self.process.stdout.readline())
        assert found is not None, self.process.communicate()[1]
        self.url = found[0]

    def at(self, path: str, query: str = "") -> str:
        base, _, token = self.url.partition("?")
        return f"{base}{path}?{token}&{query}"

    def explorers(self) -> list[int]:
        """Process ids of what it runs."""
        found, pending = [], [self.process.pid]
        while pending:
            path = Path(f"/proc/{(parent := pending.pop())}/task/{parent}/children")
            children = list(map(int, path.read_text().split())) if path.exists() else []
            found += children
            pending += children
        return found

    def end(self) -> tuple[str, str]:
        """End it; what it printed."""
        self.process.terminate()
        return self.process.communicate(timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    out, err = started.end()
    assert "Traceback" not in out + err


class Tab:
    """The page's side of a connection."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, columns: int, rows: int) -> None:
        self.socket = socket
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def shown(self) -> str:
        return "\n".join(self._screen.display)

    async def wait_for(self, wanted: str) -> None:
        await self._until(lambda shown: wanted in shown, wanted)

    async def wait_for_no(self, unwanted: str) -> None:
        await self._until(lambda shown: unwanted not in shown, f"no {unwanted}")

    async def _until(self, holds: Callable[[str], bool], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not holds(self.shown):
                    await self._read()
        except TimeoutError:
            raise AssertionError(f"{what}: not on the screen:\n{self.shown}") from None

    async def wait_for_bytes(self, wanted: bytes) -> None:
        """Wait for what is drawn on a screen of another size than ours."""
        seen = b""
        async with asyncio.timeout(PATIENCE_S):
            while wanted not in seen:
                seen += await self._read()

    async def _read(self) -> bytes:
        message = await self.socket.receive()
        assert message.type is aiohttp.WSMsgType.BINARY, (message, self.shown)
        self._stream.feed(message.data)
        return bytes(message.data)

    async def send(self, *envelope: Any) -> None:
        await self.socket.send_str(json.dumps(envelope))

    async def press(self, keys: str) -> None:
        await self.send("stdin", keys)

    async def closed(self) -> None:
        """Wait until the server has closed the connection."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.socket.closed:
                await self.socket.receive()


@asynccontextmanager
async def opened(server: Server, columns: int = 120, rows: int = 30) -> AsyncIterator[Tab]:
    async with aiohttp.ClientSession() as session:
        url = server.at("ws", f"width={columns}&height={rows}")
        async with session.ws_connect(url, max_msg_size=0) as websocket:
            tab = Tab(websocket, columns, rows)
            # As the page does when there is a picture: the explorer shows its keys only then.
            await tab.wait_for("aprtui")
            await tab.send("focus")
            yield tab


def in_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run what speaks web socket; another module may have a loop running in this thread."""
    with ThreadPoolExecutor(1) as other:
        other.submit(asyncio.run, work()).result()


def answer_to(server: Server, request: bytes) -> bytes:
    """What is said to a request that no client would send."""
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=PATIENCE_S) as one:
        one.sendall(request)
        return one.recv(65536)


def memory_mb(process_id: int, kind: str = "VmHWM") -> float:
    """The most memory that a process has had."""
    status = Path(f"/proc/{process_id}/status").read_text()
    found = re.search(rf"^{kind}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.parametrize(
    "host",
    ["[", "]", "[::1", "::1]", "[::1]x", "a]b", "[[", "localhost:x", "localhost:99999999999",
     "\x00", "\xff", " ", "@", "localhost@", "a@localhost", "%", "localhost/../x", "[v1.x]"],
)  # fmt: skip
def test_a_malformed_host_is_refused_in_a_line(server: Server, host: str) -> None:
    target = "/?" + server.url.partition("?")[2]
    for header in (f"Host: {host}", f"Host: localhost\r\nOrigin: http://{host}"):
        request = f"GET {target} HTTP/1.1\r\n{header}\r\nConnection: close\r\n\r\n"
        status = int(answer_to(server, request.encode("latin-1")).split()[1])
        assert status in (400, 403) or host in (
            "localhost:x",
            "localhost:99999999999",
            "localhost@",
            "a@localhost",
            "localhost/../x",
        )


@pytest.mark.parametrize(
    "request_line",
    ["GET", "GET /", "GET / HTTP/9.9", "\x16\x03\x01\x02", "GET http://[/ HTTP/1.1",
     "GET //[ HTTP/1.1", "GET /?%zz=%\x80 HTTP/1.1", "POST / HTTP/1.1", "CONNECT [:1 HTTP/1.1",
     "GET /" + "a" * 100_000 + " HTTP/1.1", "GET /ws?width=%00&height=\xff HTTP/1.1"],
    ids=lambda line: line[:40],
)  # fmt: skip
def test_a_malformed_request_gets_nothing(server: Server, request_line: str) -> None:
    answer = answer_to(server, f"{request_line}\r\nHost: localhost\r\n\r\n".encode("latin-1"))
    assert not answer or 400 <= int(answer.split()[1]) < 500
    assert b"Traceback" not in answer


def test_whoever_has_no_token_starts_nothing(server: Server) -> None:
    async def ask() -> None:
        async with aiohttp.ClientSession() as session:
            for query in ("", "?token=", "?token=x&width=80&height=24"):
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await session.ws_connect(server.url.split("?")[0] + "ws" + query)
                assert refused.value.status == 403

    in_loop(ask)
    assert not server.explorers()


def test_a_cookie_is_as_good_as_the_address(server: Server) -> None:
    async def ask() -> None:
        jar = aiohttp.CookieJar(unsafe=True)  # which takes cookies of addresses without a name
        async with aiohttp.ClientSession(cookie_jar=jar) as session:
            async with session.get(server.url) as page:
                assert page.status == 200
            async with session.ws_connect(server.url.split("?")[0] + "ws") as websocket:
                await Tab(websocket, 80, 24).wait_for("FAIL")

    in_loop(ask)


def test_without_a_token_where_that_is_asked_for() -> None:
    server = Server("--no-token")
    assert "?" not in server.url
    assert b" 200 " in answer_to(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")[:20]
    server.end()


def test_a_terminal_has_a_size() -> None:
    assert terminal_size("120", "40") == (120, 40)
    assert terminal_size("999999999", "1000000") == (MOST_COLUMNS, MOST_ROWS)
    assert terminal_size("0", "0") == (1, 1)
    for wrong in ("1000000000000", "-1", "x", "", "1e3", "\u0661", None):
        assert terminal_size(wrong, "24") is None and terminal_size("80", wrong) is None


class TestLimits:
    def test_of_a_terminal(self, server: Server) -> None:
        async def resize() -> None:
            async with opened(server) as tab:
                await tab.wait_for("FAIL")
                explorer = max(server.explorers())
                await tab.send("resize", {"width": 10**9, "height": 10**9})
                await tab.press("?")
                await tab.wait_for_bytes(b"Go to the next divergence")
                assert memory_mb(explorer) < 300

        in_loop(resize)

    @pytest.mark.parametrize("columns", ["1000000000", "x" * 1000])
    def test_of_a_new_terminal(self, server: Server, columns: str) -> None:
        async def ask() -> None:
            async with aiohttp.ClientSession() as session:
                url = server.at("ws", f"width={columns}&height={columns}")
                async with session.ws_connect(url, max_msg_size=0) as websocket:
                    await Tab(websocket, 80, 24).wait_for_bytes(b"FAIL")
                    assert memory_mb(max(server.explorers())) < 300

        in_loop(ask)

    @pytest.mark.slow
    def test_of_a_paste_and_of_what_outlives_a_tab(self, server: Server) -> None:
        async def paste() -> None:
            async with opened(server) as tab:
                await tab.wait_for("FAIL")
                explorer = max(server.explorers())
                for _ in range(20):
                    await tab.press(MOST_KEYS // 2 * "n")
                await tab.press("\x1b[200~" + "x" * 900_000 + "\x1b[201~")
                await asyncio.sleep(1)
                assert memory_mb(explorer) < 300

        in_loop(paste)
        left_at = time.monotonic()
        while server.explorers():
            assert time.monotonic() - left_at < 15
            time.sleep(0.05)

    def test_of_a_message(self, server: Server) -> None:
        async def send() -> None:
            async with opened(server) as tab:
                await tab.wait_for("FAIL")
                await tab.socket.send_str(json.dumps(["stdin", "x" * MOST_MESSAGE_BYTES]))
                await tab.closed()
                assert tab.socket.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG

        in_loop(send)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "message",
        ["{", '["stdin", 1]', '["x"]', '["resize", {"width": NaN, "height": 1e999}]', "[" * 20_000],
        ids=lambda message: message[:40],
    )  # fmt: skip
    def test_of_what_a_page_says(self, server: Server, message: str) -> None:
        async def send() -> None:
            async with opened(server) as tab:
                await tab.socket.send_str(message)
                await tab.closed()

        in_loop(send)

    @pytest.mark.slow
    def test_of_tabs(self) -> None:
        code = "import sys; from aprtui import browser; from aprtui.cli import main;"\
            " browser.MOST_TABS = 2; sys.exit(main(sys.argv[1:]))"  # fmt: skip
        server = Server(code=code)

        async def open_three() -> None:
            async with opened(server) as one, opened(server) as two:
                await one.wait_for("FAIL")
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    async with opened(server):
                        pass
                assert refused.value.status == 503
                await two.press("q")
                await two.closed()
                async with asyncio.timeout(PATIENCE_S):
                    while len(server.explorers()) > 1:
                        await asyncio.sleep(0.05)
                async with opened(server) as three:
                    await three.wait_for("FAIL")

        in_loop(open_three)
        server.end()


class TestWriting:
    """What the box that asks for a file's name may do."""

    def test_not_at_all(self, server: Server) -> None:
        async def ask() -> None:
            async with opened(server) as tab:
                await tab.wait_for(OVER)
                await tab.press("e")
                await tab.wait_for("may not write")
                assert "Export" not in tab.shown

        in_loop(ask)

    def test_below_a_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "in"
        (folder / "sub").mkdir(parents=True)
        (folder / "out").symlink_to(tmp_path)
        (tmp_path / "other.md").write_text("x")
        (folder / "link.md").symlink_to(tmp_path / "other.md")
        server = Server("--allow-write", str(folder))
        within = ("a.md", "sub/b.json", str(folder / "c.md"))
        outside = (str(tmp_path / "x.md"), "../x.md", "sub/../../x.md", "out/x.md", "link.md",
                   "~/x.md")  # fmt: skip

        async def ask() -> None:
            async with opened(server) as tab:
                await tab.wait_for(OVER)
                for name in (*outside, *within):
                    await tab.press("e")
                    await tab.wait_for("Export")
                    await tab.press("\x15")
                    await tab.wait_for_no("report.html")
                    await tab.press(f"{name}\r")
                    if name in outside:
                        await tab.wait_for("elsewhere")
                        await tab.press("\x1b")
                    await tab.wait_for_no("Export")
                await tab.wait_for("wrote")

        in_loop(ask)
        server.end()
        assert {path.name for path in folder.rglob("*.*")} == {"a.md", "b.json", "c.md", "link.md"}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "other.md"]
        assert (tmp_path / "other.md").read_text() == "x"
