"""Inputs read in a child process under the bounds of docs/reliability.md; what breaks them.

The child reads one input after the other. What takes it along, or keeps it for too long within a
library, is a finding too, and the next input is read by a new one.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import resource
import selectors
import shutil
import signal
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fuzz.targets import Files, Target, make_input, make_sound

SECONDS = 5.0
MEMORY_BYTES, EXPANSION = 200 * 1024 * 1024, 20
# A library that does not return to Python is ended by the parent.
PATIENCE_S = 3 * SECONDS


@dataclass(frozen=True, slots=True)
class Finding:
    """An input that breaks a promise.

    Attributes:
        target, seed, index: Which one it is.
        kind: "crash", "hang", "memory", "death" or "line".
        told: The exception and where it comes from, or how the process ended.
    """

    target: str
    seed: int
    index: int
    kind: str
    told: str

    @property
    def likeness(self) -> tuple[str, str, str]:
        """The same for what is likely the same fault."""
        return self.target, self.kind, self.told.splitlines()[-1][:60] + _place(self.told)


@dataclass(frozen=True, slots=True)
class Counts:
    """What a run of a target came to."""

    inputs: int
    read: int
    refused: int
    findings: tuple[Finding, ...]
    seconds: float


class _TooLong(BaseException):
    """An input was not read in time."""


def _ring(*_: object) -> None:
    raise _TooLong


def _place(told: str) -> str:
    """The innermost line of ours in a traceback."""
    ours = [line for line in told.splitlines() if "/aprcore/" in line or "/aprtui/" in line]
    return ours[-1].strip() if ours else ""


def scratch_folder() -> Path:
    """Where inputs are written: in memory if there is such a place."""
    shared = Path("/dev/shm")
    parent = shared if os.access(shared, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=parent))


def write_files(folder: Path, files: Files) -> None:
    """Write an input; a name that another one needs as a folder is left out."""
    for name, data in files.items():
        path = folder / name
        try:
            if len(path.parts) > len(folder.parts) + 1:
                path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError:
            continue


def judge(read: Callable[[Path], object], path: Path, size_bytes: int) -> tuple[str, str] | None:
    """Read an input under the bounds: the kind of a finding and its telling, or None.

    Returns:
        ("", "") for one that is refused as it should be.
    """
    from aprcore.ground.errors import ERROR_LIMIT, AprError

    held = int(_statm().split()[0]) * resource.getpagesize()
    most = held + MEMORY_BYTES + EXPANSION * size_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read(path)
        return None
    except AprError as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        line = str(error)
        if isinstance(error.__cause__ or error.__context__, MemoryError):
            return "memory", "out of memory, told as: " + line[:300]
        if not line.isprintable() or not line or len(line) > ERROR_LIMIT:
            return "line", f"{line[:300]!r} of {len(line)} characters{_where()}"
        return "", ""
    except _TooLong:
        return "hang", f"not within {SECONDS} s{_where()}"
    except MemoryError:
        return "memory", f"out of memory{_where()}"
    except BaseException as error:  # a panic of a library derives from nothing else
        signal.setitimer(signal.ITIMER_REAL, 0)
        return "crash", f"{type(error).__name__}: {str(error)[:300]!r}{_where()}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _where() -> str:
    lines = traceback.format_exc(limit=-6).splitlines()
    return "\n" + "\n".join(line for line in lines if line.lstrip().startswith("File "))


def _statm() -> bytes:
    descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


def run_target(
    target: Target, inputs: int, seed: int, *, start: int = 0, seconds: float | None = None,
    told: Callable[[Finding], None] | None = None, kept: Path | None = None,
) -> Counts:  # fmt: skip
    """Read inputs of a target, until they or the seconds are used up.

    Args:
        target: The reader.
        inputs: How many.
        seed: Which.
        start: The first.
        seconds: How long at most.
        told: Called with every finding.
        kept: Where to keep the inputs of findings, one of a kind.
    """
    _warm_up(target)
    began = time.monotonic()
    until = None if seconds is None else began + seconds
    found: list[Finding] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    read = refused = 0
    at, stop = start, start + inputs
    while at < stop and (until is None or time.monotonic() < until):
        for message in _in_child(target, seed, at, stop, until):
            if isinstance(message, Finding):
                found.append(message)
                seen[message.likeness] += 1
                if told is not None and seen[message.likeness] == 1:
                    told(message)
                if kept is not None and seen[message.likeness] == 1:
                    keep(kept, target, message)
            else:
                at, here_read, here_refused = message
                read, refused = read + here_read, refused + here_refused
    return Counts(at - start, read, refused, tuple(found), time.monotonic() - began)


def _warm_up(target: Target) -> None:
    """Import what the reader does, once for all children."""
    from aprcore.ground.errors import AprError

    folder = scratch_folder()
    try:
        write_files(folder, make_sound(target))
        with suppress(AprError):
            target.read(folder / target.opens)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keep(folder: Path, target: Target, finding: Finding) -> None:
    """Save the files of a finding, with what was found."""
    place = folder / f"{target.name}-{finding.seed}-{finding.index}"
    place.mkdir(parents=True, exist_ok=True)
    write_files(place, make_input(target, finding.seed, finding.index))
    (place / "finding.txt").write_text(f"{finding.kind}: {finding.told}\n", errors="replace")


def _in_child(
    target: Target, seed: int, start: int, stop: int, until: float | None
) -> Iterator[Finding | tuple[int, int, int]]:
    """What a child finds, and at last where to go on, with how many were read and refused."""
    progress = mmap.mmap(-1, 32)  # index, read, refused; shared with the child
    progress[:24] = struct.pack("<QQQ", start, 0, 0)
    ours, theirs = os.pipe()
    folder = scratch_folder()
    child = os.fork()
    if child == 0:
        os.close(ours)
        code = 1
        try:
            _read_inputs(target, seed, start, stop, until, folder, progress, theirs)
            code = 0
        finally:
            os._exit(code)
    os.close(theirs)
    try:
        was_killed = False
        last, since = start, time.monotonic()
        pending = b""
        with selectors.DefaultSelector() as selector:
            selector.register(ours, selectors.EVENT_READ)
            while True:
                if selector.select(timeout=0.5):
                    data = os.read(ours, 1 << 16)
                    if not data:
                        break
                    *lines, pending = (pending + data).split(b"\n")
                    yield from (Finding(**json.loads(line)) for line in lines)
                now = struct.unpack("<Q", progress[:8])[0]
                if now != last:
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > PATIENCE_S:
                    was_killed = True
                    os.kill(child, signal.SIGKILL)
                    break
        _, status = os.waitpid(child, 0)
        child = 0
        at, read, refused = struct.unpack("<QQQ", progress[:24])
        if status:
            kind = "hang" if was_killed else "death"
            code = os.waitstatus_to_exitcode(status)
            yield Finding(target.name, seed, at, kind, f"the process ended with {code}")
            at += 1
        yield at, read, refused
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(ours)
        shutil.rmtree(folder, ignore_errors=True)


def _read_inputs(
    target: Target, seed: int, start: int, stop: int, until: float | None, folder: Path,
    progress: mmap.mmap, pipe: int,
) -> None:  # fmt: skip
    faulthandler.disable()
    signal.signal(signal.SIGALRM, _ring)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Threads of a library do not outlive a fork.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what a panicking library says is in the finding
    here = folder / "i"
    read = refused = 0
    for index in range(start, stop):
        progress[:24] = struct.pack("<QQQ", index, read, refused)
        if until is not None and index % 16 == 0 and time.monotonic() > until:
            return
        files = make_input(target, seed, index)
        here.mkdir(exist_ok=True)
        write_files(here, files)
        size = sum(map(len, files.values()))
        outcome = judge(target.read, here / target.opens if target.opens else here, size)
        if outcome is None:
            read += 1
        elif not outcome[0]:
            refused += 1
        else:
            finding = Finding(target.name, seed, index, *outcome)
            os.write(pipe, json.dumps(asdict(finding)).encode() + b"\n")
        _clear(here)
    progress[:24] = struct.pack("<QQQ", stop, read, refused)


def _clear(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink()
