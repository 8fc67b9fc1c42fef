"""Which arithmetic explains a dump, and what float64 rounded on dump looks like."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aprcore.engines.arithmetic import (
    RESULTS,
    Arithmetic,
    EngineArithmetic,
    engine_arithmetic,
    same_everywhere,
)
from aprcore.engines.forward import trace
from aprcore.engines.numpy import NumpyBackend
from aprcore.engines.reference import ReferenceBackend
from aprcore.ground.precision import BFLOAT16
from aprcore.judging.arithmetic import Inferred, infer_arithmetic
from aprcore.judging.layouts import layout_of
from aprcore.judging.noise import assess
from aprcore.judging.replay import RecordedSide
from aprcore.models.model import Model
from aprcore.network.graph import computation_order
from aprcore.network.stages import StageKey
from aprcore.records.report import Report
from aprcore.runs.bisect import bisect
from aprcore.runs.request import Request
from tiny import Tensors, opened, write_model, write_stages

TOKENS = (5, 0, 39, 7, 7, 12, 31, 2, 17, 3, 28, 9)
F32, F64 = RESULTS["f32"], RESULTS["f64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with opened(write_model(tmp_path_factory.mktemp("model") / "m.apr")) as found:
        yield found


@pytest.fixture(scope="module")
def in_float64(model: Model) -> Tensors:
    """A pass in float64 whose tensors are rounded to float32 when they are written."""
    stream = trace(model.graph, model.weights, ReferenceBackend(), TOKENS)
    return {key: tensor.astype(np.float32) for key, tensor in stream}


@pytest.fixture(scope="module")
def in_float32(model: Model) -> Tensors:
    stream = trace(model.graph, model.weights, NumpyBackend(1), TOKENS)
    return {key: tensor.copy() for key, tensor in stream}


def blamed(model: Model, tensors: Tensors, arithmetic: Arithmetic) -> set[str]:
    """Stages whose output rounding does not explain."""
    side = RecordedSide(
        model.graph, model.weights, TOKENS, len(TOKENS),
        same_everywhere(arithmetic), read=tensors.get,
    )  # fmt: skip
    found = set()
    for key in sorted(tensors, key=computation_order):
        side.enter(key)
        expected = side.expect(key)
        assert expected is not None
        layout = layout_of(key, side.sizes(), tensors[key].size)
        if not assess(tensors[key], expected.estimate, layout).explained:
            found.add(key.stage)
    return found


def detect(
    model: Model, tensors: Tensors, dtype: str | None = None, **stated: str
) -> tuple[EngineArithmetic, list[Inferred]]:
    side = RecordedSide(
        model.graph, model.weights, TOKENS, len(TOKENS), engine_arithmetic({}), read=tensors.get
    )
    return infer_arithmetic(side, tensors, stated, dtype)


def test_what_is_lost_on_dump_is_blamed_as_float32_and_not_as_float64(
    model: Model, in_float64: Tensors
) -> None:
    assert "post_attn_residual" in blamed(model, in_float64, F32)
    assert blamed(model, in_float64, F64) == set()


def test_a_fault_in_float64_is_still_one(model: Model, in_float64: Tensors) -> None:
    key = StageKey(1, "post_ffn_residual")
    wrong = in_float64[key].copy()
    wrong[3] *= np.float32(1 + 2.0**-18)
    assert blamed(model, in_float64 | {key: wrong}, F64) >= {"post_ffn_residual"}


def test_the_two_are_told_apart(model: Model, in_float64: Tensors, in_float32: Tensors) -> None:
    engine, found = detect(model, in_float64)
    # Only a sum shows what each of its terms lost on dump; float32 explains all else as well.
    assert engine.parts["residual"] == F64
    assert all(x.explained == x.judged > 0 for x in found)
    engine, found = detect(model, in_float32)
    assert set(engine.parts.values()) == {F32} == {engine.common}
    assert all(x.explained == x.judged > 0 for x in found)


def test_a_dump_in_a_half_type_loses_more(model: Model, in_float64: Tensors) -> None:
    def shortened(x: np.ndarray) -> np.ndarray:
        bits = x.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF_0000)
        return rounded.astype(np.uint32).view(np.float32)

    dump = {key: shortened(tensor) for key, tensor in in_float64.items()}
    half = F64.dumped_as("bfloat16")
    assert half.stored is BFLOAT16
    assert blamed(model, dump, half) == set()
    assert "post_attn_residual" in blamed(model, dump, RESULTS["bf16"])
    # What float32 and float64 would have made of it is below what was lost.
    engine, _ = detect(model, dump, "bfloat16")
    assert engine.common in (half, F32.dumped_as("bfloat16"))


@pytest.mark.parametrize("stated", ["f64", None])
def test_a_dump_in_float64_is_judged_as_one(
    model: Model, in_float64: Tensors, tmp_path: Path, stated: str | None
) -> None:
    dump = write_stages(tmp_path / "dump", in_float64, tokens=TOKENS, dtype=None)
    events = list(bisect(Request(model=model.path, trace=dump, arithmetic=stated)))
    assert isinstance(events[-1], Report) and events[-1].first_divergence is None
    notes = " ".join(events[-1].header.notes)
    assert ("f64 explains" in notes) is (stated is None)


def test_only_a_coarser_type_loses_something_on_dump() -> None:
    assert F32.dumped_as("bfloat16").stored is BFLOAT16
    for dtype in (None, "float32", "float64", "int8"):
        assert F64.dumped_as(dtype) == F64


def halves(tensors: Tensors) -> Tensors:
    return {key: x.astype(np.float16).astype(np.float32) for key, x in tensors.items()}


def test_a_float32_engine_may_dump_halves(model: Model, in_float32: Tensors) -> None:
    dumped = halves(in_float32)
    assert blamed(model, dumped, F32.dumped_as("float16")) == set()
    # Held to float32, or to an engine that computes with the halves, it is wrong.
    assert "ffn_out" in blamed(model, dumped, F32)
    assert "post_attn_residual" in blamed(model, dumped, RESULTS["f16"])
    engine, found = detect(model, dumped, "float16")
    assert engine.common == F32.dumped_as("float16")
    assert all(x.explained == x.judged > 0 for x in found)


def test_a_dump_as_fine_as_the_engine_loses_nothing() -> None:
    assert F32.dumped_as("float32") is F32
    assert F32.dumped_as(None) is F32
    half = RESULTS["f16"]
    assert half.dumped_as("float16") is half
    assert half.dumped_as("float32") is half
