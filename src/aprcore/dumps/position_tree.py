"""A directory of stage files for each position: `pos-0000/layer-0/attn_norm.bin`.

What the public project's `apr parity --per-op` writes for either side, `gpu/` and `cpu/`: decoding
steps from the first token on. Together they are what one pass over all tokens gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.directory import TraceDirectory
from aprcore.dumps.sidecar import Sidecar, read_sidecar
from aprcore.ground.errors import TraceError
from aprcore.network.backend import KeyValueCache
from aprcore.network.config import ModelConfig
from aprcore.network.graph import known_stages
from aprcore.network.stages import StageKey, axis_names

Float32 = NDArray[np.float32]

_POSITION = re.compile(r"pos-(\d{1,9})", re.ASCII)


def is_position_tree(path: Path) -> bool:
    """Whether a path is a directory with one for each position, or holds such directories."""
    return path.is_dir() and bool(_has_positions(path) or _sides(path))


def _has_positions(path: Path) -> bool:
    return any(_POSITION.fullmatch(entry.name) for entry in path.iterdir())


def _sides(path: Path) -> list[str]:
    """The directories below that have one for each position: those of both engines."""
    return sorted(x.name for x in path.iterdir() if x.is_dir() and _has_positions(x))


class PositionTree:
    """The stage tensors of all positions as one pass; see `aprcore.dumps.source.StageSource`.

    Attributes:
        path: The directory.
        sidecar: What it says of itself.
        counts: Number of values of every tensor that all positions have, in the order of
            computation.
        ignored: Names of `.bin` files that are no stage.
        unlisted: Stages that a sidecar does not list.
    """

    def __init__(self, path: Path) -> None:
        """List the positions; no tensor is read.

        Raises:
            TraceError: They are not all there from the first on, or one holds no stage; or there
                are those of several engines.
        """
        self.path = path
        if not _has_positions(path):
            raise TraceError(f"holds the dumps of {' and '.join(_sides(path))}", where=path,
                             hint="name one of these directories, and the other with --against"
                             " or --oracle")  # fmt: skip
        found = sorted(
            (int(match[1]), entry) for entry in path.iterdir()
            if (match := _POSITION.fullmatch(entry.name)) is not None
        )  # fmt: skip
        numbers = [number for number, _ in found]
        if len(set(numbers)) < len(numbers):
            twice = next(a for a, b in pairwise(numbers) if a == b)
            raise TraceError(f"has position {twice} under two names", where=path,
                             hint="leave one of them out")  # fmt: skip
        if numbers[-1] != len(numbers) - 1:
            first = next(at for at, number in enumerate(numbers) if at != number)
            raise TraceError(f"has no pos-{first:04d}: a pass needs every position from 0 on",
                             where=path, hint="dump them all")  # fmt: skip
        self._steps = [TraceDirectory(folder) for _, folder in found]
        self.sidecar: Sidecar = read_sidecar(path)
        self.ignored = tuple(sorted({name for step in self._steps for name in step.ignored}))
        self.unlisted = tuple(dict.fromkeys(key for step in self._steps for key in step.unlisted))
        counts = {
            key: self._count(key) for key in self._steps[-1].keys()
            if all(key in step for step in self._steps)
        }  # fmt: skip
        self.counts: Mapping[StageKey, int] = {k: n for k, n in counts.items() if n is not None}
        if not self.counts:
            raise TraceError("has no stage that is there at every position", where=path,
                             hint="dump the same stages at each")  # fmt: skip

    def _count(self, key: StageKey) -> int | None:
        """How many values the joined tensor has; None where positions do not fit together."""
        held = [step.counts[key] for step in self._steps]
        stage = known_stages()[key.stage]
        if stage.last_token:
            return held[-1]
        if axis_names(stage.shape)[0] == "token":
            return sum(held) if len(set(held)) == 1 else None
        grows = all(count == held[0] * (at + 1) for at, count in enumerate(held))
        return held[0] * len(held) ** 2 if grows else None

    @property
    def num_layers(self) -> int:
        """One more than the highest layer present."""
        return self._steps[-1].num_layers

    def __contains__(self, key: StageKey) -> bool:
        return key in self.counts

    def keys(self) -> tuple[StageKey, ...]:
        """Every tensor, in the order of computation."""
        return tuple(self.counts)

    def shape(self, key: StageKey) -> tuple[int, ...] | None:
        """None: the files have none."""
        return None

    def past(self, config: ModelConfig) -> KeyValueCache | None:
        """None: it begins with the first token."""
        return None

    def is_exact(self, key: StageKey) -> bool:
        """True: what is stored is what the engine went on with."""
        return True

    def check_headers(self) -> None:
        """As `TraceDirectory.check_headers`, of every position."""
        for step in self._steps:
            step.check_headers()

    def read(self, key: StageKey) -> Float32:
        """The values of one tensor, flat: rows in order, scores with zeros where nothing is.

        Raises:
            FormatError: A file is damaged.
        """
        stage = known_stages()[key.stage]
        if stage.last_token:
            return self._steps[-1].read(key)
        rows = [step.read(key) for step in self._steps]
        if axis_names(stage.shape)[0] == "token":
            return np.concatenate(rows)
        heads, length = rows[0].size, len(rows)
        joined = np.zeros((heads, length, length), np.float32)
        for at, row in enumerate(rows):
            joined[:, at, : at + 1] = row.reshape(heads, -1)
        return joined.reshape(-1)
