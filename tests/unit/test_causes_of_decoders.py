"""Causes by experiment: slips in expanding stored blocks are named, by decoders of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aprcore.causes import explain
from aprcore.engines.arithmetic import arithmetic_of_dtype
from aprcore.judging.layouts import layout_of
from aprcore.judging.noise import assess
from aprcore.judging.replay import RecordedSide
from aprcore.network.config import ModelConfig
from aprcore.network.graph import Graph
from aprcore.network.rope import Rope
from aprcore.network.stages import StageKey
from stored_weights import random_bytes, stored_tensor

Floats = NDArray[Any]
Blocks = NDArray[np.uint8]

OUT, T, LAYER = 24, 9, 0


def half(blocks: Blocks, at: int) -> Floats:
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float64)


def q4_0(blocks: Blocks, offset: int = 8) -> Floats:
    codes = np.hstack([blocks[:, 2:] & 15, blocks[:, 2:] >> 4]).astype(int)
    return (codes - offset) * half(blocks, 0)


def q4_1(blocks: Blocks, sign: int = 1) -> Floats:
    codes = np.hstack([blocks[:, 4:] & 15, blocks[:, 4:] >> 4]).astype(int)
    return codes * half(blocks, 0) + sign * half(blocks, 2)


def q5(blocks: Blocks, is_q5_1: bool, bit_of: Callable[[int], tuple[int, int]]) -> Floats:
    """Value by value; `bit_of` says which byte and bit of the four hold a value's high bit."""
    start = 8 if is_q5_1 else 6
    out = np.empty((len(blocks), 32))
    for n, block in enumerate(blocks):
        high = block[start - 4 : start]
        for i in range(32):
            code = block[start + i % 16] >> 4 * (i // 16) & 15
            byte, bit = bit_of(i)
            out[n, i] = int(code) + 16 * (int(high[byte]) >> bit & 1)
    if is_q5_1:
        return out * half(blocks, 0) + half(blocks, 2)
    return (out - 16) * half(blocks, 0)


def k_scales(block: Blocks) -> list[tuple[int, int]]:
    """`get_scale_min_k4`."""
    q, found = [int(b) for b in block[4:16]], []
    for j in range(8):
        if j < 4:
            found.append((q[j] & 63, q[j + 4] & 63))
        else:
            found.append((q[j + 4] & 15 | q[j - 4] >> 6 << 4, q[j + 4] >> 4 | q[j] >> 6 << 4))
    return found


def q4_k(
    blocks: Blocks, *, sign: int = -1, late: int = 0, code_of: Callable[[int], tuple[int, int]]
    = lambda i: (i // 64 * 32 + i % 32, i % 64 // 32),
) -> Floats:  # fmt: skip
    out = np.empty((len(blocks), 256))
    steps, minima = half(blocks, 0), half(blocks, 2)
    for n, block in enumerate(blocks):
        scales = k_scales(block)
        for i in range(256):
            scale, minimum = scales[(i // 32 - late) % 8]
            byte, upper = code_of(i)
            code = int(block[16 + byte]) >> 4 * upper & 15
            out[n, i] = steps[n, 0] * scale * code + sign * minima[n, 0] * minimum
    return out


def q5_k(blocks: Blocks, bit_of: Callable[[int], int] = lambda sub: sub) -> Floats:
    out = np.empty((len(blocks), 256))
    steps, minima = half(blocks, 0), half(blocks, 2)
    for n, block in enumerate(blocks):
        scales = k_scales(block)
        for i in range(256):
            sub = i // 32
            low = int(block[48 + sub // 2 * 32 + i % 32]) >> 4 * (sub % 2) & 15
            code = low + 16 * (int(block[16 + i % 32]) >> bit_of(sub) & 1)
            out[n, i] = steps[n, 0] * scales[sub][0] * code - minima[n, 0] * scales[sub][1]
    return out


def q6_k(
    blocks: Blocks, *, shift: int = 4, offset: int = 32, late: int = 0, is_signed: bool = True,
    bits_of: Callable[[int], int] = lambda quarter: 2 * quarter,
) -> Floats:  # fmt: skip
    out = np.empty((len(blocks), 256))
    steps = half(blocks, 208)
    for n, block in enumerate(blocks):
        for i in range(256):
            part, quarter, place = i // 128, i % 128 // 32, i % 32
            low = int(block[64 * part + 32 * (quarter % 2) + place]) >> 4 * (quarter // 2) & 15
            high = int(block[128 + 32 * part + place]) >> bits_of(quarter) & 3
            scale = int(block[192 + (i // 16 - late) % 16])
            if is_signed and scale > 127:
                scale -= 256
            out[n, i] = steps[n, 0] * scale * ((low | high << shift) - offset)
    return out


SLIPS: list[tuple[str, Callable[[Blocks], Floats], str]] = [
    ("Q4_0", lambda b: q4_0(b, 7), "an offset of 7 in place of 8"),
    ("Q4_1", lambda b: q4_1(b, -1), "the minimum's sign wrong"),
    ("Q5_0", lambda b: q5(b, False, lambda i: ((i + 16) % 32 // 8, i % 8)),
     "high bits with their halves exchanged"),
    ("Q5_0", lambda b: q5(b, False, lambda i: (2 * (i % 16) // 8, 2 * i % 8) if i < 16 else
                          ((2 * (i % 16) + 1) // 8, (2 * i + 1) % 8)),
     "high bits in turn for low and high nibbles"),
    ("Q5_1", lambda b: q5(b, True, lambda i: (i // 8, 7 - i % 8)),
     "high bits from the highest bit of each byte"),
    ("Q5_1", lambda b: q5(b, True, lambda i: (3 - i // 8, i % 8)),
     "high bits from the last byte (big-endian)"),
    ("Q4_K", lambda b: q4_k(b, sign=1), "the minimum's sign wrong"),
    ("Q4_K", lambda b: q4_k(b, late=1), "sub-block scales and minima one late"),
    ("Q4_K", lambda b: q4_k(b, late=-1), "sub-block scales and minima one early"),
    ("Q4_K", lambda b: q4_k(b, code_of=lambda i: (i // 32 * 16 + i % 16, i % 32 // 16)),
     "nibbles in spans of 16 bytes, as Q4_0 has them"),
    ("Q4_K", lambda b: q4_k(b, code_of=lambda i: (i % 128, i // 128)),
     "all low nibbles before all high ones"),
    ("Q4_K", lambda b: q4_k(b, code_of=lambda i: (i // 2, i % 2)), "nibbles in turn, low and high"),
    ("Q5_K", lambda b: q5_k(b, lambda sub: 7 - sub), "high bits in reverse order"),
    ("Q5_K", lambda b: q5_k(b, lambda sub: sub ^ 1), "high bits of the neighbouring sub-block"),
    ("Q6_K", lambda b: q6_k(b, is_signed=False), "scales read without their sign"),
    ("Q6_K", lambda b: q6_k(b, shift=3), "high bits shifted by 3 in place of 4"),
    ("Q6_K", lambda b: q6_k(b, late=1), "sub-block scales one late"),
    ("Q6_K", lambda b: q6_k(b, offset=31), "an offset of 31 in place of 32"),
    ("Q6_K", lambda b: q6_k(b, offset=16), "an offset of 16 in place of 32"),
    ("Q6_K", lambda b: q6_k(b, bits_of=lambda quarter: 6 - 2 * quarter),
     "high bits in reverse order"),
]  # fmt: skip
SOUND = {
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": lambda b: q5(b, False, lambda i: (i // 8, i % 8)),
    "Q5_1": lambda b: q5(b, True, lambda i: (i // 8, i % 8)), "Q4_K": q4_k, "Q5_K": q5_k,
    "Q6_K": q6_k,
}  # fmt: skip


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(
    ("dtype", "decode", "cause"), SLIPS, ids=lambda x: x[:40] if isinstance(x, str) else ""
)
def test_a_slip_of_a_decoder_is_named(
    dtype: str, decode: Callable[[Blocks], Floats], cause: str, in_file: bool
) -> None:
    width = 512 if dtype.endswith("_K") else 128
    raw = random_bytes(dtype, (OUT, width), 11)
    weight = stored_tensor(dtype, (OUT, width), raw, name="model.layers.0.mlp.down_proj.weight")
    blocks = np.frombuffer(raw, np.uint8).reshape(weight.shape[0] * width // (
        256 if dtype.endswith("_K") else 32), -1)  # fmt: skip
    config = ModelConfig("llama", OUT, 2, 2, 1, 12, width, 5, 1e-6, Rope(1e4, 12))
    x = np.random.default_rng(1).standard_normal((T, width)).astype(np.float32)
    read = {StageKey(LAYER, "ffn_swigl"): x}.get
    engine = arithmetic_of_dtype("float32")
    side = RecordedSide(Graph(config), {weight.name: weight}, None, T, engine, read=read)
    key = StageKey(LAYER, "ffn_out")
    expected = side.expect(key)
    assert expected is not None
    layout = layout_of(key, side.sizes(), T * OUT)

    def product(decoder: Callable[[Blocks], Floats]) -> Floats:
        rows = decoder(blocks).reshape(OUT, width)
        return (x.astype(np.float64) @ rows.T).astype(np.float32).reshape(-1)

    assert assess(product(SOUND[dtype]), expected.estimate, layout).explained
    observed = product(decode)
    assert not assess(observed, expected.estimate, layout).explained
    found = explain(side, key, observed, expected, layout, in_file=in_file)
    assert [c.name for c in found.named] == [f"down_proj dequantised with {cause}"], found.causes[
        :3
    ]
