"""An open model: its configuration, its tokenizer and its weights by canonical name.

Nothing but headers is read on opening. What files may hold: docs/formats.md, "Models".
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aprcore.formats.storage import StoredTensor
from aprcore.ground.data_file import DataFile
from aprcore.ground.errors import ConfigError, FormatError, TokenizerError, WeightError, Where
from aprcore.models.names import (
    ROPE_DIVISORS,
    is_gguf_name,
    rename_tensors,
    split_fused,
    split_halves,
    unshifted,
    weights_of_layer,
)
from aprcore.network.architectures import known_names
from aprcore.network.config import Declaration, ModelConfig
from aprcore.network.dialects import declare_apr, declare_gguf, declare_huggingface
from aprcore.network.graph import Graph
from aprcore.network.operations import EMBEDDING, HEAD, K_NORM, Q_NORM, K, Q, V, WeightUse
from aprcore.network.rope import Rope, RopeScaling
from aprcore.network.stages import resolve_shape
from aprcore.network.weights import Weight, read_all
from aprcore.tokenization.tokenizer import Tokenizer, TokenizerData
from aprcore.tokenization.tokenizer_json import read_tokenizer_json

Format = Literal["apr", "gguf", "huggingface"]

APR_MAGIC, GGUF_MAGIC = b"APR\0", b"GGUF"

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Model:
    """An open model. Close it, or use it as a context manager.

    Attributes:
        path: The file or directory, as given.
        format: What it is.
        config: The configuration, with what the tensors say about biases, norms and the head.
        weights: Every weight, by canonical name.
        files: The files that hold the weights.
        metadata: The metadata as stored.
    """

    path: Path
    format: Format
    config: ModelConfig
    weights: Mapping[str, Weight]
    files: tuple[DataFile, ...]
    metadata: Mapping[str, Any]

    @cached_property
    def graph(self) -> Graph:
        """The stages of its pass."""
        return Graph(self.config)

    @property
    def pad_token_id(self) -> int | None:
        """The id that sequences of a batch are filled up with, as far as the metadata says it."""
        names = ("pad_token_id", "tokenizer.pad_token_id", "tokenizer.ggml.padding_token_id")
        found = next((self.metadata[name] for name in names if name in self.metadata), None)
        return found if type(found) is int else None

    @cached_property
    def tokenizer_data(self) -> TokenizerData | None:
        """The vocabulary that comes with the model, if any.

        Read on first use: a model whose tokenizer is damaged can still be run on token ids.

        Raises:
            TokenizerError: It is malformed.
        """
        match self.format:
            case "apr":
                return TokenizerData.from_apr_metadata(self.metadata, self.path)
            case "gguf":
                return TokenizerData.from_gguf(self.metadata, self.path)
            case "huggingface":
                return read_tokenizer_json(self.path)

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, embedded or a `tokenizer.json` beside the model; built once.

        Raises:
            TokenizerError: There is none, or it is malformed.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        sibling = (
            self.path if self.format == "huggingface" else self.path.parent
        ) / "tokenizer.json"
        if self.format != "huggingface":
            # The embedded vocabulary belongs to this model for certain; a neighbour may be
            # another model's.
            try:
                data = self.tokenizer_data
                if data is not None:
                    return Tokenizer.from_data(data, self.path)
            except TokenizerError:
                if not sibling.exists():
                    raise
        if sibling.exists():
            return Tokenizer.from_file(sibling)
        raise TokenizerError("the model has no tokenizer", where=self.path,
                             hint="put its tokenizer.json beside it or pass token ids")  # fmt: skip

    @cached_property
    def weight_types(self) -> frozenset[str]:
        """The stored types of the weights: {"F32", "Q4_K"}."""
        return frozenset(weight.dtype for weight in self.weights.values())

    @cached_property
    def sha256(self) -> str:
        """The `fingerprint` of its files."""
        return fingerprint(self.files)

    def close(self) -> None:
        """Close the files. Reading a weight is an error from then on."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fingerprint(files: Iterable[DataFile]) -> str:
    """A fingerprint of weights: SHA-256 over the first MiB, the last MiB and the size.

    The size goes in as 8 bytes, little-endian. Of several files each is added in the order of
    their names. Reading 40 GB to tell two models apart would take minutes.
    """
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path.name):
        piece = min(_MIB, file.size_bytes)
        digest.update(file.read_bytes(0, piece))
        digest.update(file.read_bytes(file.size_bytes - piece, piece))
        digest.update(file.size_bytes.to_bytes(8, "little"))
    return digest.hexdigest()


def open_model(path: str | os.PathLike[str]) -> Model:
    """Open a `.apr` or GGUF file or a Hugging Face directory, whatever its name.

    Raises:
        FormatError: It is none of these, or is damaged.
        ConfigError: Its metadata is missing something, contradictory or not supported.
        WeightError: A tensor is missing, misshaped or of no use.
    """
    path = Path(path)
    if path.is_dir():
        return _open_huggingface(path)
    with DataFile(path) as file:
        magic = file.read_bytes(0, min(4, file.size_bytes))
    if magic == GGUF_MAGIC:
        return _open_gguf(path)
    # Damage to the first bytes of a .apr is for its reader to describe.
    if magic == APR_MAGIC or path.suffix == ".apr":
        return _open_apr(path)
    hint = "a model is a .apr file, a .gguf file or a Hugging Face directory"
    if path.suffix in (".safetensors", ".json"):
        hint = "name the directory it is in"
    raise FormatError(f"not a model: it begins with {magic!r}", where=path, hint=hint)


def _open_huggingface(path: Path) -> Model:
    from aprcore.formats.huggingface import CONFIG_NAME, read_huggingface

    if not (path / CONFIG_NAME).exists():
        raise FormatError(f"the directory has no {CONFIG_NAME}", where=path,
                          hint="a model directory has one beside its .safetensors")  # fmt: skip
    held = read_huggingface(path)
    declared = declare_huggingface(held.config, held.config_path)
    config, weights = assemble(declared, held.tensors, path)
    return Model(path, "huggingface", config, weights, held.files, held.config)


def _open_apr(path: Path) -> Model:
    from aprcore.formats.apr import read_apr

    held = read_apr(path)
    declared = declare_apr(
        held.metadata, path,
        gguf_names=any(map(is_gguf_name, held.tensors)),
        embedding_rows=_embedding_rows(held.tensors),
    )  # fmt: skip
    config, weights = assemble(declared, held.tensors, path)
    return Model(path, "apr", config, weights, (held.file,), held.metadata)


def _open_gguf(path: Path) -> Model:
    from aprcore.formats.gguf import read_gguf

    held = read_gguf(path)
    declared = declare_gguf(held.metadata, path, embedding_rows=_embedding_rows(held.tensors))
    config, weights = assemble(declared, held.tensors, path)
    return Model(path, "gguf", config, weights, held.files, held.metadata)


def _embedding_rows(tensors: Mapping[str, StoredTensor]) -> int | None:
    for name in (EMBEDDING, "token_embd.weight"):
        if name in tensors and tensors[name].shape:
            return tensors[name].shape[0]
    return None


def assemble(
    declared: Declaration, tensors: Mapping[str, StoredTensor], where: Where
) -> tuple[ModelConfig, dict[str, Weight]]:
    """The configuration and canonical weights that metadata and tensors add up to.

    Raises:
        ConfigError: They contradict each other.
        WeightError: A tensor is missing, misshaped, stored twice or of no use.
    """
    config = declared.config
    every = Graph(config, known_names(config.architecture))
    renamed = rename_tensors(tensors, every, where)
    divisors = renamed.pop(ROPE_DIVISORS, None)
    if divisors is not None:
        config = dataclasses.replace(config, rope=_with_divisors(config.rope, divisors, where))
    # transformers ties in whichever direction a tensor is missing, and where both are stored it
    # keeps the stored head (equal matrices make no difference). So the tensors decide.
    if declared.tied and EMBEDDING not in renamed and HEAD in renamed:
        renamed[EMBEDDING] = dataclasses.replace(renamed.pop(HEAD), name=EMBEDDING)
    parts = split_fused(renamed, config, where)
    weights = unshifted(
        split_halves(parts, config.head_dim) if declared.adjacent_pairs else parts,
        declared.norm_offset,
    )
    config = with_found_weights(config, weights)
    _check_weights(config, declared, weights, where)
    return config, weights


_QKV_BIASES = tuple(module.bias for module in (Q, K, V))
_QK_NORMS = (Q_NORM, K_NORM)


def with_found_weights(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """A configuration with what the names of the weights say and metadata does not."""
    graph = Graph(config, known_names(config.architecture))
    return dataclasses.replace(
        config,
        found=frozenset(
            row.stage.name
            for layer in (0, graph.num_layers - 1, None)
            for row in graph.layer(layer).values()
            if row.stage.conditional
            and row.stage.operation is not None
            and _has_any(names, tuple(use.name for use in row.stage.operation.weights))
        ),
        qk_norm=_has_any(names, _QK_NORMS),
        tied_head=HEAD not in names,
    )


def _has_any(weights: Collection[str], suffixes: tuple[str, ...]) -> bool:
    return any(name.endswith(suffixes) for name in weights)


def _with_divisors(rope: Rope, tensor: StoredTensor, where: Where) -> Rope:
    """RoPE with GGUF's divisors, which stand for llama3's scaling.

    Raises:
        WeightError: There is not one positive divisor per frequency.
        ConfigError: The metadata asks for another scaling on top.
    """
    if tensor.shape != (rope.head_dim // 2,):
        raise WeightError(
            f"{ROPE_DIVISORS} has shape {list(tensor.shape)}, expected [{rope.head_dim // 2}]",
            where=where,
        )
    if rope.scaling.kind not in ("default", "llama3"):
        raise ConfigError(f"{ROPE_DIVISORS} beside {rope.scaling.kind} scaling is not supported",
                          where=where)  # fmt: skip
    divisors = read_all(tensor).astype(np.float64)
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise WeightError(f"{ROPE_DIVISORS} has values that are not positive numbers", where=where)
    return dataclasses.replace(rope, scaling=RopeScaling(), divisors=tuple(divisors.tolist()))


def _used_weights(graph: Graph, declared: Declaration) -> Iterator[tuple[str, WeightUse]]:
    """Every weight that a stage uses: its whole name, and what is known of it.

    Lazy, so that an absurd number of layers ends at the first missing tensor.
    """
    norms = _QK_NORMS if graph.config.qk_norm else ()
    layers: Iterator[int | None] = chain((None,), range(graph.num_layers))
    for layer in layers:
        prefix = "" if layer is None else f"model.layers.{layer}."
        for use in weights_of_layer(graph, layer):
            needed = use.needed or use.name in norms or use.name in declared.promised
            yield prefix + use.name, use._replace(needed=needed)


def _check_weights(
    config: ModelConfig, declared: Declaration, weights: Mapping[str, Weight], where: Where
) -> None:
    """Hold the tensors against the graph.

    Raises:
        WeightError: One is missing, misshaped, or used by no stage.
        ConfigError: The metadata denies one that exists.
    """
    sizes = config.sizes(1)
    used = set()
    for name, use in _used_weights(Graph(config), declared):
        weight = weights.get(name)
        if weight is None:
            if use.needed:
                raise _missing_error(name, use.name, declared, where)
            continue
        if use.name in declared.denied:
            raise ConfigError(f"tensor {name!r} exists, though the configuration says that the "
                              "model has no such bias", where=where)  # fmt: skip
        expected = resolve_shape(use.shape, sizes)
        if weight.shape != expected:
            raise WeightError(
                f"tensor {name!r} has shape {list(weight.shape)}, expected {list(expected)} "
                f"({use.shape})", where=where,
            )  # fmt: skip
        used.add(name)
    unused = sorted(weights.keys() - used)
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise WeightError(f"no stage uses tensor {unused[0]!r}{more}", where=where,
                          hint="the architecture or the number of layers may be wrong")  # fmt: skip


def _missing_error(name: str, short: str, declared: Declaration, where: Where) -> WeightError:
    hint = None
    if short in declared.promised:
        hint = "the configuration says that the model has it"
    elif short in (*_QKV_BIASES, *_QK_NORMS):
        hint = "others of its kind exist"
    return WeightError(f"tensor {name!r} is missing", where=where, hint=hint)
