"""Another engine's dump: a directory of stage files, or named tensors in a file or a folder.

The names are those of docs/formats.md, "A dump in one file".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.batch import Batch, find_batch, find_step, unused_integers
from aprcore.dumps.directory import TraceDirectory
from aprcore.dumps.file_folder import is_file_folder, read_file_folder, runs_of_folder
from aprcore.dumps.names import Dialect, Operand, Recipe, Term, known_dialects, resolve
from aprcore.dumps.past import read_past
from aprcore.dumps.position_tree import PositionTree, is_position_tree
from aprcore.dumps.sidecar import Sidecar, read_sidecar
from aprcore.dumps.source import StageSource
from aprcore.dumps.tensor_files import (
    StoredArray,
    TensorFile,
    drop_batch,
    read_npz_dump,
    read_safetensors_dump,
    read_torch_dump,
)
from aprcore.dumps.tensor_folder import TENSORS_NAME, is_tensor_folder
from aprcore.dumps.tool_files import (
    is_divergence_base,
    read_divergence_base,
    read_llama_debug_dump,
    read_polygraphy_dump,
)
from aprcore.ground.errors import FormatError, TraceError
from aprcore.ground.precision import BFLOAT16
from aprcore.ground.whole_directory import check_finished
from aprcore.network.backend import KeyValueCache
from aprcore.network.config import ModelConfig
from aprcore.network.graph import Graph, computation_order, known_stages, outline
from aprcore.network.stages import Reading, StageKey, axis_names

Float32 = NDArray[np.float32]

READERS: Mapping[str, Callable[[Path], TensorFile]] = {
    ".safetensors": read_safetensors_dump,
    ".npz": read_npz_dump,
    ".pt": read_torch_dump,
    ".pth": read_torch_dump,
    ".json": read_polygraphy_dump,
}
# A .bin file is mostly one of our stages; the base of a divergence has any name at all.
_LLAMA_DEBUG = re.compile(r"llamacpp-.+(?<!-tokens)\.bin", re.IGNORECASE)

# The coarsest type of a dump decides what rounding explains.
_COARSEST_FIRST = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class ReadingOptions:
    """What is said of dumps, besides where they are.

    Attributes:
        names: What the tensors are called, besides the names that are known.
        row: Which sequence of a batch.
        pad: The id that sequences of a batch are filled up with.
    """

    names: Dialect | None = None
    row: int | None = None
    pad: int | None = None


def open_dump(
    path: Path | str, options: ReadingOptions | None = None, *, graph: Graph | None = None
) -> StageSource:
    """Open a directory of stage files, or named tensors in one file or in a folder of files.

    Args:
        path: The directory or file.
        options: What is said of it.
        graph: The stages of the model, which say what other engines call them: the output of the
            projections, say, is what comes after their bias where they have one.

    Raises:
        TraceError: It does not exist, is nothing of the kind, or holds no stage; or it holds a
            batch, and no row is named.
        FormatError: It is damaged.
    """
    path = Path(path)
    if not is_tensor_file(path):
        return PositionTree(path) if is_position_tree(path) else TraceDirectory(path)
    return TensorDump(path, _read_tensors(path), options or ReadingOptions(), graph=graph)


def open_ranks(
    path: Path, options: ReadingOptions | None = None, *, graph: Graph | None = None
) -> list[StageSource]:
    """The ranks of a run, as far as a folder holds several, in order; otherwise the one dump.

    Raises:
        TraceError, FormatError: As `open_dump`.
    """
    is_folder = is_tensor_file(path) and path.is_dir() and is_file_folder(path)
    runs = [run for run in (runs_of_folder(path) if is_folder else ()) if run]
    if len(runs) < 2:
        return [open_dump(path, options, graph=graph)]
    return [
        TensorDump(path, read_file_folder(path, READERS, run), options or ReadingOptions(),
                   graph=graph)
        for run in runs
    ]  # fmt: skip


def is_tensor_file(path: Path) -> bool:
    """Whether a path is to be read as named tensors: one file, or a folder of such files."""
    try:
        if path.is_dir():
            return (is_tensor_folder(path) or is_file_folder(path)
                    or bool(_debug_logits(path)))  # fmt: skip
    except OSError as error:  # a name too long, a folder that may not be entered
        raise TraceError(f"cannot be read ({error.strerror})", where=path) from error
    return _find_reader(path) is not None


def _find_reader(path: Path) -> Callable[[Path], TensorFile] | None:
    """What reads a file, by its name."""
    if _LLAMA_DEBUG.fullmatch(path.name):
        return read_llama_debug_dump
    if path.suffix.lower() in READERS:
        return READERS[path.suffix.lower()]
    return read_divergence_base if is_divergence_base(path) else None


def _debug_logits(folder: Path) -> list[Path]:
    """The logits that llama-debug saved to a folder."""
    return sorted(file for file in folder.iterdir() if _LLAMA_DEBUG.fullmatch(file.name))


def _read_tensors(path: Path) -> TensorFile:
    if path.is_dir():
        check_finished(path)
    if is_tensor_folder(path):
        held = read_safetensors_dump(path / TENSORS_NAME)
        return replace(held, sidecar=_sidecar(path, held))
    if path.is_dir():
        logits = _debug_logits(path)
        if len(logits) > 1:
            several = ", ".join(file.name for file in logits[:3])
            raise TraceError(f"holds logits of {len(logits)} runs: {several}", where=path,
                             hint="name one of the files")  # fmt: skip
        return read_llama_debug_dump(logits[0]) if logits else read_file_folder(path, READERS)
    read = _find_reader(path)
    assert read is not None
    held = read(path)
    return replace(held, sidecar=_sidecar(path.parent, held)) if path.name == TENSORS_NAME else held


def _sidecar(folder: Path, held: TensorFile) -> Sidecar:
    found = read_sidecar(folder)
    return held.sidecar if found == Sidecar() else found


class TensorDump:
    """The stage tensors among named ones, read one at a time; see `dumps.source.StageSource`.

    Attributes:
        path: The file or folder.
        sidecar: What it says of itself; the stored type where it says nothing of that, and the ids
            that are among its tensors.
        counts: Number of values of every tensor by key, in the order of computation.
        ignored: Names of tensors that are no stage.
        unlisted: None: a file is written as a whole.
    """

    unlisted: tuple[StageKey, ...] = ()

    def __init__(
        self, path: Path, held: TensorFile, options: ReadingOptions, *, graph: Graph | None = None
    ) -> None:
        self.path = path
        self._batch: Batch | None = None
        self._row = 0
        stored = tuple(held.arrays)
        positions, history = find_step(held.integers)
        self.sidecar = replace(
            held.sidecar,
            positions=held.sidecar.positions or positions,
            history=held.sidecar.history or history,
        )
        dialects = known_dialects(stored, graph or outline(1, ()))
        if options.names is not None:
            dialects = (options.names, *dialects)
        turned = [dialect for dialect in dialects if dialect.innermost_first]
        self._arrays = {
            name: _outermost_first(array) if any(d.parse(name) for d in turned) else array
            for name, array in held.arrays.items()
        }
        batch = find_batch(held.integers, options.pad, path)
        recipes, ignored = resolve(stored, dialects, self._fits)
        if not recipes:
            few = ", ".join(sorted(stored)[:3]) or "no floating-point tensor"
            raise TraceError(
                f"has no tensor with the name of a stage; it has {few}", where=path,
                hint="say what they are called with --names; see docs/formats.md",
            )  # fmt: skip
        self._recipes = {key: recipes[key] for key in sorted(recipes, key=computation_order)}
        self._choose_row(batch or self._batch_of_shapes(), options.row)
        shapes = {key: self._resolved_shape(key, r) for key, r in self._recipes.items()}
        self._shapes = {key: shape for key, shape in shapes.items() if shape is not None}
        strangers = unused_integers(held.integers)
        strangers = [x for x in strangers if not any(d.is_internal(x) for d in dialects)]
        self.ignored = tuple(sorted((*ignored, *held.ignored, *strangers)))
        self.sidecar = _with_dtype(self.sidecar, [
            self._arrays[name].dtype for key in self._shapes for name in recipes[key].names
        ])  # fmt: skip
        if self._batch is not None and self._batch.tokens is not None:
            self.sidecar = replace(self.sidecar, tokens=self._batch.tokens[self._row])
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

    def is_exact(self, key: StageKey) -> bool:
        """True: what is stored is what the engine went on with, but for its type."""
        return True

    def read(self, key: StageKey) -> Float32:
        """The values of one tensor, flat.

        Raises:
            FormatError: The file has changed since it was opened, or is damaged.
        """
        recipe, shape = self._recipes[key], self._shapes[key]
        if recipe.reading is not Reading.PLAIN:
            values = self._array(key, recipe.names[0]).read()[:, :, : shape[2]]
            if recipe.reading is Reading.SCORES:
                values = values / np.float32(math.sqrt(self._head_dim(key, recipe)))
        elif len(recipe.terms) > 1:
            terms = [self._read_term(key, term) for term in recipe.terms]
            values = np.concatenate([x.reshape(shape[0], -1) for x in terms], axis=1)
        else:
            values = self._read_term(key, recipe.terms[0])
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

    def _read_term(self, key: StageKey, term: Term) -> Float32:
        """A tensor or the sum of several, rounded to their type as the engine's would be."""
        total, *others = (self._read_operand(key, operand) for operand in term)
        for other in others:
            total = total + other
        dtype = self._arrays[term[0].name].dtype
        if others and dtype == "float16":
            total = total.astype(np.float16).astype(np.float32)
        elif others and dtype == "bfloat16":
            total = total.astype(BFLOAT16.dtype).astype(np.float32)
        return total

    def _read_operand(self, key: StageKey, operand: Operand) -> Float32:
        array = self._array(key, operand.name)
        if known_stages()[key.stage].last_token and len(array.shape) > 1:
            values = array.load(array.shape[0] - 1, array.shape[0]).reshape(array.shape[1:])
        else:
            values = array.read()
        if operand.columns is not None:
            values = values[..., operand.columns.resolve(values.shape[-1])]
        return values

    def _fits(self, key: StageKey, recipe: Recipe) -> bool:
        return self._resolved_shape(key, recipe) is not None

    def _resolved_shape(self, key: StageKey, recipe: Recipe) -> tuple[int, ...] | None:
        """The shape that a recipe gives; None if its parts do not go together."""
        if recipe.reading is not Reading.PLAIN:
            shape = self._array(key, recipe.names[0]).shape
            if 0 in shape or len(shape) != 3 or shape[2] < shape[1]:
                return None
            if recipe.reading is Reading.SCORES and self._head_dim(key, recipe) < 1:
                return None
            # What lies beyond the tokens so far is padding.
            first = (self.sidecar.positions or (0,))[0]
            return (*shape[:2], min(first + shape[1], shape[2]))
        shapes = [self._term_shape(key, term) for term in recipe.terms]
        known = [shape for shape in shapes if shape is not None and 0 not in shape]
        if len(known) < len(shapes):
            return None
        return _joined(known) if len(known) > 1 else known[0]

    def _term_shape(self, key: StageKey, term: Term) -> tuple[int, ...] | None:
        shapes = {self._operand_shape(key, operand) for operand in term}
        return shapes.pop() if len(shapes) == 1 else None

    def _operand_shape(self, key: StageKey, operand: Operand) -> tuple[int, ...] | None:
        shape = self._array(key, operand.name).shape
        if known_stages()[key.stage].last_token and len(shape) > 1:
            shape = shape[1:]
        if operand.columns is None:
            return shape
        columns = operand.columns.resolve(shape[-1]) if shape else None
        return None if columns is None else (*shape[:-1], columns.stop - columns.start)

    def _head_dim(self, key: StageKey, recipe: Recipe) -> int:
        """D: values of the queries for one token and head."""
        scores, queries = (self._array(key, name).shape for name in recipe.names)
        size, rest = divmod(math.prod(queries), scores[0] * scores[1])
        return 0 if rest else size

    def _batch_of_shapes(self) -> Batch | None:
        """The batch that tensors without ids give away: an axis more than tokens and a width."""
        for key, recipe in self._recipes.items():
            shape = self._arrays[recipe.names[0]].shape
            is_matrix = recipe.reading is Reading.PLAIN and _factors(key) in (2, 1)
            if is_matrix and len(shape) == 3:
                return Batch(((0, shape[1]),) * shape[0], None, has_axis=True)
        return None

    def _choose_row(self, batch: Batch | None, row: int | None) -> None:
        """Settle which sequence is read.

        Raises:
            TraceError: There are several and none is named, or one that is not there.
        """
        count = 1 if batch is None else len(batch.bounds)
        if row is None and count > 1:
            raise TraceError(f"holds a batch of {count} sequences", where=self.path,
                             hint=f"say which with --row N, from 0 to {count - 1}")  # fmt: skip
        if row is not None and not 0 <= row < count:
            raise TraceError(f"has no row {row}: it holds {count} sequence{'s' * (count > 1)}",
                             where=self.path, hint="rows count from 0")  # fmt: skip
        self._batch, self._row = batch, row or 0

    def _array(self, key: StageKey, name: str) -> StoredArray:
        """A stored tensor, for one stage: of a batch the chosen sequence, without its padding."""
        array = self._arrays[name]
        batch = self._batch
        if batch is None:
            return array
        least = 2 if known_stages()[key.stage].last_token else 3
        if batch.has_axis and len(array.shape) >= least and array.shape[0] == len(batch.bounds):
            array = _row_of(array, self._row)
        start, stop = batch.bounds[self._row]
        length = max(stop for _, stop in batch.bounds)
        axes = [i for i, letter in enumerate(known_stages()[key.stage].shape.split(","))
                if letter in ("T", "S")] or [0]  # fmt: skip
        if len(array.shape) < 2 or stop - start == length:
            return array
        for axis in axes:
            if axis < len(array.shape) and array.shape[axis] >= length:
                array = _cropped(array, axis, start, stop)
        return array


def _factors(key: StageKey) -> int:
    """How many numbers tell a place in a stage's tensor, but for the tokens of the logits."""
    return len(axis_names(known_stages()[key.stage].shape))


def _outermost_first(array: StoredArray) -> StoredArray:
    """An array with ggml's axes, the innermost first, if it has them: the values lie in order."""
    if len(array.shape) != 4 or array.shape[-1] != 1:
        return array
    shape = drop_batch(array.shape[::-1])

    def load(start: int, stop: int) -> Float32:
        return array.load(0, array.shape[0]).reshape(shape)[start:stop]

    return StoredArray(shape, array.dtype, load)


def _row_of(array: StoredArray, row: int) -> StoredArray:
    shape = array.shape[1:]

    def load(start: int, stop: int) -> Float32:
        return array.load(row, row + 1).reshape(shape)[start:stop]

    return StoredArray(shape, array.dtype, load)


def _cropped(array: StoredArray, axis: int, first: int, last: int) -> StoredArray:
    shape = (*array.shape[:axis], last - first, *array.shape[axis + 1 :])

    def load(start: int, stop: int) -> Float32:
        if axis == 0:
            return array.load(first + start, first + stop)
        rows = array.load(start, stop).reshape(stop - start, *array.shape[1:])
        return np.take(rows, range(first, last), axis=axis)

    return StoredArray(shape, array.dtype, load)


def _joined(shapes: Sequence[tuple[int, ...]]) -> tuple[int, int] | None:
    """The matrix that tensors make side by side, a row for each token; None if they make none."""
    widths = [math.prod(shape[1:]) if len(shape) > 1 else shape[-1] for shape in shapes]
    rows = {shape[0] if len(shape) > 1 else 1 for shape in shapes}
    if len(rows) == 1:
        return rows.pop(), sum(widths)
    is_heads = {len(shape) for shape in shapes} == {2} and len({shape[1] for shape in shapes}) == 1
    if is_heads and len(set(shapes[1:])) == 1:
        return 1, sum(map(math.prod, shapes))  # heads and their dimensions, of one token
    return None


def _with_dtype(sidecar: Sidecar, stored: list[str]) -> Sidecar:
    if sidecar.dtype is not None:
        return sidecar
    return replace(sidecar, dtype=next(name for name in _COARSEST_FIRST if name in stored))
