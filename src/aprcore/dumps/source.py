"""What every kind of dump can do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.sidecar import Sidecar
from aprcore.network.backend import KeyValueCache
from aprcore.network.config import ModelConfig
from aprcore.network.stages import StageKey

Float32 = NDArray[np.float32]


@runtime_checkable
class PartlyRead(Protocol):
    """A dump that need not read a tensor whole."""

    def read_part(self, key: StageKey, start: int, stop: int) -> Float32:
        """Some of the values of one tensor, flat."""
        ...


class StageSource(Protocol):
    """Stage tensors of one side, read one at a time."""

    @property
    def path(self) -> Path:
        """The directory or file."""
        ...

    @property
    def sidecar(self) -> Sidecar:
        """What it says of itself."""
        ...

    @property
    def counts(self) -> Mapping[StageKey, int]:
        """Number of values of every tensor, in the order of computation."""
        ...

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names in it that are no stage."""
        ...

    @property
    def unlisted(self) -> tuple[StageKey, ...]:
        """Stages that it holds and does not list: left over from an earlier run, and not read."""
        ...

    @property
    def num_layers(self) -> int:
        """One more than the highest layer present."""
        ...

    def __contains__(self, key: StageKey) -> bool: ...

    def keys(self) -> tuple[StageKey, ...]:
        """Every tensor, in the order of computation."""
        ...

    def shape(self, key: StageKey) -> tuple[int, ...] | None:
        """The recorded shape of a tensor, if it fits the number of values."""
        ...

    def is_exact(self, key: StageKey) -> bool:
        """Whether the values are bit for bit those that the engine went on with."""
        ...

    def read(self, key: StageKey) -> Float32:
        """The values of one tensor, flat."""
        ...

    def past(self, config: ModelConfig) -> KeyValueCache | None:
        """Keys and values before a decoding step, as far as it shows them; None in a full pass."""
        ...
