"""A dump that holds the last token's rows of a whole pass, read as the step that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.source import StageSource
from aprcore.network.backend import KeyValueCache
from aprcore.network.config import ModelConfig
from aprcore.network.stages import StageKey

Float32 = NDArray[np.float32]


class LastTokenDump:
    """The same tensors, at the last position after the tokens before it; see `StageSource`.

    Attributes:
        path, counts, ignored, unlisted: Those of the dump.
        sidecar: What it says of itself, with the step's token, position and history.
    """

    def __init__(self, dump: StageSource, tokens: Sequence[int]) -> None:
        """Place the rows of a dump.

        Args:
            dump: Holds one row of each tensor, and no keys and values of earlier tokens.
            tokens: The ids of the whole pass.
        """
        self._dump = dump
        self._num_past = len(tokens) - 1
        self.path: Path = dump.path
        self.counts: Mapping[StageKey, int] = dump.counts
        self.ignored: tuple[str, ...] = dump.ignored
        self.unlisted: tuple[StageKey, ...] = dump.unlisted
        self.sidecar: Sidecar = replace(
            dump.sidecar, tokens=tuple(tokens[-1:]), positions=(self._num_past,),
            history=tuple(tokens[:-1]),
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        """One more than the highest layer present."""
        return self._dump.num_layers

    def __contains__(self, key: StageKey) -> bool:
        return key in self._dump

    def keys(self) -> tuple[StageKey, ...]:
        """Every tensor, in the order of computation."""
        return self._dump.keys()

    def shape(self, key: StageKey) -> tuple[int, ...] | None:
        """The recorded shape of a tensor."""
        return self._dump.shape(key)

    def is_exact(self, key: StageKey) -> bool:
        """As the dump says."""
        return self._dump.is_exact(key)

    def read(self, key: StageKey) -> Float32:
        """The values of one tensor, flat."""
        return self._dump.read(key)

    def past(self, config: ModelConfig) -> KeyValueCache | None:
        """What lies before the last token, of which such a dump shows nothing."""
        return KeyValueCache(self._num_past)
