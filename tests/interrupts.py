"""Writers stopped at every step: `python -m tests.interrupts`.

A child writes over what is there, and at its n-th call of the operating system it is killed, asked
to end, interrupted, or told that the call failed. What is there then must be the old whole, the new
whole, or say that it is unfinished; and after the next run nothing else may lie about.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aprcore.dumps.directory import TraceDirectory
from aprcore.dumps.open import open_dump
from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.tensor_folder import TensorFolderWriter
from aprcore.dumps.writer import TraceWriter
from aprcore.ground import whole_directory
from aprcore.ground.errors import AprError
from aprcore.ground.whole_file import write_whole
from aprcore.network.stages import StageKey

Write = Callable[[Path, float], None]

KEYS = (StageKey(0, "attn_norm"), StageKey(1, "attn_norm"), StageKey(1, "ffn_up"),
        StageKey(None, "lm_head"))  # fmt: skip
# What a writer does to a file system, as Python tells of it.
CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.listdir",
         "os.scandir", "ctypes.dlsym", "fcntl.flock", "os.chmod", "shutil.rmtree")  # fmt: skip
HOW = ("SIGKILL", "SIGTERM", "SIGINT", "error")
UNUSABLE = 2


def write_stages(target: Path, value: float) -> None:
    """A directory of stage files."""
    with TraceWriter(target, Sidecar(tokens=(int(value),))) as writer:
        for key in KEYS:
            writer.write(key, np.full((3, 4), value, np.float32))


def write_stages_one_by_one(target: Path, value: float) -> None:
    """The same where directories cannot be exchanged."""

    def refuse(a: Path, b: Path) -> None:
        raise OSError(38, "Function not implemented")

    whole_directory._exchange = refuse  # in a child of its own
    write_stages(target, value)


def write_tensors(target: Path, value: float) -> None:
    """A folder of named tensors."""
    with TensorFolderWriter(target, Sidecar(tokens=(int(value),))) as writer:
        for key in KEYS:
            piece = writer.hold(np.full((3, 4), value, np.float32))
            writer.write(key.path, [piece])


def write_file(target: Path, value: float) -> None:
    """One file."""
    with write_whole(target) as file:
        for _ in KEYS:
            file.write(f"{value}\n".encode())


WRITERS: dict[str, Write] = {
    "stage files": write_stages, "stage files, moved one by one": write_stages_one_by_one,
    "named tensors": write_tensors, "one file": write_file,
}  # fmt: skip


def state(target: Path) -> str:
    """What is there: nothing, the value that all of it has, "mixed", or "unfinished"."""
    if not target.exists():
        return "nothing"
    if target.is_file():
        values = set(target.read_text().split())
        return values.pop() if len(values) == 1 else "mixed"
    try:
        held = open_dump(target)
        if isinstance(held, TraceDirectory) and set(held.counts) != set(KEYS):
            return "mixed"
        found = {float(x) for key in KEYS for x in np.unique(held.read(key))}
        found.add(float((held.sidecar.tokens or (-1,))[0]))
    except AprError as error:
        return "unfinished" if "is unfinished" in str(error) else f"mixed: {error}"
    return str(found.pop()) if len(found) == 1 else "mixed"


def child(work: Callable[[], None], at: int | None = None, how: str = "") -> tuple[int, int]:
    """Do something in a process of its own; its exit status, and how many calls it made.

    Args:
        work: What to do.
        at: The call at which it is stopped, from 0; None: not at all.
        how: One of `HOW`.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        code = 1
        try:
            code = _in_child(work, at, how, writer)
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), int(told or b"0")


def _in_child(work: Callable[[], None], at: int | None, how: str, pipe: int) -> int:
    calls = [0]

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CALLS or calls[0] < 0:
            return
        calls[0] += 1
        if at is not None and calls[0] == at + 1:
            if how == "error":
                raise OSError(5, "Input/output error")
            os.kill(os.getpid(), getattr(signal, how))

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    sys.addaudithook(watch)
    try:
        work()
        code = 0
    except (AprError, OSError):
        code = UNUSABLE
    except KeyboardInterrupt:
        code = 130
    os.write(pipe, str(calls[0]).encode())
    return code


@contextmanager
def folder() -> Iterator[Path]:
    """A directory to write in."""
    with tempfile.TemporaryDirectory(prefix="aprtui-interrupts-") as path:
        yield Path(path)


def interrupted(write: Write, how: str, moments: int, *, is_new: bool = False) -> Counter[str]:
    """What is left when a writer is stopped at so many of its calls, evenly spread.

    Returns:
        Counts of "old", "new" and "unfinished", and of everything that must not be.
    """
    found: Counter[str] = Counter()
    with folder() as root:
        target = root / "target"
        if not is_new:
            child(lambda: write(target, 1.0))
        _, calls = child(lambda: write(target, 1.0))
        for at in sorted(set(np.linspace(0, calls - 1, min(moments, calls)).astype(int).tolist())):
            for each in root.iterdir():
                shutil.rmtree(each) if each.is_dir() else each.unlink()
            if not is_new:
                child(lambda: write(target, 1.0))
            child(lambda: write(target, 2.0), at, how)
            names = {"1.0": "old", "2.0": "new", "nothing": "old" if is_new else "lost"}
            left = state(target)
            found[names.get(left, left)] += 1
            code, _ = child(lambda: write(target, 3.0))
            if code or state(target) != "3.0":
                found["not written again"] += 1
            elif [each.name for each in root.iterdir()] != ["target"]:
                found["left about"] += 1
    return found


def raced(write: Write, times: int) -> Counter[str]:
    """What is left when two write to one place at once."""
    found: Counter[str] = Counter()
    with folder() as root:
        target = root / "target"
        for number in range(times):
            values = 2.0 * number + 1, 2.0 * number + 2
            running = []
            for value in values:
                process = os.fork()
                if not process:
                    try:
                        write(target, value)
                        os._exit(0)
                    except AprError:
                        os._exit(UNUSABLE)
                    finally:
                        os._exit(1)
                running.append(process)
            codes = [os.waitstatus_to_exitcode(os.waitpid(x, 0)[1]) for x in running]
            done = {str(value) for value, code in zip(values, codes) if code == 0}
            is_right = set(codes) <= {0, UNUSABLE} and state(target) in done
            found["one of them, whole" if is_right else f"{state(target)} {codes}"] += 1
    return found


ALLOWED = {"old", "new", "unfinished", "one of them, whole"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Stop every writer in every way and print what was left; 1 if anything was not whole."""
    parser = argparse.ArgumentParser(prog="python -m tests.interrupts", description=__doc__)
    parser.add_argument("--moments", type=int, default=100, help="of each writer and way")
    parser.add_argument("--races", type=int, default=400, help="times that two write at once")
    options = parser.parse_args(arguments)
    wrong = 0
    for name, write in WRITERS.items():
        for how in HOW:
            for is_new in (False, True):
                found = interrupted(write, how, options.moments, is_new=is_new)
                wrong += sum(n for what, n in found.items() if what not in ALLOWED)
                place = "a new place" if is_new else "over another"
                print(f"{name:<30} {place:<13} {how:<8} {dict(found)}")
    for name, write in WRITERS.items():
        found = raced(write, options.races)
        wrong += sum(n for what, n in found.items() if what not in ALLOWED)
        print(f"{name:<30} two at once            {dict(found)}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
