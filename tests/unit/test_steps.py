"""Step sizes: predicted against true rounding error, per type, and where rows are moved or cut."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import quantize

from aprcore.formats.storage import StoredTensor
from aprcore.ground.data_file import DataFile
from aprcore.models.names import RowSlice, SplitHalves
from aprcore.quant.quantise import QUANTISED, measure_rounding, quantise
from aprcore.quant.steps import step_squares
from aprcore.quant.types import FORMATS, BlockLayout, dequantize, storage_size

ROWS, K, T = 384, 256, 48

# Measured over predicted, whole tensor, on Gaussian weights and inputs: the middle of five seeds
# and a margin of four times their spread. A search leaves less than its step makes likely.
BANDS = {
    "Q4_0": (0.92, 1.08), "Q4_1": (0.87, 1.02), "Q5_0": (0.91, 1.07), "Q5_1": (0.87, 1.01),
    "Q8_0": (0.89, 1.04), "Q4_K": (0.70, 0.84), "Q6_K": (0.70, 0.86),
    "MXFP4": (0.75, 1.10), "TQ1_0": (0.72, 0.92), "TQ2_0": (0.72, 0.92),
    "F16": (0.93, 1.07), "BF16": (0.93, 1.07),
}  # fmt: skip


def store(dtype: str, values: np.ndarray) -> np.ndarray:
    """Values as a file would hold them, uint8 [n, bytes of a row]."""
    if dtype in ("Q4_K", "Q6_K"):
        return quantise(dtype, values)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint8)
    return quantize(values, gguf.GGMLQuantizationType[dtype])


def expand(dtype: str, raw: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    out = np.empty(shape[0] * shape[1], np.float32)
    dequantize(dtype, raw.reshape(-1), out, row_length=shape[1])
    return out.reshape(shape)


def per_value(squares: np.ndarray, group: int, length: int) -> np.ndarray:
    """d² of every value, float64 [n, length]."""
    return np.repeat(squares, group, axis=1)[:, :length].astype(np.float64)


def row_ratios(dtype: str, weights: np.ndarray, seed: int = 1) -> tuple[float, np.ndarray]:
    """Measured over predicted error energy of x · W: of the whole tensor, and of every row."""
    raw = store(dtype, weights)
    inputs = np.random.default_rng(seed).standard_normal((T, weights.shape[1]))
    error = (expand(dtype, raw, weights.shape) - weights.astype(np.float64)) @ inputs.T
    squares, group = step_squares(dtype, raw.reshape(-1), weights.size, row_length=weights.shape[1])
    predicted = per_value(squares, group, weights.shape[1]) @ np.square(inputs).T / 12
    measured = np.square(error)
    return measured.sum() / predicted.sum(), measured.sum(axis=1) / predicted.sum(axis=1)


def gaussian(seed: int, deviation: float = 0.02, rows: int = ROWS) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, K), np.float32)
    return values * np.float32(deviation)


class TestPrediction:
    @pytest.mark.parametrize("dtype", BANDS)
    def test_gaussian_weights(self, dtype: str) -> None:
        total, rows = row_ratios(dtype, gaussian(3))
        low, high = BANDS[dtype]
        assert low <= total <= high
        assert rows.min() > 0.15 and rows.max() < 2.5

    @pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
    @pytest.mark.parametrize("deviation", [3e-5, 1e-6])
    def test_scales_that_are_subnormal(self, dtype: str, deviation: float) -> None:
        # The rounding of the scale is then many times that of the codes.
        total, rows = row_ratios(dtype, gaussian(4, deviation))
        assert 0.6 < total < 1.2
        assert rows.max() < 4

    @pytest.mark.parametrize("dtype", ["Q4_1", "Q5_1", "Q4_K"])
    @pytest.mark.parametrize("offset", [-0.5, -5])
    def test_blocks_far_from_zero(self, dtype: str, offset: float) -> None:
        # What is rounded there is the minimum, not the codes.
        total, rows = row_ratios(dtype, gaussian(5, 0.01) + np.float32(offset))
        assert 0.2 < total < 1.3  # an upper estimate where the minima are far from their neighbours
        assert rows.max() < 6  # one error per block, so few degrees of freedom

    @pytest.mark.parametrize("dtype", ["Q4_K", "Q6_K"])
    def test_sub_blocks_that_are_small_beside_their_neighbours(self, dtype: str) -> None:
        # The predicted error of a whole row is that of the large ones; inputs that are large
        # where weights are small, as trained models have them, look at the small ones.
        group = 32 if dtype == "Q4_K" else 16
        rng = np.random.default_rng(6)
        sizes = np.exp(rng.uniform(-7, 0, (4000, K // group)))
        weights = (rng.standard_normal((4000, K)) * np.repeat(sizes, group, axis=1)).astype("f4")
        raw = quantise(dtype, weights)
        error = np.square(expand(dtype, raw, weights.shape) - weights.astype(np.float64))
        error = error.reshape(4000, -1, group).mean(axis=2)
        squares, found = step_squares(dtype, raw.reshape(-1), weights.size, row_length=K)
        assert found == group
        relative = sizes / sizes.max(axis=1, keepdims=True)
        # Where the scale rounds to 0 the error is anything up to the values themselves.
        for low, high, least in (
            (1e-3, 0.005, 0),
            (0.005, 0.02, 0.5),
            (0.02, 0.1, 0.6),
            (0.1, 1, 0.6),
        ):
            chosen = (low <= relative) & (relative < high)
            ratio = 12 * error[chosen].sum() / squares[chosen].sum()
            assert least < ratio < 1.4, (low, high)

    def test_a_step_of_zero_is_for_exact_types_alone(self) -> None:
        for dtype in FORMATS:
            raw = np.full(storage_size(dtype, (2, 256)), 60, np.uint8)
            raw = raw[4:] if dtype == "AprQ8" else raw
            squares, _ = step_squares(dtype, raw, 512, row_length=256)
            exact = dtype in ("F64", "BOOL") or (dtype[0] in "IU" and dtype[1:].isdigit())
            assert bool((squares == 0).all()) == exact, dtype


class TestSpacing:
    def test_float16_is_spaced_as_numpy_says(self) -> None:
        bits = np.arange(65536, dtype=np.uint16)
        bits = bits[(bits & 0x7C00) != 0x7C00]
        squares, group = step_squares("F16", bits.view(np.uint8), bits.size, row_length=1)
        # numpy takes the spacing of a negative number to be negative, and steps down at the top.
        magnitudes = (bits & 0x7FFF).view(np.float16)
        top = magnitudes == np.float16(65504)
        expected = np.where(top, 32, np.spacing(np.where(top, 0, magnitudes)).astype(np.float32))
        assert group == 1
        np.testing.assert_array_equal(squares[:, 0], expected**2)

    def test_float32_and_bfloat16(self) -> None:
        values = np.array([1, -1.5, 2, 3e-5, 1e15, -1e-15], np.float32)
        squares, _ = step_squares("F32", values.view(np.uint8), 6, row_length=6)
        spacing = np.spacing(np.abs(values)).astype(np.float64)
        np.testing.assert_array_equal(squares[0], (spacing**2).astype(np.float32))
        halves = (values.view(np.uint32) >> 16).astype(np.uint16)
        squares, _ = step_squares("BF16", halves.view(np.uint8), 6, row_length=3)
        np.testing.assert_array_equal(
            squares, np.square(spacing * 2.0**16).astype("f4").reshape(2, 3)
        )

    @pytest.mark.parametrize("dtype", ["F32", "BF16"])
    def test_the_ends_of_the_range(self, dtype: str) -> None:
        values = np.array([0, 1e-45, 1e-38, 3.4e38, np.inf, np.nan], np.float32)
        shift = 16 if dtype == "BF16" else 0
        stored = (values.view(np.uint32) >> shift).astype("u2" if shift else "u4")
        squares, _ = step_squares(dtype, stored.view(np.uint8), 6, row_length=6)
        assert np.isfinite(squares).all()
        np.testing.assert_array_equal(squares[0, :3], 0)  # of squares below float32's range
        assert (squares[0, 3:] > 1e38).all()


@pytest.mark.parametrize("dtype", sorted(FORMATS))
def test_any_bytes_have_finite_steps(dtype: str) -> None:
    row = FORMATS[dtype]
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, storage_size(dtype, (64, 256)), dtype=np.uint8)
    raw = raw[4:] if row.layout is BlockLayout.SCALED else raw
    for scale in (0.5, np.inf, np.nan):
        squares, group = step_squares(dtype, raw, 64 * 256, row_length=256, scale=scale)
        assert squares.shape == (64, -(-256 // group))
        assert np.isfinite(squares).all() and (squares >= 0).all()


def tensor(path, dtype: str, shape: tuple[int, ...], raw: np.ndarray) -> StoredTensor:
    path.write_bytes(raw.tobytes())
    return StoredTensor("w", shape, dtype, DataFile(path), 0, raw.size)


class TestRows:
    @pytest.mark.parametrize("dtype", ["F16", "Q8_0", "Q4_K", "Q6_K", "AprQ4", "AprQ8", "I8"])
    @pytest.mark.parametrize("cols", [256, 96])
    def test_rows_alone_are_rows_of_the_whole(self, tmp_path, dtype: str, cols: int) -> None:
        rng = np.random.default_rng(8)
        raw = rng.integers(0, 100, storage_size(dtype, (6, cols)), dtype=np.uint8)
        weight = tensor(tmp_path / "w", dtype, (6, cols), raw)
        whole, group = weight.step_squares(0, 6)
        assert whole.shape == (6, -(-cols // group))
        for start, stop in ((0, 1), (2, 5), (5, 6), (3, 3)):
            squares, same = weight.step_squares(start, stop)
            assert same == group
            np.testing.assert_array_equal(squares, whole[start:stop])
        with pytest.raises(IndexError, match="rows 2 to 7"):
            weight.step_squares(2, 7)

    def test_the_filling_of_padded_rows_has_no_steps(self, tmp_path) -> None:
        values = gaussian(9)[:5, :172]
        for dtype, group, groups in (("Q4_K", 32, 6), ("Q6_K", 16, 11)):
            raw = quantise(dtype, values).reshape(-1)
            weight = tensor(tmp_path / dtype, dtype, (5, 172), raw)
            squares, found = weight.step_squares(0, 5)
            assert (squares.shape, found) == ((5, groups), group)
            cost = measure_rounding(dtype, values, raw.reshape(5, -1))
            predicted = per_value(squares, group, 172).sum() / 12
            assert cost.predicted_energy == pytest.approx(predicted, rel=1e-6)

    @pytest.mark.parametrize("cols", [64, 40, 50, 33])
    def test_blocks_over_the_flattened_tensor(self, tmp_path, cols: int) -> None:
        size = storage_size("AprQ4", (7, cols))
        raw = np.zeros(size, np.uint8)
        scales = np.linspace(0.5, 9, size // 18).astype(np.float16)
        raw.reshape(-1, 18)[:, :2] = scales.view(np.uint8).reshape(-1, 2)
        weight = tensor(tmp_path / "w", "AprQ4", (7, cols), raw)
        expected = np.repeat(scales.astype(np.float32) ** 2, 32)[: 7 * cols].reshape(7, cols)
        squares, group = weight.step_squares(2, 6)
        np.testing.assert_array_equal(per_value(squares, group, cols), expected[2:6])

    def test_one_scale_for_all(self, tmp_path) -> None:
        raw = np.concatenate([np.array([0.25], "<f4").view(np.uint8), np.ones(60, np.uint8)])
        squares, group = tensor(tmp_path / "w", "AprQ8", (3, 20), raw).step_squares(1, 3)
        assert (squares.tolist(), group) == ([[0.0625], [0.0625]], 20)

    def test_vectors_have_a_value_per_row(self, tmp_path) -> None:
        values = np.array([1, 2, 300], np.float16)
        squares, group = tensor(tmp_path / "f", "F16", (3,), values.view(np.uint8)).step_squares(
            1, 3
        )
        assert (squares.tolist(), group) == ([[2.0**-18], [0.0625]], 1)
        blocks = quantize(gaussian(1)[:1, :96], gguf.GGMLQuantizationType.Q8_0).reshape(-1)
        whole, _ = step_squares("Q8_0", blocks, 96, row_length=96)
        weight = tensor(tmp_path / "q", "Q8_0", (96,), blocks)
        squares, group = weight.step_squares(20, 50)
        np.testing.assert_array_equal(squares[:, 0], np.repeat(whole[0], 32)[20:50])
        assert group == 1

    def test_rows_that_hold_rows_of_blocks(self, tmp_path) -> None:
        rng = np.random.default_rng(10)
        raw = rng.integers(0, 100, storage_size("Q6_K", (3, 4, 40)), dtype=np.uint8)
        weight = tensor(tmp_path / "w", "Q6_K", (3, 4, 40), raw)
        flat = tensor(tmp_path / "v", "Q6_K", (12, 40), raw)
        squares, group = weight.step_squares(1, 3)
        rows, row_group = flat.step_squares(4, 12)
        assert (row_group, group) == (16, 8)  # 40 values are not whole groups of 16
        expected = per_value(rows, row_group, 40).reshape(2, 160)
        np.testing.assert_array_equal(per_value(squares, group, 160), expected)

    def test_views_move_steps_with_their_rows(self, tmp_path) -> None:
        raw = quantise("Q4_K", gaussian(11)[:24])
        fused = tensor(tmp_path / "w", "Q4_K", (24, 256), raw.reshape(-1))
        rows = RowSlice("q", fused, 8, 16)
        halves = SplitHalves("q", rows, 8)
        whole, group = fused.step_squares(0, 24)
        np.testing.assert_array_equal(rows.step_squares(3, 9)[0], whole[11:17])
        for start, stop in ((0, 16), (1, 3), (5, 5), (6, 13)):
            squares, found = halves.step_squares(start, stop)
            assert found == group
            np.testing.assert_array_equal(squares, whole[8 + halves.stored_rows(start, stop)])


def test_every_written_type_is_calibrated() -> None:
    assert set(QUANTISED) <= set(BANDS)
