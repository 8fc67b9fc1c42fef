"""`python -m tests.fuzz [TARGET...] --inputs N --seed S`: fuzz the readers, and print a table."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.fuzz.harness import Counts, Finding, run_target
from tests.fuzz.targets import TARGETS


def main() -> int:
    names = [target.name for target in TARGETS]
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET",
                        help=f"{', '.join(names)}; default: all")  # fmt: skip
    parser.add_argument("--inputs", type=int, default=10_000, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="the first input's index")
    parser.add_argument("--seconds", type=float, help="for each target, at most")
    parser.add_argument("--jobs", type=int, default=1, help="targets at the same time")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"),
                        help="where to save what is found (default: ./fuzz-found)")  # fmt: skip
    asked = parser.parse_args()
    unknown = set(asked.targets) - set(names)
    if unknown:
        parser.error(f"there is no target {min(unknown)}")
    print("| reader | inputs | read | refused | findings | a second |\n|---|--:|--:|--:|--:|--:|",
          flush=True)  # fmt: skip
    chosen = [name for name in names if name in (asked.targets or names)]
    failed = False
    with ProcessPoolExecutor(asked.jobs) as pool:
        for name, counts in zip(chosen, pool.map(partial(_run, asked), chosen)):
            kinds = len({finding.likeness for finding in counts.findings})
            failed |= bool(kinds)
            told = f"{len(counts.findings)} ({kinds} kinds)" if kinds else "0"
            rate = counts.inputs / max(counts.seconds, 1e-9)
            print(f"| {name} | {counts.inputs:,} | {counts.read:,} | {counts.refused:,} | {told}"
                  f" | {rate:,.0f} |", flush=True)  # fmt: skip
    return int(failed)


def _run(asked: argparse.Namespace, name: str) -> Counts:
    target = next(target for target in TARGETS if target.name == name)
    return run_target(target, asked.inputs, asked.seed, start=asked.start, seconds=asked.seconds,
                      told=_tell, kept=asked.keep)  # fmt: skip


def _tell(finding: Finding) -> None:
    print(f"{finding.target}: seed {finding.seed}, input {finding.index}: {finding.kind}: "
          f"{finding.told}", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
