"""Applying each mutation to a copy of `src` and running the fast tests that should notice it."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Imported here for the processes that run the tests: nothing of the package under test.
import gguf.quants
import hypothesis
import numpy as np
import pytest
import pytest_textual_snapshot

from .table import EXEMPT, MUTATIONS, Mutation, mutated

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60  # of one test
# What pytest ends with when a test failed, and when a test file could not even be imported.
FAILED = (1, 2)
ASTRAY = 99  # what the tests imported was not the copy

# Otherwise the imports would be unused, and one that lost its name would not be noticed.
PRELOADED = (gguf.quants, hypothesis, np, pytest, pytest_textual_snapshot)


class TableError(Exception):
    """The tests cannot say what becomes of a mutation."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation.

    Attributes:
        mutation: Which one.
        killer: The test that failed first; None if none did.
        elapsed_s: How long that took.
    """

    mutation: Mutation
    killer: str | None
    elapsed_s: float


@contextmanager
def source_copy() -> Iterator[Path]:
    """A folder with a copy of `src`, which is all that is ever changed."""
    with tempfile.TemporaryDirectory(prefix="aprtui-mutations-") as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        yield copy


def first_failure(source: Path, tests: Sequence[str]) -> str | None:
    """The first test of some files that fails with the package in a folder, or None.

    Raises:
        TableError: pytest could not run, or not on that package.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = os.fork()  # with all that is slow to import already there
        if child == 0:
            os._exit(_run_tests(source, tests, output.fileno()))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        lines = output.read().splitlines()
    if code == 0:
        return None
    if code not in FAILED:
        raise TableError("\n".join([f"pytest ended with {code}", *lines]))
    named = [x for x in lines if x.startswith(("FAILED", "ERROR"))]
    name = named[0].split(" ", 1)[1].split(" - ")[0] if named else "(no name)"
    return name.removeprefix("tests/unit/")


def _run_tests(source: Path, tests: Sequence[str], output: int) -> int:
    """In a process of its own: what pytest ends with, or `ASTRAY`."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    sys.path.insert(0, str(source))
    # Byte code is told from its source by a time in whole seconds: none is kept.
    sys.dont_write_bytecode = True
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(source.parent / "hypothesis")
    options = ("-x", "-q", "--tb=no", "--no-header", "-p", "no:cacheprovider")
    code = int(pytest.main([*options, "-o", f"timeout={TIMEOUT_S}", *tests]))
    sys.stdout.flush()
    packages = [sys.modules.get(name) for name in ("aprcore", "aprtui")]
    files = [Path(str(package.__file__)) for package in packages if package is not None]
    return code if files and all(x.is_relative_to(source) for x in files) else ASTRAY


def check(source: Path, mutations: Sequence[Mutation]) -> None:
    """Fail unless every entry of the table fits, and no test fails without a mutation.

    Raises:
        LookupError: What an entry replaces is not there exactly once.
        TableError: A test fails.
    """
    for entry in [*mutations, *EXEMPT]:
        mutated(entry, (source / entry.file).read_text("utf-8"))
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    failure = first_failure(source, tests)
    if failure is not None:
        raise TableError(f"{failure} fails without any mutation")


def outcomes(source: Path, mutations: Sequence[Mutation]) -> Iterator[Outcome]:
    """What becomes of each, one after the other."""
    for mutation in mutations:
        file = source / mutation.file
        original = file.read_text("utf-8")
        started = time.perf_counter()
        file.write_text(mutated(mutation, original), "utf-8")
        try:
            killer = first_failure(source, mutation.tests)
        finally:
            file.write_text(original, "utf-8")
        yield Outcome(mutation, killer, time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 0 if every mutation is noticed, 1 if one is not, 2 if it cannot be said."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose file or text has this in it")
    parser.add_argument("--check", action="store_true", help="check the table and run none")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts")
    options = parser.parse_args(arguments)
    part, parts = map(int, options.part.split("/"))
    chosen = [m for m in MUTATIONS if options.only in f"{m.file} {m.old}"][part - 1 :: parts]
    survivors = 0
    started = time.perf_counter()
    try:
        with source_copy() as source:
            check(source, chosen)
            for outcome in outcomes(source, () if options.check else chosen):
                survivors += outcome.killer is None
                mutation = outcome.mutation
                said = f"killed by {outcome.killer}" if outcome.killer else "SURVIVED"
                print(f"{mutation.file}: {mutation.short}: {said}", flush=True)
    except (TableError, LookupError) as error:
        print(f"tests.mutations: {error}", file=sys.stderr)
        return 2
    elapsed = time.perf_counter() - started
    print(f"{len(chosen)} mutations, {survivors} survived, {elapsed:.0f} s")
    return int(survivors > 0)
