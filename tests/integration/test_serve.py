"""`aprtui serve`: the explorer in a real browser, and who else may reach it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
import pyte
import pytest

from aprtui.browser import is_loopback
from aprtui.cli import main
from aprtui.commands.serve import explorer_arguments
from aprtui.demo import demo_path, load_faults

COMMAND = Path(sys.executable).with_name("aprtui")
PATIENCE_S = 60
FAULT = load_faults()["rope-pairs"]


class Page:
    """The explorer in a tab: what its terminal shows, and the keys that go to it."""

    def __init__(self, page: Any, url: str) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._page = page
        self._screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self._screen)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("websocket", self._watch)
        page.goto(url)

    def _watch(self, websocket: Any) -> None:
        self.requests.append(websocket.url)
        size = re.search(r"width=(\d+)&height=(\d+)", websocket.url)
        assert size is not None
        self._screen.resize(int(size[2]), int(size[1]))
        websocket.on("framereceived", self._feed)

    def _feed(self, data: str | bytes) -> None:
        if isinstance(data, bytes):
            self._stream.feed(data)

    def wait_for(self, *wanted: str) -> str:
        """Wait until all of these are on the screen."""
        end = time.monotonic() + PATIENCE_S
        while True:
            shown = "\n".join(self._screen.display)
            if all(text in shown for text in wanted):
                return shown
            assert time.monotonic() < end, f"{wanted} is not on the screen:\n{shown}"
            self._page.wait_for_timeout(50)

    def press(self, key: str) -> None:
        self._page.keyboard.press(key)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as driver:
        if found is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("no Chromium; `playwright install chromium` brings one")
        # No sandbox: containers give browsers none, and it opens only what this test serves.
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, subprocess.Popen[str]]]]:
    started: list[subprocess.Popen[str]] = []

    def start(
        *arguments: str | Path, command: Sequence[str | Path] = (COMMAND,)
    ) -> tuple[str, subprocess.Popen[str]]:
        process = subprocess.Popen(
            [*command, "serve", *arguments, "--port", "0"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"is at (http://127\.0\.0\.1:\d+/(?:\?token=[\w-]{43})?) ", line)
        assert found is not None, line or process.communicate()[1]
        return found[1], process

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


def at(url: str, path: str = "", **query: object) -> str:
    """Another address of a server, with its token."""
    base, _, token = url.partition("?")
    return f"{base}{path}?" + "&".join(filter(None, [token, urlencode(query)]))


def children_of(process: subprocess.Popen[str]) -> list[str]:
    """Process ids of what a server runs."""
    task = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return task.read_text("ascii").split() if task.exists() else []


def is_running(process_id: str) -> bool:
    """Whether a process is there, and has not ended for somebody to take notice of."""
    try:
        return Path("/proc", process_id, "stat").read_text("utf-8").rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def wait_until(is_true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


class TestBrowser:
    def test_the_page_opens_the_tree_fills_and_keys_work(self, browser: Any, serve: Any) -> None:
        url, process = serve(FAULT.model, "--oracle", demo_path() / "oracle")
        with browser.new_page(viewport={"width": 1200, "height": 760}) as tab:
            page = Page(tab, url)
            page.wait_for("layer 0", "layer 3", "✗ FAIL", "✓ 2 PASS")
            # The line of keys, which is there once the explorer knows that it has the keyboard.
            page.wait_for("palette", "q quit")
            page.press("Home")
            page.wait_for("─ run ─")
            page.press("n")
            page.wait_for("─ layer 2 · qkv_matmul ─", "10 largest differences")
            page.press("w")
            page.wait_for("The model file is wrong here", "q_proj and k_proj rows permuted")
            assert len(children_of(process)) == 1
            page.press("q")
            tab.wait_for_selector("#closed", state="visible", timeout=1000 * PATIENCE_S)
            origin = at(url).split("?")[0].rstrip("/").removeprefix("http:")
            assert "token" not in tab.url
            strangers = [one for one in page.requests if origin not in one]
            assert not [one for one in strangers if not one.startswith("data:")]
            assert not page.errors
            assert any(one.startswith("ws:") for one in page.requests)
            tab.click("#again")
            tab.wait_for_selector("body.-first-byte", timeout=1000 * PATIENCE_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0

    def test_an_explorer_ends_with_its_tab(self, browser: Any, serve: Any) -> None:
        url, process = serve(FAULT.model, "--oracle", demo_path() / "oracle")
        with browser.new_page() as tab:
            Page(tab, url).wait_for("palette")
            assert len(children_of(process)) == 1
        wait_until(lambda: not children_of(process), "the explorer is still there")

    def test_the_server_ends_while_a_tab_is_open(self, browser: Any, serve: Any) -> None:
        url, process = serve(FAULT.model, "--oracle", demo_path() / "oracle")
        with browser.new_page() as tab:
            Page(tab, url).wait_for("palette")
            (explorer,) = children_of(process)
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 0
        assert not is_running(explorer)

    def test_paths_are_not_read_by_the_shell(
        self, browser: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        name = 'it\'s "a" $(touch pwned); `touch pwned` & model.apr'
        (tmp_path / name).symlink_to(FAULT.model)
        url, _ = serve(name, "--oracle", demo_path() / "oracle", "--theme", "monochrome")
        with browser.new_page(viewport={"width": 1600, "height": 600}) as tab:
            page = Page(tab, url)
            page.wait_for("model.apr", "✗ FAIL")
            assert tab.title() == f"aprtui {name}"
        assert not (tmp_path / "pwned").exists()


# A server that waits for its explorers for a moment only.
IMPATIENT = """
import sys
from aprtui import browser
from aprtui.cli import main

browser.WAIT_FOR_EXPLORERS_S = 0.5
sys.exit(main(sys.argv[1:]))
"""


class TestEnd:
    """However a server ends, nothing that it has started stays behind."""

    def end(
        self, url: str, process: subprocess.Popen[str], number: signal.Signals, *, stopped: bool
    ) -> int:
        """End a server by a signal while a page is connected to it, and return its exit code.

        Args:
            url: Where it is.
            process: The server.
            number: The signal.
            stopped: Whether its explorer does not get to run any more.
        """

        async def connect_and_end() -> None:
            session = aiohttp.ClientSession()
            patience = asyncio.timeout(PATIENCE_S)
            async with (
                patience, session, session.ws_connect(at(url, "ws", width=80, height=24)) as page
            ):  # fmt: skip
                shown = b""
                while b"FAIL" not in shown:
                    message = await page.receive()
                    assert not page.closed, shown
                    shown += message.data if message.type is aiohttp.WSMsgType.BINARY else b""
                explorers.extend(children_of(process))
                if stopped:
                    os.kill(int(explorers[0]), signal.SIGSTOP)
                process.send_signal(number)
                while not page.closed:
                    await page.receive()

        explorers: list[str] = []
        with ThreadPoolExecutor(1) as other:  # the browser has a loop running in this thread
            other.submit(asyncio.run, connect_and_end()).result()
        code = process.wait(PATIENCE_S)
        (explorer,) = explorers
        if number is signal.SIGKILL:  # which left it no time for anything
            wait_until(lambda: not is_running(explorer), "the explorer is still there")
        assert not is_running(explorer)
        return code

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_by_a_signal(self, serve: Any, number: signal.Signals) -> None:
        url, process = serve(FAULT.model, "--oracle", demo_path() / "oracle")
        assert self.end(url, process, number, stopped=False) == 0

    def test_by_one_that_nobody_hears(self, serve: Any) -> None:
        url, process = serve(FAULT.model, "--oracle", demo_path() / "oracle")
        assert self.end(url, process, signal.SIGKILL, stopped=False) == -signal.SIGKILL

    def test_while_an_explorer_hangs(self, serve: Any) -> None:
        command = (sys.executable, "-c", IMPATIENT)
        url, process = serve(FAULT.model, "--oracle", demo_path() / "oracle", command=command)
        assert self.end(url, process, signal.SIGTERM, stopped=True) == 0


def status_of(url: str, **headers: str) -> int:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


class TestWhoMayAsk:
    @pytest.fixture(scope="class")
    def url(self) -> Iterator[str]:
        process = subprocess.Popen(
            [COMMAND, "serve", FAULT.model, "--port", "0"], text=True, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        yield found[0]
        process.terminate()
        process.communicate(timeout=PATIENCE_S)

    @pytest.mark.parametrize("path", ["", "ws", "static/js/textual.js", "download/x"])
    def test_no_other_site(self, url: str, path: str) -> None:
        assert status_of(at(url, path), Origin="http://elsewhere.example") == 403
        assert status_of(at(url, path), Origin="null") == 403
        # A name of another site that resolves to this machine.
        assert status_of(at(url, path), Host="elsewhere.example") == 403

    def test_its_own_page(self, url: str) -> None:
        origin = url.split("/?")[0]
        assert status_of(url, Origin=origin) == 200
        assert status_of(url, Host="localhost:9000") == 200  # through a tunnel
        assert status_of(at(url, "static/js/textual.js"), Origin=origin) == 200

    @pytest.mark.parametrize("path", ["", "ws", "static/js/textual.js", "static", "download/x"])
    def test_nobody_without_the_token(self, url: str, path: str) -> None:
        base, _, token = url.partition("?")
        wrong = ("", "?token=", "?token=x", f"?{token}x", f"?{token[:-1]}", f"?{token.lower()}",
                 "?token=%FF%00", f"?x{token}")  # fmt: skip
        assert {status_of(base + path + one) for one in wrong} == {403}
        cookie = "; ".join(f"{name}={token[6:]}" for name in ("token", "aprtui-", "aprtui"))
        assert status_of(base + path, Cookie=cookie) == 403
        # Not even an attempt to speak web socket is taken up.
        assert status_of(base + path, Connection="Upgrade", Upgrade="websocket") == 403

    def test_a_page_keeps_its_token_in_a_cookie(self, url: str) -> None:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            (cookie,) = answer.headers.get_all("Set-Cookie")
            assert answer.headers["Referrer-Policy"] == "no-referrer"
        said, *how = cookie.split("; ")
        assert set(how) == {"HttpOnly", "Path=/", "SameSite=Strict"}
        base = url.split("?")[0]
        assert status_of(base, Cookie=said) == 200
        assert status_of(f"{base}static/js/textual.js", Cookie=f"other=1; {said}") == 200
        assert status_of(base, Cookie=said[:-1]) == 403

    @pytest.mark.parametrize("path", ["static", "static/", "static/js", "static/../server.py",
                                      "static/%2e%2e/server.py", "static//etc/passwd"])  # fmt: skip
    def test_only_the_files_of_the_page(self, url: str, path: str) -> None:
        assert status_of(at(url, path)) in (403, 404)

    def test_the_page_allows_no_other_source(self, url: str) -> None:
        with urllib.request.urlopen(at(url, fontsize="<script>"), timeout=PATIENCE_S) as answer:
            policy, page = answer.headers["Content-Security-Policy"], answer.read().decode()
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert "<script>" not in page
        assert 'data-font-size="16"' in page


class TestRefused:
    def refused(self, capsys: pytest.CaptureFixture[str], *words: str) -> str:
        assert main(["serve", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("aprtui")
        return err

    def test_beyond_this_machine(self, capsys: pytest.CaptureFixture[str]) -> None:
        for host in ("0.0.0.0", "::", "192.0.2.1"):
            line = self.refused(capsys, str(FAULT.model), "--host", host)
            assert host in line and "--i-know" in line

    def test_a_port_in_use(self, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            line = self.refused(capsys, str(FAULT.model), "--port", str(port))
        assert f"127.0.0.1:{port}" in line and "in use" in line and "--port" in line

    def test_an_address_that_is_not_ours(self, capsys: pytest.CaptureFixture[str]) -> None:
        line = self.refused(capsys, str(FAULT.model), "--host", "192.0.2.1", "--i-know")
        assert "192.0.2.1" in line

    def test_no_such_address(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no.such.host.invalid" in self.refused(
            capsys, str(FAULT.model), "--host", "no.such.host.invalid"
        )

    @pytest.mark.parametrize("port", ["-1", "65536", "http", "99999999999"])
    def test_what_is_no_port(self, capsys: pytest.CaptureFixture[str], port: str) -> None:
        assert port in self.refused(capsys, str(FAULT.model), f"--port={port}")

    @pytest.mark.parametrize("name", ["cut.apr", "none.aprx", "folder.aprx"])
    def test_a_file_that_cannot_be_opened(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        path = tmp_path / name
        match name:
            case "cut.apr":
                path.write_bytes(FAULT.model.read_bytes()[:3000])
            case "none.aprx":
                path.write_bytes(b"no zip file")
            case _:
                path.mkdir()
        assert str(path) in self.refused(capsys, str(path))

    @pytest.mark.parametrize("option", ["--oracle", "--trace", "--reference-weights"])
    def test_a_file_that_is_missing(
        self, capsys: pytest.CaptureFixture[str], option: str, tmp_path: Path
    ) -> None:
        missing = str(tmp_path / "missing")
        assert missing in self.refused(capsys, str(FAULT.model), option, missing)
        assert missing in self.refused(capsys, missing)

    def test_files_that_a_page_may_not_write(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in/link").symlink_to(tmp_path)
        model, allowed = str(FAULT.model), ["--allow-write", str(tmp_path / "in")]
        assert "--allow-write" in self.refused(capsys, model, "--save", str(tmp_path / "r.aprx"))
        for name in ("r.aprx", "in/../r.aprx", "in/link/r.aprx"):
            save = ["--save", str(tmp_path / name)]
            assert "elsewhere" in self.refused(capsys, model, *allowed, *save)
        missing = str(tmp_path / "missing")
        assert missing in self.refused(capsys, model, "--allow-write", missing)

    def test_no_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no model given" in self.refused(capsys)

    def test_settings_that_every_explorer_would_refuse(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "settings.toml"
        file.write_text('[keys]\nexplorer.next = "q"\n', "utf-8")
        monkeypatch.setenv("APRTUI_SETTINGS", str(file))
        assert "app.quit" in self.refused(capsys, str(FAULT.model))


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1")))


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["m.apr", "--oracle", "d"], ["m.apr", "--oracle", "d"]),
        (["--port", "1", "m.apr", "--host=h", "--i-know", "--gpu"], ["m.apr", "--gpu"]),
        (["--no-token", "m.apr", "--allow-write", "d", "--save", "d/r.aprx"],
         ["m.apr", "--save", "d/r.aprx"]),
        (["m.apr", "--prompt=--port 9", "--port", "9"], ["m.apr", "--prompt=--port 9"]),
        (["m.apr", "--prompt", "two words"], ["m.apr", "--prompt", "two words"]),
        (["--port", "9", "--", "--host"], ["--", "--host"]),
        (["m.apr", "--budget", "a=1", "--budget", "b=2"],
         ["m.apr", "--budget", "a=1", "--budget", "b=2"]),
    ],
)  # fmt: skip
def test_the_explorer_gets_what_is_not_the_servers(words: list[str], left: list[str]) -> None:
    assert explorer_arguments(["serve", *words]) == left
