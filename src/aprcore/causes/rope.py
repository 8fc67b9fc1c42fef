"""What goes wrong with rotary position embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from aprcore.causes.rope_schedules import before_rotation, solved_divisor, solved_shift
from aprcore.causes.scene import ORIGINAL, Entry, Float64, Scene, Trial, single
from aprcore.causes.solving import minimise, round_number, to_halves, to_pairs
from aprcore.ground.precision import BFLOAT16, FLOAT16
from aprcore.network.operations import PARTS, Rotate
from aprcore.network.rope import Rope, RopeScaling

# Bases that models are trained with; others are solved for.
USUAL_THETAS = (
    5e3, 1e4, 2e4, 4e4, 5e4, 1e5, 1.5e5, 2.5e5, 3e5, 5e5, 6e5, 1e6, 2e6, 3.5e6, 5e6, 8e6, 1e7,
)  # fmt: skip
USUAL_FACTORS = (0.125, 0.25, 0.5, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0, 40.0)
# Solving for theta reads this many tokens and heads: the last ones turn the furthest.
SOLVED_TOKENS = 33
ROTATED = (Rotate,)


def _angles(scene: Scene) -> Float64:
    positions = scene.positions.astype(np.float64)
    return np.multiply.outer(positions, scene.config.rope.inverse_frequencies())


def _adjacent_pairs(scene: Scene) -> Float64:
    dim = scene.config.head_dim
    x = to_halves(before_rotation(scene), dim)
    return to_pairs(_turned(x, _angles(scene), scene.config.rope.attention_factor()), dim)


def _pairs_in_halves(scene: Scene) -> Float64:
    return _rotated(scene, to_halves(before_rotation(scene), scene.config.head_dim))


def _stored_as_pairs(scene: Scene) -> Float64:
    """q and k whose rows were not permuted back: the rotation meets the wrong partners."""
    return _rotated(scene, to_pairs(before_rotation(scene), scene.config.head_dim))


def _rotated(scene: Scene, x: Float64) -> Float64:
    """The model's own rotation of something else."""
    return scene.backend.rope(x, scene.positions, scene.config.rope)


def _at_positions(change: Callable[[Float64], Float64]) -> Callable[[Scene], Float64]:
    def output(scene: Scene) -> Float64:
        return _rotated_at(scene, change(scene.positions.astype(np.float64)))

    return output


def _rotated_at(scene: Scene, positions: Float64, *, in_single: bool = False) -> Float64:
    """Rotation at any positions, whole or not; by angles in float32 if that is asked for."""
    rope, kind = scene.config.rope, np.float32 if in_single else np.float64
    frequencies = rope.inverse_frequencies().astype(kind)
    angles = np.multiply.outer(positions.astype(kind), frequencies).astype(np.float64)
    return _turned(before_rotation(scene), angles, rope.attention_factor())


def _turned(x: Float64, angles: Float64, factor: float = 1.0) -> Float64:
    """Rotate dimensions i and i + D/2 of every head of x [T, N·D] by angles [T, D/2]."""
    return _with_turn(x, factor * np.cos(angles), factor * np.sin(angles))


def _with_turn(
    x: Float64, cosine: Float64, sine: Float64, signs: tuple[int, int] = (-1, 1)
) -> Float64:
    """The same by cosine and sine; `signs` are the sine's in the first and the second half."""
    first, second = np.moveaxis(x.reshape(x.shape[0], -1, 2, cosine.shape[1]), 2, 0)
    c, s = cosine[:, None, :], sine[:, None, :]
    halves = [first * c + signs[0] * second * s, second * c + signs[1] * first * s]
    return np.stack(halves, axis=2).reshape(x.shape)


def _offsets(scene: Scene) -> Iterator[Trial]:
    usual = (1, -1, 2, -2, scene.num_tokens, -scene.num_tokens)
    shift = solved_shift(scene)
    for offset in dict.fromkeys(usual if shift is None else (*usual, shift)):
        positions = scene.positions.astype(np.float64) + offset
        yield f"{offset:+d}", _rotated_at(scene, positions)
        if abs(offset) > scene.num_tokens:  # engines round such angles further than ours predict
            yield f"{offset:+d}", _rotated_at(scene, positions, in_single=True)


def _restarts(scene: Scene) -> Iterator[Trial]:
    """Positions that start again: in every chunk, or at the boundary of two batches."""
    positions, tokens = scene.positions.astype(np.float64), scene.num_tokens
    first = scene.first_wrong_token
    usual = {n for n in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n < tokens}
    for period in sorted(usual | {first} - {0, 1}):
        yield f"every {period} tokens", _rotated_at(scene, positions % period)
    for start in sorted({*range(1, min(tokens, 17)), first} - {0}):
        moved = np.where(positions < start, positions, positions - start)
        yield f"at token {start}", _rotated_at(scene, moved)


def _held(scene: Scene) -> Iterator[Trial]:
    """Positions beyond a table's end, which is read there instead."""
    positions = scene.positions.astype(np.float64)
    if scene.is_observed and not scene.wrong.reshape(len(positions), -1)[-1].any():
        return  # the last token is beyond the end, if any is
    last = {2**n - 1 for n in range(1, 18)} | {int(positions[max(0, scene.first_wrong_token - 1)])}
    for end in sorted(n for n in last if max(0, positions[0]) < n < positions[-1]):
        yield f"{end}", _rotated_at(scene, np.minimum(positions, end))


def _usual_thetas(scene: Scene) -> Iterator[Trial]:
    for theta in USUAL_THETAS:
        if theta != scene.config.rope.theta:
            yield f"{theta:g}", _with_rope(scene, replace(scene.config.rope, theta=theta))


def _solved_theta(scene: Scene) -> Iterator[Trial]:
    x, observed = before_rotation(scene), scene.observed.reshape(scene.plain.value.shape)
    rows = slice(-SOLVED_TOKENS, None)
    positions, rope = scene.positions[rows], scene.config.rope

    def misfit(log_theta: float) -> float:
        turned = scene.backend.rope(
            x[rows], positions, replace(rope, theta=float(np.exp(log_theta)))
        )
        return float(np.square(turned - observed[rows]).sum())

    theta = float(np.exp(minimise(misfit, np.linspace(np.log(2.0), np.log(1e9), 240))))
    theta = round_number(theta, 1e-5)
    yield f"{theta:.6g}", _with_rope(scene, replace(rope, theta=theta))


def _with_rope(scene: Scene, rope: Rope) -> Float64:
    return scene.backend.rope(before_rotation(scene), scene.positions, rope)


def _partial(scene: Scene) -> Iterator[Trial]:
    """Only the first dimensions of a head turn; their frequencies span those or the whole head."""
    x, dim, rope = before_rotation(scene), scene.config.head_dim, scene.config.rope
    heads = x.reshape(x.shape[0], -1, dim)
    for rotary in range(2, dim, 2):
        if dim > 64 and rotary % 8:
            continue
        half = rotary // 2
        narrow = rope.theta ** -(np.arange(half, dtype=np.float64) / half)
        for frequencies in (narrow, rope.inverse_frequencies()[:half]):
            angles = np.multiply.outer(scene.positions.astype(np.float64), frequencies)
            first = heads[:, :, :rotary].reshape(x.shape[0], -1)
            turned = _turned(first, angles, rope.attention_factor())
            out = heads.copy()
            out[:, :, :rotary] = turned.reshape(x.shape[0], -1, rotary)
            yield f"{rotary}", out.reshape(x.shape)
    yield from _pairs_left(scene, x)


def _pairs_left(scene: Scene, x: Float64) -> Iterator[Trial]:
    """Only the first pairs of the usual ones turn, each with its partner in the other half."""
    half = scene.config.head_dim // 2
    for kept in range(1, half):
        if half > 32 and kept % 4:
            continue
        angles = _angles(scene)
        angles[:, kept:] = 0
        yield f"{2 * kept}", _turned(x, angles, scene.config.rope.attention_factor())


def _scaling_missing(scene: Scene) -> Iterator[Trial]:
    rope = scene.config.rope
    if rope.scaling.kind == "default" and rope.divisors is None:
        return
    name = rope.scaling.kind if rope.divisors is None else "rope_freqs"
    yield name, _with_rope(scene, replace(rope, scaling=RopeScaling(), divisors=None))


def _scaling_partial(scene: Scene) -> Iterator[Trial]:
    """Part of the scaling only: the frequencies without the factor on the result."""
    rope = scene.config.rope
    x, angles = before_rotation(scene), _angles(scene)
    if rope.attention_factor() != 1:
        yield "without its attention factor", _turned(x, angles)
        plain = replace(rope, scaling=RopeScaling()).inverse_frequencies()
        unscaled = np.multiply.outer(scene.positions.astype(np.float64), plain)
        yield "only as its attention factor", _turned(x, unscaled, rope.attention_factor())
        yield "with its attention factor twice", _turned(x, angles, rope.attention_factor() ** 2)
    if rope.scaling.kind in ("llama3", "yarn"):
        linear = replace(rope, scaling=RopeScaling("linear", factor=rope.scaling.factor))
        yield "as if it were linear", _with_rope(scene, linear)


def _other_columns(scene: Scene) -> Iterator[Trial]:
    """The rotation of something else than this side's q or k."""
    part: str = scene.operation.part
    start, stop = scene.config.qkv_columns(part)
    bare = scene.unbiased(0)
    if bare is not None:
        yield f"{part} before its bias", _rotated(scene, bare[:, start:stop])
    for other in PARTS:
        first = scene.config.qkv_columns(other)[0]
        columns = scene.inputs[0][:, first : first + stop - start]
        if other != part and columns.shape[1] == stop - start:
            yield f"the columns of {other}", _rotated(scene, columns)


def _scaled_positions(scene: Scene) -> Iterator[Trial]:
    solved = solved_divisor(scene)
    factors = USUAL_FACTORS if solved is None else (*USUAL_FACTORS, solved)
    for factor in dict.fromkeys(factors):
        yield f"{factor:g}", _rotated_at(scene, scene.positions / factor)


def _exponents(scene: Scene) -> Iterator[Trial]:
    """Frequencies from a slip in theta^(-2i/D)."""
    rope, dim = scene.config.rope, scene.config.head_dim
    index = np.arange(dim // 2, dtype=np.float64)
    usual = rope.inverse_frequencies() / rope.theta ** (-2 * index / dim)
    for name, exponent in (
        ("-i/D", -index / dim),
        ("-4i/D", -4 * index / dim),
        ("-2i/E", -2 * index / scene.config.hidden_size),
        ("-2i/(H·D)", -2 * index / (dim * scene.config.num_heads)),
        ("-2(i+1)/D", -2 * (index + 1) / dim),
        ("+2i/D", 2 * index / dim),
        ("-2i/D in reverse order", (-2 * index / dim)[::-1]),
    ):
        angles = np.multiply.outer(scene.positions.astype(np.float64), usual * rope.theta**exponent)
        yield name, _turned(before_rotation(scene), angles, rope.attention_factor())


def _one_angle(scene: Scene) -> Float64:
    angles = np.repeat(scene.positions.astype(np.float64)[:, None], scene.config.head_dim // 2, 1)
    return _turned(before_rotation(scene), angles)


def _other_heads(scene: Scene) -> Iterator[Trial]:
    """Heads of another size, such as hidden size over heads where the model states one."""
    x, rope, config = before_rotation(scene), scene.config.rope, scene.config
    sizes = (config.hidden_size // config.num_heads, config.num_heads, config.num_kv_heads,
             rope.head_dim // 2, 2 * rope.head_dim)  # fmt: skip
    for size in dict.fromkeys(sizes):
        if size != config.head_dim and size > 1 and not size % 2 and not x.shape[1] % size:
            other = replace(rope, head_dim=size, divisors=None)
            yield f"{size} dimensions in place of {config.head_dim}", (
                scene.backend.rope(x, scene.positions, other)
            )  # fmt: skip


def _half_angles(scene: Scene) -> Iterator[Trial]:
    """Sine and cosine, or the angle too, rounded to half precision."""
    angles, x = _angles(scene), before_rotation(scene)
    frequencies = scene.config.rope.inverse_frequencies()
    factor = scene.config.rope.attention_factor()
    for half in (FLOAT16, BFLOAT16):
        cast = half.round
        product = cast(cast(scene.positions.astype(np.float64))[:, None] * cast(frequencies)[None])
        for turn in (angles, cast(angles), product):
            for rounding in (cast, lambda y: y):
                cosine, sine = rounding(np.cos(turn)), rounding(np.sin(turn))
                yield half.name, _with_turn(x, cosine * factor, sine * factor)


def _one_sign(scene: Scene) -> Iterator[Trial]:
    """One of the two sines has the wrong sign: no rotation at all."""
    angles, x = _angles(scene), before_rotation(scene)
    factor = scene.config.rope.attention_factor()
    cosine, sine = factor * np.cos(angles), factor * np.sin(angles)
    yield "first", _with_turn(x, cosine, sine, (1, 1))
    yield "second", _with_turn(x, cosine, sine, (-1, -1))
    yield "sine and cosine exchanged in", _with_turn(x, sine, cosine)


def _twice(scene: Scene) -> Float64:
    return _rotated(scene, scene.plain.value)


def _row(name: str, outputs: Callable[[Scene], Iterator[Trial]], advice: str, in_file: str | None,
         file_advice: str = "", *, is_fallback: bool = False) -> Entry:  # fmt: skip
    return Entry(name, ROTATED, outputs, advice, in_file, file_advice, is_fallback)


_CONFIG = "compare this value with the original model's config: the conversion lost or changed it"

NOT_APPLIED = Entry("RoPE not applied", ROTATED, single(before_rotation),
      "the rotation is skipped, or its result is written elsewhere",
      "the original model does not rotate in this layer", "layers without RoPE")  # fmt: skip

ENTRIES = (
    Entry("RoPE on adjacent pairs", ROTATED, single(_adjacent_pairs),
          "the kernel rotates dimensions 2i and 2i+1; this model pairs i with i + D/2",
          "the original model rotates adjacent pairs",
          "rope_type says split halves (2) and the model wants adjacent pairs (0)"),
    Entry("RoPE on adjacent pairs, put in halves first", ROTATED, single(_pairs_in_halves),
          "q and k are permuted from pairs to halves although they come in halves",
          "q and k rows stored in halves but read as adjacent pairs",
          "rope_type or the converter's permutation of q and k rows"),
    Entry("q and k in adjacent-pair order under a rotation of halves", ROTATED,
          single(_stored_as_pairs),
          "q and k are in adjacent-pair order when the rotation of halves meets them",
          "q and k rows permuted to adjacent pairs once more",
          "the converter's permutation of q and k rows"),
    NOT_APPLIED,
    Entry("RoPE applied twice", ROTATED, single(_twice),
          "the rotation runs in place and once more, for instance on reading the cache"),
    Entry("RoPE with the sine negated", ROTATED, single(_at_positions(np.negative)),
          "the sign of the sine, or which half is negated in rotate_half"),
    _row("RoPE with the {} sine's sign wrong", _one_sign,
         "the signs of the two products with the sine: x·cos - y·sin and x·sin + y·cos", None),
    _row("RoPE theta {}", _usual_thetas, "which base the kernel's frequencies are made from",
         ORIGINAL, "rope_theta of this file: " + _CONFIG),
    _row("RoPE theta {}", _solved_theta, "which base the kernel's frequencies are made from",
         ORIGINAL, "rope_theta of this file: " + _CONFIG, is_fallback=True),
    _row("RoPE of {}", _other_columns, "which buffer and which columns the rotation reads", None),
    Entry("RoPE positions off by {}", ROTATED, _offsets,
          "which position the first token gets, and the cache's length when it is read",
          is_causal=False),
    _row("RoPE positions restarting {}", _restarts,
         "positions are taken within a chunk or batch and not within the text", None),
    _row("RoPE positions held at {}", _held,
         "the length of the table of sines and cosines: max_position_embeddings", None),
    Entry("RoPE with the last position for every token", ROTATED,
          single(_at_positions(lambda p: np.full_like(p, p[-1]))),
          "one position for all tokens, as when decoding", is_causal=False),
    Entry("RoPE positions in reverse", ROTATED, single(_at_positions(lambda p: p[::-1])),
          "the order of the positions", is_causal=False),
    _row("RoPE on the first {} dimensions of a head only", _partial,
         "the rotary dimension against the head dimension",
         "RoPE on the first {} dimensions only in the original model",
         "partial_rotary_factor of the original config"),
    _row("RoPE scaling ({}) missing", _scaling_missing, "the kernel ignores rope_scaling",
         "no RoPE scaling in the original model", "rope_scaling of this file: " + _CONFIG),
    _row("RoPE scaling {}", _scaling_partial, "how the kernel applies rope_scaling", ORIGINAL,
         "rope_scaling of this file: " + _CONFIG),
    _row("RoPE positions divided by {}", _scaled_positions, "linear scaling of positions",
         "RoPE scaling (linear by {})" + ORIGINAL, "rope_scaling of this file: " + _CONFIG,
         is_fallback=True),
    _row("RoPE on heads of {}", _other_heads,
         "the head dimension, which need not be hidden size over heads; and that it is not taken "
         "for the number of heads", ORIGINAL, "head_dim of this file: " + _CONFIG),
    _row("RoPE frequencies theta^({})", _exponents,
         "the exponent of theta in the frequencies: -2i/D", None),
    Entry("RoPE with one frequency for all dimensions", ROTATED, single(_one_angle),
          "the frequencies all come out as 1"),
    _row("RoPE angles in {}", _half_angles, "angles, sine and cosine must be computed in float32",
         None),
)  # fmt: skip
