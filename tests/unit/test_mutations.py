"""The table of mutations fits the source, and a sample of them is noticed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mutations.table import EXEMPT, MUTATIONS, Mutation, mutated, mutations_of

ROOT = Path(__file__).parents[2]


def test_every_text_is_found_exactly_once() -> None:
    """A change of the source that leaves the table behind shows at once, not when it is run."""
    sources: dict[str, str] = {}
    for entry in (*MUTATIONS, *EXEMPT):
        text = sources.setdefault(entry.file, (ROOT / "src" / entry.file).read_text("utf-8"))
        changed = mutated(entry, text)
        assert changed != text
        ast.parse(changed)  # what is not Python would be noticed by any test


def test_the_tests_that_should_notice_exist() -> None:
    named = {test for mutation in MUTATIONS for test in mutation.tests}
    assert named and all((ROOT / test).is_file() for test in named)
    assert all(mutation.tests for mutation in MUTATIONS)


def test_a_number_is_doubled_and_halved() -> None:
    found = mutations_of("f", ["test_a"], ["x / {2} + {1.5}", ("y", "z", "")])
    paths = ("tests/unit/test_a.py",)
    assert found == [
        Mutation("f", "x / 2 + 1.5", new, paths)
        for new in ("x / (2 * 2) + 1.5", "x / (2 / 2) + 1.5",
                    "x / 2 + (1.5 * 2)", "x / 2 + (1.5 / 2)")
    ] + [Mutation("f", "y", "z", paths), Mutation("f", "y", "", paths)]  # fmt: skip


@pytest.mark.parametrize("text", ["", "x x"])
def test_a_text_that_is_gone_or_twice_there_is_an_error(text: str) -> None:
    with pytest.raises(LookupError, match="not once"):
        mutated(Mutation("f", "x", "y", ()), text)


@pytest.mark.slow
def test_a_sample_is_noticed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutations", "--part", "1/40"],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 survived" in done.stdout
