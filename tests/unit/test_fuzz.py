"""Every reader on a few hundred inputs and on what was found before; the harness on planted faults.

`make fuzz` reads many more; see docs/reliability.md.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.fuzz import harness
from tests.fuzz.harness import run_target, write_files
from tests.fuzz.targets import TARGETS, Target, make_input, make_sound

from aprcore.ground.errors import AprError

FOUND = Path(__file__).parents[1] / "fuzz" / "found"
BY_NAME = {target.name: target for target in TARGETS}
SEED = 11


@pytest.mark.parametrize("name", BY_NAME)
def test_a_sound_input_is_read(name: str, tmp_path: Path) -> None:
    """Otherwise nothing but its first check would be fuzzed."""
    target = BY_NAME[name]
    for index in range(3):
        folder = tmp_path / str(index)
        folder.mkdir()
        write_files(folder, make_sound(target, index))
        target.read(folder / target.opens)


@pytest.mark.parametrize("name", BY_NAME)
def test_inputs_break_nothing(name: str) -> None:
    target = BY_NAME[name]
    counts = run_target(target, min(250, target.per_second), SEED)
    assert not counts.findings
    assert counts.inputs == min(250, target.per_second)
    assert counts.read
    assert counts.refused or name == "provenance"  # of which what is no text is left out


@pytest.mark.parametrize("folder", sorted(FOUND.glob("*/")), ids=lambda folder: folder.name)
def test_a_found_input_breaks_nothing_any_more(folder: Path) -> None:
    target = next(t for t in TARGETS if folder.name.partition("@")[0] == t.name)
    files = {str(path.relative_to(folder)): path.read_bytes()
             for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip
    counts = run_target(replace(target, make=lambda _: files), 1, SEED)
    assert not counts.findings


def test_an_input_is_the_same_each_time() -> None:
    for target in TARGETS:
        assert make_input(target, SEED, 7) == make_input(target, SEED, 7)


class Unkempt(AprError):
    def __str__(self) -> str:
        return "\x1b[2J"


def crash(_: Path) -> None:
    raise IndexError("planted")


def loop(_: Path) -> None:
    while True:
        pass


def loop_in_a_library(_: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    while True:
        pass


def take_memory(_: Path) -> None:
    bytearray(1 << 30)


def tell_of_memory(_: Path) -> None:
    try:
        bytearray(1 << 30)
    except MemoryError as error:
        raise AprError("is damaged") from error


def abort(_: Path) -> None:
    ctypes.CDLL(None).abort()


def escape(_: Path) -> None:
    raise Unkempt("planted")


PLANTED: dict[Callable[[Path], None], str] = {
    crash: "crash", loop: "hang", loop_in_a_library: "hang", take_memory: "memory",
    tell_of_memory: "memory", abort: "death", escape: "line",
}  # fmt: skip


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(harness, "SECONDS", 0.2)
    monkeypatch.setattr(harness, "PATIENCE_S", 1.0)
    yield


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_and_the_rest_is_read(
    fault: Callable[[Path], None], tmp_path: Path
) -> None:
    def read(path: Path) -> None:
        if path.read_bytes() == b"1":
            fault(path)

    target = Target("planted", lambda c: {"a/b": b"1" if c.odd(0, (1,)) else b"0"}, read, "a/b")
    planted = [at for at in range(6) if make_input(target, SEED, at)["a/b"] == b"1"]
    assert 1 < len(planted) < 6
    told: list[str] = []
    counts = run_target(target, 6, SEED, told=lambda found: told.append(found.kind), kept=tmp_path)
    assert [finding.index for finding in counts.findings] == planted
    assert {finding.kind for finding in counts.findings} == {PLANTED[fault]}
    assert (counts.inputs, counts.read) == (6, 6 - len(planted))
    # Those that look the same are told, and kept, once.
    assert told == [PLANTED[fault]]
    (kept,) = tmp_path.iterdir()
    assert (kept / "a" / "b").read_bytes() == b"1"
    assert (kept / "finding.txt").read_text().startswith(PLANTED[fault])
