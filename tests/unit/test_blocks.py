"""What is judged block by block is judged as it would be whole."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.dumps.directory import TraceDirectory
from aprcore.engines import estimate as estimates
from aprcore.engines.arithmetic import RESULTS, Arithmetic
from aprcore.engines.estimate import BlockedEstimate, Estimate, Profile
from aprcore.engines.prediction import PredictionBackend
from aprcore.judging.compare import describe
from aprcore.judging.layouts import Layout
from aprcore.judging.noise import assess
from aprcore.judging.replay import Expectation, make_judgment
from aprcore.network.mask import CAUSAL, Mask
from aprcore.network.stages import StageKey
from aprcore.records.report import Report, StageReport
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from aprtui.demo import demo_path, load_faults
from tiny import SIZES, edited, trace_model, write_model, write_stages

HEADS, KV_HEADS, TOKENS, DIM = 4, 2, 11, 6
MASKS = (CAUSAL, Mask(3, 0), Mask(None, None), Mask(2, 4), Mask(0, 0))


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of [H, T, S] is large, and a block is a row or a few."""
    monkeypatch.setattr(estimates, "WHOLE_VALUES", 0)
    monkeypatch.setattr(estimates, "BLOCK_VALUES", 40)


def attention(mask: Mask, arithmetic: Arithmetic, past: int, *, is_exact: bool) -> list[Estimate]:
    """Scores, capped ones, their softmax and what it gives."""
    draw = np.random.default_rng(0)
    op = PredictionBackend([(None, Profile(arithmetic, False))], threads=1)

    def estimate(*shape: int) -> Estimate:
        value = draw.standard_normal(shape)
        return Estimate(value, np.zeros(shape) if is_exact else 1e-12 * draw.random(shape))

    q = estimate(TOKENS, HEADS * DIM)
    k, v = (estimate(past + TOKENS, KV_HEADS * DIM) for _ in "kv")
    scores = op.attention_scores(q, k, HEADS, KV_HEADS, 0.4, mask)
    capped = op.soft_cap(scores, 2.0)
    softmax = op.masked_softmax(capped, mask)
    return [scores, capped, softmax, op.weighted_values(softmax, v, KV_HEADS)]


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("arithmetic", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_exact", [True, False])
def test_what_is_expected_of_attention(
    blocked: None, monkeypatch: pytest.MonkeyPatch, mask: Mask, arithmetic: str, past: int,
    is_exact: bool,
) -> None:  # fmt: skip
    made = attention(mask, RESULTS[arithmetic], past, is_exact=is_exact)
    assert [isinstance(one, BlockedEstimate) for one in made] == [True, True, True, False]
    monkeypatch.undo()
    for block_by_block, whole in zip(made, attention(mask, RESULTS[arithmetic], past,
                                                     is_exact=is_exact)):  # fmt: skip
        assert not isinstance(whole, BlockedEstimate)
        found = block_by_block.whole()
        np.testing.assert_allclose(found.value, whole.value, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(found.variance, whole.variance, rtol=1e-10, atol=1e-40)
        assert found.token_dof == whole.token_dof
        assert found.correlation == pytest.approx(whole.correlation)


FAULTS: dict[str, Any] = {
    "nothing": np.s_[:0],
    "everything": np.s_[:],
    "head 2": np.s_[2],
    "token 7": np.s_[:, 7],
    "position 3": np.s_[:, :, 3],
    "head 1, token 4, position 5": np.s_[1, 4, 5],
    "head 3, token 10, position 10": np.s_[3, 10, 10],
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("correlation", [0.0, 0.2])
def test_what_stands_out(
    monkeypatch: pytest.MonkeyPatch, name: str, repeats: bool, correlation: float
) -> None:
    monkeypatch.setattr(estimates, "BLOCK_VALUES", 40)
    draw = np.random.default_rng(1)
    shape = HEADS, TOKENS, TOKENS
    value, variance = draw.standard_normal(shape), 1e-12 * (1 + draw.random(shape))
    if repeats:
        value[:, 5:] = value[:, :6]
    value[0, 3] = variance[0, 3] = 0
    observed = value + np.sqrt(variance) * draw.standard_normal(shape)
    observed[FAULTS[name]] += 1e-3
    expected = BlockedEstimate(shape, lambda head, rows: (value[head, rows], variance[head, rows]),
                               token_dof=9.0, correlation=correlation)  # fmt: skip
    layout = Layout(shape, shape, ("head", "token", "position"))
    found = make_judgment(observed.reshape(-1), Expectation(expected), layout)
    whole = make_judgment(observed.reshape(-1), Expectation(expected.whole()), layout)
    assert found is not None and whole is not None
    for ours, theirs in (
        (found.assessment, whole.assessment),
        (assess(observed, expected, layout), assess(observed, expected.whole(), layout)),
    ):
        assert ours.worst.name == theirs.worst.name
        assert ours.explained == theirs.explained == (name == "nothing")
        assert (ours.ratio, ours.floor, ours.worst.ratio, ours.worst.factor) == pytest.approx(
            (theirs.ratio, theirs.floor, theirs.worst.ratio, theirs.worst.factor), rel=1e-9
        )
    assert (found.relative_l2, found.cosine, found.bound) == pytest.approx(
        (whole.relative_l2, whole.cosine, whole.bound)
    )


def test_what_is_not_finite_is_not_judged() -> None:
    shape = 2, 3, 3
    layout = Layout(shape, shape, ("head", "token", "position"))
    value = np.ones(shape)
    value[1, 2, 2] = np.inf
    expected = BlockedEstimate(shape, lambda head, rows: (value[head, rows], value[head, rows]))
    assert not expected.is_finite()
    assert make_judgment(np.ones(18), Expectation(expected), layout) is None


def assert_same(found: Report, whole: Report) -> None:
    def plain(stage: StageReport) -> tuple[Any, ...]:
        return stage.key, stage.verdict, stage.reason, stage.permuted

    assert list(map(plain, found.stages)) == list(map(plain, whole.stages))
    for a, b in zip(found.stages, whole.stages):
        for ours, theirs in ((a.kernel, b.kernel), (a.model, b.model)):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert ours.relative_l2 == pytest.approx(theirs.relative_l2, rel=1e-6)
                assert ours.bound == pytest.approx(theirs.bound, rel=1e-6)
                assert ours.assessment.worst.name == theirs.assessment.worst.name


@pytest.mark.parametrize("fault", ["none", *load_faults()])
def test_runs_of_the_demo(blocked: None, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    oracle, faults = demo_path() / "oracle", load_faults()
    request = Request(model=demo_path() / "sound.apr", oracle=oracle)
    if fault in faults:
        request = replace(request, model=faults[fault].model, trace=faults[fault].trace)
    found = run(request)
    monkeypatch.undo()
    assert_same(found, run(request))


def test_a_large_tensor_is_read_again_and_not_kept(
    blocked: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "m.apr")
    tensors = trace_model(model)
    scores, softmax = StageKey(1, "attn_scores"), StageKey(1, "attn_softmax")
    hidden = ~CAUSAL.allowed(*tensors[scores].shape[1:])

    def junk(x: Any) -> Any:
        x = x.copy()
        x[:, hidden] = -np.inf
        return x

    oracle = write_stages(tmp_path / "o", edited(tensors, scores, junk))
    wrong = write_stages(tmp_path / "w", edited(tensors, softmax, lambda x: 0.5 * x))
    read: list[StageKey] = []
    read_part = TraceDirectory.read_part

    def noted(self: TraceDirectory, key: StageKey, start: int, stop: int) -> Any:
        read.append(key)
        return read_part(self, key, start, stop)

    monkeypatch.setattr(TraceDirectory, "read_part", noted)
    requests = [Request(model=model, oracle=oracle),
                Request(model=model, trace=wrong, oracle=oracle)]  # fmt: skip
    found = [run(request) for request in requests]
    assert {scores, softmax} <= set(read)
    monkeypatch.undo()
    for ours, request in zip(found, requests):
        assert_same(ours, run(request))
    assert found[0].first_divergence is None
    assert found[1].first_divergence is not None and found[1].first_divergence.key == softmax


@pytest.mark.parametrize("size", [0, 1, 5, 700_000])
def test_statistics_in_pieces(size: int) -> None:
    x = np.random.default_rng(2).standard_normal(size).astype(np.float32)
    x[::7] = 0
    found = describe(x)
    if size:
        wide = x.astype(np.float64)
        expected = (wide.mean(), wide.std(), wide.min(), wide.max())
        shown = (found.mean, found.std, found.minimum, found.maximum)
        assert found.rms == pytest.approx(np.sqrt(np.square(wide).mean()))
        assert shown == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert found.zeros == np.count_nonzero(wide == 0)
    lost = np.concatenate([x, np.array([np.nan, np.inf, -np.inf], np.float32)])
    again = describe(lost)
    assert (again.count, again.nans, again.infinities) == (size + 3, 1, 2)
    assert (again.mean == found.mean) or not size


MEASURED = """
import re, sys
from pathlib import Path
from aprtui.cli import main

code = main(sys.argv[1:])
# Not getrusage: what it tells of a process includes the one that it was forked from.
(peak_kb,) = re.findall(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
print(int(peak_kb) // 1024, file=sys.stderr)
sys.exit(code)
"""
LONG, MOST_MB = 4096, 1000


@pytest.mark.slow  # scores of 4096 tokens, three times
def test_memory_of_a_long_prompt(tmp_path: Path) -> None:
    """One layer, whose scores take 268 MB in float32: two such tensors are what a pass holds."""
    model = write_model(tmp_path / "m.apr", num_layers=1)
    ids = ",".join(map(str, np.random.default_rng(0).integers(0, SIZES["V"], LONG)))

    def run_measured(*words: str | Path) -> int:
        done = subprocess.run([sys.executable, "-c", MEASURED, *map(str, words)],
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return int(done.stderr.splitlines()[-1])

    stages = tmp_path / "o"
    run_measured("trace", model, "--tokens", ids, "--save-tensor", "all",
                 "--save-tensor-layers", "all", "--save-tensor-dir", stages)  # fmt: skip
    assert run_measured("bisect", model, "--tokens", ids) < MOST_MB
    assert run_measured("bisect", model, "--oracle", stages) < MOST_MB
    assert run_measured("bisect", model, "--trace", stages, "--oracle", stages) < MOST_MB
