"""The one way in which tests hold floats against the float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# Half the spacing of float32 and of float64 at 1: the error of one correctly rounded operation.
FLOAT32_ROUNDOFF = 2.0**-24
FLOAT64_ROUNDOFF = 2.0**-53


def relative_l2(found: ArrayLike, reference: ArrayLike) -> float:
    """|found - reference| / |reference| in float64; 0 if both are zero, NaN if either has one."""
    a, b = (np.asarray(x, dtype=np.float64).reshape(-1) for x in (found, reference))
    error, size = np.linalg.norm(a - b), np.linalg.norm(b)
    return 0.0 if error == 0 else float(np.divide(error, size))


def assert_close(found: Any, reference: ArrayLike, bound: float) -> None:
    """Fail unless shapes are equal and the relative L2 error is at most `bound`; NaN fails."""
    assert np.shape(found) == np.shape(reference)
    error = relative_l2(found, reference)
    assert error <= bound, f"relative L2 {error:.3g} exceeds {bound:.3g}"
