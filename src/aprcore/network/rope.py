"""Rotary position embedding: the frequencies that a model's configuration asks for.

Only the schedule of angles lives here, in float64, because it is configuration. The rotation
itself is an operation of the backends.

Source: RoFormer (arXiv:2104.09864); "llama3" and "yarn" as in transformers' `modeling_rope_utils`
and YaRN (arXiv:2309.00071).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCALING_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Long-context scaling, with the field names of Hugging Face's `rope_scaling`.

    Attributes:
        kind: One of `SCALING_KINDS`.
        factor: The extension factor.
        original_max_position_embeddings: Context length before extension (llama3, yarn).
        low_freq_factor, high_freq_factor: llama3's two wavelength limits.
        beta_fast, beta_slow: yarn's two rotation counts.
        attention_factor: yarn's multiplier of sine and cosine, if the file states it.
        mscale, mscale_all_dim: The other way in which yarn files state that multiplier.
        truncate: Whether yarn rounds the limits of its ramp to whole dimensions.
    """

    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions become angles.

    Attributes:
        theta: The base of the geometric series of wavelengths.
        head_dim: Dimensions that are rotated, D.
        max_position_embeddings: The trained context length (yarn's fallback for the original one).
        scaling: Long-context scaling.
        divisors: Per-frequency divisors given by the file itself (GGUF's `rope_freqs.weight`), of
            length D/2; then `scaling` is "default".
    """

    theta: float
    head_dim: int
    max_position_embeddings: int | None = None
    scaling: RopeScaling = RopeScaling()
    divisors: tuple[float, ...] | None = None

    def inverse_frequencies(self) -> NDArray[np.float64]:
        """Radians per position for each of the D/2 frequencies, float64."""
        import numpy as np

        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        plain = self.theta**-exponents
        if self.divisors is not None:
            return plain / np.asarray(self.divisors, dtype=np.float64)
        match self.scaling.kind:
            case "default":
                return plain
            case "linear":
                return plain / self.scaling.factor
            case "llama3":
                return self._llama3(plain)
            case "yarn":
                return self._yarn(plain)
        raise ValueError(f"unknown RoPE scaling {self.scaling.kind!r}")

    def attention_factor(self) -> float:
        """The factor on sine and cosine: 1 except for yarn."""
        scaling = self.scaling
        if scaling.kind != "yarn":
            return 1.0
        if scaling.attention_factor is not None:
            return scaling.attention_factor
        factor = scaling.factor
        if scaling.mscale and scaling.mscale_all_dim:
            return _mscale(factor, scaling.mscale) / _mscale(factor, scaling.mscale_all_dim)
        return _mscale(factor, 1.0)

    def ramp_limits(self) -> tuple[float, float]:
        """yarn's ramp: from which of the D/2 frequencies, to which.

        Raises:
            ArithmeticError, ValueError: The numbers of the scaling give none.
        """
        scaling, dim = self.scaling, self.head_dim
        original = scaling.original_max_position_embeddings or self.max_position_embeddings or 2048

        def dimension_of(rotations: float) -> float:
            """The dimension whose wavelength makes that many turns over the original context."""
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001  # as in transformers: no division by zero
        return low, high

    def _llama3(self, plain: NDArray[np.float64]) -> NDArray[np.float64]:
        import numpy as np

        scaling = self.scaling
        original = float(scaling.original_max_position_embeddings or 8192)
        wavelength = 2 * math.pi / plain
        low, high = original / scaling.low_freq_factor, original / scaling.high_freq_factor
        smooth = (original / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        between = (1 - smooth) * plain / scaling.factor + smooth * plain
        return np.where(
            wavelength > low, plain / scaling.factor, np.where(wavelength < high, plain, between)
        )

    def _yarn(self, plain: NDArray[np.float64]) -> NDArray[np.float64]:
        import numpy as np

        low, high = self.ramp_limits()
        dim, factor = self.head_dim, self.scaling.factor
        ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
        return plain / factor * ramp + plain * (1 - ramp)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
