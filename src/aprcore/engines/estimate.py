"""What a sound engine gives: expected values with the variance of their error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.arithmetic import Arithmetic
from aprcore.ground.precision import FLOAT32

Float64 = NDArray[np.float64]


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
