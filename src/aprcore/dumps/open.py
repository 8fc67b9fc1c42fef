"""Another engine's dump: a directory of stage files, or one file of named tensors.

The names are those of docs/formats.md, "A dump in one file".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.directory import TraceDirectory
from aprcore.dumps.names import Dialect, Recipe, known_dialects, resolve
from aprcore.dumps.past import read_past
from aprcore.dumps.sidecar import Sidecar, read_sidecar
from aprcore.dumps.source import StageSource
from aprcore.dumps.tensor_files import (
    StoredArray,
    TensorFile,
    read_npz_dump,
    read_safetensors_dump,
    read_torch_dump,
)
from aprcore.dumps.tensor_folder import TENSORS_NAME, is_tensor_folder
from aprcore.ground.errors import FormatError, TraceError
from aprcore.network.backend import KeyValueCache
from aprcore.network.config import ModelConfig
from aprcore.network.graph import Graph, computation_order, known_stages, outline
from aprcore.network.stages import Reading, StageKey

Float32 = NDArray[np.float32]

READERS: Mapping[str, Callable[[Path], TensorFile]] = {
    ".safetensors": read_safetensors_dump,
    ".npz": read_npz_dump,
    ".pt": read_torch_dump,
    ".pth": read_torch_dump,
}

# The coarsest type of a dump decides what rounding explains.
_COARSEST_FIRST = ("bfloat16", "float16", "float32")


def open_dump(
    path: Path | str, names: Dialect | None = None, *, graph: Graph | None = None
) -> StageSource:
    """Open a directory of stage files, or one .safetensors, .npz or .pt file of named tensors.

    Args:
        path: The directory or file.
        names: What the tensors of a file are called, besides the names that are known.
        graph: The stages of the model, which say what other engines call them: the output of the
            projections, say, is what comes after their bias where they have one.

    Raises:
        TraceError: It does not exist, is nothing of the kind, or holds no stage.
        FormatError: It is damaged.
    """
    path = Path(path)
    if is_tensor_folder(path):
        return TensorDump(path / TENSORS_NAME, names, graph=graph)
    if is_tensor_file(path):
        return TensorDump(path, names, graph=graph)
    return TraceDirectory(path)


def is_tensor_file(path: Path) -> bool:
    """Whether a path is to be read as one file of tensors, or as a folder with one."""
    return (path.suffix.lower() in READERS and not path.is_dir()) or is_tensor_folder(path)


class TensorDump:
    """The stage tensors in one file, read one at a time; see `aprcore.dumps.source.StageSource`.

    Attributes:
        path: The file.
        sidecar: What it says of itself; the stored type where it says nothing of that.
        counts: Number of values of every tensor by key, in the order of computation.
        ignored: Names of tensors that are no stage.
        unlisted: None: a file is written as a whole.
    """

    unlisted: tuple[StageKey, ...] = ()

    def __init__(
        self, path: Path, names: Dialect | None = None, *, graph: Graph | None = None
    ) -> None:
        self.path = path
        held = READERS[path.suffix.lower()](path)
        self._arrays = held.arrays
        stored = tuple(held.arrays)
        sidecar = read_sidecar(path.parent) if path.name == TENSORS_NAME else Sidecar()
        self.sidecar = held.sidecar if sidecar == Sidecar() else sidecar
        dialects = known_dialects(stored, graph or outline(1, ()))
        recipes, ignored = resolve(stored, (*(() if names is None else (names,)), *dialects))
        shapes = {key: self._resolved_shape(key, recipe) for key, recipe in recipes.items()}
        self._shapes: dict[StageKey, tuple[int, ...]] = {}
        for key in sorted(shapes, key=computation_order):
            shape = shapes[key]
            if shape is None:
                ignored += recipes[key].names[:1]
            else:
                self._shapes[key] = shape
        if not self._shapes:
            few = ", ".join(sorted(stored)[:3]) or "no floating-point tensor"
            raise TraceError(
                f"has no tensor with the name of a stage; it has {few}", where=path,
                hint="say what they are called with --names; see docs/formats.md",
            )  # fmt: skip
        self._recipes = recipes
        self.ignored = tuple(sorted((*ignored, *held.ignored)))
        self.sidecar = _with_dtype(self.sidecar, [
            self._arrays[name].dtype for key in self._shapes for name in recipes[key].names
        ])  # fmt: skip
        self.counts: Mapping[StageKey, int] = {k: math.prod(s) for k, s in self._shapes.items()}

    def __contains__(self, key: StageKey) -> bool:
        return key in self._shapes

    def keys(self) -> tuple[StageKey, ...]:
        """Every tensor, in the order of computation."""
        return tuple(self._shapes)

    def shape(self, key: StageKey) -> tuple[int, ...] | None:
        """The stored shape of a tensor, without a batch axis."""
        return self._shapes[key]

    @property
    def num_layers(self) -> int:
        """One more than the highest layer present."""
        return 1 + max((key.layer for key in self._shapes if key.layer is not None), default=-1)

    def read(self, key: StageKey) -> Float32:
        """The values of one tensor, flat.

        Raises:
            FormatError: The file has changed since it was opened, or is damaged.
        """
        recipe, shape = self._recipes[key], self._shapes[key]
        first = self._arrays[recipe.names[0]]
        if recipe.reading is not Reading.PLAIN:
            values = first.read()[:, :, : shape[2]]
            if recipe.reading is Reading.SCORES:
                values = values / np.float32(math.sqrt(self._head_dim(recipe)))
        elif len(recipe.names) > 1:
            parts = (self._arrays[name] for name in recipe.names)
            values = np.concatenate([x.read().reshape(*_matrix(x)) for x in parts], axis=1)
        elif known_stages()[key.stage].last_token and len(first.shape) > 1:
            values = first.load(first.shape[0] - 1, first.shape[0])
        else:
            values = first.read()
        flat: Float32 = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        if flat.size != self.counts[key]:
            raise FormatError(f"{recipe.names[0]!r} has {flat.size} values, where the header has "
                              f"{self.counts[key]}", where=self.path)  # fmt: skip
        return flat

    def past(self, config: ModelConfig) -> KeyValueCache | None:
        """Keys and values before a decoding step, as far as it shows them; None in a full pass."""
        first = (self.sidecar.positions or (0,))[0]
        if not first:
            return None
        shapes = {name: array.shape for name, array in self._arrays.items()}
        return read_past(
            shapes, lambda name: self._arrays[name].read(), self.sidecar, config, first
        )

    def _resolved_shape(self, key: StageKey, recipe: Recipe) -> tuple[int, ...] | None:
        """The shape that a recipe gives; None if its parts do not go together."""
        arrays = [self._arrays[name] for name in recipe.names]
        shape = arrays[0].shape
        if 0 in shape:
            return None
        if recipe.reading is not Reading.PLAIN:
            if len(shape) != 3 or shape[2] < shape[1]:
                return None
            if recipe.reading is Reading.SCORES and self._head_dim(recipe) < 1:
                return None
            # What lies beyond the tokens so far is padding.
            first = (self.sidecar.positions or (0,))[0]
            return (*shape[:2], min(first + shape[1], shape[2]))
        if len(arrays) > 1:
            rows = {_matrix(x)[0] for x in arrays}
            return None if len(rows) > 1 else (*rows, sum(_matrix(x)[1] for x in arrays))
        return shape[1:] if known_stages()[key.stage].last_token and len(shape) > 1 else shape

    def _head_dim(self, recipe: Recipe) -> int:
        """D: values of the queries for one token and head."""
        scores, queries = (self._arrays[name].shape for name in recipe.names)
        size, rest = divmod(math.prod(queries), scores[0] * scores[1])
        return 0 if rest else size


def _matrix(x: StoredArray) -> tuple[int, int]:
    """A tensor as rows of one token each; without axes to tell them, one row."""
    return (x.shape[0], math.prod(x.shape[1:])) if len(x.shape) > 1 else (1, math.prod(x.shape))


def _with_dtype(sidecar: Sidecar, stored: list[str]) -> Sidecar:
    if sidecar.dtype is not None:
        return sidecar
    return replace(sidecar, dtype=next(name for name in _COARSEST_FIRST if name in stored))
