"""Dumps of other engines beside the project are read as their tools write them, without a map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aprcore.ground.errors import AprError
from aprcore.judging.verdict import Verdict
from aprcore.records.report import Report
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from aprtui.cli import main

TOKENS = (3, 5, 7, 11, 13, 17, 19)


@pytest.fixture
def engines(shared: Path) -> Path:
    pytest.importorskip("torch", reason="torch is not installed (the `oracle` extra)")
    found = shared / "cases" / "engines"
    if not found.exists():
        pytest.skip("the cases are not at hand")
    return found


def judge(engines: Path, dump: str, **settings: Any) -> Report:
    model = engines.parent / "models" / "llama"
    return run(Request(model=model, trace=engines / dump, **settings))


def left_out(report: Report) -> list[str]:
    return [note for note in report.header.notes if "left out" in note]


# Of llama with 4 layers: stages per layer, and those of the whole model.
@pytest.mark.parametrize(
    ("dump", "in_layer", "around"),
    [("vllm-llama.pt", 13, 3), ("tl.pt", 15, 3), ("mad_tensors", 12, 2), ("msprobe", 13, 3)],
)
def test_a_sound_dump_is_judged_in_every_stage(
    engines: Path, dump: str, in_layer: int, around: int
) -> None:
    report = judge(engines, dump, tokens=TOKENS)
    assert {stage.verdict for stage in report.stages} == {Verdict.PASS}
    assert len(report.stages) == 4 * in_layer + around
    assert left_out(report) == []


@pytest.mark.parametrize("dump", ["tl.pt", "mad_tensors", "msprobe"])
def test_the_ids_in_a_dump_are_those_that_ran(engines: Path, dump: str) -> None:
    assert judge(engines, dump).header.tokens == TOKENS
    with pytest.raises(AprError, match=r"--tokens gives \[4, 5\]"):
        judge(engines, dump, tokens=(4, 5))


@pytest.mark.parametrize(("row", "tokens"), [(0, (3, 5, 7, 11)), (1, (13, 17, 19, 23, 29, 31, 37))])
def test_a_sequence_of_a_batch_is_read_without_its_padding(
    engines: Path, row: int, tokens: tuple[int, ...]
) -> None:
    report = judge(engines, "leftpad-sound.pt", row=row)
    assert {stage.verdict for stage in report.stages} == {Verdict.PASS}
    assert report.header.tokens == tokens


def test_a_batch_is_never_joined(engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, dump = engines.parent / "models" / "llama", engines / "leftpad-sound.pt"
    arguments = ["bisect", str(model), "--trace", str(dump)]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "holds a batch of 2 sequences; say which with --row N, from 0 to 1" in told
    assert main([*arguments, "--row", "1"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--row", "2"]) == 2
    assert "has no row 2" in capsys.readouterr().err
