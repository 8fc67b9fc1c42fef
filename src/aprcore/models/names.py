"""Tensors as files hold them -> weights under canonical names, in canonical order.

Files differ in names (Hugging Face's or GGUF's), in fusing q, k and v, and in the order of q and k
rows. All of it is undone by views that are read lazily like the tensors themselves.

Source: docs/formats.md, "Models"; llama.cpp's `convert_hf_to_gguf.py` for the order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.formats.storage import StoredTensor
from aprcore.ground.errors import WeightError, Where
from aprcore.network.architectures import find_architecture
from aprcore.network.config import ModelConfig
from aprcore.network.graph import Graph
from aprcore.network.operations import PARTS, K, Q, V, WeightUse
from aprcore.network.stages import Scope
from aprcore.network.weights import Float32, Weight, row_values
from aprcore.quant.types import Bytes

ROPE_DIVISORS = "rope_freqs.weight"
FUSED_QKV = "self_attn.qkv_proj"

_GGUF_LAYER = re.compile(r"blk\.(\d{1,9})\.([a-z_]+)\.(weight|bias)", re.ASCII)
_GGUF_MODEL = re.compile(r"(token_embd|output_norm|output)\.(weight|bias)", re.ASCII)
_FUSED_NAME = re.compile(r"(model\.layers\.\d{1,9}\.)self_attn\.qkv_proj\.(weight|bias)", re.ASCII)
# A leftover of old checkpoints; the frequencies follow from the configuration.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Some rows of a weight, as a weight: one of the matrices in a fused `qkv_proj`.

    Attributes:
        name: The canonical name.
        inner: The fused weight.
        first_row: Where the rows begin in it.
        num_rows: How many there are.
    """

    name: str
    inner: StoredTensor
    first_row: int
    num_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, row-major."""
        return (self.num_rows, *self.inner.shape[1:])

    @property
    def dtype(self) -> str:
        """The stored type."""
        return self.inner.dtype

    def read(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        """See `Weight.read`."""
        return self.inner.read(*self._inner_rows(start, stop), out)

    def read_raw(self, start: int, stop: int) -> Bytes:
        """See `StoredTensor.read_raw`."""
        return self.inner.read_raw(*self._inner_rows(start, stop))

    def step_squares(self, start: int, stop: int) -> tuple[Float32, int]:
        """See `Weight.step_squares`."""
        return self.inner.step_squares(*self._inner_rows(start, stop))

    def _inner_rows(self, start: int, stop: int) -> tuple[int, int]:
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows {start} to {stop} of {self.name!r}, which has {self.num_rows}")
        return self.first_row + start, self.first_row + stop


@dataclass(frozen=True, slots=True)
class SplitHalves:
    """q or k rows stored for RoPE on adjacent pairs, presented in split-half order.

    Converting to GGUF, llama.cpp stores row `i + s·D/2` of a head (s is 0 or 1) as row `2i + s`,
    so that the pair of dimensions i and i + D/2 becomes adjacent. This is the way back.

    Attributes:
        name: The canonical name.
        inner: The stored weight, bias or per-head norm.
        head_dim: D; the rows are whole heads.
    """

    name: str
    inner: StoredTensor | RowSlice
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, row-major."""
        return self.inner.shape

    @property
    def dtype(self) -> str:
        """The stored type."""
        return self.inner.dtype

    def stored_rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """The stored rows of rows `start` to `stop`, int64 [stop - start]."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {self.name!r}, which has {self.shape[0]}")
        head, within = np.divmod(np.arange(start, stop), self.head_dim)
        half, pair = np.divmod(within, self.head_dim // 2)
        rows: NDArray[np.int64] = head * self.head_dim + 2 * pair + half
        return rows

    def read(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        """See `Weight.read`. A piece of one half is every other row of twice as many."""
        rows = self.stored_rows(start, stop)
        shape = (stop - start, *self.shape[1:])
        count = (stop - start) * row_values(self)
        values = np.empty(count, np.float32) if out is None else out.reshape(-1)[:count]
        values = values.reshape(shape)
        if count:
            first = int(rows.min())
            np.take(self.inner.read(first, int(rows.max()) + 1), rows - first, axis=0, out=values,
                    mode="clip")  # fmt: skip  # the other modes copy `out` first
        return values

    def read_raw(self, start: int, stop: int) -> Bytes:
        """See `StoredTensor.read_raw`."""
        rows = self.stored_rows(start, stop)
        if not rows.size:
            return np.empty(0, np.uint8)
        first, last = int(rows.min()), int(rows.max()) + 1
        raw = self.inner.read_raw(first, last).reshape(last - first, -1)
        return raw[rows - first].reshape(-1)

    def step_squares(self, start: int, stop: int) -> tuple[Float32, int]:
        """See `Weight.step_squares`; the groups of a row move with it."""
        rows = self.stored_rows(start, stop)
        if not rows.size:
            return self.inner.step_squares(0, 0)
        first = int(rows.min())
        squares, group = self.inner.step_squares(first, int(rows.max()) + 1)
        return squares[rows - first], group


@dataclass(frozen=True, slots=True)
class Shifted:
    """A vector stored with something added to it, as a weight: GGUF's norms by 1 + w.

    Attributes:
        name: The canonical name.
        inner: The stored vector.
        offset: What was added.
    """

    name: str
    inner: StoredTensor | RowSlice | SplitHalves
    offset: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, row-major."""
        return self.inner.shape

    @property
    def dtype(self) -> str:
        """The stored type."""
        return self.inner.dtype

    def read(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        """See `Weight.read`. Exact for sums of a common size; else off by less than a step."""
        values = self.inner.read(start, stop, out)
        return np.subtract(values, np.float32(self.offset), out=None if out is None else values)

    def step_squares(self, start: int, stop: int) -> tuple[Float32, int]:
        """See `Weight.step_squares`: the steps of what is stored, and of the difference."""
        squares, group = self.inner.step_squares(start, stop)
        return squares + np.spacing(np.abs(self.read(start, stop)))[:, None] ** 2, group


def is_gguf_name(name: str) -> bool:
    """Whether a tensor's name is one of GGUF's."""
    return any(pattern.fullmatch(name) for pattern in (_GGUF_LAYER, _GGUF_MODEL))


class GgufNames:
    """The names that GGUF gives the weights of a graph, by the `gguf` package's own map."""

    def __init__(self, graph: Graph) -> None:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        self._graph = graph
        family = find_architecture(graph.config.architecture)
        named = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        self._map = get_tensor_name_map(
            named.get(family.gguf or family.name, MODEL_ARCH.LLAMA), 1
        )  # fmt: skip
        self._layers: dict[int | None, Mapping[str, str]] = {}

    def canonical(self, name: str) -> str:
        """The Hugging Face name of a tensor; a name that is not GGUF's is returned as it is."""
        if _GGUF_MODEL.fullmatch(name):
            return self._names(None).get(name, name)
        match = _GGUF_LAYER.fullmatch(name)
        if match is None:
            return name
        layer = int(match[1])
        short = self._names(min(layer, self._graph.num_layers - 1)).get(f"{match[2]}.{match[3]}")
        return name if short is None else f"model.layers.{layer}.{short}"

    def stored(self, name: str) -> str:
        """GGUF's name of a canonical one: the way back."""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        module, _, kind = (name if match is None else match[2]).rpartition(".")
        found = self._lookup(module, None if match is None else 0)
        if found is None:
            return name
        number = "" if match is None else match[1]
        return f"{found}.{kind}" if match is None else f"blk.{number}.{found}.{kind}"

    def _names(self, layer: int | None) -> Mapping[str, str]:
        """Canonical names by GGUF's, without what says the layer."""
        found = self._layers.get(layer)
        if found is None:
            found = {}
            modules = {use.name.rpartition(".")[0] for use in weights_of_layer(self._graph, layer)}
            if layer is not None:
                modules.add(FUSED_QKV)
            for module in modules:
                stored = self._lookup(module, layer)
                if stored is not None:
                    found |= {f"{stored}.{kind}": f"{module}.{kind}" for kind in ("weight", "bias")}
            self._layers[layer] = found
        return found

    def _lookup(self, module: str, layer: int | None) -> str | None:
        """GGUF's name of a module, without the layer.

        What the architecture's own map lacks is looked up in that of all: files fuse what a model
        has apart, untie its head, or add norms.
        """
        from gguf import TENSOR_NAMES, TensorNameMap

        name = self._map.get_name(module if layer is None else f"model.layers.0.{module}")
        if name is None:
            everything: Any = TensorNameMap  # its tables have no stubs
            table = everything.mappings_cfg if layer is None else everything.block_mappings_cfg
            wanted = module if layer is None else f"model.layers.{{bid}}.{module}"
            names = (TENSOR_NAMES[tensor] for tensor, known in table.items() if wanted in known)
            name = next(names, None)
        return None if name is None else name.removeprefix("blk.0.").removeprefix("blk.{bid}.")


def weights_of_layer(graph: Graph, layer: int | None) -> Iterator[WeightUse]:
    """The weights that the stages of a layer use, or those of the whole model (None)."""
    rows = [*graph.layer(layer).values()]
    if layer is None:
        rows += [row for row in graph.layer(0).values() if row.stage.scope is Scope.FIRST_LAYER]
    for row in rows:
        is_outside = row.stage.scope is not Scope.LAYER
        if row.stage.operation is not None and is_outside == (layer is None):
            yield from row.stage.operation.weights


def rename_tensors(
    tensors: Mapping[str, StoredTensor], graph: Graph, where: Where
) -> dict[str, StoredTensor]:
    """Tensors under canonical names, without those that carry nothing.

    Raises:
        WeightError: Two tensors have the same canonical name.
    """
    names = GgufNames(graph) if any(map(is_gguf_name, tensors)) else None
    renamed: dict[str, StoredTensor] = {}
    for stored, tensor in tensors.items():
        if stored.endswith(_IGNORED_SUFFIX):
            continue
        name = stored if names is None else names.canonical(stored)
        if name in renamed:
            raise WeightError(f"{name} is stored twice, once as {stored!r}", where=where)
        renamed[name] = dataclasses.replace(tensor, name=name) if name != stored else tensor
    return renamed


def split_fused(
    tensors: Mapping[str, StoredTensor], config: ModelConfig, where: Where
) -> dict[str, StoredTensor | RowSlice]:
    """Every fused `qkv_proj` as the three weights it holds: q's rows, then k's, then v's.

    Raises:
        WeightError: Its rows are not (H + 2K)·D, or a part is stored on its own as well.
    """
    weights: dict[str, StoredTensor | RowSlice] = {}
    for name, tensor in tensors.items():
        match = _FUSED_NAME.fullmatch(name)
        if match is None:
            _add(weights, name, tensor, where)
            continue
        expected = config.qkv_columns("v")[1]
        if not tensor.shape or tensor.shape[0] != expected:
            raise WeightError(f"{name} has shape {list(tensor.shape)}, expected {expected} rows",
                              where=where)  # fmt: skip
        for part, module in zip(PARTS, (Q, K, V)):
            start, stop = config.qkv_columns(part)
            single = f"{match[1]}{module.path}.{match[2]}"
            _add(weights, single, RowSlice(single, tensor, start, stop - start), where)
    return weights


def _add(
    weights: dict[str, StoredTensor | RowSlice],
    name: str,
    weight: StoredTensor | RowSlice,
    where: Where,
) -> None:
    if name in weights:
        raise WeightError(f"{name} is stored twice, once within qkv_proj", where=where)
    weights[name] = weight


_ROTATED_NAME = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_(proj|norm)\.(weight|bias)")


def split_halves(
    weights: Mapping[str, StoredTensor | RowSlice], head_dim: int
) -> Mapping[str, StoredTensor | RowSlice | SplitHalves]:
    """Weights whose q and k rows are for adjacent pairs, with those rows in split-half order.

    A norm of q or k scales the same dimensions, so it is stored in the same order.
    """
    return {
        name: SplitHalves(name, weight, head_dim) if _ROTATED_NAME.fullmatch(name) else weight
        for name, weight in weights.items()
    }


def unshifted(
    weights: Mapping[str, StoredTensor | RowSlice]
    | Mapping[str, StoredTensor | RowSlice | SplitHalves],
    offset: float,
) -> dict[str, Weight]:
    """Weights whose norms are stored with something added, with it taken off again."""
    return {
        name: Shifted(name, weight, offset) if offset and name.endswith("norm.weight") else weight
        for name, weight in weights.items()
    }
