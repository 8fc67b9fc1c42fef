"""A tiny model written straight to .apr, without torch, and stage directories made of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.writer import TraceWriter
from aprcore.engines.forward import trace
from aprcore.engines.numpy import NumpyBackend
from aprcore.formats.apr_writer import AprWriter, TensorEntry
from aprcore.models.model import Model, open_model
from aprcore.network.graph import outline
from aprcore.network.stages import Scope, StageKey, resolve_shape

Float32 = NDArray[np.float32]
Tensors = dict[StageKey, Float32]

# Sizes that differ from each other, so that no two axes can be confused unseen.
SIZES = {"H": 4, "K": 2, "D": 6, "E": 20, "F": 28, "V": 40}
NUM_LAYERS = 3
TOKENS = (5, 0, 39, 7, 7)


@dataclass(frozen=True)
class ArrayWeight:
    """A weight held in memory."""

    name: str
    values: Float32
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        rows = self.values[start:stop]
        if out is None:
            return rows.copy()
        target = out.reshape(-1)[: rows.size].reshape(rows.shape)
        target[...] = rows
        return target


def draw_weights(
    seed: int = 0, num_layers: int = NUM_LAYERS, *, has_bias: bool = True,
    architecture: str = "llama", also: Iterable[str] = (),
) -> dict[str, Float32]:  # fmt: skip
    """Weights of a Qwen2 at a trained model's scale: norms near one, biases that matter.

    Each depends on the seed and its name alone: a model of fewer layers is the start of a longer.
    """
    weights = {}
    graph = outline(num_layers, (*also, *(("qkv_bias",) if has_bias else ())), architecture)
    for row in (graph.find(key) for key in graph.keys):
        stage = row.stage
        layer = row.key.layer if stage.scope is Scope.LAYER else None
        for use in stage.operation.weights:
            if use.needed:
                prefix, name = "" if layer is None else f"model.layers.{layer}.", use.name
                shape = resolve_shape(use.shape, SIZES)
                generator = np.random.default_rng([seed, crc32((prefix + name).encode())])
                noise = generator.standard_normal(shape)
                if name.endswith("norm.weight"):
                    noise = 1 + 0.2 * noise
                elif len(shape) == 2:
                    noise /= np.sqrt(shape[1])
                weights[prefix + name] = noise.astype(np.float32)
    return weights


def write_model(
    path: Path, *, seed: int = 0, num_layers: int = NUM_LAYERS, has_bias: bool = True,
    changed: Mapping[str, Float32] | None = None, metadata: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write the model of `seed`, with some of its weights and metadata `changed`."""
    weights = draw_weights(seed, num_layers, has_bias=has_bias) | dict(changed or {})
    declared = {
        "architecture": "qwen2" if has_bias else "llama",
        "hidden_size": SIZES["E"], "num_layers": num_layers, "num_heads": SIZES["H"],
        "num_kv_heads": SIZES["K"], "head_dim": SIZES["D"], "vocab_size": SIZES["V"],
        "intermediate_size": SIZES["F"], "max_position_embeddings": 4096,
        "rope_theta": 10000.0, "rope_type": 2, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    } | dict(metadata or {})  # fmt: skip
    entries = [TensorEntry(name, "F32", values.shape) for name, values in weights.items()]
    with AprWriter(path, declared, entries) as writer:
        for entry in writer.entries:
            writer.write(entry.name, np.ascontiguousarray(weights[entry.name]))
    return path


def embedded_tokenizer(vocabulary: list[str]) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer without merges, padded to the vocabulary's size."""
    padding = [f"<pad{i}>" for i in range(SIZES["V"] - len(vocabulary))]
    return {
        "tokenizer.vocabulary": [*vocabulary, *padding],
        "tokenizer.merges": [],
        "tokenizer.model_type": "gpt2",
    }


@contextmanager
def opened(path: Path) -> Iterator[Model]:
    with open_model(path) as model:
        yield model


def trace_model(path: Path, tokens: tuple[int, ...] = TOKENS) -> Tensors:
    """Every stage of the CPU path, by key."""
    with opened(path) as model:
        stream = trace(model.graph, model.weights, NumpyBackend(1), tokens)
        return {key: tensor.copy() for key, tensor in stream}


def write_stages(
    directory: Path, tensors: Mapping[StageKey, NDArray[Any]], *,
    tokens: tuple[int, ...] | None = TOKENS, dtype: str | None = "float32", **sidecar: Any,
) -> Path:  # fmt: skip
    """Write a directory of stage files as an engine would."""
    with TraceWriter(directory, Sidecar(tokens=tokens, dtype=dtype, **sidecar)) as writer:
        for key, values in tensors.items():
            writer.write(key, values)
    return directory


def edited(tensors: Tensors, key: StageKey, change: Callable[[Float32], NDArray[Any]]) -> Tensors:
    """A copy of `tensors` with one of them replaced by what `change` makes of a copy of it."""
    return tensors | {key: np.asarray(change(tensors[key].copy()), dtype=np.float32)}


def leftovers(directory: Path) -> list[str]:
    """Every path below a directory, for comparing before and after."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
