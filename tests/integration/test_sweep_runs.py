"""`aprtui sweep` as a user runs it: in processes, on a Dask cluster, over http, and cut off."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from aprcore.network.stages import StageKey
from aprtui.cli import main
from aprtui.commands import sweep
from opencl_device import obstacle
from tiny import draw_weights, trace_model, write_model, write_stages

UP = StageKey(1, "ffn_up")
UP_WEIGHT = "model.layers.1.mlp.up_proj.weight"
PATIENCE_S = 60  # a busy machine may take seconds to start an interpreter
LAYERS = ["all", "0..1", "0..2", "1..2", "1..3", "2..3"]

# What Python runs first in every process that finds it on PYTHONPATH: opening one of the files
# named here ends the process as a driver's fault or the kernel's out-of-memory killer would. Each
# line of KILL_LOG is such an end.
KILLER = """
import os, signal, sys

def end(event, arguments):
    if event == "open" and str(arguments[0]).endswith("deadly.apr"):
        log = os.environ["KILL_LOG"]
        most = int(os.environ["KILLS"])
        descriptor = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        done = os.fstat(descriptor).st_size
        if done < most:
            os.write(descriptor, b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        os.close(descriptor)

sys.addaudithook(end)
"""

# So too: opening one of the files named here waits until there is the file LET_GO, as a read does
# that waits for a disk. So a sweep is in its middle for as long as a test likes.
HOLDER = """
import os, sys, time

def hold(event, arguments):
    if event == "open" and str(arguments[0]).endswith("held.apr"):
        while not os.path.exists(os.environ["LET_GO"]):
            time.sleep(0.01)

sys.addaudithook(hold)
"""
FREE, HELD = 6, 4  # cases of `write_held_cases`


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of which one is wrong, and their oracle."""
    root = tmp_path_factory.mktemp("sweep")
    write_stages(root / "oracle", trace_model(write_model(root / "m.apr")))
    rows = draw_weights()[UP_WEIGHT]
    write_model(root / "wrong.apr", changed={UP_WEIGHT: -rows})
    for name in ("deadly.apr", "held.apr"):
        (root / name).write_bytes((root / "m.apr").read_bytes())
    return root


def write_cases(folder: Path, root: Path, *models: str, layers: list[str] = LAYERS) -> Path:
    path = folder / "cases.toml"
    found = [f"{root}/{model}" for model in models]
    path.write_text(f'[[matrix]]\nmodels = {found}\noracles = ["{root}/oracle"]\n'
                    f"layers = {layers}\n")  # fmt: skip
    return path


def write_held_cases(folder: Path, root: Path) -> Path:
    """Cases that run through, and behind them some that are held."""
    path = folder / "cases.toml"
    path.write_text(f'[[matrix]]\nmodels = ["{root}/m.apr"]\n'
                    f"prompts = {[[n] for n in range(FREE)]}\n"
                    f'[[matrix]]\nmodels = ["{root}/held.apr"]\n'
                    f"prompts = {[[n] for n in range(HELD)]}\n")  # fmt: skip
    return path


def called(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["sweep", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def sweep_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    _, out, _ = called(capsys, *arguments, "--json")
    data: dict[str, Any] = json.loads(out)
    return data


def findings(data: dict[str, Any]) -> dict[str, Any]:
    """What a sweep found, by case, without what differs from run to run."""
    timeless = ("elapsed_s", "notes")
    return {case["id"]: {k: v for k, v in case.items() if k not in timeless}
            for case in data["cases"]}  # fmt: skip


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_each_once(results: Path, data: dict[str, Any]) -> None:
    """Every case has exactly one line."""
    ids = [line["id"] for line in lines_of(results)]
    assert sorted(ids) == sorted(case["id"] for case in data["cases"])


@pytest.fixture
def killer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ends processes started from here that open deadly.apr, `KILLS` times; the log of it."""
    folder, log = tmp_path / "killer", tmp_path / "kills"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("KILL_LOG", str(log))
    monkeypatch.setenv("KILLS", "1")
    yield log


@pytest.fixture
def let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Holds processes started from here that open held.apr, until this file is made."""
    folder, file = tmp_path / "holder", tmp_path / "let-go"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOLDER)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("LET_GO", str(file))
    yield file
    file.touch()


class TestLocal:
    def test_the_table_says_where_cases_differ(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cases = write_cases(tmp_path, root, "m.apr", "wrong.apr", layers=["all", "0..2"])
        code, out, err = called(capsys, cases, "--report", tmp_path / "r.md")
        assert (code, err) == (1, "")
        assert "in every case: oracle oracle, prompt recorded, backend numpy" in out
        assert f"\n  {UP.path} FAIL model: " in out and "  (2 cases)\n" in out
        assert "model:   always with wrong.apr; never with m.apr" in out
        assert "layers:  makes no difference" in out
        assert out.endswith("4 cases: 2 PASS, 2 FAIL\n")
        assert "always with wrong.apr" in (tmp_path / "r.md").read_text()
        assert not list(tmp_path.glob(".*"))

    def test_exit_codes(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for models, code in ((["m.apr"], 0), (["m.apr", "gone.apr"], 2),
                             (["m.apr", "gone.apr", "wrong.apr"], 1)):  # fmt: skip
            cases = write_cases(tmp_path, root, *models, layers=["all"])
            assert called(capsys, cases)[0] == code

    def test_results_are_kept_and_errors_are_tried_again(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "late").symlink_to(root)
        cases = tmp_path / "cases.toml"
        cases.write_text(f'[[matrix]]\nmodels = ["{root}/m.apr", "late.apr"]\n'
                         f'oracles = ["{root}/oracle"]\n')  # fmt: skip
        first = sweep_json(capsys, cases)
        assert [case["verdict"] for case in first["cases"]] == ["PASS", "ERROR"]
        assert "late.apr" in first["cases"][1]["summary"]
        (tmp_path / "late.apr").write_bytes((root / "m.apr").read_bytes())
        second = sweep_json(capsys, cases)
        assert [case["verdict"] for case in second["cases"]] == ["PASS", "PASS"]
        assert (first["kept"], second["kept"]) == (0, 1)
        assert second["cases"][0] == first["cases"][0]
        assert sweep_json(capsys, cases)["kept"] == 2
        assert sweep_json(capsys, cases, "--fresh")["kept"] == 0

    def test_a_worker_that_is_killed_loses_nothing(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], killer: Path
    ) -> None:
        cases = write_cases(tmp_path, root, "deadly.apr", "m.apr")
        data = sweep_json(capsys, cases, "--jobs", "2")
        assert killer.read_text() == "x"
        assert data["counts"] == {"PASS": 12}
        assert_each_once(tmp_path / "cases.results.jsonl", data)
        notes = [n for case in data["cases"] for n in case["notes"] if "tokenizer" not in n]
        assert notes == ["run again: its worker process ended before (SIGKILL)"]

    def test_a_case_that_always_kills_is_given_up_and_the_others_go_on(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], killer: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setenv("KILLS", "99")
        cases = write_cases(tmp_path, root, "m.apr", "deadly.apr", layers=["all", "0..1"])
        data = sweep_json(capsys, cases, "--jobs", "2")
        assert [case["verdict"] for case in data["cases"]] == ["PASS", "PASS", "ERROR", "ERROR"]
        assert len(killer.read_text()) == 6
        assert "3 times (SIGKILL, SIGKILL, SIGKILL)" in data["cases"][2]["summary"]

    @pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
    def test_a_sweep_that_is_cut_off_goes_on(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], let_go: Path,
        end: signal.Signals,
    ) -> None:  # fmt: skip
        cases = write_held_cases(tmp_path, root)
        results = tmp_path / "cases.results.jsonl"
        with started(cases) as process:
            wait_for(lambda: count_lines(results) == FREE)
            os.kill(process.pid, end)
            out, err = process.communicate(timeout=PATIENCE_S)
        before = results.read_text()
        assert before.count("\n") == FREE
        if end is signal.SIGINT:
            assert process.returncode == 130 and out == ""
            (line,) = err.splitlines()
            assert f"stopped: {FREE} of {FREE + HELD} cases" in line
        wait_for(lambda: not session_members(process.pid))  # nobody is left behind
        let_go.touch()
        data = sweep_json(capsys, cases)
        assert data["kept"] == FREE
        assert results.read_text().startswith(before)
        assert_each_once(results, data)

    def test_ctrl_c_in_a_terminal_is_for_the_whole_group(
        self, root: Path, tmp_path: Path, let_go: Path
    ) -> None:
        cases = write_held_cases(tmp_path, root)
        results = tmp_path / "cases.results.jsonl"
        with started(cases) as process:
            wait_for(results.exists)
            time.sleep(0.1)  # its workers are starting
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130
        assert len(err.splitlines()) <= 1 and "Traceback" not in err

    @pytest.mark.skipif(bool(obstacle()), reason=f"no OpenCL device: {obstacle()}")
    def test_backends_side_by_side(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cases = tmp_path / "cases.toml"
        cases.write_text(f"""
            [[matrix]]
            models = ["{root}/m.apr"]
            oracles = ["{root}/oracle"]
            backends = ["numpy", "opencl"]
            [[matrix]]
            models = ["{root}/m.apr"]
            backends = ["opencl"]
            device = "no such device"
        """)
        data = sweep_json(capsys, cases)
        assert [case["backend"] for case in data["cases"]] == ["numpy", "opencl", "opencl"]
        # A device that is not there is no result of the CPU.
        assert [case["verdict"] for case in data["cases"]] == ["PASS", "PASS", "ERROR"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["gone.toml"], ["gone.toml", "no such file"]),
            (["cases.toml", "--jobs", "0"], ["'0' is not a positive number"]),
            (["cases.toml", "--fresh", "--resume"], ["not allowed with"]),
            (["cases.toml", "--report", "r.pdf"], ["r.pdf", ".md or .json"]),
            (["cases.toml", "--jobs", "2", "--scheduler", "tcp://h:1"], ["--jobs"]),
            (["cases.toml", "-o", "gone/r.jsonl"], ["gone/r.jsonl", "cannot be written"]),
            (["cases.toml", "--report", "gone/r.md"], ["gone", "no such directory"]),
        ],
    )
    def test_a_wrong_argument_is_one_line(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str],
    ) -> None:  # fmt: skip
        write_cases(tmp_path, root, "m.apr", layers=["all"])
        monkeypatch.chdir(tmp_path)
        code, out, err = called(capsys, *arguments)
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        for word in words:
            assert word in line
        assert [path.name for path in tmp_path.iterdir()] == ["cases.toml"]

    def test_a_report_that_can_no_longer_be_written_leaves_the_results(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Its folder went away while the cases ran."""
        cases = write_cases(tmp_path, root, "m.apr", layers=["all"])
        folder = tmp_path / "gone"
        folder.mkdir()
        run_to_end = sweep._run_to_end

        def run_and_remove(*arguments: Any) -> Any:
            finished = run_to_end(*arguments)
            folder.rmdir()
            return finished

        monkeypatch.setattr(sweep, "_run_to_end", run_and_remove)
        code, _, err = called(capsys, cases, "--report", folder / "r.md")
        assert code == 2 and "gone/r.md: cannot be written" in err
        assert len(lines_of(tmp_path / "cases.results.jsonl")) == 1


class TestProgress:
    def test_a_bar_with_an_estimate_on_a_terminal_alone(self, root: Path, tmp_path: Path) -> None:
        import pexpect

        cases = write_cases(tmp_path, root, "m.apr")
        command = f"{sys.executable} -m aprtui sweep {cases} --jobs 1 > {tmp_path}/out"
        child = pexpect.spawn("/bin/sh", ["-c", command], timeout=60, dimensions=(24, 100),
                              env={**os.environ, "TERM": "xterm-256color"})  # fmt: skip
        child.expect(r"/6")
        child.expect(r"\d+ s left")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
        assert "\x1b" not in (tmp_path / "out").read_text()


class TestRemote:
    def test_cases_over_http_give_what_local_ones_give(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with serving(root) as (url, log):
            cases = tmp_path / "cases.toml"
            cases.write_text(f"""
                [[matrix]]
                models = ["{url}/m.apr", "{url}/wrong.apr", "{url}/gone.apr"]
                oracles = ["{url}/oracle/"]
                layers = ["all", "0..2"]
            """)
            data = sweep_json(capsys, cases, "--jobs", "2", "--cache", tmp_path / "cache")
            fetched = [line for line in log if line.startswith("GET") and ".apr" in line]
            assert sorted(fetched) == ["GET /m.apr", "GET /wrong.apr"]  # once, though used twice
            again = sweep_json(capsys, cases, "--fresh", "--cache", tmp_path / "cache")
            assert len([x for x in log if x.startswith("GET") and ".apr" in x]) == 2
        cases = write_cases(tmp_path, root, "m.apr", "wrong.apr", layers=["all", "0..2"])
        local = sweep_json(capsys, cases, "--fresh")
        shown = [(case["verdict"], case["summary"], case["faults"]) for case in local["cases"]]
        for found in (data, again):
            there = found["cases"]
            assert [(c["verdict"], c["summary"], c["faults"]) for c in there[:4]] == shown
            assert [c["verdict"] for c in there[4:]] == ["ERROR", "ERROR"]
            assert f"{url}/gone.apr: no such file" in there[4]["summary"]

    def test_without_a_cache_nothing_stays(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        cases = tmp_path / "cases.toml"
        cases.write_text(f'[[case]]\nmodel = "file://{root}/m.apr"\n'
                         f'oracle = "file://{root}/oracle"\n')  # fmt: skip
        assert called(capsys, cases)[0] == 0
        assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
class TestCluster:
    """On a real scheduler with two worker processes of its own."""

    def test_it_finds_what_a_local_sweep_finds(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cases = write_cases(tmp_path, root, "m.apr", "wrong.apr", "gone.apr")
        local = sweep_json(capsys, cases, "-o", tmp_path / "local.jsonl")
        with cluster(tmp_path) as held:
            data = sweep_json(capsys, cases, "--scheduler", held.scheduler_address)
        assert findings(data) == findings(local)
        # Layers 0..1 and 2..3 do not have the stage that is wrong, and the logits inherit from it.
        assert data["counts"] == {"PASS": 6, "FAIL": 4, "INHERITED": 2, "ERROR": 6}
        assert_each_once(tmp_path / "cases.results.jsonl", data)

    def test_a_case_that_kills_its_worker_once_is_run_again(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], killer: Path
    ) -> None:
        cases = write_cases(tmp_path, root, "m.apr", "deadly.apr", "wrong.apr")
        local = sweep_json(capsys, write_cases(tmp_path, root, "m.apr", "deadly.apr", "wrong.apr"),
                           "-o", tmp_path / "local.jsonl")  # fmt: skip
        killer.unlink()
        with cluster(tmp_path) as held:
            data = sweep_json(capsys, cases, "--scheduler", held.scheduler_address)
        assert killer.read_text() == "x"
        assert findings(data) == findings(local)
        assert_each_once(tmp_path / "cases.results.jsonl", data)

    def test_a_worker_killed_in_the_middle_loses_nothing(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], let_go: Path
    ) -> None:
        cases = write_held_cases(tmp_path, root)
        results = tmp_path / "cases.results.jsonl"
        with cluster(tmp_path) as held:
            victim = held.workers[0].pid

            def kill() -> None:
                wait_for(lambda: count_lines(results) == FREE)
                os.kill(victim, signal.SIGKILL)
                let_go.touch()

            thread = threading.Thread(target=kill)
            thread.start()
            data = sweep_json(capsys, cases, "--scheduler", held.scheduler_address)
            thread.join()
        assert data["counts"] == {"PASS": FREE + HELD}
        assert_each_once(results, data)

    def test_a_case_that_always_kills_is_given_up(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], killer: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setenv("KILLS", "99")
        cases = write_cases(tmp_path, root, "m.apr", "deadly.apr", layers=["all"])
        with cluster(tmp_path) as held:
            data = sweep_json(capsys, cases, "--scheduler", held.scheduler_address)
        assert [case["verdict"] for case in data["cases"]] == ["PASS", "ERROR"]
        assert "ended every worker" in data["cases"][1]["summary"]

    def test_a_scheduler_that_goes_away_ends_the_sweep_and_keeps_its_results(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], let_go: Path
    ) -> None:
        cases = write_held_cases(tmp_path, root)
        results = tmp_path / "cases.results.jsonl"
        with cluster(tmp_path) as held:

            def close() -> None:
                wait_for(lambda: count_lines(results) == FREE)
                held.close()

            thread = threading.Thread(target=close)
            thread.start()
            code, out, err = called(capsys, cases, "--scheduler", held.scheduler_address)
            let_go.touch()
            thread.join()
        assert (code, out) == (2, "") and count_lines(results) == FREE
        assert "went away" in err and "Traceback" not in err
        data = sweep_json(capsys, cases, "--jobs", "2")
        assert data["kept"] == FREE
        assert_each_once(results, data)

    def test_workers_copy_what_is_behind_a_url(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with serving(root) as (url, log), cluster(tmp_path) as held:
            cases = tmp_path / "cases.toml"
            cases.write_text(f'[[matrix]]\nmodels = ["{url}/m.apr"]\n'
                             f'oracles = ["file://{root}/oracle"]\n'
                             f"layers = {LAYERS}\n")  # fmt: skip
            data = sweep_json(capsys, cases, "--scheduler", held.scheduler_address)
        assert data["counts"] == {"PASS": 6}
        assert 1 <= sum(line == "GET /m.apr" for line in log) <= 2  # once per worker

    def test_nobody_there_is_one_line(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("aprcore.sweep.cluster.CONNECT_TIMEOUT_S", 1)
        cases = write_cases(tmp_path, root, "m.apr", layers=["all"])
        for address in ("tcp://127.0.0.1:9", "nonsense://x", "tcp://[", "127.0.0.1:x"):
            code, out, err = called(capsys, cases, "--scheduler", address)
            assert (code, out) == (2, "")
            *_, line = err.splitlines()
            assert "no scheduler answers" in line and address in line


def wait_for(is_true: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def count_lines(path: Path) -> int:
    """Lines that have been written to their end; 0 of a file that is not there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextmanager
def started(cases: Path) -> Iterator[subprocess.Popen[str]]:
    """A sweep of two processes at the head of a session of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "aprtui", "sweep", str(cases), "--jobs", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def session_members(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@contextmanager
def cluster(folder: Path) -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
        local_directory=str(folder / "dask"), silence_logs=50,
    ) as held:  # fmt: skip
        yield held


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A web server of a folder, and the requests that it answered with a file."""
    log: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            if int(code) == 200:
                log.append(f"{self.command} {self.path}")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
