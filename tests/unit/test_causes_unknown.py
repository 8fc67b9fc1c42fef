"""Causes by experiment: what is in no catalogue has a symptom, and what is sound has no cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.judging.noise import assess
from aprcore.network.stages import StageKey
from cause_worlds import (
    LAYER,
    TOKENS,
    D,
    E,
    Floats,
    H,
    T,
    V,
    World,
    all_scores,
    edited,
    explained,
    rotate,
    softmax,
    weighted,
)
from tiny import draw_weights, trace_model, write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("causes") / "m.apr")


@pytest.fixture(scope="module")
def world(path: Path) -> World:
    return World(trace_model(path, TOKENS), draw_weights())


def test_a_sound_output_with_a_spoilt_value_names_nothing(path: Path, world: World) -> None:
    for stage in ("q_post_rope", "attn_softmax", "ffn_gate", "post_attn_residual", "ffn_norm"):
        key = StageKey(LAYER, stage)
        observed = world.tensors[key].copy()
        observed[tuple(n - 1 for n in observed.shape)] += np.float32(0.37)
        found = explained(path, world.tensors, key, observed)
        assert not found.named, (stage, found.named)
        assert found.symptom is not None and "only in" in found.symptom


def test_causes_that_cannot_be_told_apart_are_both_named(path: Path) -> None:
    tokens = (9,)
    tensors = trace_model(path, tokens)
    key = StageKey(LAYER, "q_post_rope")
    q = tensors[StageKey(LAYER, "qkv_bias")][:, : H * D].reshape(1, H, D).astype(np.float64)
    # Token 0 at position 1: off by one, or the length of the text taken for the position.
    found = explained(path, tensors, key, rotate(q, start=2), tokens=tokens)
    assert {c.name for c in found.named} >= {"RoPE positions off by +2"}
    attention = StageKey(LAYER, "post_attn_residual")
    x = tensors[StageKey(0, "post_ffn_residual")].astype(np.float64)
    y = tensors[StageKey(LAYER, "attn_out")].astype(np.float64)
    found = explained(path, tensors, attention, 2 * (x + y), tokens=tokens)
    assert [c.name for c in found.named] == ["sum doubled"]


@pytest.mark.parametrize(
    ("stage", "change", "symptom"),
    [
        ("ffn_silu", lambda x: x + 0.25, "a constant offset 0.25"),
        ("ffn_out", lambda x: x * np.linspace(1, 2, T)[:, None], "a factor for each token"),
        ("post_attn_residual", lambda x: x * np.linspace(1, 2, E), "a factor for each dim"),
        ("post_attn_residual", lambda x: x + np.linspace(1, 2, E) ** 2, "an addend for each dim"),
        ("q_post_rope", lambda x: edited(x, (slice(None), slice(D, 2 * D)),
                                         x[:, D : 2 * D] ** 2), "head 1"),
        ("q_post_rope", lambda x: edited(x, (slice(None), slice(2 * D, None)),
                                         x[:, 2 * D :] ** 2), "kv group 1"),
        ("ffn_gate", lambda x: edited(x, slice(5, None), x[5:] ** 2), "from token 5 on"),
        ("ffn_gate", lambda x: edited(x, (slice(None), slice(24, None)), x[:, 24:] ** 2),
         "dims 24 to 27"),
        ("ffn_silu", lambda x: np.abs(x), "signs flipped"),
        ("ffn_silu", lambda x: x + np.sin(40 * x), "no pattern"),
    ],
)  # fmt: skip
def test_an_unknown_fault_has_a_symptom(
    path: Path, world: World, stage: str, change: Callable[[Floats], Floats], symptom: str
) -> None:
    key = StageKey(LAYER, stage)
    found = explained(path, world.tensors, key, change(world.at(stage)))
    assert not found.named, found.named
    assert found.symptom is not None and symptom in found.symptom, found.symptom
    assert found.causes and not any(c.explains for c in found.causes)


def test_a_missing_addend_is_recognised(path: Path, world: World) -> None:
    key = StageKey(LAYER, "ffn_out")
    observed = world.at("ffn_out") + world.at("attn_out")
    found = explained(path, world.tensors, key, observed)
    assert found.symptom == "1 times attn_out is added"


def test_a_cause_inside_a_span_is_named(path: Path, world: World) -> None:
    """Fused attention dumps neither scores nor weights."""
    fused = {
        k: x for k, x in world.tensors.items() if k.stage not in ("attn_scores", "attn_softmax")
    }
    key = StageKey(LAYER, "attention")
    observed = weighted(softmax(all_scores(world)), world.part("v"))
    found = explained(path, fused, key, observed)
    assert [c.name for c in found.named] == ["attn_softmax: no causal mask"]
    found = explained(path, fused, key, observed**2)
    assert not found.named and found.symptom is not None
    assert "attn_scores, attn_softmax" in found.symptom and "dump" in found.symptom


@pytest.mark.parametrize("period", [8, 300, 512])
def test_a_long_text_is_not_tried_whole(tmp_path: Path, period: int) -> None:
    path = write_model(tmp_path / "m.apr", num_layers=2)
    tokens = tuple(int(t) for t in np.random.default_rng(3).integers(0, V, 700))
    tensors = trace_model(path, tokens)
    key = StageKey(1, "q_post_rope")
    q = tensors[StageKey(1, "qkv_bias")][:, : H * D].reshape(-1, H, D).astype(np.float64)
    pieces = [rotate(q[i : i + period]) for i in range(0, len(q), period)]
    found = explained(path, tensors, key, np.concatenate(pieces), tokens=tokens)
    assert [c.name for c in found.named] == [f"RoPE positions restarting every {period} tokens"]


def test_few_alternatives_are_assessed_whole(
    path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample refutes most of them: a pass over all values, part by part, takes far longer."""
    assessed = 0

    def counted(*args: Any) -> Any:
        nonlocal assessed
        assessed += 1
        return assess(*args)

    monkeypatch.setattr("aprcore.causes.experiment.assess", counted)
    wrong = edited(world.at("attn_scores"), (1, 6), 0.0)
    found = explained(path, world.tensors, StageKey(LAYER, "attn_scores"), wrong)
    names = [cause.name for cause in found.named]
    assert names == ["not computed (left at zero), in head 1, token 6 only"]
    assert found.tried > 50
    assert assessed <= 8


def test_wrong_rows_that_come_from_nowhere_are_not_matched_with_all(path: Path) -> None:
    """Of many wrong indices, a few tell whether they are others' values."""
    tokens = tuple(np.random.default_rng(6).integers(0, V, 64).tolist())
    tensors = trace_model(path, tokens)
    key = StageKey(LAYER, "ffn_up")
    right = tensors[key].astype(np.float64)

    def tried(wrong: Floats) -> list[str]:
        found = explained(path, tensors, key, wrong, tokens=tokens)
        return [cause.name for cause in found.causes if "tokens" in cause.name]

    noise = right + np.random.default_rng(7).standard_normal(right.shape)
    assert not any("from others" in name for name in tried(noise))
    assert any("tokens permuted" in name for name in tried(np.roll(right, 5, axis=0)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stage", ["ffn_gate", "attn_out", "attn_norm", "attention"])
def test_a_random_error_is_no_arithmetic(path: Path, world: World, stage: str, seed: int) -> None:
    """It is of the size that sums in bfloat16 have, and not spread as they are."""
    key = StageKey(LAYER, stage)
    sound = world.tensors[key].astype(np.float64)
    draw = np.random.default_rng(seed).standard_normal(sound.shape)
    for error in (0.01 * sound * draw, 0.01 * float(sound.std()) * draw):
        found = explained(path, world.tensors, key, (sound + error).astype(np.float32))
        assert not found.named, [cause.name for cause in found.named]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("change", [np.negative, np.zeros_like, lambda x: 2 * x, lambda x: x + 1])
def test_a_fit_to_a_value_or_two_is_no_cause(
    path: Path, world: World, change: Callable[[Floats], Floats], count: int
) -> None:
    """It says what is wrong and not why: any of many alternatives may give one value."""
    for stage in ("q_post_rope", "attn_out", "ffn_norm"):
        key = StageKey(LAYER, stage)
        observed = world.at(stage).copy()
        observed[3, 4 : 4 + count] = change(observed[3, 4 : 4 + count])
        found = explained(path, world.tensors, key, observed)
        assert not found.named, (stage, found.named)
        assert found.symptom is not None and "token 3" in found.symptom


def test_a_few_values_are_enough_where_all_of_them_agree(path: Path, world: World) -> None:
    observed = world.at("attn_out").copy()
    observed[3, 4:10] *= -1
    found = explained(path, world.tensors, StageKey(LAYER, "attn_out"), observed)
    assert "negated" in found.clause() and "dims 4 to 9" in found.clause()


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("stage", ["attn_scores", "attention", "ffn_up"])
def test_values_near_their_places_are_not_in_another_order(
    path: Path, world: World, stage: str, size: float
) -> None:
    """Of many values sorted ones agree, however small errors are spread."""
    sound = world.at(stage)
    noise = np.random.default_rng(5).standard_normal(sound.shape)
    observed = sound + size * float(sound.std()) * noise
    if stage == "attn_scores":
        observed *= np.tri(T)
    found = explained(path, world.tensors, StageKey(LAYER, stage), observed)
    assert not found.named, found.named
    assert found.symptom is not None
    assert not any(word in found.symptom for word in ("order", "permuted")), found.symptom
