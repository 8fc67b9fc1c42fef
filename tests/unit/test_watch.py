"""Noticing changes of files, on a real file system."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from aprtui.watch import signature_of, wait_for_change

QUICK_S = 0.02
PATIENCE_S = 60.0  # for what comes at once, unless others have the processor


def change_after(paths: list[Path], change: object, limit_s: float = PATIENCE_S) -> bool:
    """Whether a change is noticed within the limit."""
    before = signature_of(paths)
    until = time.monotonic() + limit_s
    assert callable(change)
    threading.Timer(2 * QUICK_S, change).start()
    return wait_for_change(paths, before, lambda: time.monotonic() > until, QUICK_S)


def test_another_content(tmp_path: Path) -> None:
    file = tmp_path / "model.apr"
    file.write_bytes(b"one")
    assert change_after([file], lambda: file.write_bytes(b"three"))


def test_another_file_of_the_same_name_and_size(tmp_path: Path) -> None:
    file, other = tmp_path / "model.apr", tmp_path / "new"
    file.write_bytes(b"one")
    times = file.stat()
    other.write_bytes(b"two")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert change_after([file], lambda: other.replace(file))


def test_a_stage_file_in_a_directory_of_a_layer(tmp_path: Path) -> None:
    layer = tmp_path / "dump" / "layer-0"
    layer.mkdir(parents=True)
    (layer / "attn_norm.bin").write_bytes(b"")
    assert change_after([tmp_path / "dump"], lambda: (layer / "ffn_out.bin").write_bytes(b"x"))


def test_a_directory_that_comes_to_be(tmp_path: Path) -> None:
    def make() -> None:
        (tmp_path / "dump").mkdir()
        (tmp_path / "dump" / "embedding.bin").write_bytes(b"x")

    assert change_after([tmp_path / "dump"], make)


def test_a_writer_at_work_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "lm_head.bin"
    file.write_bytes(b"")
    before = signature_of([file])
    left = iter(range(15))

    def write() -> bool:
        """Asked before every look whether to give up, it writes first."""
        with file.open("ab") as stream:
            stream.write(b"x")
        return next(left, None) is None

    assert not wait_for_change([file], before, write, QUICK_S)
    assert wait_for_change([file], before, lambda: False, QUICK_S)


def test_what_a_writer_has_not_moved_into_place_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "lm_head.bin").write_bytes(b"x")
    before = signature_of([tmp_path])
    (tmp_path / ".aprtui-staging").mkdir()
    (tmp_path / ".aprtui-staging" / "lm_head.bin").write_bytes(b"y")
    assert signature_of([tmp_path]) == before


def test_what_a_run_writes_itself_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved beside the dump, under whatever spelling of the folder, it would run for ever."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm_head.bin").write_bytes(b"x")
    ours = tmp_path / "run.aprx"
    before = signature_of([Path()], ours)
    ours.write_bytes(b"a run")
    assert signature_of([Path()], ours) == before != signature_of([Path()])
    until = time.monotonic() + 6 * QUICK_S
    assert not wait_for_change([Path()], before, lambda: time.monotonic() > until, QUICK_S, ours)


def test_nothing_happens(tmp_path: Path) -> None:
    assert not change_after([tmp_path], lambda: None, limit_s=6 * QUICK_S)


def test_no_files_are_no_change(tmp_path: Path) -> None:
    file = tmp_path / "model.apr"
    file.write_bytes(b"x")
    assert not change_after([file], file.unlink, limit_s=8 * QUICK_S)
