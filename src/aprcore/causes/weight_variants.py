"""The catalogue of other weights, inputs and biases for a product (see `projections`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from aprcore.causes.projections import Indices, Part, Pick, Variant, Variants, picker
from aprcore.causes.scene import Float64
from aprcore.network.graph import GATE, UP, K, O, Q, V
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
    index = np.arange(part.weight.shape[0]).reshape(-1, 2, part.head_dim // 2)
    pairs = index.swapaxes(1, 2).reshape(-1)
    for rows, order in ((pairs, "halves to pairs"), (np.argsort(pairs), "pairs to halves")):
        yield Variant(
            f"{{}} rows permuted from {order}",
            _say(part, "q and k rows are permuted between the two RoPE conventions",
                 "the converter permuted q and k rows for the other RoPE convention, or did not"),
            _mapped(picker(part.weight), rows),
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
        pair = {name[: -len("_proj")] for name in (part.short_name, other)}
        swapped = " (gate and up swapped)" if pair == {"gate", "up"} else ""
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
    gate, up = (part.scene.site.find(f"{name}.weight") for name in (GATE, UP))
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
        changed, names = own.copy(), []
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
            names.append(f"{what} {best} of row {row}"
                         + (f" (scale times {1 + factor:.4g})" if size > 1 else ""))  # fmt: skip
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        yield Variant(
            f"{{}} with a wrong value: {listed}",
            _say(part, "how these values are read", "these values in the conversion"),
            _replaced(picker(part.weight), wrong, changed.astype(np.float32)),
            is_fallback=True,
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
        weight = part.scene.site.weights.get(f"model.layers.{layer}.{part.module}.weight")
        if weight is not None and weight.shape == part.weight.shape:
            yield Variant(
                f"{{}} weight of layer {layer}",
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
    x, advice = part.x, "the index along the input's dimensions"
    tokens = x.shape[0]
    told = _say(part, advice, "the order of the weight's columns")
    yield Variant("{} columns one late", told, x=np.roll(x, -1, axis=1))
    yield Variant("{} columns one early", told, x=np.roll(x, 1, axis=1))
    yield Variant("{} columns in reverse", told, x=x[:, ::-1])
    if part.module != O:
        return
    dim, heads = part.scene.config.head_dim, part.scene.config.num_heads
    yield Variant("{} reads dimensions before heads", told,
                  x=x.reshape(tokens, heads, dim).swapaxes(1, 2).reshape(x.shape))  # fmt: skip
    yield Variant("{} reads heads before dimensions", told,
                  x=x.reshape(tokens, dim, heads).swapaxes(1, 2).reshape(x.shape))  # fmt: skip
    by_head = x.reshape(tokens, heads, dim).swapaxes(0, 1)
    yield Variant("{} reads heads before tokens", told, x=by_head.reshape(x.shape))
    yield Variant("{} reads tokens before heads", told,
                  x=x.reshape(heads, tokens, dim).swapaxes(0, 1).reshape(x.shape))  # fmt: skip
    groups = part.scene.config.num_kv_heads
    tiled = x.reshape(tokens, groups, heads // groups, dim).swapaxes(1, 2)
    yield Variant("{} reads the heads of a group apart", told, x=tiled.reshape(x.shape))
    yield Variant("{} reads the heads in reverse", told,
                  x=x.reshape(tokens, heads, dim)[:, ::-1].reshape(x.shape))  # fmt: skip


def _moved_tokens(part: Part) -> Iterator[Variant]:
    x = part.x
    if x.shape[0] > 1:
        for name, step in (("before", 1), ("after", -1)):
            moved = np.roll(x, step, axis=0)
            yield Variant(f"{{}} reads the token {name}", "the token index of the input", x=moved)
        yield Variant("{} reads the last token for all", "the token index of the input",
                      x=np.repeat(x[-1:], x.shape[0], axis=0))  # fmt: skip
        yield Variant("{} reads the first token for all", "the token index of the input",
                      x=np.repeat(x[:1], x.shape[0], axis=0))  # fmt: skip


def _cut_input(part: Part) -> Iterator[Variant]:
    """The sum over the input's dimensions ends, or starts, too soon."""
    width = part.x.shape[1]
    cuts = {1, 2, 4, 8, 16, 32, 64, 128, 256, width // 2, width // 4}
    cuts |= {width % tile for tile in (16, 32, 48, 64, 96, 128, 256, 512, 1024)}
    for cut in sorted(c for c in cuts if 0 < c < width):
        last, first = part.x.copy(), part.x.copy()
        last[:, width - cut :] = 0
        first[:, :cut] = 0
        advice = "the bounds of the loop over the input's dimensions (a partial tile or block)"
        yield Variant(f"{{}} leaves out the last {cut} input dimensions", advice, x=last)
        if cut >= FEWEST_CUT_FIRST:
            yield Variant(f"{{}} leaves out the first {cut} input dimensions", advice, x=first)
    for tile in (16, 32, 64, 128, 256):
        if tile < width:
            for start in range(0, min(width, 32 * tile), tile):
                gone = part.x.copy()
                gone[:, start : start + tile] = 0
                yield Variant(f"{{}} leaves out input dimensions {start} to "
                              f"{min(width, start + tile) - 1}",
                              "the loop over blocks of the input's dimensions", x=gone)  # fmt: skip


def _other_inputs(part: Part) -> Iterator[Variant]:
    """Another recorded tensor of the layer as the input."""
    stage = part.scene.key.stage
    for name in ("attn_norm", "attention", "attn_out", "post_attn_residual", "ffn_norm", "ffn_silu",
                 "ffn_swigl", "ffn_gate", "ffn_up", "q_post_rope", "ffn_out"):  # fmt: skip
        if name != stage:
            yield from _reading(part, name, part.scene.tensor(name))
    layer, last = part.scene.key.layer, part.scene.config.num_layers - 1
    before = last if layer is None else layer - 1
    source = ("embedding", 0) if before < 0 else ("post_ffn_residual", before)
    stream = part.scene.tensor(source[0], source[1])
    if stream is not None and stage == "lm_head":
        stream = stream[-1:]
    yield from _reading(part, "the stream before the norm", stream)


def _reading(part: Part, name: str, x: Float64 | None) -> Iterator[Variant]:
    if x is not None and x.shape == part.x.shape:
        yield Variant(f"{{}} reads {name}", "which buffer the product reads", x=x)


def _biases(part: Part) -> Iterator[Variant]:
    stored = part.scene.site.find(f"{part.module}.bias")
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
        other = part.scene.site.weights.get(f"model.layers.{layer}.{part.module}.bias")
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
    stored = part.scene.site.find(f"{part.module}.bias")
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
    _lost_bias,
    _spoilt_values,
    _other_layers,
)
