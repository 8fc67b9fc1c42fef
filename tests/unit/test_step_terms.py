"""Every constant of the step sizes, measured anew on Gaussian weights or worked out by itself."""

from __future__ import annotations

from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
from gguf.quants import quantize

from aprcore.engines.arithmetic import EXACT
from aprcore.engines.estimate import Profile
from aprcore.engines.prediction import PredictionBackend
from aprcore.judging.layouts import Layout
from aprcore.judging.noise import assess
from aprcore.quant.quantise import quantise
from aprcore.quant.steps import SHRINKAGE, join_rows, step_squares
from aprcore.quant.types import FORMATS, dequantize

# The smallest subnormal number of float16, which all of them are multiples of.
SMALLEST = 2.0**-24


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def expand(dtype: str, raw: np.ndarray) -> np.ndarray:
    """Stored blocks as float64 [n, values of a block]."""
    row = FORMATS[dtype]
    out = np.empty(raw.size // row.block_bytes * row.block_values, np.float32)
    dequantize(dtype, np.ascontiguousarray(raw).reshape(-1), out, row_length=row.block_values)
    return out.reshape(-1, row.block_values).astype(np.float64)


def steps_of(dtype: str, raw: np.ndarray) -> np.ndarray:
    """Squared steps of every group, float64 [blocks, groups]."""
    size = FORMATS[dtype].block_values
    flat = np.ascontiguousarray(raw).reshape(-1)
    count = flat.size // FORMATS[dtype].block_bytes * size
    squares, group = step_squares(dtype, flat, count, row_length=size)
    assert squares.shape == (count // size, size // group)
    return squares.astype(np.float64)


def put(blocks: np.ndarray, offset: int, half: float) -> None:
    blocks[:, offset : offset + 2] = np.array([half], "<f2").view(np.uint8)


class TestScales:
    """A float16 scale in front of 32 values: q times its own rounding, where that is large."""

    @pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
    def test_the_mean_square_of_a_code(self, dtype: str) -> None:
        weights = normal(0, 1, 32 * 4000).astype(np.float32)
        raw = quantize(weights, gguf.GGMLQuantizationType[dtype])
        blocks = raw.reshape(-1, FORMATS[dtype].block_bytes).copy()
        has_minimum = dtype.endswith("_1")
        put(blocks, 0, 1.0)
        if has_minimum:
            put(blocks, 2, 0.0)
        measured = np.square(expand(dtype, blocks)).mean()  # with a scale of 1, the codes
        # A subnormal scale is spaced as widely as all of them are, so that d² = scale² + q², and
        # one more for a minimum of 0, in units of that spacing.
        put(blocks, 0, 3 * SMALLEST)
        squares = steps_of(dtype, blocks[:1])[0, 0] / SMALLEST**2
        code_square = squares - 3**2 - has_minimum
        # The scale of a symmetric type is of the largest value of either sign, which exceeds the
        # largest one: its codes are smaller than predicted.
        low, high = (0.97, 1.03) if has_minimum else (0.76, 0.86)
        assert low < measured / code_square < high

    @pytest.mark.parametrize("dtype", ["Q4_1", "Q5_1"])
    def test_a_minimum_rounds_to_its_own_spacing(self, dtype: str) -> None:
        blocks = np.zeros((1, FORMATS[dtype].block_bytes), np.uint8)
        put(blocks, 0, 0.5)
        for minimum, spacing in ((1024.0, 1.0), (3.0, 2.0**-9), (-60000.0, 32.0)):
            put(blocks, 2, minimum)
            assert steps_of(dtype, blocks)[0, 0] == pytest.approx(0.25 + spacing**2, rel=1e-3)

    @pytest.mark.parametrize("dtype", ["Q4_0", "Q5_0", "Q8_0"])
    def test_without_a_minimum_the_bytes_after_the_scale_are_codes(self, dtype: str) -> None:
        blocks = np.full((1, FORMATS[dtype].block_bytes), 0x64, np.uint8)
        put(blocks, 0, 0.5)
        assert steps_of(dtype, blocks)[0, 0] == pytest.approx(0.25, rel=1e-2)


# K-quants: bytes of the unit and of the minima's unit, of the codes' low bits and the bytes that
# set all of these to 1; the largest code, and whether it counts from a minimum.
K_QUANTS: dict[str, dict[str, Any]] = {
    "Q2_K": {"unit": 80, "minimum": 82, "codes": (slice(16, 80), 0x55), "largest": 3},
    "Q3_K": {"unit": 108, "minimum": None, "codes": (slice(32, 96), 0x55), "largest": 4},
    "Q4_K": {"unit": 0, "minimum": 2, "codes": (slice(16, 144), 0x11), "largest": 15},
    "Q5_K": {"unit": 0, "minimum": 2, "codes": (slice(48, 176), 0x11), "largest": 31},
    "Q6_K": {"unit": 208, "minimum": None, "codes": (slice(0, 128), 0x11), "largest": 32},
}


def ones(dtype: str, unit: float, minimum: float, seed: int = 1) -> np.ndarray:
    """Blocks of all kinds of scales, with all codes equal."""
    known = K_QUANTS[dtype]
    blocks = np.random.default_rng(seed).integers(0, 256, (300, FORMATS[dtype].block_bytes))
    blocks = blocks.astype(np.uint8)
    blocks[:, known["codes"][0]] = known["codes"][1]
    put(blocks, known["unit"], unit)
    if known["minimum"] is not None:
        put(blocks, known["minimum"], minimum)
    if dtype == "Q5_K":
        blocks[:, 16:48] = 0
    if dtype == "Q6_K":
        blocks[:, 128:192] = 0
    return blocks


def decoded_scales(dtype: str, unit: float) -> np.ndarray:
    """Scales of the sub-blocks of `ones`, from what another code changes in the values."""
    blocks = ones(dtype, unit, 0.0)
    where, byte = K_QUANTS[dtype]["codes"]
    lower = blocks.copy()
    lower[:, where] = 0
    assert byte
    size = 16 if dtype in ("Q2_K", "Q3_K", "Q6_K") else 32
    difference = expand(dtype, blocks) - expand(dtype, lower)
    return difference.reshape(len(blocks), -1, size)[:, :, 0]


class TestSuperBlocks:
    @pytest.mark.parametrize("dtype", K_QUANTS)
    def test_a_step_is_the_difference_of_two_codes(self, dtype: str) -> None:
        unit = 2.0
        scales = decoded_scales(dtype, unit)
        excess = steps_of(dtype, ones(dtype, unit, 0.0)) - scales**2
        group = 256 // scales.shape[1]
        known = K_QUANTS[dtype]
        cut, lost = (excess[scales != 0] / unit**2), (excess[scales == 0] / unit**2)
        if dtype in ("Q4_K", "Q5_K", "Q2_K"):
            assert lost.size > 5 and cut.size > 5
        # In float32, beside squares of scales: what is asked is one figure for all of them.
        assert np.ptp(cut) < 0.01 * cut.mean() and (not lost.size or np.ptp(lost) < 0.01)
        assert 0.8 < cut.mean() / self.cut_off(known, group) < 1.05
        assert lost.mean() == pytest.approx(self.lost(known, group), rel=0.08)

    def cut_off(self, known: dict[str, Any], group: int) -> float:
        """What a scale that rounds down by up to half a unit cuts off the ends of the range."""
        x = normal(2, 20_000, group)
        if known["minimum"] is not None:
            x -= x.min(axis=1, keepdims=True)
        x = np.abs(x) / np.abs(x).max(axis=1, keepdims=True)
        scale = 8.0
        exact = scale + np.random.default_rng(3).uniform(-0.5, 0.5, (20_000, 1))
        over = np.maximum(known["largest"] * (x * exact - scale), 0)
        return float(12 * np.square(over).mean())

    def lost(self, known: dict[str, Any], group: int) -> float:
        """Values whose scale is less than half a unit: all of them become zero."""
        x = normal(4, 20_000, group)
        top, bottom = x.max(axis=1).mean(), x.min(axis=1).mean()
        span = top - bottom if known["minimum"] is not None else top
        scale = np.random.default_rng(5).uniform(0, 0.5, 200_000)
        deviation = known["largest"] * scale / span
        return float(12 * np.square(deviation).mean())

    @pytest.mark.parametrize("dtype", [t for t in K_QUANTS if K_QUANTS[t]["minimum"] is not None])
    def test_minima_count_in_their_own_unit(self, dtype: str) -> None:
        scales = decoded_scales(dtype, 1.0)
        added = steps_of(dtype, ones(dtype, 1.0, 64.0)) - steps_of(dtype, ones(dtype, 1.0, 0.0))
        own = added / 64.0**2
        cut, lost = measured_minima()
        assert own[scales != 0].mean() == pytest.approx(cut, rel=0.25)
        assert own[scales == 0].mean() == pytest.approx(lost, rel=0.2)


def excess_of_minima(weights: np.ndarray, searched: float, *, scaled: bool) -> float:
    """12 times the error of Q4_K beyond what its scales cost, in the minima's own units squared.

    Args:
        weights: float32 [n, 256].
        searched: What a search leaves of the error that its scales make likely.
        scaled: Which sub-blocks to look at: those with a scale, or those whose scale rounds to 0.
    """
    raw = quantise("Q4_K", weights)
    error = np.square(expand("Q4_K", raw) - weights).reshape(-1, 8, 32).mean(axis=2)
    own = np.ascontiguousarray(raw[:, 2:4]).view("<f2").astype(np.float64) ** 2
    put(raw, 2, 0.0)
    excess = 12 * error - searched * steps_of("Q4_K", raw)
    raw[:, K_QUANTS["Q4_K"]["codes"][0]] = K_QUANTS["Q4_K"]["codes"][1]
    chosen = (expand("Q4_K", raw)[:, ::32] != 0) == scaled
    return float(excess[chosen].sum() / np.broadcast_to(own, chosen.shape)[chosen].sum())


def measured_minima() -> tuple[float, float]:
    """What the rounding of minima adds, of blocks with a scale and of those that lose it."""
    # Far from zero, where nothing but the minima has lost much; a search leaves three quarters
    # of its scale's part.
    cut = excess_of_minima((normal(6, 1500, 256) - 100).astype(np.float32), 0.77, scaled=True)
    # Where the scale rounds to 0 there are no codes to make up for the minimum, which is off by
    # as much as any rounding: once its own unit. Unless it rounds to 0 as well, since the block
    # is as small as it is near zero: then the values are lost, and nothing more. Which of both
    # it is the file does not say: the mean.
    generator = np.random.default_rng(7)
    small = normal(8, 1500, 8, 32)
    small[:, 1:] *= generator.uniform(0, 0.02, (1500, 7, 1))
    near = excess_of_minima(small.reshape(1500, 256).astype(np.float32), 1.0, scaled=False)
    small[:, 1:] -= 0.3 * generator.uniform(0, 1, (1500, 7, 1))
    far = excess_of_minima(small.reshape(1500, 256).astype(np.float32), 1.0, scaled=False)
    assert abs(near) < 0.1 and abs(far - 1) < 0.1
    return cut, (near + far) / 2


def entries_of(dtype: str) -> np.ndarray:
    """The codebook of a type, [entries, values of an entry]."""
    source = getattr(gguf.quants, "IQ4_NL" if dtype == "IQ4_XS" else dtype)
    if source.grid_shape == (0, 0):
        return np.array(source.kvalues, np.float64)[:, None]
    source.init_grid()
    return source.grid.reshape(source.grid_shape).astype(np.float64)


# Values that share a scale, and what is added to entries, of either sign.
CODEBOOKS = {
    "IQ4_NL": (32, 0), "IQ4_XS": (32, 0), "NVFP4": (16, 0), "IQ1_S": (32, 0.125),
    "IQ1_M": (16, 0.125), "IQ2_XXS": (32, 0), "IQ2_XS": (16, 0), "IQ2_S": (16, 0),
    "IQ3_XXS": (32, 0), "IQ3_S": (32, 0),
}  # fmt: skip


def nearest(x: np.ndarray, entries: np.ndarray, *, has_signs: bool) -> np.ndarray:
    y = np.abs(x) if has_signs else x
    distance = np.square(entries).sum(axis=1) - 2 * y @ entries.T
    found = entries[distance.argmin(axis=1)]
    return np.where(x < 0, -found, found) if has_signs else found


class TestCodebooks:
    @pytest.mark.parametrize("dtype", CODEBOOKS)
    def test_the_step_that_nearest_entries_are_worth(self, dtype: str) -> None:
        """Gaussian groups, each with the best of a few scales: sqrt(12 error) over their peak."""
        group, shift = CODEBOOKS[dtype]
        entries = entries_of(dtype)
        has_signs = entries.shape[1] > 1 and not shift
        values = normal(9, 150, group)
        peak = np.abs(values).max(axis=1, keepdims=True) / np.abs(entries).max()
        error, stored = np.full(150, np.inf), np.zeros_like(values)
        for factor in np.geomspace(0.4, 1.6, 13):
            for moved in {shift, -shift}:
                scale = factor * peak
                rows = (values / scale).reshape(-1, entries.shape[1])
                found = nearest(rows, entries + moved, has_signs=has_signs)
                found = found.reshape(values.shape) * scale
                own = np.square(found - values).sum(axis=1)
                better = own < error
                error[better], stored[better] = own[better], found[better]
        measured = 12 * error.mean() / group / np.square(np.abs(stored).max(axis=1)).mean()
        # A file's scales are themselves rounded, and other searches weigh values: upper estimates.
        assert 0.8 < np.sqrt(measured) / self.fraction(dtype) < 1.1

    def fraction(self, dtype: str) -> float:
        """The step over the peak of a group, from blocks of anything."""
        group = CODEBOOKS[dtype][0]
        row = FORMATS[dtype]
        raw = np.random.default_rng(10).integers(0, 256, (50, row.block_bytes)).astype(np.uint8)
        with np.errstate(all="ignore"):
            values = np.abs(expand(dtype, raw))
        usable = np.isfinite(values).all(axis=1) & (values.max(axis=1) < 1e15)
        peaks = values.reshape(50, -1, group).max(axis=2)
        usable &= (peaks > 1e-15).all(axis=1)
        fractions = np.sqrt(steps_of(dtype, raw))[usable] / peaks[usable]
        assert usable.sum() > 5 and np.ptp(fractions) < 1e-3
        return float(fractions.mean())


class TestGroups:
    def test_rows_that_are_part_of_a_row_of_blocks(self) -> None:
        squares = np.arange(6, dtype=np.float32).reshape(2, 3)
        # 40 values in groups of 16, of which the last is short; rows of 20 share groups of 4.
        found, group = join_rows(squares, 16, 40, 20)
        assert (found.shape, group) == ((4, 5), 4)
        per_value = np.repeat(squares, 16, axis=1)[:, :40].reshape(4, 20)
        np.testing.assert_array_equal(np.repeat(found, 4, axis=1), per_value)

    def test_blocks_over_row_ends_have_the_largest_groups_that_never_span_two(self) -> None:
        for length, size in ((64, 32), (48, 16), (33, 1)):
            raw = np.zeros(-(-2 * length // 32) * 18, np.uint8)
            _, group = step_squares("AprQ4", raw, 2 * length, row_length=length)
            assert group == size

    def test_what_is_not_a_number_has_no_step(self) -> None:
        for scale, square in ((np.nan, 0.0), (np.inf, float(np.finfo(np.float32).max)), (3.0, 9)):
            found, _ = step_squares("AprQ8", np.zeros(4, np.uint8), 4, row_length=4, scale=scale)
            assert found[0, 0] == np.float32(square)
        for half, square in ((np.nan, 0.0), (np.inf, 0.0), (3.0, 9.0)):
            block = np.zeros((1, 18), np.uint8)
            put(block, 0, half)
            found, _ = step_squares("AprQ4", block.reshape(-1), 32, row_length=32)
            assert (found == square).all()


class TestShrinkage:
    """MXFP4 cuts off the ends of its range, and so makes a whole tensor smaller."""

    @staticmethod
    def quantised(rows: np.ndarray) -> np.ndarray:
        raw = quantize(rows.astype(np.float32), gguf.GGMLQuantizationType.MXFP4)
        return expand("MXFP4", raw).reshape(rows.shape)

    def test_it_is_as_large_as_is_said_and_of_no_other_type(self) -> None:
        for seed, rows in enumerate((normal(1, 200, 1024), normal(2, 200, 1024) ** 3)):
            shrunk = 1 - float((self.quantised(rows) * rows).sum() / np.square(rows).sum())
            assert 0.015 < shrunk < (1.2, 2.0)[seed] * SHRINKAGE["MXFP4"]
        assert set(SHRINKAGE) == {"MXFP4"}

    def test_outputs_that_all_of_a_row_adds_up_to_are_not_accused(self) -> None:
        """Every product x · w is of one sign, so that the outputs shrink as the weights do."""
        out, size, tokens = 96, 1024, 6
        direction = normal(3, size)
        weights = normal(4, out, 1) * direction + 0.3 * normal(5, out, size)
        x = normal(6, tokens, 1) * direction + 0.1 * normal(7, tokens, size)
        weight = QuantisedWeight(weights.astype(np.float32))
        reference = x @ weights.T
        op = PredictionBackend([(None, Profile(EXACT, weights_rounded=True))], threads=1)
        found = op.linear(op.from_host(x), [weight])
        layout = Layout((tokens, out), (tokens, out), ("token", "dim"))
        assert assess(reference, found, layout).explained
        # A factor of 1.5, which no quantiser makes, is.
        assert not assess(1.5 * reference, found, layout).explained


class QuantisedWeight:
    """A weight in MXFP4 blocks."""

    name, dtype = "w", "MXFP4"

    def __init__(self, rows: np.ndarray) -> None:
        self.shape = rows.shape
        self._raw = quantize(rows, gguf.GGMLQuantizationType.MXFP4)

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        values = expand("MXFP4", self._raw[start:stop]).astype(np.float32)
        values = values.reshape(stop - start, -1)
        if out is None:
            return values
        out[: values.size] = values.reshape(-1)
        return out[: values.size].reshape(values.shape)

    def step_squares(self, start: int, stop: int) -> tuple[np.ndarray, int]:
        raw = np.ascontiguousarray(self._raw[start:stop]).reshape(-1)
        return step_squares("MXFP4", raw, (stop - start) * self.shape[1], row_length=self.shape[1])
