"""Where the tensors of a run come from, once it is over."""

from __future__ import annotations

from typing import Protocol

from aprcore.pictures.plane import TensorPair
from aprcore.records.report import StageReport


class TensorSource(Protocol):
    """Gives both sides of a stage."""

    def open(self, report: StageReport) -> TensorPair:
        """Both sides of a stage, in the layout in which they were judged.

        Raises:
            AprError: They cannot be had.
        """
        ...

    def close(self) -> None:
        """Close what is open."""
        ...
