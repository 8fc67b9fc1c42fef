"""`aprtui sweep` with a limit per case: one that hangs is ended, and the others go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aprtui.cli import main
from tiny import trace_model, write_model, write_stages

# What Python runs first in every process that finds it on PYTHONPATH: a process that opens a file
# of this name stands still, as over a file system that no longer answers. Nothing but SIGKILL ends
# it. It notes its id first.
STOPPER = """
import os, signal, sys

def stop(event, arguments):
    if event == "open" and str(arguments[0]).endswith("stuck.apr"):
        with open(os.environ["STOPPED"], "a") as log:
            log.write(f"{os.getpid()}\\n")
        os.kill(os.getpid(), signal.SIGSTOP)

sys.addaudithook(stop)
"""

# A sound case takes a tenth of a second, and on a busy machine far less than this.
LIMIT_S = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its oracle, and the same model by the name that stops who opens it."""
    root = tmp_path_factory.mktemp("sweep")
    write_stages(root / "oracle", trace_model(write_model(root / "m.apr")))
    (root / "stuck.apr").write_bytes((root / "m.apr").read_bytes())
    return root


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where processes that stand still leave their ids."""
    folder, log = tmp_path / "stopper", tmp_path / "stopped"
    folder.mkdir()
    log.touch()
    (folder / "sitecustomize.py").write_text(STOPPER)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("STOPPED", str(log))
    return log


def write_cases(folder: Path, root: Path, *models: str, settings: str = "") -> Path:
    path = folder / "cases.toml"
    found = [f"{root}/{model}" for model in models]
    path.write_text(f'[[matrix]]\nmodels = {found}\noracles = ["{root}/oracle"]\n'
                    f'layers = ["all", "0..2", "1..3"]\n{settings}')  # fmt: skip
    return path


def sweep_json(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, dict[str, Any]]:
    code = main(["sweep", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def results_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "cases.results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_recorded_once(folder: Path, data: dict[str, Any]) -> None:
    """Every case has one line, and that says what the report says."""
    lines = {line["id"]: line["verdict"] for line in results_of(folder)}
    assert len(lines) == len(results_of(folder)) == len(data["cases"])
    assert lines == {case["id"]: case["verdict"] for case in data["cases"]}


def is_gone(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return status == "Z"


def wait_for(is_true: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestLocal:
    def test_a_case_that_hangs_is_ended_and_the_others_are_judged(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: Path
    ) -> None:
        cases = write_cases(tmp_path, root, "stuck.apr", "m.apr")
        code, data = sweep_json(capsys, cases, "--jobs", "3", "--timeout", str(LIMIT_S))
        assert code == 2
        verdicts = [case["verdict"] for case in data["cases"]]
        assert verdicts == ["ERROR"] * 3 + ["PASS"] * 3
        for case in data["cases"][:3]:
            assert case["summary"] == f"took longer than {LIMIT_S} s, and its process was ended"
            assert case["elapsed_s"] == LIMIT_S
        assert_recorded_once(tmp_path, data)
        # Each of them hung once, in a process of its own, and none is left behind.
        processes = [int(line) for line in stopped.read_text().split()]
        assert len(set(processes)) == len(processes) == 3
        assert all(map(is_gone, processes))

    def test_it_is_run_again_as_any_error_and_the_limit_is_no_part_of_a_case(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        cases = write_cases(tmp_path, root, "stuck.apr", "m.apr", settings="timeout = 2.5\n")
        code, first = sweep_json(capsys, cases, "--jobs", "3")
        assert (code, first["counts"]) == (2, {"ERROR": 3, "PASS": 3})
        assert "longer than 2.5 s" in first["cases"][0]["summary"]
        monkeypatch.delenv("PYTHONPATH")  # the file system answers again
        code, second = sweep_json(capsys, cases, "--timeout", "600")
        assert (code, second["kept"], second["counts"]) == (0, 3, {"PASS": 6})
        assert [case["id"] for case in second["cases"]] == [case["id"] for case in first["cases"]]

    def test_a_case_may_have_a_limit_of_its_own(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: Path
    ) -> None:
        cases = tmp_path / "cases.toml"
        cases.write_text(f"""
            [defaults]
            timeout = 600
            [[case]]
            model = "{root}/stuck.apr"
            tokens = [1, 2]
            timeout = 1
            [[case]]
            model = "{root}/m.apr"
            tokens = [1, 2]
        """)
        code, data = sweep_json(capsys, cases)
        assert code == 2
        assert [case["verdict"] for case in data["cases"]] == ["ERROR", "PASS"]
        assert "longer than 1 s" in data["cases"][0]["summary"]

    def test_a_case_that_works_and_is_too_slow(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """No hang: hundreds of layers to trace and to judge, which take far more than the limit."""
        deep = 400
        write_model(tmp_path / "deep.apr", num_layers=deep)
        cases = tmp_path / "cases.toml"
        cases.write_text(f"""
            [[case]]
            model = "deep.apr"
            tokens = {[n % 40 for n in range(300)]}
            timeout = 1
            [[case]]
            model = "{root}/m.apr"
            oracle = "{root}/oracle"
        """)
        started = time.monotonic()
        code, data = sweep_json(capsys, cases, "--jobs", "1")
        assert code == 2
        assert [case["verdict"] for case in data["cases"]] == ["ERROR", "PASS"]
        assert "longer than 1 s" in data["cases"][0]["summary"]
        assert time.monotonic() - started < 30
        assert_recorded_once(tmp_path, data)

    @pytest.mark.parametrize("end", ["kill", "terminate"])
    def test_a_sweep_that_is_killed_takes_its_hanging_case_along(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
    ) -> None:
        """Who waits for a pipe that nobody writes to is no better than who is stopped."""
        folder, log = tmp_path / "waiter", tmp_path / "waiting"
        folder.mkdir()
        waiter = STOPPER.replace("os.kill(os.getpid(), signal.SIGSTOP)", "os.read(os.pipe()[0], 1)")
        (folder / "sitecustomize.py").write_text(waiter)
        log.touch()
        cases = write_cases(tmp_path, root, "stuck.apr")
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        monkeypatch.setenv("STOPPED", str(log))
        process = subprocess.Popen(
            [sys.executable, "-m", "aprtui", "sweep", str(cases), "--jobs", "1"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda: log.read_text().endswith("\n"))
        worker = int(log.read_text())
        assert not is_gone(worker)
        getattr(process, end)()
        process.wait()
        wait_for(lambda: is_gone(worker))

    def test_a_process_that_cannot_be_killed_holds_nobody_up(
        self, root: Path, tmp_path: Path, stopped: Path
    ) -> None:
        """As one that waits in the kernel: here a stopped one, whose signals are held back."""
        cases = write_cases(tmp_path, root, "stuck.apr", "m.apr")
        code = f"""if True:
            import sys
            from multiprocessing.context import SpawnProcess
            from aprcore.sweep import pool
            from aprtui.cli import main
            SpawnProcess.kill = lambda self: None
            pool.END_S = 0.2
            sys.exit(main(["sweep", {str(cases)!r}, "--timeout", "3", "--jobs", "3"]))
        """
        with (tmp_path / "out").open("w") as out:  # a pipe would stay open with those left behind
            try:
                found = subprocess.run([sys.executable, "-c", code], stdout=out, timeout=60)
            finally:
                processes = [int(line) for line in stopped.read_text().split()]
                was_left = [not is_gone(process) for process in processes]
                for process in processes:
                    os.kill(process, signal.SIGKILL)
        text = (tmp_path / "out").read_text()
        assert (found.returncode, was_left) == (2, [True] * 3)
        assert text.count("hangs in the system and cannot be ended") == 3
        assert text.endswith("\n6 cases: 3 ERROR, 3 PASS\n")
        assert len(results_of(tmp_path)) == 6

    @pytest.mark.parametrize("seconds", ["0", "-1", "x", "inf", "nan", ""])
    def test_a_limit_is_a_positive_number(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: str
    ) -> None:
        cases = write_cases(tmp_path, root, "m.apr")
        assert main(["sweep", str(cases), f"--timeout={seconds}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{seconds!r} is not a positive number of seconds" in line


@pytest.mark.slow
class TestCluster:
    """On a real scheduler with two worker processes of its own, each watched by a nanny."""

    @pytest.fixture
    def scheduler(self, tmp_path: Path, stopped: Path) -> Iterator[str]:
        from distributed import LocalCluster

        with LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
            local_directory=str(tmp_path / "dask"), silence_logs=50,
        ) as held:  # fmt: skip
            yield held.scheduler_address

    def test_a_case_that_hangs_is_ended_and_the_others_are_judged(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: Path,
        scheduler: str,
    ) -> None:  # fmt: skip
        # More of them than workers: each would lose its place for good.
        cases = write_cases(tmp_path, root, "stuck.apr", "m.apr")
        limit = ("--scheduler", scheduler, "--timeout", str(LIMIT_S))
        code, data = sweep_json(capsys, cases, *limit)
        assert code == 2
        assert [case["verdict"] for case in data["cases"]] == ["ERROR"] * 3 + ["PASS"] * 3
        reasons = {case["summary"] for case in data["cases"][:3]}
        assert reasons == {f"took longer than {LIMIT_S} s, and its process was ended"}
        assert_recorded_once(tmp_path, data)
        processes = [int(line) for line in stopped.read_text().split()]
        assert len(set(processes)) == len(processes) == 3
        assert all(map(is_gone, processes))
