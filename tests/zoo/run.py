"""Running the zoo."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from . import corpus, table
from .grounds import Farm, quiet
from .trial import Case, Outcome, attempt


def outcomes(cases: Iterable[Case], farm: Farm) -> Iterator[Outcome]:
    """Every case judged, but those whose model is not at hand."""
    quiet()
    torch.set_num_threads(1)  # as `models.build` does, and for the same reason
    for case in cases:
        if farm.missing(case.ground) is None:
            yield attempt(case, farm, farm.directory / "case")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the corpus, or a part of it, and print the table; 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="cases whose name contains NAME")
    parser.add_argument(
        "--engines", action="store_true", help="the sound dumps of every engine instead"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures and every case")
    options = parser.parse_args(arguments)
    corpus.check_names()
    cases = (*corpus.single_faults(), *corpus.several_faults(), *corpus.sound_pairs())
    if options.engines:
        cases = corpus.engine_sweep()
    if options.only:
        cases = tuple(case for case in cases if options.only in case.name)
    started = time.perf_counter()
    done = []
    with tempfile.TemporaryDirectory(prefix="aprtui-zoo-") as folder:
        farm = Farm(Path(folder))
        for missing in sorted({m for case in cases if (m := farm.missing(case.ground))}):
            print(f"left out: {missing}", file=sys.stderr)
        for outcome in outcomes(cases, farm):
            done.append(outcome)
            if sys.stderr.isatty():
                print(f"\r{len(done)} of {len(cases)}  {outcome.case.name:<70.70}", end="",
                      file=sys.stderr, flush=True)  # fmt: skip
    if sys.stderr.isatty():
        print(file=sys.stderr)
    lines = table.figures(done)
    print(table.to_text(lines))
    print(f"\n{len(done)} cases in {time.perf_counter() - started:.0f} s")
    if options.json is not None:
        options.json.write_text(json.dumps(table.to_json(lines, done), indent=1) + "\n", "utf-8")
    return int(any(line.met is False for line in lines))
