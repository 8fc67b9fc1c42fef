"""The judge's backend: the reference's values, and variances that real rounding bears out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aprcore.engines.arithmetic import RESULTS, engine_arithmetic
from aprcore.engines.estimate import Estimate, Profile
from aprcore.engines.prediction import PredictionBackend
from aprcore.engines.reference import ReferenceBackend
from aprcore.network.mask import Mask
from aprcore.network.rope import Rope
from closeness import assert_close
from tiny import ArrayWeight

EXACT = ReferenceBackend()
F32, F16 = RESULTS["f32"], RESULTS["f16"]
POSITIONS = np.arange(9)
ROPE = Rope(theta=10000.0, head_dim=8)

# Squared steps of a weight in memory, as a file would give them.
STEPS = {"F32": 0.0, "F16": None, "Q": 0.01**2}


class SteppedWeight(ArrayWeight):
    """A weight in memory that states its rounding steps."""

    def step_squares(self, start: int, stop: int) -> tuple[np.ndarray, int]:
        rows = self.values[start:stop].reshape(stop - start, -1)
        if self.dtype == "F16":
            steps = np.spacing(np.abs(rows).astype(np.float16)).astype(np.float32)
            return steps**2, 1
        return np.full(rows.shape, STEPS[self.dtype], np.float32), 1


def weight(seed: int, *shape: int, dtype: str = "F32", scale: float = 0.3) -> SteppedWeight:
    values = scale * np.random.default_rng(seed).standard_normal(shape)
    return SteppedWeight("w", values.astype(np.float32), dtype)


def array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def backend(arithmetic: Any = F32, *, weights_rounded: bool = False) -> PredictionBackend:
    return PredictionBackend([(None, Profile(arithmetic, weights_rounded))], threads=1)


OPERATIONS: dict[str, Callable[[Any, Callable[[np.ndarray], Any]], Any]] = {
    "embed": lambda op, wrap: op.embed(np.array([3, 0, 3]), weight(1, 5, 6)),
    "rms_norm": lambda op, wrap: op.rms_norm(wrap(array(2, 9, 16)), weight(3, 8), 1e-5),
    "linear": lambda op, wrap: op.linear(
        wrap(array(4, 9, 16)), [weight(5, 7, 16), weight(6, 3, 16)]
    ),
    "add_bias": lambda op, wrap: op.add_bias(wrap(array(7, 9, 5)), [weight(8, 2), weight(9, 3)]),
    "columns": lambda op, wrap: op.columns(wrap(array(10, 9, 5)), 1, 4),
    "rows": lambda op, wrap: op.rows(wrap(array(10, 9, 5)), 1, 4),
    "rope": lambda op, wrap: op.rope(wrap(array(11, 9, 24)), POSITIONS, ROPE),
    "attention_scores": lambda op, wrap: op.attention_scores(
        wrap(array(12, 9, 24)), wrap(array(13, 9, 8)), 6, 2, 0.3, Mask(4)
    ),
    "masked_softmax": lambda op, wrap: op.masked_softmax(wrap(array(14, 3, 9, 9)), Mask(4)),
    "soft_cap": lambda op, wrap: op.soft_cap(wrap(3 * array(22, 9, 5)), 1.5),
    "scale": lambda op, wrap: op.scale(wrap(array(23, 9, 5)), 7.3),
    "rms_norm by 1 + w": lambda op, wrap: op.rms_norm(
        wrap(array(24, 9, 16)), weight(25, 16), 1e-5, 1.0
    ),
    "weighted_values": lambda op, wrap: op.weighted_values(
        wrap(np.abs(array(15, 6, 9, 9))), wrap(array(16, 9, 8)), 2
    ),
    "activation": lambda op, wrap: op.activation(wrap(array(17, 9, 5)), "silu"),
    "add": lambda op, wrap: op.add(wrap(array(18, 9, 5)), wrap(array(19, 9, 5))),
    "multiply": lambda op, wrap: op.multiply(wrap(array(20, 9, 5)), wrap(array(21, 9, 5))),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("carried", [False, True])
def test_values_are_the_references(name: str, carried: bool) -> None:
    op = backend(weights_rounded=True)

    def wrap(x: np.ndarray) -> Estimate:
        return Estimate(x, np.full(x.shape, 1e-8)) if carried else op.from_host(x)

    expected = OPERATIONS[name](EXACT, lambda x: x)
    found = OPERATIONS[name](op, wrap)
    # The products are written anew, in another order of summation.
    assert_close(found.value, expected, 1e-14)
    assert found.variance.shape == found.value.shape
    assert np.isfinite(found.variance).all() and (found.variance >= 0).all()


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in ("embed",)])
def test_an_error_of_the_input_is_carried_on(name: str) -> None:
    """Noise put on the inputs comes out with the predicted energy, or somewhat less."""
    size = 1e-4
    generator = np.random.default_rng(99)
    exact = OPERATIONS[name](EXACT, lambda x: x)
    op = backend()
    plain = OPERATIONS[name](op, op.from_host).variance.sum()
    carried = OPERATIONS[name](op, lambda x: Estimate(x, np.full(x.shape, size**2))).variance.sum()
    measured = []
    for _ in range(100):
        noisy = OPERATIONS[name](EXACT, lambda x: x + size * generator.standard_normal(x.shape))
        measured.append(np.square(noisy - exact).sum())
    # RMSNorm's own dependence on the input's length is left out: an upper estimate there.
    low = 0.5 if name == "rms_norm" else 0.85
    assert low < np.mean(measured) / (carried - plain) < 1.15


def test_rounded_weights_make_the_predicted_error() -> None:
    x = array(1, 7, 512)
    sound = 0.02 * array(2, 300, 512)
    stored = sound.astype(np.float16)
    op = backend(weights_rounded=True)
    kept = SteppedWeight("w", stored.astype(np.float32), "F16")
    found = op.linear(op.from_host(x), [kept])
    error = np.square(x @ stored.astype(np.float64).T - x @ sound.T)
    # 2,100 results of 7 independent tokens: the mean scatters by some 3 percent.
    assert error.sum() / found.variance.sum() == pytest.approx(1, abs=0.15)


def test_weights_that_are_not_rounded_make_none() -> None:
    x = array(1, 7, 64)
    kept = weight(3, 30, 64, dtype="Q")
    rounded, plain = (
        backend(weights_rounded=flag).linear(backend().from_host(x), [kept])
        for flag in (True, False)
    )
    step = STEPS["Q"]
    assert step is not None
    expected = np.square(x).sum(axis=1)[:, None] * step / 12
    assert_close(rounded.variance - plain.variance, np.broadcast_to(expected, (7, 30)), 1e-5)


def test_half_precision_storage_makes_the_predicted_error() -> None:
    x, y = array(5, 200, 300), array(6, 200, 300)
    op = backend(F16)
    found = op.add(op.from_host(x), op.from_host(y))
    error = np.square((x + y).astype(np.float16).astype(np.float64) - (x + y))
    assert error.sum() / found.variance.sum() == pytest.approx(1, abs=0.02)


def test_float32_products_stay_within_the_prediction() -> None:
    x, w = array(7, 16, 2048).astype(np.float32), weight(8, 256, 2048)
    op = backend()
    found = op.linear(op.from_host(x), [w])
    sequential = np.cumsum((x[:, None, :] * w.values[None]), axis=2, dtype=np.float32)[..., -1]
    error = np.square(sequential - found.value)
    # One sum after the other, the worst order. The formula takes every rounding at its largest
    # for the exponent (0.54 of that on average) and partial sums both wandering and growing.
    assert 0.2 < error.sum() / found.variance.sum() < 1


@pytest.mark.parametrize(
    ("word", "dtype", "block", "half"), [("q8_0", "F32", 32, True), ("ggml", "Q8_0", 32, True),
                                         ("ggml", "Q6_K", 256, False), ("int8", "F32", 256, False)]
)  # fmt: skip
def test_activations_rounded_to_eight_bits(word: str, dtype: str, block: int, half: bool) -> None:
    x, w = array(9, 12, 256), weight(10, 400, 256)
    object.__setattr__(w, "dtype", dtype)
    op = backend(engine_arithmetic({"linear": word}).parts["linear"])
    found = op.linear(op.from_host(x), [w])
    blocks = x.reshape(12, -1, block).astype(np.float32)
    step = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    codes = np.round(blocks / step).astype(np.float64)
    scale = step.astype(np.float16) if half else step
    rounded = (codes * scale.astype(np.float64)).reshape(x.shape)
    # What is rounded is known: its product is reproduced, and no noise is allowed for it.
    exact = rounded @ w.values.astype(np.float64).T
    assert_close(found.value, exact, 1e-6)
    plain = backend(F32).linear(op.from_host(x), [w])
    assert found.variance.sum() < 1.1 * plain.variance.sum()
    assert np.square(found.value - plain.value).sum() > 1000 * plain.variance.sum()


def test_sides_that_are_stacked_are_judged_as_on_their_own() -> None:
    profiles = Profile(F32, False), Profile(F16, True)
    x = array(11, 8, 64), array(12, 8, 64)
    w, gain, bias = (
        weight(13, 24, 64, dtype="Q"),
        weight(14, 64, dtype="Q"),
        weight(15, 24, dtype="Q"),
    )
    both = PredictionBackend([(8, profiles[0]), (8, profiles[1])])

    def run(op: PredictionBackend, y: Estimate) -> Estimate:
        return op.add_bias(op.linear(op.rms_norm(y, gain, 1e-6), [w]), [bias])

    stacked = run(both, both.from_host(np.concatenate(x)))
    for number, profile in enumerate(profiles):
        alone = run(PredictionBackend([(None, profile)]), both.from_host(x[number]))
        rows = slice(8 * number, 8 * number + 8)
        assert_close(stacked.value[rows], alone.value, 1e-14)
        assert_close(stacked.variance[rows], alone.variance, 1e-6)


def test_repeated_tokens_are_one_independent_direction() -> None:
    op = backend(weights_rounded=True)
    w = weight(16, 10, 32, dtype="Q")
    alike = op.linear(op.from_host(np.tile(array(17, 1, 32), (20, 1))), [w])
    apart = op.linear(op.from_host(np.eye(20, 32)), [w])
    assert alike.token_dof == pytest.approx(1)
    assert apart.token_dof == pytest.approx(20)
    # The engine's own roundoff does not repeat.
    assert backend().linear(op.from_host(np.ones((20, 32))), [w]).token_dof is None
