"""A backend in float16, which computes elsewhere in float64."""

from __future__ import annotations

import numpy as np

from aprcore.engines.reference import ReferenceBackend


class ToyBackend(ReferenceBackend):
    """Float64 rounded to float16 on the way out."""

    name = "toy"

    def to_host(self, x):
        """Rounded."""
        return super().to_host(x).astype(np.float16).astype(np.float32)
