"""Command lines run one after the other in a process with a bound on memory and time.

One process for many, since to start Python takes longer than most of them. What takes the process
along (an abort, SIGKILL for memory) is the last that is answered for.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The bound of docs/reliability.md: 20 times the file, and this.
MEMORY_BYTES, EXPANSION = 200 * 1024 * 1024, 20
SECONDS = 5.0


@dataclass(frozen=True)
class Outcome:
    """How a command line ended.

    Attributes:
        arguments: The command line.
        code: Its exit code; None if it took the process along, or did not end.
        out, err: What it printed.
        seconds: How long it took.
        cpu_s: The processor's time of that.
    """

    arguments: tuple[str, ...]
    code: int | None
    out: str
    err: str
    seconds: float
    cpu_s: float

    @property
    def fault(self) -> str:
        """What is wrong with it, whatever it was asked for; empty if nothing is."""
        lines = self.err.splitlines()
        if self.code not in (0, 1, 2):
            return f"ended with {self.code}"
        if "Traceback" in self.err or "this is a bug" in self.err:
            return "a traceback"
        if "out of memory" in self.err:
            return "out of memory"
        if self.code == 2 and (len(lines) != 1 or not lines[0].startswith("aprtui: ")):
            return f"{len(lines)} lines"
        return ""


def run_limited(
    commands: Sequence[tuple[Sequence[str | Path], int]], seconds: float = SECONDS
) -> list[Outcome]:
    """Run command lines, each with the size of the file that it reads.

    A process that is taken along is started again after the command line that did it.
    """
    left = [([str(word) for word in words], size) for words, size in commands]
    found: list[Outcome] = []
    while left:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
                       "RAYON_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}  # fmt: skip
        done = subprocess.run(
            [sys.executable, __file__], input=json.dumps([seconds, left]), capture_output=True,
            text=True, env=environment, timeout=60 + 2 * seconds * len(left), check=False,
        )  # fmt: skip
        answers = [Outcome(**json.loads(line)) for line in done.stdout.splitlines()]
        found += answers
        left = left[len(answers) :]
        if left:
            words, _ = left.pop(0)
            found.append(Outcome(tuple(words), None, "", done.stderr, seconds, seconds))
    return found


class _TooLong(BaseException):
    """A command line did not end in time."""


def _ring(*_: object) -> None:
    raise _TooLong


def _answer(words: list[str], size: int, seconds: float) -> dict[str, Any]:
    from aprtui.cli import main

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = held + MEMORY_BYTES + EXPANSION * size
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    began, began_cpu = time.perf_counter(), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    code: int | None = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except _TooLong:
            err.write("did not end")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    texts = [stream.buffer.getvalue().decode(errors="replace") for stream in (out, err)]  # type: ignore[attr-defined]
    return {"arguments": words, "code": code, "out": texts[0], "err": texts[1],
            "seconds": time.perf_counter() - began,
            "cpu_s": time.process_time() - began_cpu}  # fmt: skip


def _main() -> None:
    import numpy as np

    from aprcore.ground.parallel import available_threads

    del np, available_threads
    signal.signal(signal.SIGALRM, _ring)
    answers = sys.stdout
    seconds, commands = json.load(sys.stdin)
    for words, size in commands:
        print(json.dumps(_answer(words, size, seconds)), file=answers, flush=True)


if __name__ == "__main__":
    _main()
