"""A weight as a kernel reads it that rounds both factors of a product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aprcore.network.weights import Float32, Weight
from aprcore.quant.roundings import Rounding, RoundingOfBoth

# Types that hold no number which a rounding of both factors moves: 8 digits are below any of these.
_HELD = {"tf32": ("F16", "BF16"), "tf32-cut": ("F16", "BF16"), "f16:f32-both": ("F16",),
         "bf16:f32-both": ("BF16",)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RoundedWeight:
    """A weight whose values are rounded as they are read; its steps in the file are as they were.

    Attributes:
        stored: The weight of the file.
        rounding: What rounds its values.
    """

    stored: Weight
    rounding: Rounding

    @property
    def name(self) -> str:
        """As of the weight."""
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As of the weight."""
        return self.stored.shape

    @property
    def dtype(self) -> str:
        """The type that the file has."""
        return self.stored.dtype

    def read(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        """As `Weight.read`."""
        rows = self.stored.read(start, stop, out)
        flat = rows.reshape(max(1, len(rows)), -1)
        flat[...] = self.rounding(flat.astype(np.float64)).value
        return rows

    def step_squares(self, start: int, stop: int) -> tuple[Float32, int]:
        """As `Weight.step_squares`."""
        return self.stored.step_squares(start, stop)


def as_read(weight: Weight, rounding: Rounding | None) -> Weight:
    """A weight as a kernel reads it that rounds activations so."""
    if not isinstance(rounding, RoundingOfBoth) or weight.dtype in _HELD[rounding.name]:
        return weight
    return RoundedWeight(weight, rounding)
