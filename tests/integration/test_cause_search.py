"""The search for causes over a run: what explained a stage first, and how many are searched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from aprcore.engines.forward import trace
from aprcore.engines.numpy import NumpyBackend
from aprcore.judging.verdict import Verdict
from aprcore.models.model import Model
from aprcore.network.stages import StageKey
from aprcore.records.report import CauseSought, Report, StageReport
from aprcore.runs.bisect import bisect, run
from aprcore.runs.request import SEARCHED, Request
from aprtui.cli import main
from aprtui.commands.run_options import _number_of_causes
from aprtui.drawing import VisibleConsole
from tiny import Tensors, opened, write_model, write_stages

TOKENS = (5, 0, 39, 7, 7, 12, 31, 2, 17, 3, 28, 9)
NOT_SEARCHED = "its cause was not searched for (--causes all)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with opened(write_model(tmp_path_factory.mktemp("model") / "m.apr")) as found:
        yield found


@pytest.fixture(scope="module")
def sound(model: Model) -> Tensors:
    stream = trace(model.graph, model.weights, NumpyBackend(1), TOKENS)
    return {key: tensor.copy() for key, tensor in stream}


def doubled(sound: Tensors, *stages: str) -> Tensors:
    """Every layer's tensor of these stages twice as large."""
    return {key: 2 * x if key.stage in stages else x for key, x in sound.items()}


def judged(model: Model, tensors: Tensors, folder: Path, **options: object) -> Report:
    dump = write_stages(folder / "dump", tensors, tokens=TOKENS, dtype="float32")
    return run(Request(model=model.path, trace=dump, **options))  # type: ignore[arg-type]


def of_stage(report: Report, stage: str) -> list[str]:
    return [s.reason for s in report.stages if s.key.stage == stage]


def test_what_explained_a_stage_is_all_that_is_tried_in_other_layers(
    model: Model, sound: Tensors, tmp_path: Path
) -> None:
    report = judged(model, doubled(sound, "attn_out"), tmp_path)
    found = [s.explanation for s in report.stages if s.key.stage == "attn_out"]
    tried = [explanation.tried for explanation in found if explanation is not None]
    assert len(tried) == len(found) > 1 and all(e is not None and e.named for e in found)
    assert tried[0] > 20 and max(tried[1:]) < 5
    assert len({e.clause() for e in found if e is not None}) == 1


def test_another_fault_of_the_same_stage_is_searched_for_anew(
    model: Model, sound: Tensors, tmp_path: Path
) -> None:
    wrong = doubled(sound, "attn_out")
    key = StageKey(1, "attn_out")
    wrong[key] = -sound[key]
    first, second, *_ = of_stage(judged(model, wrong, tmp_path), "attn_out")
    assert ("2" in first and "negated" in second) or "-1" in second


@pytest.mark.parametrize(("most", "searched"), [(0, 0), (1, 1), (None, 2)])
def test_as_many_stages_are_searched_as_are_asked_for(
    model: Model, sound: Tensors, tmp_path: Path, most: int | None, searched: int
) -> None:
    report = judged(model, doubled(sound, "attn_out", "ffn_norm"), tmp_path, causes=most)
    found = [of_stage(report, stage)[0] for stage in ("attn_out", "ffn_norm")]
    assert sum(NOT_SEARCHED not in reason for reason in found) == searched
    assert all(s.explanation is None for s in report.stages if NOT_SEARCHED in s.reason)


def test_the_option_takes_a_number_all_or_none(
    model: Model, sound: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = write_stages(
        tmp_path / "dump", doubled(sound, "attn_out"), tokens=TOKENS, dtype="float32"
    )
    arguments = ["bisect", str(model.path), "--trace", str(dump)]
    for words, is_named in (([], True), (["--causes", "all"], True), (["--causes", "none"], False)):
        assert main([*arguments, *words]) == 1
        assert (NOT_SEARCHED in capsys.readouterr().out) is not is_named
    assert main([*arguments, "--causes", "some"]) == 2
    assert "'some' is not a number of stages, all or none" in capsys.readouterr().err
    assert SEARCHED == Request().causes == 16 and _number_of_causes("3") == 3


def test_a_stage_without_a_known_cause_leaves_searches_to_others(
    model: Model, sound: Tensors, tmp_path: Path
) -> None:
    wrong, draw = dict(sound), np.random.default_rng(0)
    for key, x in sound.items():
        if key.stage == "q_post_rope":  # the scores that were made of it are wrong, too
            wrong[key] = x * (1 + 0.3 * draw.standard_normal(x.shape)).astype(np.float32)
    wrong[StageKey(2, "attn_softmax")] = 2 * sound[StageKey(2, "attn_softmax")]
    report = judged(model, wrong, tmp_path, causes=4)
    for stage in ("q_post_rope", "attn_scores"):
        searched = [NOT_SEARCHED not in reason for reason in of_stage(report, stage)]
        assert searched == [True, *[False] * (model.config.num_layers - 1)]
    assert "doubled" in of_stage(report, "attn_softmax")[2]


def test_a_verdict_does_not_wait_for_its_cause(
    model: Model, sound: Tensors, tmp_path: Path
) -> None:
    dump = write_stages(
        tmp_path / "dump", doubled(sound, "attn_out"), tokens=TOKENS, dtype="float32"
    )
    events = list(bisect(Request(model=model.path, trace=dump, causes=3)))
    found = [(a, b) for a, b in pairwise(events) if isinstance(a, CauseSought)]
    failed = [e for e in events if isinstance(e, StageReport) and e.verdict is Verdict.FAIL]
    # What is doubled, and what it is added to.
    assert [b for _, b in found] == failed and len(failed) == 2 * model.config.num_layers
    for sought, report in found:
        assert isinstance(report, StageReport) and report.explanation is not None
        assert sought.stage.key == report.key and sought.stage.explanation is None
        assert sought.stage.verdict is Verdict.FAIL and sought.stage.kernel == report.kernel
        assert report.explanation.clause() in report.reason
        assert report.explanation.clause() not in sought.stage.reason
    assert found[0][0].progress() == "search 1 of at most 3"
    # From the second layer on what is known explains it, and nothing is searched.
    assert {sought.progress() for sought, _ in found[2:]} == {"search 3 of at most 3"}


def test_a_sound_run_looks_for_nothing(model: Model, sound: Tensors, tmp_path: Path) -> None:
    dump = write_stages(tmp_path / "dump", sound, tokens=TOKENS, dtype="float32")
    events = list(bisect(Request(model=model.path, trace=dump)))
    assert not any(isinstance(event, CauseSought) for event in events)


def test_a_terminal_is_told_what_is_looked_for(
    model: Model, sound: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    dump = write_stages(
        tmp_path / "dump", doubled(sound, "attn_out"), tokens=TOKENS, dtype="float32"
    )
    arguments = ["bisect", str(model.path), "--trace", str(dump), "--causes", "all"]
    main(arguments)
    plain = capsys.readouterr()
    assert "looking for its cause" not in plain.err
    monkeypatch.setattr(VisibleConsole, "is_terminal", True)
    main(arguments)
    shown = capsys.readouterr()
    assert "layer 0 · attn_out fails; looking for its cause: search 1" in shown.err
    assert len(shown.out.splitlines()) == len(plain.out.splitlines())
