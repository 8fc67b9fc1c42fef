"""The judge's backend: float64 values, each with the variance of the error it may carry.

An array here is an `Estimate`: what the operation should give, and the predicted variance of what
a sound engine gives instead, because weights are stored with a step and arithmetic rounds. Running
a stage's operation on this backend therefore yields both the expected tensor and its noise floor,
and a span of several operations carries the noise through by itself.

The formulas take errors as independent and first-order:

- a weight stored with step d is off by d^2/12 in variance: y = W x gains sum_k x_k^2 d_jk^2 / 12;
- a result rounded to a type gains spacing(y)^2/12;
- a sum of K products carried with unit roundoff u gains u^2/3 (K/2 sum_k p_k^2 + K/3 y^2): the
  first part where partial sums wander, the second where they grow steadily (Higham, "Accuracy and
  Stability of Numerical Algorithms", ch. 4, with the squared error of one rounding u^2/3). It is
  an upper estimate: blocked and pairwise sums do better;
- RoPE's angles are computed in float32 whatever the engine: position * frequency is off by a few u.

Values themselves come from `ReferenceBackend`; only the products are written again, so that one
pass over each weight serves several sides at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.arithmetic import Arithmetic
from aprcore.engines.estimate import (
    BlockedEstimate,
    Estimate,
    Float64,
    Profile,
    is_blocked,
)
from aprcore.engines.predicted_product import PredictedProduct
from aprcore.engines.reference import ReferenceBackend
from aprcore.engines.rounded_weight import as_read
from aprcore.ground.parallel import available_threads, for_each, single_threaded_blas
from aprcore.ground.precision import FLOAT32
from aprcore.network.backend import Int64
from aprcore.network.mask import Mask
from aprcore.network.rope import Rope
from aprcore.network.weights import Weight, read_all, row_chunks
from aprcore.quant.roundings import WITH_MINIMUM, RotatedRounding, Rounding, sum_offsets
from aprcore.quant.steps import SHRINKAGE

# Weights are judged in pieces of about this many float32 bytes. Their float64 copy and squares then
# leave a core's own cache, but smaller pieces cost more in calls than that (measured: 192 KiB
# 2.1 s, 1 MiB 1.7 s for a 0.5B-shaped model).
PIECE_BYTES = 1024 * 1024
# Beside an outlier, a sub-block of a K-quant gets a scale of one or two units, which cuts off the
# ends of its range: single values come to 205 (Q4_K) and 103 (Q6_K) times d^2/12, three times what
# a normal error may reach. Products average that out; an embedding shows every value.
CLIPPED_TAIL = 4.0
# Roundings of position * frequency: the frequency's power, its cast, the product, and sin/cos.
ANGLE_ROUNDINGS = 4
# Units in the last place that an elementary function of a conformant device may be off by. Source:
# OpenCL C 3.0, "Relative Error as ULPs", single precision, full profile; CUDA's and Metal's tables,
# fast functions among them, are below these. Libraries of a CPU come to one.
EXP_ULPS, DIVISION_ULPS, ROOT_ULPS, SINE_ULPS, TANH_ULPS = 3.0, 2.5, 2.0, 4.0, 5.0
# Products that a tensor core adds to a sum at once, the fewest (TF32 on an A100), before it cuts
# off what float32 does not hold: a unit in the last place at most, half on average, and always
# towards zero. Partial sums that wander come to half of the last in the mean. Source: Fasi, Higham,
# Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021.
CUT_TERMS = 4
# Rows of a weight, twice, that stand for all where the correlation of its results is measured.
SAMPLED_ROWS = 64
_TINY = float(np.finfo(np.float64).tiny)


class PredictionBackend:
    """Operations on `Estimate`; see `aprcore.network.backend.Backend`.

    Rows of different sides may be stacked for the row-wise operations: `profiles` then gives each
    block of rows its own engine.
    """

    name = "prediction"

    def __init__(
        self, profiles: Sequence[tuple[int | None, Profile]], threads: int | None = None
    ) -> None:
        """One (number of rows, profile) per stacked side; None rows for a single side."""
        self._profiles = profiles
        self._threads = threads or available_threads()
        # Factors are rounded here, where it is known how well they are known.
        self._exact = ReferenceBackend()

    def from_host(self, x: NDArray[np.floating[Any]]) -> Estimate:
        value = np.asarray(x, dtype=np.float64)
        return Estimate(value, np.broadcast_to(0.0, value.shape))

    def to_host(self, x: Estimate) -> Float64:
        return x.value

    def embed(self, tokens: Int64, weight: Weight) -> Estimate:
        value = self._exact.embed(tokens, weight)
        steps = np.concatenate([_steps(weight, token, token + 1) for token in tokens.tolist()])
        if weight.dtype.endswith("_K"):
            steps *= CLIPPED_TAIL
        variance = self._weight_error(value, steps)
        distinct = float(np.unique(tokens).size)
        return Estimate(value, variance + self._stored(value), distinct)

    def scale(self, x: Estimate, factor: float) -> Estimate:
        value = factor * x.value

        def of_factor(energy: Float64, profile: Profile) -> Float64:
            return energy * _rounding(factor, profile) ** 2

        # The factor rounds once, by as much for every value: no mean over them is near a typical
        # rounding, so it is the one that the type gives. Then each product rounds.
        variance = factor**2 * x.variance + self._by_side(np.square(x.value), of_factor)
        return replace(x, value=value, variance=variance + self._stored(value))

    def soft_cap(self, x: Estimate, cap: float) -> Estimate:
        if isinstance(x, BlockedEstimate):
            return self._by_block(x, lambda block, rows: self.soft_cap(block, cap))
        value = self._exact.soft_cap(x.value, cap)
        quotient, tanh = x.value / cap, value / cap
        slope = 1 - np.square(tanh)
        # Quotient, tanh and product are stored: a small score's quotient may be subnormal in half
        # precision where the score is not, so that each counts by its own spacing.
        variance = np.square(cap * slope) * self._stored(quotient)
        variance += cap**2 * self._stored(tanh) + self._stored(value)
        # 1/cap may be a rounded factor.
        variance += self._sum_error((_roundings_of(TANH_ULPS) + 4) * np.square(value))
        if np.any(x.variance):
            variance += np.square(slope) * x.variance
        return replace(x, value=value, variance=variance)

    def rms_norm(self, x: Estimate, weight: Weight, eps: float, offset: float = 0.0) -> Estimate:
        value = self._exact.rms_norm(x.value, weight, eps, offset)
        size = weight.shape[0]
        groups = x.value.reshape(-1, size)
        scale = 1 / np.sqrt(np.mean(np.square(groups), axis=1, keepdims=True) + eps)
        normed = (groups * scale).reshape(value.shape)
        stored = read_all(weight).astype(np.float64)
        gain = np.tile(offset + stored, value.shape[1] // size)
        steps = np.tile(_steps(weight, 0, size).reshape(-1), value.shape[1] // size)
        stored = np.tile(stored, value.shape[1] // size)
        variance = np.square(normed) * self._weight_error(stored[None, :], steps[None, :])
        if offset:  # the sum with the weight is rounded once, in float32 at the coarsest
            variance += np.square(value) * (FLOAT32.roundoff**2 / 3)
        # The mean of squares is a sum of `size` positive terms; the root halves its error. That of
        # the root is in all values of a row: no mean over them is below what it may come to.
        roundings = 0.25 * size / 3 + 3 * _roundings_of(ROOT_ULPS)
        variance += self._sum_error(roundings * np.square(value))
        variance += self._stored(value) + self._stored(normed) * np.square(gain)
        if np.any(x.variance):
            spread = np.repeat(scale, size, axis=1).reshape(value.shape)
            variance += np.square(gain * spread) * x.variance
        dof = 1.0 if self._any_weights_rounded() else None
        return Estimate(value, variance, dof, x.correlation)

    def linear(self, x: Estimate, weights: Sequence[Weight]) -> Estimate:
        rows, width = x.value.shape[0], sum(weight.shape[0] for weight in weights)
        # sum_k w^2 x^2 goes where the variance will be: what follows from it is added at the end.
        value, variance, more = (np.empty((rows, width)) for _ in range(3))
        products: dict[tuple[object, ...], PredictedProduct] = {}
        jobs = []
        first = 0
        for weight in weights:
            roundings = self._roundings(lambda a: a.rounding_of(weight))  # noqa: B023
            read = as_read(weight, roundings[0])
            assert all(as_read(weight, x) == read for x in roundings), "sides that read alike"
            kind = (*roundings, weight.dtype if weight.dtype in WITH_MINIMUM else "")
            if kind not in products:
                offsets = [
                    sum_offsets(rounding, weight.dtype, x.value[part])
                    for rounding, (part, _) in zip(roundings, self._profiles_of(rows))
                ]
                factor = self._factor(x, roundings)
                products[kind] = PredictedProduct(factor, self._profiles_of(rows), offsets)
            pieces = row_chunks(weight, PIECE_BYTES)
            jobs += [(products[kind], read, first, *piece) for piece in pieces]
            first += weight.shape[0]

        def multiply(job: tuple[PredictedProduct, Weight, int, int, int]) -> None:
            product, weight, first, start, stop = job
            columns = slice(first + start, first + stop)
            product.rows(weight, start, stop, *(y[:, columns] for y in (value, variance, more)))

        with single_threaded_blas():
            for_each(multiply, jobs, self._threads)
        terms = x.value.shape[1]
        variance = self._sum_error(variance) + self._product_error(variance, value, terms)
        variance += self._stored(value) + more
        dofs = [
            _independent_rows(x.value[rows])
            for rows, profile in self._profiles_of(rows)
            if profile.rounds_weights
        ]
        shared = 0.0 if x.is_exact else self._shared(x, weights, variance)
        shrinkage = max(SHRINKAGE.get(weight.dtype, 0.0) for weight in weights)
        if shrinkage and any(profile.weights_rounded for _, profile in self._profiles):
            alike = np.square(shrinkage * value) / np.maximum(variance, _TINY)
            shared = max(shared, float(np.mean(alike)) ** 2)
        return Estimate(value, variance, min(dofs, default=None), shared)

    def add_bias(self, x: Estimate, biases: Sequence[Weight]) -> Estimate:
        value = self._exact.add_bias(x.value, biases)
        bias = np.concatenate([read_all(b) for b in biases]).astype(np.float64)[None, :]
        steps = np.concatenate([_steps(b, 0, b.shape[0]).reshape(-1) for b in biases])[None, :]
        # Engines add the bias before or after rounding the product: allow for either.
        variance = x.variance + self._weight_error(bias, steps)
        variance = variance + self._stored(value) + self._stored(x.value)
        # Fused with the product, the sum is another one than the recorded product's: both round at
        # the size of what they sum, which the product's typical size shows even where it cancels.
        size = np.mean(np.square(x.value), axis=1, keepdims=True) + np.square(bias)
        variance += self._sum_error(size * (x.value.shape[1] / 2 + 1))
        dof = 1.0 if self._any_weights_rounded() else x.token_dof
        return Estimate(value, variance, dof, x.correlation)

    def columns(self, x: Estimate, start: int, stop: int) -> Estimate:
        return replace(x, value=x.value[:, start:stop], variance=x.variance[:, start:stop])

    def rows(self, x: Estimate, start: int, stop: int) -> Estimate:
        return replace(x, value=x.value[start:stop], variance=x.variance[start:stop],
                       token_dof=None)  # fmt: skip

    def append_rows(self, x: Estimate, y: Estimate) -> Estimate:
        return Estimate(
            np.concatenate([x.value, y.value]), np.concatenate([x.variance, y.variance])
        )

    def rope(self, x: Estimate, positions: Int64, rope: Rope) -> Estimate:
        value = np.concatenate([
            ReferenceBackend(profile.arithmetic).rope(x.value[rows], positions[rows], rope)
            for rows, profile in self._profiles_of(x.value.shape[0])
        ])  # fmt: skip
        half = rope.head_dim // 2

        def swapped(y: Float64) -> Float64:
            """Each dimension's partner in the rotation."""
            pairs = y.reshape(y.shape[0], -1, 2, half)
            return pairs[:, :, ::-1].reshape(y.shape)

        angles = np.multiply.outer(positions.astype(np.float64), rope.inverse_frequencies())
        angle_variance = ANGLE_ROUNDINGS * np.square(FLOAT32.roundoff * np.maximum(angles, 1)) / 3
        per_dim = np.tile(angle_variance, (1, x.value.shape[1] // half))
        energy = np.square(x.value) + np.square(swapped(x.value))
        variance = np.square(swapped(value)) * per_dim
        # Sine and cosine, then the two products: each rounding touches half of the energy.
        variance += self._rounded(energy) + self._stored(value)
        variance += self._sum_error(_roundings_of(SINE_ULPS) / 2 * energy)
        if np.any(x.variance):
            variance += (x.variance + swapped(x.variance)) / 2
        return replace(x, value=value, variance=variance)

    def attention_scores(
        self, q: Estimate, k: Estimate, num_heads: int, num_kv_heads: int, scale: float, mask: Mask
    ) -> Estimate:
        head_dim = q.value.shape[1] // num_heads
        q = self._factor(q, self._roundings(lambda a: a.activation_rounding), head_dim)
        k = self._factor(k, self._roundings(lambda a: a.cache_rounding), head_dim)
        # The D errors of a query are in all of its scores, those of a key in those of all tokens.
        by_head = [x.variance.reshape(x.variance.shape[0], -1, head_dim) for x in (q, k)]
        token_dof = None if k.is_exact else _independent(by_head[1])
        correlation = 0.0 if q.is_exact else max(1 / _independent(by_head[0]), q.correlation)
        shape = num_heads, q.value.shape[0], k.value.shape[0]
        if not self._is_in_blocks(shape):
            made = self._scores(q, k, num_heads, num_kv_heads, scale, mask)
            return Estimate(*made, token_dof, correlation)
        group = num_heads // num_kv_heads

        def make(head: int, rows: slice) -> tuple[Float64, Float64]:
            of_head, of_group = (
                slice(number * head_dim, (number + 1) * head_dim)
                for number in (head, head // group)
            )
            queries = Estimate(q.value[rows, of_head], q.variance[rows, of_head])
            keys = self.columns(k, of_group.start, of_group.stop)
            its_mask = mask.before(shape[1] - rows.stop)
            value, variance = self._scores(queries, keys, 1, 1, scale, its_mask)
            return value[0], variance[0]

        return BlockedEstimate(shape, make, token_dof=token_dof, correlation=correlation)

    def _scores(
        self, q: Estimate, k: Estimate, num_heads: int, num_kv_heads: int, scale: float, mask: Mask
    ) -> tuple[Float64, Float64]:
        """Value and variance of scores, [H, T, S]."""
        exact, head_dim = self._exact.attention_scores, q.value.shape[1] // num_heads

        def squares(a: Float64, b: Float64) -> Float64:
            return exact(a, b, num_heads, num_kv_heads, scale**2, mask)

        value = exact(q.value, k.value, num_heads, num_kv_heads, scale, mask)
        wander = squares(np.square(q.value), np.square(k.value))
        variance = self._product_error(wander, value, head_dim)
        variance += 2 * self._stored(value)  # the product, then its scaling
        if np.any(q.variance) or np.any(k.variance):
            variance += squares(q.variance, np.square(k.value))
            variance += squares(np.square(q.value), k.variance)
        return value, variance

    def masked_softmax(self, scores: Estimate, mask: Mask) -> Estimate:
        if isinstance(scores, BlockedEstimate):
            tokens = scores.shape[1]

            def softmax(block: Estimate, rows: slice) -> Estimate:
                alone = Estimate(block.value[None], block.variance[None])
                made = self.masked_softmax(alone, mask.before(tokens - rows.stop))
                return Estimate(made.value[0], made.variance[0])

            return self._by_block(scores, softmax)
        value = self._exact.masked_softmax(scores.value, mask)
        seen = value > 0
        top = np.where(seen, scores.value, -np.inf).max(axis=2, keepdims=True)
        depth = np.where(seen, top - scores.value, 0.0)
        # The argument of exp is off by u (top - s), exp and the division by a few u; what a row is
        # divided by is off in all of its values alike.
        relative = np.square(depth) + value.shape[2] / 3
        relative += _roundings_of(EXP_ULPS) + 3 * _roundings_of(DIVISION_ULPS)
        if any(profile.arithmetic.scales_late for _, profile in self._profiles):
            relative = relative + np.square(scores.value)  # what it scales itself, it rounds itself
        variance = self._sum_error(np.square(value) * relative) + self._stored(value)
        # exp of what lies far below the maximum underflows to zero in float32.
        variance += np.where(seen, np.square(2.0**FLOAT32.min_exponent), 0.0)
        if np.any(scores.variance):
            pooled = (np.square(value) * scores.variance).sum(axis=2, keepdims=True)
            variance += np.square(value) * ((1 - 2 * value) * scores.variance + pooled)
        return replace(scores, value=value, variance=variance)

    def weighted_values(self, softmax: Estimate, v: Estimate, num_kv_heads: int) -> Estimate:
        v = self._factor(v, self._roundings(lambda a: a.cache_rounding),
                         v.value.shape[1] // num_kv_heads)  # fmt: skip
        roundings = self._roundings(lambda a: a.activation_rounding)
        if isinstance(softmax, BlockedEstimate):
            softmax = self._by_block(softmax, lambda x, rows: self._factor(x, roundings))
            heads, _, positions = softmax.shape
            sums = self._weighted_blocks(softmax, v, num_kv_heads)
        else:
            softmax = self._factor(softmax, roundings)
            heads, _, positions = softmax.value.shape
            sums = self._weighted(softmax, v, num_kv_heads)
        value, wander, of_softmax, of_values = sums.parts
        variance = self._product_error(wander, value, positions)
        variance += self._stored(value) + self._turned_back(value)
        correlation = 0.0
        if np.any(of_softmax) or np.any(of_values):
            shares = (float(np.mean(part / np.maximum(variance + of_softmax + of_values, _TINY)))
                      for part in (of_softmax, of_values))  # fmt: skip
            variance += of_softmax + of_values
            correlation = self._shared_in_attention(
                heads, sums.independent, softmax.correlation, v, num_kv_heads, *shares
            )
        return Estimate(value, variance, softmax.token_dof, correlation)

    def _weighted(self, softmax: Estimate, v: Estimate, num_kv_heads: int) -> _WeightedSums:
        """The sums over positions that the values of attention and their errors are made of."""
        exact = self._exact.weighted_values
        parts = [
            exact(softmax.value, v.value, num_kv_heads),
            exact(np.square(softmax.value), np.square(v.value), num_kv_heads),
        ]
        if softmax.is_exact and v.is_exact:
            return _WeightedSums((*parts, *[np.zeros_like(parts[0])] * 2), 1.0)
        parts.append(exact(softmax.variance, np.square(v.value), num_kv_heads))
        parts.append(exact(np.square(softmax.value), v.variance, num_kv_heads))
        return _WeightedSums(tuple(parts), _independent(softmax.variance))

    def _weighted_blocks(
        self, softmax: BlockedEstimate, v: Estimate, num_kv_heads: int
    ) -> _WeightedSums:
        """As `_weighted`, from one block after the other."""
        heads, tokens, _ = softmax.shape
        dim = v.value.shape[1] // num_kv_heads
        parts = tuple(np.zeros((tokens, heads * dim)) for _ in range(4))
        of_rows = _Independent()
        for head, rows, block in softmax.blocks():
            first = head // (heads // num_kv_heads) * dim
            values = self.columns(v, first, first + dim)
            alone = Estimate(block.value[None], block.variance[None])
            found = self._weighted(alone, values, 1)
            for part, made in zip(parts, found.parts):
                part[rows, head * dim : (head + 1) * dim] = made
            of_rows.add(block.variance)
        return _WeightedSums(parts, of_rows.count)

    def _is_in_blocks(self, shape: Sequence[int]) -> bool:
        return len(self._profiles) == 1 and is_blocked(shape)

    @staticmethod
    def _by_block(
        x: BlockedEstimate, function: Callable[[Estimate, slice], Estimate]
    ) -> BlockedEstimate:
        """What a function makes of every block; it is also given the block's rows."""

        def make(head: int, rows: slice) -> tuple[Float64, Float64]:
            made = function(x.block(head, rows), rows)
            return made.value, made.variance

        return BlockedEstimate(x.shape, make, token_dof=x.token_dof, correlation=x.correlation)

    def activation(self, x: Estimate, kind: str) -> Estimate:
        value = self._exact.activation(x.value, kind)
        # The argument of exp(-x) is off by u |x|, exp and the division by a few u.
        roundings = 4.0
        if kind == "silu":
            roundings = _roundings_of(EXP_ULPS) + _roundings_of(DIVISION_ULPS)
        energy = np.square(value) * (roundings + np.square(x.value))
        if kind.startswith("gelu"):
            # x/2 (1 + tanh): far below zero the sum cancels to what tanh is off near 1.
            energy += _roundings_of(TANH_ULPS) * np.square(x.value / 2)
        variance = self._sum_error(energy)
        variance += self._stored(value)
        if np.any(x.variance):
            variance += np.square(self._slope(x.value, kind)) * x.variance
        return replace(x, value=value, variance=variance)

    def add(self, x: Estimate, y: Estimate) -> Estimate:
        value = x.value + y.value
        variance = x.variance + y.variance + self._stored(value)
        return Estimate(value, variance, None, max(x.correlation, y.correlation))

    def multiply(self, x: Estimate, y: Estimate) -> Estimate:
        value = x.value * y.value
        carried = np.square(y.value) * x.variance + np.square(x.value) * y.variance
        correlation = max(x.correlation, y.correlation)
        return Estimate(value, carried + self._stored(value), None, correlation)

    def _shared(self, x: Estimate, weights: Sequence[Weight], variance: Float64) -> float:
        """Mean squared correlation of a product's errors that its input's errors make.

        With errors of variance v_k behind it, the covariance of outputs i and j is
        sum_k w_ik w_jk v_k. Runs of rows of each weight stand for all of them.
        """
        found = 0.0
        for rows, _ in self._profiles_of(x.value.shape[0]):
            known = np.mean(x.variance[rows], axis=0)
            if not np.any(known):
                continue
            first, parts, sizes = 0, [], []
            for weight in weights:
                count = min(SAMPLED_ROWS, weight.shape[0])
                for start in {0, (weight.shape[0] - count) // 2}:
                    parts.append(weight.read(start, start + count).reshape(count, -1))
                    columns = slice(first + start, first + start + count)
                    sizes.append(np.mean(variance[rows][:, columns], axis=0))
                first += weight.shape[0]
            scaled = np.concatenate(parts).astype(np.float64) * np.sqrt(known)
            spread = np.sqrt(np.maximum(np.concatenate(sizes), _TINY))
            squares = np.square((scaled @ scaled.T) / spread[:, None] / spread)
            share = float(np.mean(np.sqrt(np.diagonal(squares))))
            np.fill_diagonal(squares, 0)
            count = len(spread)
            pairs = float(squares.sum()) / max(1, count * (count - 1))
            found = max(found, pairs, share**2 * x.correlation)
        return found

    @staticmethod
    def _shared_in_attention(
        heads: int, positions: float, correlation: float, v: Estimate, num_kv_heads: int,
        of_softmax: float, of_values: float,
    ) -> float:  # fmt: skip
        """Mean squared correlation of the errors of attention's output.

        The errors of a token's attention weights are in every dimension of the head, and those of a
        value in every head of its group.

        Args:
            heads: Their number.
            positions: How many errors of its weights a token's value has.
            correlation: Of the weights.
            v: The values.
            num_kv_heads: How many heads share them.
            of_softmax, of_values: What part of the errors' energy comes from each.
        """
        group, features = heads // num_kv_heads, v.value.shape[1] * heads // num_kv_heads
        by_group = (group - 1) / max(1, features - 1)
        return float(
            of_softmax**2 * max(1 / positions, correlation)
            + of_values**2 * max(by_group, v.correlation)
        )

    def _slope(self, x: Float64, kind: str) -> Float64:
        """The activation's derivative, for carrying an error through it."""
        width = 1e-4 * np.maximum(1, np.abs(x))
        above, below = (self._exact.activation(x + s * width, kind) for s in (1, -1))
        return (above - below) / (2 * width)

    def _profiles_of(self, rows: int) -> list[tuple[slice, Profile]]:
        """The rows of every stacked side."""
        if len(self._profiles) == 1:
            return [(slice(0, rows), self._profiles[0][1])]
        blocks, start = [], 0
        for count, profile in self._profiles:
            assert count is not None, "stacked sides say how many rows they have"
            blocks.append((slice(start, start + count), profile))
            start += count
        assert start == rows, f"{rows} rows where the sides have {start}"
        return blocks

    def _roundings(
        self, of: Callable[[Arithmetic], Rounding | None]
    ) -> tuple[Rounding | None, ...]:
        """How each side's engine rounds a factor."""
        return tuple(of(profile.arithmetic) for _, profile in self._profiles)

    def _factor(
        self, x: Estimate, roundings: tuple[Rounding | None, ...], width: int | None = None
    ) -> Estimate:
        """A factor as the engines round it, in rows of this width (its last axis by default)."""
        if not any(roundings):
            return x
        value, variance = x.value.copy(), np.array(x.variance)
        if len(self._profiles) == 1:
            blocks = [slice(None)]
        else:
            blocks = [rows for rows, _ in self._profiles_of(x.value.shape[0])]
        for rows, rounding in zip(blocks, roundings):
            if rounding is None:
                continue
            shape = value[rows].shape
            flat = (-1, width or shape[-1])
            spread: Float64 | float = 0.0
            if np.any(variance[rows]):
                spread = np.sqrt(variance[rows]).reshape(flat)
            found = rounding(value[rows].reshape(flat), spread)
            value[rows] = found.value.reshape(shape)
            variance[rows] += found.variance.reshape(shape)
        return replace(x, value=value, variance=variance)

    def _turned_back(self, value: Float64) -> Float64 | float:
        """Variance of turning attention's output back, where values were turned for the cache."""
        rounding = self._profiles[0][1].arithmetic.cache_rounding
        if not isinstance(rounding, RotatedRounding):
            return 0.0
        size = rounding.size
        groups = np.square(value).reshape(value.shape[0], -1, size)
        energy = np.repeat(groups.mean(axis=2), size, axis=1)
        return self._sum_error(energy * (size / 2 + 1))

    def _any_weights_rounded(self) -> bool:
        return any(profile.rounds_weights for _, profile in self._profiles)

    def _by_side(self, x: Float64, function: Callable[[Float64, Profile], Float64]) -> Float64:
        if len(self._profiles) == 1:
            return function(x, self._profiles[0][1])
        parts = [function(x[rows], profile) for rows, profile in self._profiles_of(x.shape[0])]
        return np.concatenate(parts)

    def _stored(self, x: Float64) -> Float64:
        """Variance of rounding a result to the type that the engine stores."""
        return self._by_side(x, lambda y, p: p.arithmetic.stored.rounding_variance(y))

    def _rounded(self, energy: Float64) -> Float64:
        """Variance of one rounding of something with this squared size."""
        return self._by_side(energy, lambda y, p: y * (p.arithmetic.stored.roundoff**2 / 3))

    def _sum_error(self, weighted_energy: Float64) -> Float64:
        """u^2/3 of the accumulating type times an energy that counts its roundings."""
        return self._by_side(
            weighted_energy, lambda y, p: y * (p.arithmetic.accumulated.roundoff**2 / 3)
        )

    def _product_error(self, wander: Float64, value: Float64, terms: int) -> Float64:
        """Variance of sums of products, from sum_k p_k^2 and the sums themselves."""
        square = np.square(value)
        variance = self._sum_error(wander * (terms / 2) + square * (terms / 3))

        def cut(energy: Float64, profile: Profile) -> Float64:
            return energy * (FLOAT32.roundoff**2 if profile.arithmetic.cuts_sums else 0.0)

        if any(profile.arithmetic.cuts_sums for _, profile in self._profiles):
            steps = terms / CUT_TERMS
            variance += self._by_side((wander + square) * (steps / 2) ** 2, cut)
        return variance

    def _weight_error(self, weight: Float64, steps: Float64) -> Float64:
        """Variance of a weight used as it is, [1 or rows, C], from its squared steps."""

        def error(profile: Profile) -> Float64:
            if not profile.rounds_weights:
                return np.zeros_like(weight)
            cast = profile.arithmetic.stored.rounding_variance(weight)
            return steps / 12 + cast if profile.weights_rounded else cast

        if len(self._profiles) == 1:
            return error(self._profiles[0][1])
        # A vector shared by all rows must become one row per side's row.
        return np.concatenate(
            [
                np.broadcast_to(error(p), (count or 1, weight.shape[1]))
                for count, p in self._profiles
            ]
        )


def _rounding(number: float, profile: Profile) -> float:
    """By how much a number of the model is off in the type that the engine stores."""
    return float(profile.arithmetic.stored.round(np.asarray(number))) - number


def _roundings_of(ulps: float) -> float:
    """How many roundings make the error of a function that is good to this many units.

    A unit in the last place is two unit roundoffs of a value at most; errors are spread evenly up
    to that, as those of a rounding are.
    """
    return (2 * ulps) ** 2


def _steps(weight: Weight, start: int, stop: int) -> Float64:
    """Squared steps of every value of rows start..stop, [rows, C]."""
    steps, group = weight.step_squares(start, stop)
    columns = int(np.prod(weight.shape[1:], dtype=np.int64))
    return np.repeat(steps.astype(np.float64), group, axis=1)[:, :columns]


class _WeightedSums(NamedTuple):
    """What attention's output is made of, each [T, H·D], summed over positions.

    Attributes:
        parts: Weights times values; squares times squares; the variance of the weights times
            squared values; squared weights times the variance of the values.
        independent: How many errors a row of the weights has.
    """

    parts: tuple[Float64, ...]
    independent: float


class _Independent:
    """How many errors a row of the last axis has, of those rows that have most of the error.

    (sum v)^2 / sum v^2: a few numbers near a tie may be all that is uncertain.
    """

    def __init__(self) -> None:
        self._totals = self._squares = 0.0

    def add(self, variance: Float64) -> None:
        """Take more rows into account."""
        self._totals += float(np.square(variance.sum(axis=-1)).sum())
        self._squares += float(np.square(variance).sum())

    @property
    def count(self) -> float:
        """How many, at least 1."""
        return max(1.0, self._totals / max(self._squares, _TINY))


def _independent(variance: Float64) -> float:
    """As `_Independent`, of rows that are at hand."""
    rows = _Independent()
    rows.add(variance)
    return rows.count


def _independent_rows(x: Float64) -> float:
    """How many of the rows count as independent directions: (tr G)^2 / |G|^2 of the Gram matrix."""
    gram = x @ x.T
    total = float(np.square(gram).sum())
    return float(np.trace(gram)) ** 2 / total if total > 0 else 1.0
