"""What a sound engine gives: expected values with the variance of their error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.arithmetic import Arithmetic
from aprcore.ground.precision import FLOAT32

Float64 = NDArray[np.float64]

# Of [H, T, S]: up to so many values, 32 MiB in float64, are computed at once; more in such blocks.
WHOLE_VALUES = 4 * 1024 * 1024
BLOCK_VALUES = 512 * 1024


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected values and the variance of a sound engine's error, both float64 of one shape.

    Attributes:
        value: What exact arithmetic gives.
        variance: Predicted variance of the error of each value.
        token_dof: Over how many independent errors a sum over tokens averages; None: as many as
            there are tokens. Errors of a weight repeat where tokens look alike.
        correlation: Mean squared correlation of the errors of two values of a token: what many
            values read shows in all of them.
    """

    value: Float64
    variance: Float64
    token_dof: float | None = None
    correlation: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether it carries no error."""
        return not np.any(self.variance)

    @property
    def size(self) -> int:
        """How many values it has."""
        return self.value.size

    def is_finite(self) -> bool:
        """Whether every expected value is."""
        return bool(np.isfinite(self.value).all())

    def whole(self) -> Estimate:
        """The estimate with all of its values at hand."""
        return self


class BlockedEstimate(Estimate):
    """An estimate of [H, T, S] values that is made block by block, whenever it is asked for.

    Scores of a long prompt are the largest tensors of a pass; in float64, with their variance and
    what is made of both, they would take twenty times what the pass does. `value` and `variance`
    make all of it, for whoever needs that.

    Attributes:
        shape: H, T and S.
    """

    __slots__ = ("_is_exact", "_make", "shape")

    shape: tuple[int, int, int]
    _make: Callable[[int, slice], tuple[Float64, Float64]]
    _is_exact: bool

    def __init__(
        self,
        shape: tuple[int, int, int],
        make: Callable[[int, slice], tuple[Float64, Float64]],
        *,
        is_exact: bool = False,
        token_dof: float | None = None,
        correlation: float = 0.0,
    ) -> None:
        """Keep how it is made.

        Args:
            shape: H, T and S.
            make: Value and variance of rows of a head, [rows, S].
            is_exact: Whether it carries no error.
            token_dof, correlation: As of any estimate.
        """
        for name, given in (("shape", shape), ("_make", make), ("_is_exact", is_exact),
                            ("token_dof", token_dof), ("correlation", correlation)):  # fmt: skip
            object.__setattr__(self, name, given)

    @property
    def is_exact(self) -> bool:
        """Whether it carries no error."""
        return self._is_exact

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def value(self) -> Float64:
        """All expected values."""
        return self.whole().value

    @property
    def variance(self) -> Float64:
        """All variances."""
        return self.whole().variance

    def is_finite(self) -> bool:
        """Whether every expected value is."""
        return all(np.isfinite(block.value).all() for *_, block in self.blocks())

    def whole(self) -> Estimate:
        """The estimate with all of its values at hand."""
        value, variance = np.empty(self.shape), np.empty(self.shape)
        for head, rows, block in self.blocks():
            value[head, rows], variance[head, rows] = block.value, block.variance
        return Estimate(value, variance, self.token_dof, self.correlation)

    def block(self, head: int, rows: slice) -> Estimate:
        """Rows of a head, [rows, S]."""
        value, variance = self._make(head, rows)
        return Estimate(value, variance, self.token_dof, self.correlation)

    def blocks(self) -> Iterator[tuple[int, slice, Estimate]]:
        """Every block with its head and rows, in the order of the values."""
        heads, tokens, positions = self.shape
        count = max(1, BLOCK_VALUES // max(1, positions))
        for head in range(heads):
            for start in range(0, tokens, count):
                rows = slice(start, min(tokens, start + count))
                yield head, rows, self.block(head, rows)


def is_blocked(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape is so large that it is judged block by block."""
    return len(shape) == 3 and is_large(math.prod(shape))


def is_large(count: int) -> bool:
    """Whether a tensor of so many values would be, if it had the shape."""
    return count > WHOLE_VALUES


@dataclass(frozen=True, slots=True)
class Profile:
    """What the engine on one side rounds in an operation.

    Attributes:
        arithmetic: Its precision there.
        weights_rounded: Whether its weights are other roundings of the same numbers, so that the
            step of the stored ones counts as an error.
    """

    arithmetic: Arithmetic
    weights_rounded: bool

    @property
    def rounds_weights(self) -> bool:
        """Whether its weights differ from the stored ones: other roundings, or cast to its type."""
        is_cast = not self.arithmetic.rounds_on_dump
        return self.weights_rounded or (is_cast and self.arithmetic.stored.digits < FLOAT32.digits)
