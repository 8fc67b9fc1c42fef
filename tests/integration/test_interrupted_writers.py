"""Writers stopped on the way, and two at once: `python -m tests.interrupts` prints all of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aprtui.cli import main
from interrupts import ALLOWED, HOW, WRITERS, interrupted, raced, write_stages
from tiny import write_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_left_is_whole_or_says_that_it_is_not(name: str, how: str) -> None:
    found = interrupted(WRITERS[name], how, 12)
    assert set(found) <= ALLOWED
    assert found["old"] and found["new"]
    if "one by one" not in name:
        assert not found["unfinished"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_new_place_holds_all_or_nothing(name: str) -> None:
    assert set(interrupted(WRITERS[name], "SIGKILL", 12, is_new=True)) <= {"old", "new"}


@pytest.mark.parametrize("name", WRITERS)
def test_two_at_once_do_not_mix(name: str) -> None:
    assert set(raced(WRITERS[name], 8)) == {"one of them, whole"}


def test_what_others_keep_there_stays(tmp_path: Path) -> None:
    target = tmp_path / "trace"
    write_stages(target, 1.0)
    (target / "notes.txt").write_text("mine")
    (target / "layer-0" / "link").symlink_to("attn_norm.bin")
    target.chmod(0o750)
    write_stages(target, 2.0)
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "layer-0" / "link").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o750


def test_an_unfinished_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "m.apr")
    write_stages(tmp_path / "trace", 1.0)
    (tmp_path / "trace" / ".aprtui-unfinished").touch()
    assert main(["bisect", str(model), "--trace", str(tmp_path / "trace")]) == 2
    assert "is unfinished: what wrote it was stopped" in capsys.readouterr().err


def test_sigterm_ends_a_command_as_ctrl_c_does(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.apr")
    (tmp_path / "out").mkdir()
    code = (
        "import sys, time\n"
        "from aprcore.dumps.writer import TraceWriter\n"
        "write = TraceWriter.write\n"
        "def slow(*a):\n    write(*a); print('writing', flush=True); time.sleep(60)\n"
        "TraceWriter.write = slow\n"
        "from aprtui.__main__ import main\n"
        f"sys.argv = ['aprtui', 'trace', {str(model)!r}, '--tokens', '1,2',\n"
        "            '--save-tensor', 'all', '--save-tensor-dir',\n"
        f"            {str(tmp_path / 'out' / 'trace')!r}]\n"
        "sys.exit(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as running:  # fmt: skip
        assert running.stdout is not None
        while "writing" not in running.stdout.readline():
            assert running.poll() is None
            time.sleep(0.01)
        assert any((tmp_path / "out").iterdir())
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 143
    assert not any((tmp_path / "out").iterdir())
