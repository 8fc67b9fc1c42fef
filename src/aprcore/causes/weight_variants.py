"""The catalogue of other weights, inputs and biases for a product (see `projections`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from aprcore.causes.projections import (
    Indices,
    Part,
    Pick,
    Variant,
    Variants,
    order_note,
    picker,
)
from aprcore.causes.scene import Float64
from aprcore.causes.solving import off_by_a_token, to_halves, to_pairs
from aprcore.network.operations import GATE, UP, Head, K, Norm, O, Q, V
from aprcore.network.stages import StageKey
from aprcore.network.weights import Weight, read_all

# Values of a weight that is read whole (to transpose it, for instance).
LARGEST_WHOLE = 1 << 28
# Layers whose weights are tried: the nearest ones.
MOST_LAYERS = 64
# Loops end too soon by any number, and start too late by whole tiles.
FEWEST_CUT_FIRST = 8
# Share of the columns that a bias which a file lacks shows in.
FEWEST_BIASED = 0.25
# Rows whose wrong value is solved for, and the tokens that this takes: one is left to check it.
MOST_SPOILT = 32
FEWEST_TOKENS = 3
# What a block's scale is multiplied by where the block was left out.
NEARLY_ZERO = 1e-2
# Rows with a block that was left out, each by itself; of more the same dimensions are left out.
MOST_EMPTY = 2
# Blocks of input dimensions that are left out one by one.
LARGEST_CUT = 256
# Parts that a sum is split into, and how near to a whole number the solved ones are.
SPLITS = (2, 3, 4, 8, 16, 32)
NEARLY_WHOLE = 0.1


def _mapped(inner: Pick, rows: Indices) -> Pick:
    return lambda wanted: inner(rows[wanted])


def _transposed(part: Part) -> Iterator[Variant]:
    out, width = part.weight.shape
    if out * width > LARGEST_WHOLE:
        return

    @cache
    def whole() -> NDArray[np.float32]:
        flat: NDArray[np.float32] = read_all(part.weight).reshape(width, out)
        return flat

    yield Variant(
        "{} weight transposed",
        _say(part, "the weight is [out, in] row-major: y = x·Wᵀ",
             "the converter stored this weight transposed"),
        lambda rows: whole()[:, rows].T,
    )  # fmt: skip


def _rope_rows(part: Part) -> Iterator[Variant]:
    if part.module not in (Q, K) or part.head_dim is None:
        return
    index = np.arange(part.weight.shape[0])
    for permuted, order in ((to_pairs, "halves to pairs"), (to_halves, "pairs to halves")):
        yield Variant(
            f"{{}} rows permuted from {order}",
            _say(part, "q and k rows are permuted between the two RoPE conventions",
                 "the converter permuted q and k rows for the other RoPE convention, or did not"),
            _mapped(picker(part.weight), permuted(index, part.head_dim)),
        )  # fmt: skip
    yield from _permuted_by_other_heads(part, index)


def _permuted_by_other_heads(part: Part, index: Indices) -> Iterator[Variant]:
    """GGUF's permutation of q and k with the other's number of heads, done or undone."""
    config = part.scene.config
    own, other = config.num_heads, config.num_kv_heads
    if part.module == K:
        own, other = other, own
    if own == other or index.size % (2 * other):
        return
    rows, width = index.size, index.size // other
    letters = "H in place of K" if part.module == K else "K in place of H"
    done = {heads: to_pairs(index, rows // heads) for heads in (own, other)}
    undone = {heads: to_halves(index, rows // heads) for heads in (own, other)}
    for name, order in (
        (f"permuted as {other} heads of {width}", done[other]),
        (f"permuted as {other} heads of {width}, and back as {own}", done[other][undone[own]]),
        (f"permuted back as {other} heads of {width}", undone[other]),
        (f"permuted as {own} heads, and back as {other} of {width}", done[own][undone[other]]),
    ):
        yield Variant(
            f"{{}} rows {name} ({letters})",
            _say(part, "the number of heads in the permutation of rows: K of k's, H of q's",
                 "the number of heads that the converter's permute() is given: K of k's, H of q's"),
            _mapped(picker(part.weight), order),
        )  # fmt: skip


def _other_modules(part: Part) -> Iterator[Variant]:
    """Another weight of this layer with as many rows and columns."""
    if part.scene.key.layer is None:
        return  # the head: see `embedding_head`
    layer = f"model.layers.{part.scene.key.layer}."
    for name, weight in part.scene.site.weights.items():
        inside = name.removeprefix(layer)
        same = weight.shape == part.weight.shape and weight.name != part.weight.name
        if not same or inside == name:
            continue
        other = inside.removesuffix(".weight").rpartition(".")[2]
        is_pair = {part.module.weight, inside} == {GATE.weight, UP.weight}
        swapped = " (gate and up swapped)" if is_pair else ""
        yield Variant(
            f"{{}} uses the weight of {other}{swapped}",
            _say(part, f"which weight is bound here: {{}} or {other}",
                 f"{{}} and {other} are exchanged in the conversion"),
            picker(weight),
        )  # fmt: skip


def _interleaved(part: Part) -> Iterator[Variant]:
    """Gate and up from a fused matrix whose rows alternate, or the other way round."""
    if part.module not in (GATE, UP):
        return
    gate, up = (part.scene.site.find(module.weight) for module in (GATE, UP))
    if gate is None or up is None or gate.shape != up.shape:
        return
    count = gate.shape[0]
    places = np.arange(count) + (0 if part.module == GATE else count)  # in halves of the fused
    alternate = np.arange(2 * count).reshape(2, count).T.reshape(-1)  # its order, interleaved
    for order in (alternate, np.argsort(alternate)):
        yield Variant(
            "{} rows interleaved with the other's of gate and up",
            _say(part, "how the fused gate and up are split: halves or alternate rows",
                 "rows of gate and up alternate in this file, or did in the original"),
            _from_two(gate, up, order[places]),
        )  # fmt: skip


def _from_two(first: Weight, second: Weight, rows: Indices) -> Pick:
    """Rows of two weights of one shape, numbered through."""
    count = first.shape[0]

    def pick(wanted: Indices) -> NDArray[np.float32]:
        out = np.empty((wanted.size, first.shape[1]), np.float32)
        for weight, start in ((first, 0), (second, count)):
            here = (rows[wanted] >= start) & (rows[wanted] < start + count)
            if here.any():
                out[here] = picker(weight)(rows[wanted][here] - start)
        return out

    return pick


def _spoilt_values(part: Part) -> Iterator[Variant]:
    """One wrong input column or one wrong block for each wrong row, its factor solved for."""
    plain = part.scene.plain.value
    error = part.scene.observed.reshape(plain.shape) - plain
    wrong = np.flatnonzero(part.scene.wrong.any(axis=0))
    if not 0 < wrong.size <= MOST_SPOILT or part.x.shape[0] < FEWEST_TOKENS:
        return
    own = picker(part.weight)(wrong).astype(np.float64)
    for size, what in ((1, "weight"), (32, "block"), (256, "block")):
        if size >= part.x.shape[1]:
            continue
        changed, names, zeros = own.copy(), [], 0
        for number, row in enumerate(wrong):
            starts = np.arange(0, part.x.shape[1], size)
            shares = np.add.reduceat(part.x * own[number], starts, axis=1)
            if size == 1:
                shares = part.x
            energy = np.square(shares).sum(axis=0)
            along = error[:, row] @ shares
            gains = np.where(energy > 0, along**2 / np.where(energy > 0, energy, 1.0), 0.0)
            best = int(np.argmax(gains))
            factor = float(along[best] / energy[best]) if energy[best] > 0 else 0.0
            where = slice(best * size, (best + 1) * size)
            changed[number, where] = own[number, where] * (1 + factor) if size > 1 else (
                own[number, where] + factor
            )  # fmt: skip
            name = f"{what} {best} of row {row}"
            if size > 1:
                is_zero = abs(1 + factor) < NEARLY_ZERO
                name += " (zero)" if is_zero else f" (scale times {1 + factor:.4g})"
            zeros += size > 1 and abs(1 + factor) < NEARLY_ZERO
            names.append(name)
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        yield Variant(
            f"{{}} with a wrong value: {listed}",
            _say(part, "how these values are read", "these values in the conversion"),
            _replaced(picker(part.weight), wrong, changed.astype(np.float32)),
            is_fallback=not zeros == wrong.size <= MOST_EMPTY,
        )


def _replaced(inner: Pick, rows: Indices, values: NDArray[np.float32]) -> Pick:
    def pick(wanted: Indices) -> NDArray[np.float32]:
        out = inner(wanted).copy()
        for number, row in enumerate(rows):
            out[wanted == row] = values[number]
        return out

    return pick


def _other_layers(part: Part) -> Iterator[Variant]:
    here = part.scene.key.layer
    if here is None:
        return
    layers = sorted(range(part.scene.config.num_layers), key=lambda n: abs(n - here))
    for layer in layers[1 : MOST_LAYERS + 1]:
        weight = part.scene.site.weights.get(f"model.layers.{layer}.{part.module.weight}")
        if weight is not None and weight.shape == part.weight.shape:
            yield Variant(
                f"{{}} weight of layer {layer}{order_note(part.scene, weight.name)}",
                _say(part, "the offset of this layer's weights",
                     "the layer numbers in the conversion"),
                picker(weight),
            )  # fmt: skip


def _moved_rows(part: Part) -> Iterator[Variant]:
    count = part.weight.shape[0]
    index = np.arange(count)
    moves = {"one row late": np.roll(index, 1), "one row early": np.roll(index, -1),
             "in reverse": index[::-1].copy(),
             "the halves exchanged": np.roll(index, count // 2)}  # fmt: skip
    # A tile that is computed from its neighbour's rows shows as a local shift.
    for tile in (2, 4, 8, 16, 32, 64, 128):
        if tile < count:
            moves[f"{tile} rows late"] = np.roll(index, tile)
            moves[f"{tile} rows early"] = np.roll(index, -tile)
    dim = part.head_dim
    if dim is not None and count > dim:
        moves["one head late"] = np.roll(index, dim)
        moves["one head early"] = np.roll(index, -dim)
        moves["the heads in reverse"] = index.reshape(-1, dim)[::-1].reshape(-1)
        moves["dimensions before heads"] = index.reshape(-1, dim).T.reshape(-1)
        moves["heads before dimensions"] = index.reshape(dim, -1).T.reshape(-1)
        heads = count // dim
        groups = part.scene.config.num_kv_heads
        if heads % groups == 0 and 1 < groups < heads:
            grouped = index.reshape(groups, heads // groups, dim)
            moves["the heads of a group apart"] = grouped.swapaxes(0, 1).reshape(-1)
            tiled = index.reshape(heads // groups, groups, dim)
            moves["the heads of a group together"] = tiled.swapaxes(0, 1).reshape(-1)
    for name, rows in moves.items():
        yield Variant(
            f"{{}} rows {name}",
            _say(part, "the row index into the weight", "the order of the weight's rows"),
            _mapped(picker(part.weight), rows),
        )


def _moved_columns(part: Part) -> Iterator[Variant]:
    """The input's dimensions in another order, which is the weight's columns in the other."""
    x, tokens = part.x, part.x.shape[0]
    moves = {"columns one late": np.roll(x, -1, axis=1), "columns one early": np.roll(x, 1, axis=1),
             "columns in reverse": x[:, ::-1]}  # fmt: skip
    if part.module == O:
        dim, heads = part.scene.config.head_dim, part.scene.config.num_heads
        groups = part.scene.config.num_kv_heads
        by_head = x.reshape(tokens, heads, dim)
        moves |= {
            "reads dimensions before heads": by_head.swapaxes(1, 2),
            "reads heads before dimensions": x.reshape(tokens, dim, heads).swapaxes(1, 2),
            "reads heads before tokens": by_head.swapaxes(0, 1),
            "reads tokens before heads": x.reshape(heads, tokens, dim).swapaxes(0, 1),
            "reads the heads of a group apart":
                x.reshape(tokens, groups, heads // groups, dim).swapaxes(1, 2),
            "reads the heads in reverse": by_head[:, ::-1],
        }  # fmt: skip
    told = _say(part, "the index along the input's dimensions", "the order of the weight's columns")
    for name, moved in moves.items():
        yield Variant(f"{{}} {name}", told, x=moved.reshape(x.shape))


def _moved_tokens(part: Part) -> Iterator[Variant]:
    x, advice = part.x, "the token index of the input"
    for word, moved in off_by_a_token(x):
        name = {"earlier": "before", "later": "after"}[word]
        yield Variant(f"{{}} reads the token {name}", advice, x=moved)
    if x.shape[0] > 1:
        for name, row in (("last", x[-1:]), ("first", x[:1])):
            yield Variant(f"{{}} reads the {name} token for all", advice,
                          x=np.repeat(row, x.shape[0], axis=0))  # fmt: skip


def _cut_input(part: Part) -> Iterator[Variant]:
    """The sum over the input's dimensions ends, or starts, too soon."""
    width = part.x.shape[1]
    cuts = {1, 2, 4, 8, 16, 32, 64, 128, 256, width // 2, width // 4}
    cuts |= {width % tile for tile in (16, 32, 48, 64, 96, 128, 256, 512, 1024)}
    advice = "the bounds of the loop over the input's dimensions (a partial tile or block)"

    def without(start: int, stop: int) -> Float64:
        x = part.x.copy()
        x[:, start:stop] = 0
        return x

    for cut in sorted(c for c in cuts if 0 < c < width):
        yield Variant(f"{{}} leaves out the last {cut} input dimensions", advice,
                      x=without(width - cut, width))  # fmt: skip
        if cut >= FEWEST_CUT_FIRST:
            yield Variant(f"{{}} leaves out the first {cut} input dimensions", advice,
                          x=without(0, cut))  # fmt: skip
    for tile in (16, 32, 64, 128, 256):
        for start in range(0, min(width, 32 * tile), tile) if tile < width else ():
            stop = min(width, start + tile)
            yield Variant(f"{{}} leaves out input dimensions {start} to {stop - 1}",
                          "the loop over blocks of the input's dimensions",
                          x=without(start, stop))  # fmt: skip


def _split_sums(part: Part) -> Iterator[Variant]:
    """Parts of the sum over the input's dimensions that are added twice, or lost (split-k).

    How often each part was added is solved for, and is a whole number.
    """
    sample, width = part.sample, part.x.shape[1]
    weight = picker(part.weight)(sample.columns).astype(np.float64)
    x, shape = part.x[sample.tokens], part.scene.plain.value.shape
    where = np.ix_(sample.tokens, sample.columns)
    error = part.scene.observed.reshape(shape)[where] - part.scene.plain.value[where]
    for count in SPLITS:
        if width % count or count == width or 2 * count > sample.mask.sum():
            continue
        pieces = np.einsum(
            "tpi,opi->pto", x.reshape(len(x), count, -1), weight.reshape(len(weight), count, -1)
        )
        given = pieces[:, sample.mask].T
        times, *_ = np.linalg.lstsq(given, error[sample.mask], rcond=None)
        whole = np.rint(times)
        if not whole.any() or np.abs(times - whole).max() > NEARLY_WHOLE or (whole < -1).any():
            continue
        told = [f"part {i} of {count} {'left out' if n < 0 else 'added twice'}"
                for i, n in enumerate(whole) if n in (-1, 1)]  # fmt: skip
        is_cut = not (whole > 0).any() and width // count <= LARGEST_CUT  # see `_cut_input`
        if 0 < len(told) < count and len(told) == np.count_nonzero(whole) and not is_cut:
            yield Variant(
                f"{{}} sum with {' and '.join(told[:3])}{', ...' if len(told) > 3 else ''}",
                "the reduction over the parts of the inner dimension (split-k): each once",
                x=part.x * np.repeat(1 + whole, width // count),
            )


def _other_inputs(part: Part) -> Iterator[Variant]:
    """Another recorded tensor of the layer as the input, or the stream."""
    scene = part.scene
    found = [(_told(part, key), x) for key, x in scene.around()]
    stream = scene.tensor(scene.graph.stream(scene.key.layer))
    if stream is not None:
        found.append(("the stream before the norm", stream))
    for name, x in found:
        read = x[-1:] if isinstance(scene.operation, Head) else x
        if read.shape == part.x.shape:
            yield Variant(f"{{}} reads {name}", "which buffer the product reads", x=read)


def _told(part: Part, key: StageKey) -> str:
    """A tensor that a product reads in place of its own."""
    graph, own = part.scene.graph, part.scene.source(0)
    both_normed = all(isinstance(graph.operation(k), Norm) for k in (key, own))
    is_before = key != own and both_normed and graph.inputs(key)[0] == graph.stream(key.layer)
    return f"{key.stage} (a parallel block)" if is_before else key.stage


def _biases(part: Part) -> Iterator[Variant]:
    stored = part.scene.site.find(part.module.bias)
    bias = None if stored is None else read_all(stored).astype(np.float64)
    here = part.scene.key.layer
    if part.bias is None:
        if bias is not None:
            yield Variant("{} bias added already", "the bias belongs to the next stage", bias=bias)
        return
    yield Variant("{} bias missing", _say(part, "the addition of the bias",
                  "the original model has no such bias"), bias=0 * part.bias)  # fmt: skip
    yield Variant("{} bias doubled", "the bias is added twice", bias=2 * part.bias)
    yield Variant("{} bias subtracted", "the sign of the bias", bias=-part.bias)
    if part.scene.in_file:
        yield Variant("{} bias stored doubled", "the bias in the conversion", bias=part.bias / 2)
    for layer in range(part.scene.config.num_layers):
        other = part.scene.site.weights.get(f"model.layers.{layer}.{part.module.bias}")
        if layer != here and other is not None and other.shape == part.bias.shape:
            yield Variant(f"{{}} bias of layer {layer}", "the offset of this layer's bias",
                          bias=read_all(other).astype(np.float64))  # fmt: skip


def _row_factors(part: Part) -> Iterator[Variant]:
    advice = _say(part, "a scale applied to the product", "a scale folded into the weight")
    for name, factor in (("negated", -1.0), ("doubled", 2.0), ("halved", 0.5)):
        yield Variant(f"{{}} product {name}", advice, x=part.x * factor)
    if part.module in (Q, K, V, O):
        dim = part.scene.config.head_dim
        yield Variant("{} product divided by sqrt(D)", advice, x=part.x * dim**-0.5)
        if part.scene.in_file:
            yield Variant("{} product times sqrt(D)", advice, x=part.x * dim**0.5)


def _lost_bias(part: Part) -> Iterator[Variant]:
    """The oracle adds the same to every token: a bias that this file lacks."""
    plain = part.scene.plain.value
    stored = part.scene.site.find(part.module.bias)
    if not part.scene.in_file or plain.shape[0] < 3:
        return
    addend = (part.scene.observed.reshape(plain.shape) - plain).mean(axis=0)
    is_zero = stored is None or not np.any(read_all(stored))
    if stored is None and part.scene.wrong.any(axis=0).mean() < FEWEST_BIASED:
        return  # a bias would show in more than a few columns
    state = "lacks it" if stored is None else ("has zeros" if is_zero else "has another")
    yield Variant(
        f"{{}} bias lost (the original adds one, this file {state})",
        "the bias in the conversion",
        bias=addend if part.bias is None else part.bias + addend,
        is_fallback=stored is None or not is_zero,
    )


def _say(part: Part, engine: str, file: str) -> str:
    return file if part.scene.in_file else engine


VARIANTS: tuple[Variants, ...] = (
    _transposed,
    _rope_rows,
    _other_modules,
    _interleaved,
    _biases,
    _moved_rows,
    _moved_columns,
    _moved_tokens,
    _other_inputs,
    _row_factors,
    _cut_input,
    _split_sums,
    _lost_bias,
    _spoilt_values,
    _other_layers,
)
