"""Our quantisers: gguf-py reads the same values, errors are as small as promised, all is finite."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from aprcore.models.model import open_model
from aprcore.network.weights import read_all
from aprcore.quant.quantise import (
    LARGEST,
    QUANTISED,
    Rounding,
    count_unrepresentable,
    measure_rounding,
    quantise,
)
from aprcore.quant.types import FORMATS, dequantize, row_bytes

K_QUANTS = ("Q4_K", "Q6_K")
DEMO = Path(__file__).parents[2] / "src" / "aprtui" / "demo" / "sound.apr"


def gaussian(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols), np.float32)


def read_back(dtype: str, raw: np.ndarray, cols: int) -> np.ndarray:
    out = np.empty(len(raw) * cols, np.float32)
    dequantize(dtype, raw.reshape(-1), out, row_length=cols)
    return out.reshape(-1, cols)


def unpack_q4_k(block: np.ndarray) -> np.ndarray:
    """One block of 144 bytes as ggml's `dequantize_row_q4_K` reads it, value by value."""
    d, dmin = (np.float32(half) for half in block[:4].view(np.float16))
    q = [int(byte) for byte in block[4:16]]
    values = []
    for sub in range(8):
        if sub < 4:
            scale, minimum = q[sub] & 63, q[sub + 4] & 63
        else:
            scale = (q[sub + 4] & 0xF) | ((q[sub - 4] >> 6) << 4)
            minimum = (q[sub + 4] >> 4) | ((q[sub] >> 6) << 4)
        for i in range(32):
            code = int(block[16 + sub // 2 * 32 + i]) >> (4 * (sub % 2)) & 0xF
            values.append(d * np.float32(scale) * np.float32(code) - dmin * np.float32(minimum))
    return np.array(values, np.float32)


def unpack_q6_k(block: np.ndarray) -> np.ndarray:
    """One block of 210 bytes as ggml's `dequantize_row_q6_K` reads it, value by value."""
    d = np.float32(block[208:].view(np.float16)[0])
    scales = block[192:208].view(np.int8)
    values = np.empty(256, np.float32)
    for half in range(2):
        ql, qh = block[64 * half :], block[128 + 32 * half :]
        for i in range(32):
            for quarter in range(4):
                low = int(ql[i + 32 * (quarter % 2)]) >> (4 * (quarter // 2)) & 0xF
                code = (low | (int(qh[i]) >> (2 * quarter) & 3) << 4) - 32
                scale = d * np.float32(scales[8 * half + i // 16 + 2 * quarter])
                values[128 * half + 32 * quarter + i] = scale * np.float32(code)
    return values


class TestBytes:
    @pytest.mark.parametrize("dtype", QUANTISED)
    def test_gguf_reads_the_same_values(self, dtype: str) -> None:
        values = gaussian(33, 512, seed=1)
        raw = quantise(dtype, values)
        assert raw.dtype == np.uint8
        assert raw.shape == (33, row_bytes(FORMATS[dtype], 512))
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[dtype])
        np.testing.assert_array_equal(read_back(dtype, raw, 512), theirs)
        assert np.sqrt(np.square(theirs - values).mean()) < 0.1

    @pytest.mark.parametrize(("dtype", "unpack"), [("Q4_K", unpack_q4_k), ("Q6_K", unpack_q6_k)])
    def test_ggml_reads_the_same_values(self, dtype: str, unpack) -> None:
        values = gaussian(3, 256, seed=2) * np.repeat(np.arange(1, 9, dtype="f4"), 32)
        raw = quantise(dtype, values)
        np.testing.assert_array_equal(
            read_back(dtype, raw, 256), np.stack([unpack(block) for block in raw])
        )

    @pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0"])
    def test_the_plain_ones_are_the_bytes_of_gguf(self, dtype: str) -> None:
        values = gaussian(16, 96, seed=3)
        expected = quantize(values, gguf.GGMLQuantizationType[dtype])
        np.testing.assert_array_equal(quantise(dtype, values), expected)

    @pytest.mark.parametrize("dtype", K_QUANTS)
    def test_pieces_do_not_show(self, dtype: str) -> None:
        # Pieces are shared out among threads; a row is a row wherever it is.
        values = gaussian(700, 256, seed=4)
        whole = quantise(dtype, values)
        np.testing.assert_array_equal(whole[600:640], quantise(dtype, values[600:640]))

    def test_values_on_the_grid_come_back_exactly(self) -> None:
        rng = np.random.default_rng(5)
        codes = rng.integers(0, 16, (20, 8, 32)).astype(np.float32)
        codes[:, :, 0], codes[:, :, 1] = 0, 15
        scales = rng.integers(30, 64, (20, 8, 1)).astype(np.float32)
        minima = rng.integers(10, 64, (20, 8, 1)).astype(np.float32)
        scales[:, 0], minima[:, 0] = 63, 63
        values = (scales * codes / 1024 - minima / 64).reshape(20, 256)
        np.testing.assert_array_equal(read_back("Q4_K", quantise("Q4_K", values), 256), values)


class TestError:
    def figures(self, weights: list[np.ndarray]) -> dict[str, Rounding]:
        kinds = {name: Rounding() for name in ("Q4_1", "Q8_0", "Q4_K", "Q6_K")}
        for values in weights:
            for name in kinds:
                if name in QUANTISED:
                    raw = quantise(name, values)
                else:
                    raw = quantize(values, gguf.GGMLQuantizationType[name])
                kinds[name] += measure_rounding(name, values, raw)
        return kinds

    def check(self, weights: list[np.ndarray]) -> None:
        found = self.figures(weights)
        assert found["Q4_K"].relative_rmse <= 0.95 * found["Q4_1"].relative_rmse
        assert found["Q6_K"].relative_rmse <= 4 * found["Q8_0"].relative_rmse
        for name in K_QUANTS:
            assert 0.65 < found[name].noise_ratio < 0.9

    def test_gaussian_weights(self) -> None:
        self.check([gaussian(256, 512, seed=6)])

    def test_stories260k(self, shared: Path) -> None:
        with open_model(shared / "data" / "stories260k") as model:
            self.check(matrices(model))

    def test_demo(self) -> None:
        with open_model(DEMO) as model:
            self.check(matrices(model))

    @pytest.mark.parametrize("dtype", K_QUANTS)
    def test_the_search_beats_the_plain_range(self, dtype: str, monkeypatch) -> None:
        values = gaussian(64, 256, seed=7)
        name = "_Q4_SPANS" if dtype == "Q4_K" else "_Q6_SPANS"
        plain = np.array([15 if dtype == "Q4_K" else -32], np.float32)
        searched = measure_rounding(dtype, values, quantise(dtype, values))
        monkeypatch.setattr(f"aprcore.quant.quantise.{name}", plain)
        once = measure_rounding(dtype, values, quantise(dtype, values))
        assert searched.relative_rmse < 0.99 * once.relative_rmse

    def test_figures_add_up(self) -> None:
        cost = Rounding(4, 1, 2) + Rounding(12, 3, 3)
        assert (cost.relative_rmse, cost.noise_ratio) == (0.5, 0.8)
        assert (Rounding().relative_rmse, Rounding().noise_ratio) == (0, 0)


def matrices(model) -> list[np.ndarray]:
    """Those that every type takes."""
    weights = [w for w in model.weights.values() if len(w.shape) == 2 and w.shape[1] % 32 == 0]
    assert weights
    return [read_all(weight) for weight in weights]


class TestPadding:
    @pytest.mark.parametrize("dtype", K_QUANTS)
    @pytest.mark.parametrize("cols", [1, 12, 64, 172, 250, 257, 300])
    def test_the_filling_does_not_distort(self, dtype: str, cols: int) -> None:
        values = gaussian(200, cols, seed=8) + 3  # far from the zeros that it is filled up with
        raw = quantise(dtype, values)
        assert raw.shape[1] == row_bytes(FORMATS[dtype], cols)
        full = gaussian(200, 512, seed=8) + 3
        error = np.square(read_back(dtype, raw, cols) - values).mean()
        assert error < 1.1 * np.square(read_back(dtype, quantise(dtype, full), 512) - full).mean()

    @pytest.mark.parametrize("dtype", K_QUANTS)
    def test_whole_sub_blocks_of_filling_are_zero(self, dtype: str) -> None:
        raw = quantise(dtype, gaussian(5, 70, seed=9))
        filled = read_back(dtype, raw, 256)
        np.testing.assert_array_equal(filled[:, 96:], 0)

    @pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0"])
    def test_plain_rows_must_be_whole_blocks(self, dtype: str) -> None:
        with pytest.raises(ValueError, match=f"rows of 172 values are not whole {dtype} blocks"):
            quantise(dtype, gaussian(2, 172))


@pytest.mark.parametrize("dtype", QUANTISED)
class TestEdges:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
    def test_what_has_no_image_is_counted(self, dtype: str, bad: float) -> None:
        values = gaussian(4, 256)
        values[1, 3] = values[3, 200] = bad
        assert count_unrepresentable(dtype, values) == 2
        with pytest.raises(ValueError, match=f"2 values cannot be represented in {dtype}"):
            quantise(dtype, values)

    @pytest.mark.parametrize("sign", [-1, 1])
    def test_the_largest_values(self, dtype: str, sign: int) -> None:
        values = np.zeros((1, 256), np.float32)
        values[0, 5] = sign * np.float32(LARGEST[dtype])
        values[0, 77] = -values[0, 5]
        stored = read_back(dtype, quantise(dtype, values), 256)
        np.testing.assert_allclose(stored[0, [5, 77]], values[0, [5, 77]], rtol=0.13)
        assert count_unrepresentable(dtype, np.float32(1.001) * values) == 2

    def test_zeros_stay_zero(self, dtype: str) -> None:
        stored = read_back(dtype, quantise(dtype, np.zeros((3, 512), np.float32)), 512)
        np.testing.assert_array_equal(stored, 0)

    @pytest.mark.parametrize("value", [1.0, -1.0, 0.37, -2e-3, 5000.0])
    def test_constant_rows(self, dtype: str, value: float) -> None:
        values = np.full((2, 256), value, np.float32)
        stored = read_back(dtype, quantise(dtype, values), 256)
        np.testing.assert_allclose(stored, values, rtol=5e-3)

    def test_no_rows(self, dtype: str) -> None:
        assert len(quantise(dtype, np.empty((0, 256), np.float32))) == 0

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_anything_finite_has_a_finite_image(self, dtype: str, data: st.DataObject) -> None:
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        rows = data.draw(st.integers(1, 5))
        cols = data.draw(st.integers(1, 600))
        cols = cols if dtype in K_QUANTS else -(-cols // 32) * 32
        low, high = sorted(data.draw(st.tuples(EXPONENTS, EXPONENTS)))
        exponents = low + (high - low) * rng.random((rows, cols))
        values = np.exp2(exponents) * rng.choice([-1, 1], (rows, cols))
        values[rng.random((rows, cols)) < data.draw(st.floats(0, 1))] = data.draw(CONSTANTS)
        values = np.clip(values, -LARGEST[dtype], LARGEST[dtype]).astype(np.float32)
        raw = quantise(dtype, values)
        stored = read_back(dtype, raw, cols)
        assert np.isfinite(stored).all()
        # Wrong by no more than what a block of these values can be wrong by.
        assert np.abs(stored - values).max() <= 1.5 * np.abs(values).max() + 1e-6
        assert np.isfinite(measure_rounding(dtype, values, raw).predicted_energy)


EXPONENTS = st.floats(-149, 26)
CONSTANTS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-20, 3e6, -3e6])
