"""What goes wrong in expanding stored blocks: alternatives to the decoder, from the raw bytes.

Most slips are a change of the bytes before the usual decoder, or of the values after it.
Source: ggml-quants.c for the block structures; docs/formats.md for AprQ4, padded rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.causes.projections import Indices, Part, Pick, Variant, in_runs, picker
from aprcore.causes.scene import Entry, Scene, Trial
from aprcore.network.operations import EMBEDDING, Embed
from aprcore.network.weights import Weight
from aprcore.quant.types import FORMATS, BlockLayout, dequantize, locate, row_bytes

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Change = Callable[[Bytes], Bytes]  # of blocks [n, block_bytes], a copy


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Where a type keeps its parts within a block.

    Attributes:
        nibbles: The bytes that hold two values each.
        minimum: The bytes of the minimum (or of its scale).
        high: The bytes of the values' high bits.
        span: Values that a run of nibbles covers: low halves first, then high halves.
    """

    nibbles: slice | None = None
    minimum: slice | None = None
    high: slice | None = None
    span: int = 32


_SCALE = slice(0, 2)
_BLOCKS = {
    "Q4_0": _Blocks(slice(2, 18)),
    "Q4_1": _Blocks(slice(4, 20), minimum=slice(2, 4)),
    "Q5_0": _Blocks(slice(6, 22), high=slice(2, 6)),
    "Q5_1": _Blocks(slice(8, 24), minimum=slice(2, 4), high=slice(4, 8)),
    "Q8_0": _Blocks(),
    "Q4_K": _Blocks(slice(16, 144), minimum=slice(2, 4), span=64),
    "Q5_K": _Blocks(slice(48, 176), minimum=slice(2, 4), high=slice(16, 48), span=64),
    "Q6_K": _Blocks(slice(0, 128), high=slice(128, 192), span=128),
    "AprQ4": _Blocks(slice(2, 18)),
}
_OFFSETS = {"Q4_0": 8, "AprQ4": 8, "Q5_0": 16, "Q6_K": 32}


def _put(where: slice, value: Callable[[Bytes], Any]) -> Change:
    """Some bytes of every block replaced by a function of them."""

    def change(blocks: Bytes) -> Bytes:
        blocks[:, where] = value(blocks[:, where].copy())
        return blocks

    return change


def _swap_nibbles(where: slice) -> Change:
    return _put(where, lambda found: (found >> 4) | (found << 4))


def _clear(where: slice, mask: int = 0) -> Change:
    return _put(where, lambda found: found & np.uint8(mask))


def _flip_sign(where: slice) -> Change:
    """Of a float16."""
    return _put(where, lambda found: found ^ np.array([0, 0x80], np.uint8))


def _reorder_bits(where: slice, order: Iterable[int]) -> Change:
    """Bits of these bytes, counted through from the lowest: to each place the bit of `order`."""
    wanted = np.asarray(list(order))

    def change(found: Bytes) -> Bytes:
        bits = np.unpackbits(found, axis=1, bitorder="little")
        return np.packbits(bits[:, wanted], axis=1, bitorder="little")

    return _put(where, change)


def _bits_within(size_bytes: int, order: Iterable[int]) -> Iterator[int]:
    """The same order of bits within each of some bytes."""
    within = list(order)
    return (8 * byte + bit for byte in range(size_bytes) for bit in within)


def _renibbled(where: slice, stored: Indices) -> Change:
    """Codes from other nibbles, each with the scale of the place that it comes to.

    `stored` has, for each value, twice its byte and 1 if it is the upper half.
    """
    size = where.stop - where.start
    usual = _NIBBLES_OF_SPAN[size]

    def change(found: Bytes) -> Bytes:
        codes = np.stack([found & 15, found >> 4], axis=2).reshape(len(found), -1)
        moved = np.empty_like(codes)
        moved[:, usual] = codes[:, stored]
        return np.asarray(moved[:, 0::2] | (moved[:, 1::2] << 4))

    return _put(where, change)


def _in_spans(size_bytes: int, span: int) -> Indices:
    """Where values lie whose low halves come first in every run of `span` bytes."""
    byte = np.arange(size_bytes).reshape(-1, 1, span)
    return np.concatenate([2 * byte, 2 * byte + 1], axis=1).reshape(-1)


_NIBBLES_OF_SPAN = {16: _in_spans(16, 16), 128: _in_spans(128, 32)}


def _swap_quarters(blocks: Bytes) -> Bytes:
    """Q6_K's second and third quarter of 128 values: upper halves before the next bytes."""
    halves = blocks[:, :128].reshape(-1, 2, 2, 32)
    first, second = halves[:, :, 0].copy(), halves[:, :, 1].copy()
    halves[:, :, 0] = first & 15 | second << 4
    halves[:, :, 1] = first >> 4 | second & 0xF0
    blocks[:, :128] = halves.reshape(-1, 128)
    return blocks


def _rolled(where: slice, step: int, axis: int = 0) -> Change:
    """Of the block before or after; with axis 1, within the block."""
    return _put(where, lambda found: np.roll(found, step, axis=axis))


def _exchange(first: slice, second: slice) -> Change:
    def change(blocks: Bytes) -> Bytes:
        kept = blocks[:, first].copy()
        blocks[:, first], blocks[:, second] = blocks[:, second], kept
        return blocks

    return change


def _repack(variant: str) -> Change:
    """Q4_K's and Q5_K's twelve bytes of 6-bit scales and minima, read in a wrong way."""

    def change(blocks: Bytes) -> Bytes:
        packed = blocks[:, 4:16]
        low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
        scales = np.hstack([low & 63, (high & 15) | ((low >> 6) << 4)])
        minima = np.hstack([middle & 63, (high >> 4) | ((middle >> 6) << 4)])
        if variant == "exchanged":
            scales, minima = minima, scales
        elif variant == "first formula":
            scales, minima = np.hstack([low & 63, middle & 63]), np.hstack([middle & 63, high & 63])
        elif variant == "nibbles":
            scales = np.hstack([low & 63, (high >> 4) | ((low >> 6) << 4)])
            minima = np.hstack([middle & 63, (high & 15) | ((middle >> 6) << 4)])
        elif variant == "crossed":
            scales = np.hstack([low & 63, (high & 15) | ((middle >> 6) << 4)])
            minima = np.hstack([middle & 63, (high >> 4) | ((low >> 6) << 4)])
        elif variant == "late":
            scales, minima = np.roll(scales, 1, axis=1), np.roll(minima, 1, axis=1)
        elif variant == "early":
            scales, minima = np.roll(scales, -1, axis=1), np.roll(minima, -1, axis=1)
        elif variant == "scales late":
            scales = np.roll(scales, 1, axis=1)
        elif variant == "minima late":
            minima = np.roll(minima, 1, axis=1)
        elif variant == "one":
            scales, minima = np.repeat(scales[:, :1], 8, 1), np.repeat(minima[:, :1], 8, 1)
        blocks[:, 4:8] = (scales[:, :4] & 63) | ((scales[:, 4:] >> 4) << 6)
        blocks[:, 8:12] = (minima[:, :4] & 63) | ((minima[:, 4:] >> 4) << 6)
        blocks[:, 12:16] = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
        return blocks

    return change


def _changes(dtype: str) -> Iterator[tuple[str, Change]]:
    """Wrong readings of a type's bytes."""
    kind = _BLOCKS[dtype]
    if kind.nibbles is not None:
        yield "nibbles swapped", _swap_nibbles(kind.nibbles)
    if kind.minimum is not None:
        yield "minimum ignored", _clear(kind.minimum)
        yield "the minimum's sign wrong", _flip_sign(kind.minimum)
        yield "scale and minimum exchanged", _exchange(_SCALE, kind.minimum)
    if kind.high is not None:
        yield "high bits ignored", _clear(kind.high)
        yield "high bits swapped", _swap_nibbles(kind.high)
        yield from _other_high_bits(dtype, kind.high)
    if dtype in ("Q4_K", "Q5_K"):
        yield "high bits of the scales ignored", _clear(slice(4, 12), 63)
        yield "scale bits misread (scales and minima exchanged)", _repack("exchanged")
        yield "scale bits misread (the first four's formula for all)", _repack("first formula")
        yield "scale bits misread (their nibbles exchanged)", _repack("nibbles")
        yield "scale bits misread (high bits of the other kind)", _repack("crossed")
        yield "scale bits misread (the first sub-block's for all)", _repack("one")
        yield "sub-block scales and minima one late", _repack("late")
        yield "sub-block scales and minima one early", _repack("early")
        yield "sub-block scales one late", _repack("scales late")
        yield "sub-block minima one late", _repack("minima late")
        nibbles = slice(16, 144) if dtype == "Q4_K" else slice(48, 176)
        yield (
            "nibbles in spans of 16 bytes, as Q4_0 has them",
            _renibbled(nibbles, _in_spans(128, 16)),
        )
        yield "all low nibbles before all high ones", _renibbled(nibbles, _in_spans(128, 128))
        yield "nibbles in turn, low and high", _renibbled(nibbles, np.arange(256))
    scale = slice(208, 210) if dtype == "Q6_K" else _SCALE
    yield "scale of the block before", _rolled(scale, 1)
    yield "scale of the block after", _rolled(scale, -1)
    if dtype == "Q6_K":
        yield "sub-block scales one early", _rolled(slice(192, 208), -1, axis=1)
        yield "sub-block scales one late", _rolled(slice(192, 208), 1, axis=1)
        yield "second and third quarter of the values exchanged", _swap_quarters
        first = _put(slice(192, 208), lambda found: np.repeat(found[:, :1], 16, axis=1))
        yield "scale bits misread (the first sub-block's for all)", first


def _other_high_bits(dtype: str, where: slice) -> Iterator[tuple[str, Change]]:
    """Values' high bits in another order."""
    if dtype == "Q6_K":  # two bits for each quarter of 128 values
        for name, order in (
            ("in reverse order", (6, 7, 4, 5, 2, 3, 0, 1)),
            ("of the neighbouring quarter", (2, 3, 0, 1, 6, 7, 4, 5)),
            ("of the next quarter", (2, 3, 4, 5, 6, 7, 0, 1)),
            ("with their two bits exchanged", (1, 0, 3, 2, 5, 4, 7, 6)),
        ):
            yield f"high bits {name}", _reorder_bits(where, _bits_within(64, order))
    elif dtype == "Q5_K":  # one for each sub-block
        for name, order in (
            ("in reverse order", (7, 6, 5, 4, 3, 2, 1, 0)),
            ("of the neighbouring sub-block", (1, 0, 3, 2, 5, 4, 7, 6)),
            ("of the next sub-block", (1, 2, 3, 4, 5, 6, 7, 0)),
        ):
            yield f"high bits {name}", _reorder_bits(where, _bits_within(32, order))
    else:  # Q5_0, Q5_1: bit i of 32 belongs to value i
        count = np.arange(32)
        for name, bits in (
            ("in reverse order", count[::-1]),
            ("from the highest bit of each byte", count ^ 7),
            ("from the last byte (big-endian)", count ^ 24),
            ("with their halves exchanged", count ^ 16),
            ("in turn for low and high nibbles", count.reshape(-1, 2).T.reshape(-1)),
            ("one late", np.roll(count, 1)),
            ("one early", np.roll(count, -1)),
        ):
            yield f"high bits {name}", _reorder_bits(where, bits.tolist())


def pickers(weight: Weight) -> Iterator[tuple[str, Pick]]:
    """Wrong decoders of a quantised weight, as ways to pick rows."""
    kind = FORMATS.get(weight.dtype)
    if kind is None or weight.dtype not in _BLOCKS or len(weight.shape) != 2:
        return
    reader: Any = weight
    if not hasattr(reader, "read_raw" if kind.layout is not BlockLayout.FLAT else "file"):
        return
    for name, change in _changes(weight.dtype):
        yield name, _decoded(reader, change)
    for name, after in _rearranged(weight):
        yield name, _rearranging(reader, after)
    if weight.dtype in ("Q8_0", *_OFFSETS):
        yield "values read without their sign or offset", _unsigned(reader)
    if weight.dtype in _OFFSETS:
        own = _OFFSETS[weight.dtype]
        for offset in (own - 1, own + 1, own // 2):
            yield f"an offset of {offset} in place of {own}", _offset_by(reader, own - offset)
    if weight.dtype == "Q6_K":
        yield "scales read without their sign", _q6_otherwise(reader, signed=False)
        for shift in (2, 3, 5):
            yield f"high bits shifted by {shift} in place of 4", _q6_otherwise(reader, shift=shift)
    if kind.layout is BlockLayout.PADDED_ROWS and weight.shape[1] % kind.block_values:
        yield "row padding ignored", _unpadded(reader)
    if weight.shape[1] > kind.block_values and kind.layout is not BlockLayout.FLAT:
        for name, step in (("next", 1), ("previous", -1)):
            yield f"first block of the {name} row", _foreign_block(reader, step, first=True)
            yield f"last block of the {name} row", _foreign_block(reader, step, first=False)
        yield "blocks one late", _rolled_blocks(reader, kind.block_values)
        yield "blocks one early", _rolled_blocks(reader, -kind.block_values)


def raw_blocks(weight: Weight, rows: Indices) -> Bytes | None:
    """The stored blocks of some rows, [n, blocks, block_bytes]; None where rows have none."""
    kind = FORMATS.get(weight.dtype)
    reader: Any = weight
    in_rows = (BlockLayout.ROWS, BlockLayout.PADDED_ROWS)
    if kind is None or kind.layout not in in_rows or not hasattr(reader, "read_raw"):
        return None
    found: list[Bytes] = [reader.read_raw(int(row), int(row) + 1) for row in rows]
    return np.stack(found).reshape(len(found), -1, kind.block_bytes)


def _decode(weight: Any, raw: Bytes, rows: int) -> Float32:
    out = np.empty(rows * weight.shape[1], np.float32)
    dequantize(weight.dtype, raw, out, row_length=weight.shape[1])
    return out.reshape(rows, weight.shape[1])


def _decoded(weight: Any, change: Change) -> Pick:
    kind = FORMATS[weight.dtype]

    def run(start: int, stop: int) -> Float32:
        if kind.layout is BlockLayout.FLAT:
            return _decode_flat(weight, change, start, stop)
        # The neighbouring rows come along for changes that move something from block to block.
        first, last = max(0, start - 1), min(weight.shape[0], stop + 1)
        raw = weight.read_raw(first, last).reshape(-1, kind.block_bytes).copy()
        rows = _decode(weight, np.ascontiguousarray(change(raw)).reshape(-1), last - first)
        return rows[start - first : stop - first]

    return in_runs(run)


def _decode_flat(weight: Any, change: Change, start: int, stop: int) -> Float32:
    width = weight.shape[1]
    kind = FORMATS[weight.dtype]
    span = locate(kind, width, start * width, (stop - start) * width)
    raw = np.empty(span.size_bytes, np.uint8)
    weight.file.read_into(weight.offset_bytes + span.offset_bytes, raw)
    out = np.empty((stop - start) * width, np.float32)
    blocks = np.ascontiguousarray(change(raw.reshape(-1, kind.block_bytes)))
    dequantize(weight.dtype, blocks.reshape(-1), out, skip_values=span.skip_values)
    return out.reshape(stop - start, width)


def _rearranged(weight: Weight) -> Iterator[tuple[str, Indices]]:
    """Values of a run of nibbles in another order: which value comes to each place."""
    kind = _BLOCKS[weight.dtype]
    width = weight.shape[1]
    if kind.nibbles is None or width % kind.span:
        return
    order = np.arange(kind.span)
    if weight.dtype == "AprQ4":  # even indices in the low nibbles
        changed = order.reshape(-1, 2).T.reshape(-1)
        yield "nibbles taken as halves instead of even and odd", _every(changed, width)
        yield "nibbles stored as halves instead of even and odd", _every(np.argsort(changed), width)
    elif weight.dtype != "Q6_K":
        changed = order.reshape(2, -1).T.reshape(-1)
        yield "nibbles taken as even and odd instead of halves", _every(changed, width)
        yield "nibbles stored as even and odd instead of halves", _every(np.argsort(changed), width)


def _every(order: Indices, width: int) -> Indices:
    starts = np.arange(0, width, order.size)[:, None]
    return np.asarray((starts + order[None, :]).reshape(-1))


def _rearranging(weight: Any, columns: Indices) -> Pick:
    return in_runs(lambda start, stop: weight.read(start, stop)[:, columns])


def _unsigned(weight: Any) -> Pick:
    """Codes taken as unsigned: int8 without its sign, nibbles without their offset."""
    plain = picker(weight)

    def pick(rows: Indices) -> Float32:
        values = plain(rows)
        if weight.dtype == "Q8_0":
            wrapped: Float32 = np.where(values < 0, values + 256 * _steps(weight, rows), values)
            return wrapped
        return (values + _OFFSETS[weight.dtype] * _signed_steps(weight, rows)).astype(np.float32)

    return pick


def _offset_by(weight: Any, steps: int) -> Pick:
    """Codes that are more by so many steps."""
    plain = picker(weight)

    def pick(rows: Indices) -> Float32:
        return (plain(rows) + steps * _signed_steps(weight, rows)).astype(np.float32)

    return pick


def _q6_otherwise(weight: Any, *, shift: int = 4, signed: bool = True) -> Pick:
    """Q6_K's values from their parts. Source: `dequantize_row_q6_K` of ggml-quants.c."""

    def run(start: int, stop: int) -> Float32:
        blocks = weight.read_raw(start, stop).reshape(-1, 210)
        low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 32)
        codes = np.empty((len(blocks), 2, 4, 32), np.int32)
        for quarter in range(4):
            nibbles = low[:, :, quarter % 2] >> (quarter // 2 * 4) & 15
            upper = (high >> (2 * quarter) & 3).astype(np.int32)
            codes[:, :, quarter] = nibbles | upper << shift
        scales = blocks[:, 192:208].view(np.int8 if signed else np.uint8).astype(np.float32)
        step = np.ascontiguousarray(blocks[:, 208:210]).view("<f2").astype(np.float32)
        values = (codes.reshape(-1, 16, 16) - 32) * (scales * step)[:, :, None]
        return values.reshape(stop - start, -1)[:, : weight.shape[1]].astype(np.float32)

    return in_runs(run)


def _steps(weight: Any, rows: Indices) -> Float32:
    """The step of every value, [n, C]."""
    found = []
    for row in rows:
        squares, group = weight.step_squares(int(row), int(row) + 1)
        found.append(np.repeat(np.sqrt(squares), group, axis=1)[:, : weight.shape[1]])
    return np.concatenate(found)


def _signed_steps(weight: Any, rows: Indices) -> Float32:
    """As `_steps`; scales may be negative where a block's values are mostly below zero."""
    kind = _BLOCKS[weight.dtype]

    def all_codes_zero(blocks: Bytes) -> Bytes:  # which decode to minus the offset times the step
        for where in (kind.nibbles, kind.high):
            if where is not None:
                blocks[:, where] = 0
        return blocks

    values = _decoded(weight, all_codes_zero)(rows)
    return (-values / np.float32(_OFFSETS[weight.dtype])).astype(np.float32)


def _unpadded(weight: Any) -> Pick:
    """Rows taken one after the other as if no row were filled up."""
    width = weight.shape[1]
    kind = FORMATS[weight.dtype]
    padded = row_bytes(kind, width) // kind.block_bytes * kind.block_values

    def pick(rows: Indices) -> Float32:
        out = np.empty((rows.size, width), np.float32)
        for number, row in enumerate(rows.tolist()):
            first, last = row * width // padded, ((row + 1) * width - 1) // padded + 1
            raw = weight.read_raw(first, last)
            flat = np.empty((last - first) * padded, np.float32)
            dequantize(weight.dtype, raw, flat, row_length=padded)
            start = row * width - first * padded
            out[number] = flat[start : start + width]
        return out

    return pick


def _foreign_block(weight: Any, step: int, *, first: bool) -> Pick:
    plain = picker(weight)
    size = FORMATS[weight.dtype].block_values
    tail = (weight.shape[1] - 1) % size + 1
    where = slice(0, size) if first else slice(weight.shape[1] - tail, None)

    def pick(rows: Indices) -> Float32:
        values = plain(rows)
        values[:, where] = plain((rows + step) % weight.shape[0])[:, where]
        return values

    return pick


def _rolled_blocks(weight: Any, step: int) -> Pick:
    return in_runs(lambda start, stop: np.roll(weight.read(start, stop), step, axis=1))


def decoders(part: Part) -> Iterator[Variant]:
    """A product by the same bytes, read otherwise."""
    advice = f"the decoder of {part.weight.dtype} blocks"
    if part.scene.in_file:
        advice = f"how the converter wrote {part.weight.dtype} blocks"
    for name, pick in pickers(part.weight):
        yield Variant(f"{{}} dequantised with {name}", advice, pick)


def _embedded(scene: Scene) -> Iterator[Trial]:
    for name, pick in pickers(scene.site.weight(EMBEDDING)):
        rows = np.concatenate([pick(np.array([token])) for token in scene.site.tokens])
        yield name, scene.operation.scale * rows.astype(np.float64)


ENTRIES = (
    Entry("embedding dequantised with {}", (Embed,), _embedded, "the decoder of the table's blocks",
          "embedding dequantised with {}", "how the converter wrote the table's blocks"),
)  # fmt: skip
