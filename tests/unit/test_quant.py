"""The table of stored types, against the gguf package and against plain numpy."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import _type_traits

from aprcore.ground.errors import UnsupportedError
from aprcore.quant.types import FORMATS, BlockLayout, dequantize, find_format, locate, storage_size

BLOCKED = (BlockLayout.ROWS, BlockLayout.PADDED_ROWS)
GGML = sorted(name for name, row in FORMATS.items() if row.layout in BLOCKED)


def random_blocks(dtype: str, blocks: int, seed: int = 0) -> np.ndarray:
    """Any bytes are a block of any ggml type."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (blocks, FORMATS[dtype].block_bytes), dtype=np.uint8)


def test_block_sizes_are_those_of_gguf() -> None:
    for name in GGML:
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert sizes == (FORMATS[name].block_values, FORMATS[name].block_bytes), name


def test_every_type_that_gguf_expands_is_in_the_table() -> None:
    # Q1_0 and the like may come with a later gguf: then this names what to add.
    assert {kind.name for kind in _type_traits} | {"F32", "F16"} <= set(FORMATS)


@pytest.mark.parametrize("dtype", GGML)
def test_expands_as_gguf_does(dtype: str) -> None:
    row = FORMATS[dtype]
    raw = random_blocks(dtype, 6)
    out = np.full(6 * row.block_values, 7, np.float32)
    dequantize(dtype, raw.reshape(-1), out, row_length=2 * row.block_values)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[dtype])
    np.testing.assert_array_equal(out, expected.reshape(-1))


def test_drops_the_filling_of_padded_rows() -> None:
    raw = random_blocks("Q6_K", 6)
    out = np.empty(3 * 300, np.float32)
    dequantize("Q6_K", raw.reshape(-1), out, row_length=300)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q6_K)
    np.testing.assert_array_equal(out.reshape(3, 300), expected.reshape(3, 512)[:, :300])


def test_storage_sizes() -> None:
    assert storage_size("F32", ()) == 4
    assert storage_size("F16", (3, 5)) == 30
    assert storage_size("Q4_K", (3, 320)) == 3 * 2 * 144
    assert storage_size("Q8_0", (2, 3, 64)) == 2 * 3 * 2 * 34
    assert storage_size("AprQ4", (5, 50)) == 8 * 18
    assert storage_size("AprQ8", (5, 50)) == 254
    assert storage_size("F64", (2**63, 2**63)) == 2**129
    with pytest.raises(UnsupportedError, match="rows of 50 values are not whole Q5_0 blocks"):
        storage_size("Q5_0", (2, 50))


def test_an_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="'Q8_K'; supported are F32, F16"):
        find_format("Q8_K")


def test_float16_is_widened_exactly() -> None:
    every = np.arange(65536, dtype=np.uint16)
    finite = every[(every & 0x7C00) != 0x7C00]
    infinite = np.array([0x3C00, 0xFC00], np.uint16)
    for bits in (finite, infinite, every):  # without and with those that take the slow way
        out = np.empty(bits.size, np.float32)
        dequantize("F16", bits.view(np.uint8), out)
        expected = bits.view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    every = np.arange(65536, dtype=np.uint16)
    out = np.empty(65536, np.float32)
    dequantize("BF16", every.view(np.uint8), out)
    np.testing.assert_array_equal(out.view(np.uint32), every.astype(np.uint32) << 16)


def apr_q4_value(blocks: bytes, index: int) -> float:
    """One value, written straight from the words of docs/formats.md."""
    block = blocks[index // 32 * 18 :][:18]
    scale = np.frombuffer(block[:2], "<f2")[0]
    if not np.isfinite(scale) or abs(scale) < 2**-14:
        return 0.0
    byte = block[2 + index % 32 // 2]
    nibble = byte >> 4 if index % 2 else byte & 15
    return (nibble - 8) * float(scale)


def test_apr_q4_follows_its_definition() -> None:
    blocks = random_blocks("AprQ4", 40)
    scales = [0x7E00, 0x7C00, 0xFC00, 0x0001, 0x83FF, 0x0000, 0x0400, 0x7BFF]
    blocks[: len(scales), :2] = np.array(scales, "<u2").view(np.uint8).reshape(-1, 2)
    content = blocks.tobytes()
    for first, count in ((0, 40 * 32), (7, 100), (33, 1), (31, 34)):
        span = locate(FORMATS["AprQ4"], 50, first, count)
        raw = np.frombuffer(content[span.offset_bytes :][: span.size_bytes], np.uint8)
        out = np.empty(count, np.float32)
        dequantize("AprQ4", raw, out, skip_values=span.skip_values)
        expected = [apr_q4_value(content, index) for index in range(first, first + count)]
        np.testing.assert_array_equal(out, np.array(expected, np.float32))


def test_apr_q8_is_a_scale_times_each_value() -> None:
    raw = np.arange(-128, 128).astype(np.int8)
    out = np.empty(256, np.float32)
    dequantize("AprQ8", raw.view(np.uint8), out, scale=0.3)
    np.testing.assert_array_equal(out, np.arange(-128, 128).astype(np.float32) * np.float32(0.3))
