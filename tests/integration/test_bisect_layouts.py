"""A whole run with a side that lays its tensors out in another way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from bisect_runs import LAYOUTS, Q, everywhere, found_at, heads_first, pairs, verdicts
from tiny import Tensors, edited, embedded_tokenizer, trace_model, write_model, write_stages


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = ["[bold]", "\x1b[2J", *map(chr, range(ord("a"), ord("a") + 26))]
    metadata = embedded_tokenizer(vocabulary)
    return write_model(tmp_path_factory.mktemp("model") / "m.apr", metadata=metadata)


@pytest.fixture(scope="module")
def tensors(model: Path) -> Tensors:
    return trace_model(model)


@pytest.fixture(scope="module")
def oracle(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stages(tmp_path_factory.mktemp("oracle") / "o", tensors, prompt="sums")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("setting", ["trace", "trace and model", "oracle", "oracle and model"])
def test_another_layout_is_never_a_divergence(
    model: Path, oracle: Path, tensors: Tensors, tmp_path: Path, name: str, setting: str
) -> None:
    dump = write_stages(tmp_path / "d", LAYOUTS[name](tensors))
    request = {
        "trace": Request(trace=dump, oracle=oracle),
        "trace and model": Request(model=model, trace=dump, oracle=oracle),
        "oracle": Request(trace=oracle, oracle=dump),
        "oracle and model": Request(model=model, oracle=dump),
    }[setting]
    report = run(request)
    assert not report.diverges(), report.summary()
    assert set(verdicts(report).values()) <= {"PASS", "LAYOUT"}
    changed = any(not np.array_equal(a, b) for a, b in zip(LAYOUTS[name](tensors).values(),
                                                          tensors.values()))  # fmt: skip
    assert changed
    if "scores with -" not in name and name != "raw scores":
        assert Verdict.LAYOUT in report.counts


@pytest.mark.parametrize("has_model", [True, False], ids=["with model", "dumps only"])
def test_both_sides_may_have_their_own_layout(
    model: Path, tensors: Tensors, tmp_path: Path, has_model: bool
) -> None:
    trace = write_stages(tmp_path / "t", everywhere(tensors, "q_post_rope", pairs))
    oracle = write_stages(tmp_path / "o", everywhere(tensors, "q_post_rope", heads_first))
    report = run(Request(model=model if has_model else None, trace=trace, oracle=oracle))
    assert not report.diverges(), report.summary()
    assert found_at(report, Q).verdict is Verdict.LAYOUT


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("has_model", [True, False], ids=["with model", "dumps only"])
def test_a_wrong_stage_is_found_in_another_layout_too(
    model: Path, oracle: Path, tensors: Tensors, tmp_path: Path, name: str, has_model: bool
) -> None:
    stage = next((s for s in ("q", "k") if name.startswith(f"{s} ")), "attn_scores")
    key = StageKey(1, {"q": "q_post_rope", "k": "k_post_rope"}.get(stage, stage))

    def spoil(x: np.ndarray) -> np.ndarray:
        x[..., -1, 0] += 3 * np.abs(x).max()  # in the last token, which every layout has
        return x

    dump = write_stages(tmp_path / "d", LAYOUTS[name](edited(tensors, key, spoil)))
    report = run(Request(model=model if has_model else None, trace=dump, oracle=oracle))
    assert report.first_divergence is not None
    assert report.first_divergence.key == key
    assert report.first_divergence.verdict is Verdict.FAIL


def test_a_permutation_within_a_head_that_no_engine_uses_is_a_fault(
    oracle: Path, tensors: Tensors, tmp_path: Path
) -> None:
    trace = write_stages(tmp_path / "t", edited(tensors, Q, lambda x: np.roll(x, 1, axis=1)))
    assert found_at(run(Request(trace=trace, oracle=oracle)), Q).verdict is Verdict.FAIL
