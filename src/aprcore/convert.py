"""Importing a model: a GGUF file or a Hugging Face directory -> one .apr file.

The tensors are those of the open model: canonical names, q and k rows in split-half order, q, k
and v apart. A tensor whose stored type the new file keeps is copied byte for byte (rows may move,
their bytes do not change); every other one is read as float32 and encoded, a few rows at a time.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from aprcore.canonical import EMBEDDING, HEAD, ROPE_DIVISORS
from aprcore.config import ModelConfig
from aprcore.encode import Encoded, encode
from aprcore.errors import AprError, TokenizerError, WeightError
from aprcore.formats.apr import dtype_id
from aprcore.formats.apr_writer import AprWriter, TensorEntry
from aprcore.formats.storage import StoredTensor
from aprcore.model import Model, open_model
from aprcore.quant import FORMATS, Bytes, Float32, Layout
from aprcore.rope import Rope
from aprcore.steps import step_squares
from aprcore.weights import Weight, row_chunks

DTYPES = ("keep", "f32", "f16", "bf16", "q8_0")

# Pieces are written in one call each; larger than the readers' so that calls do not dominate.
PIECE_BYTES = 4 * 1024 * 1024

SPLIT_HALVES = 2  # `rope_type` of the metadata


@runtime_checkable
class _RawRows(Protocol):
    """A weight that can give the stored bytes of its rows."""

    def read_raw(self, start: int, stop: int) -> Bytes: ...


@dataclass(frozen=True, slots=True)
class ConvertProgress:
    """How far an import is.

    Attributes:
        tensor: The tensor that is written.
        done_bytes: Bytes of tensors written.
        total_bytes: Bytes of all tensors.
    """

    tensor: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What becomes of one tensor.

    Attributes:
        weight: Where it comes from.
        entry: What the new file holds.
        reason: Why that is not the type that was asked for, if it is not.
    """

    weight: Weight
    entry: TensorEntry
    reason: str = ""

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are copied as they are."""
        return self.weight.dtype == self.entry.dtype and _can_copy(self.weight)


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """What an import writes.

    Attributes:
        metadata: The JSON object of the new file.
        tensors: What becomes of each tensor.
        notes: What could not be taken along, and why.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the new file."""
        return sum(plan.entry.size_bytes for plan in self.tensors)

    def summary(self) -> tuple[str, ...]:
        """What was done, a line per kind of change: "3 tensors: IQ2_S -> F32 (...)"."""
        kinds = Counter((t.weight.dtype, t.entry.dtype, t.reason) for t in self.tensors)
        lines = []
        for (source, target, reason), count in sorted(kinds.items()):
            change = f"{source} kept" if source == target else f"{source} -> {target}"
            tensors = "1 tensor" if count == 1 else f"{count} tensors"
            lines.append(f"{tensors}: {change}{f' ({reason})' if reason else ''}")
        return tuple(lines)


def import_model(
    source: Path,
    target: Path,
    *,
    dtype: str = "keep",
    overwrite: bool = False,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> ImportPlan:
    """Write a model as one .apr file.

    The file appears under its name only when it is complete; after any error, Ctrl-C included,
    nothing is left behind.

    Args:
        source: A GGUF file, a Hugging Face directory or another .apr file.
        target: The new file.
        dtype: One of `DTYPES`; "keep" keeps each tensor's stored type.
        overwrite: Whether an existing file is replaced.
        progress: Called after every piece.

    Returns:
        What was done.

    Raises:
        AprError: The arguments, the source or the target cannot be used.
        WeightError: A value has no finite image in the type that was asked for.
    """
    with open_model(source) as model:
        _check_target(model, target, overwrite)
        plan = plan_import(model, dtype)
        by_name = {tensor.entry.name: tensor for tensor in plan.tensors}
        entries = [tensor.entry for tensor in plan.tensors]
        with AprWriter(target, plan.metadata, entries) as writer:
            done_bytes, total_bytes = 0, plan.total_bytes
            for entry in writer.entries:
                for piece in encode_tensor(by_name[entry.name], source):
                    writer.write(entry.name, piece)
                    done_bytes += piece.nbytes
                    if progress is not None:
                        progress(ConvertProgress(entry.name, done_bytes, total_bytes))
    return plan


def plan_import(model: Model, dtype: str = "keep") -> ImportPlan:
    """Decide what a new file holds, without reading any weight.

    Raises:
        AprError: `dtype` is not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise AprError(
            f"unknown type {dtype!r}", where="--dtype", hint=f"types are {', '.join(DTYPES)}"
        )
    tensors = [_plan_tensor(weight, dtype) for weight in model.weights.values()]
    if model.config.rope.divisors is not None:
        # Factors per frequency have no metadata key; the tensor keeps GGUF's name.
        divisors = np.asarray(model.config.rope.divisors, np.float32)
        weight = _ArrayWeight(ROPE_DIVISORS, divisors)
        tensors.append(TensorPlan(weight, TensorEntry(weight.name, "F32", weight.shape)))
    metadata = {**_describe_name(model), **describe_config(model.config)}
    try:
        tokenizer = model.tokenizer_data
    except TokenizerError as error:
        # The weights are of use without it: every command takes token ids.
        return ImportPlan(metadata, tuple(tensors), (f"the tokenizer is left out: {error}",))
    if tokenizer is not None:
        metadata |= tokenizer.to_apr_metadata()
    return ImportPlan(metadata, tuple(tensors))


def describe_config(config: ModelConfig) -> dict[str, Any]:
    """A configuration under the canonical metadata keys."""
    fields = {
        "architecture": config.architecture,
        "model_type": config.architecture,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope.theta,
        "rope_type": SPLIT_HALVES,
        "rope_scaling": _describe_scaling(config.rope),
        "hidden_act": config.hidden_act,
        "sliding_window": config.sliding_window,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tied_head,
    }
    return _without_none(fields)


def encode_tensor(plan: TensorPlan, source: str | os.PathLike[str]) -> Iterator[Encoded]:
    """The bytes of a tensor in its new type, piece by piece.

    Raises:
        WeightError: Values have no finite image in the new type.
    """
    weight, dtype = plan.weight, plan.entry.dtype
    if plan.is_copy:
        yield from _copy_pieces(weight)
        return
    bad = 0
    for start, stop in row_chunks(weight, PIECE_BYTES):
        values = weight.read(start, stop)
        encoded, lost = encode(dtype, values)
        bad += lost
        if not bad:
            yield encoded
    if bad:
        raise WeightError(
            f"tensor {weight.name!r}: {bad} value{'s have' if bad > 1 else ' has'} no finite "
            f"{dtype} ({weight.dtype} is stored)",
            where=source,
            hint="import it as f32, or keep the stored type",
        )


def _check_target(model: Model, target: Path, overwrite: bool) -> None:
    """Refuse to overwrite what is read, or what was not meant to be overwritten.

    Raises:
        AprError: One of these.
    """
    if not target.exists():
        return
    if any(target.samefile(file.path) for file in model.files):
        raise AprError(
            "the new file would overwrite the model that is read",
            where=target,
            hint="choose another name",
        )
    if not overwrite:
        raise AprError("the file exists", where=target, hint="--force overwrites it")


def _plan_tensor(weight: Weight, asked: str) -> TensorPlan:
    dtype, reason = _choose_dtype(weight, asked)
    return TensorPlan(weight, TensorEntry(weight.name, dtype, weight.shape), reason)


def _choose_dtype(weight: Weight, asked: str) -> tuple[str, str]:
    """The new type of a tensor, and why if it is not the one that was asked for."""
    stored = weight.dtype
    if asked == "keep":
        if dtype_id(stored) is None:
            return "F32", f".apr has no type for {stored}"
        if not _can_copy(weight):
            return "F32", f"rows of {stored} cannot be taken apart"
        return stored, ""
    if asked != "q8_0":
        return asked.upper(), ""
    # What q8_0 would hurt most and save least: as llama.cpp does for vectors; embedding and head
    # stay float because they are also the tensors whose errors every token sees.
    floating = stored if stored in ("F32", "F16", "BF16") else "F32"
    if len(weight.shape) < 2:
        return floating, "vectors stay float"
    if weight.name in (EMBEDDING, HEAD):
        return floating, "embedding and head stay float"
    if weight.shape[-1] % FORMATS["Q8_0"].block_values:
        return floating, f"rows of {weight.shape[-1]} are not whole blocks"
    return "Q8_0", ""


def _can_copy(weight: Weight) -> bool:
    """Whether the stored bytes of `weight` can be taken as they are."""
    row = FORMATS.get(weight.dtype)
    if row is None:
        return False
    if row.layout in (Layout.FLAT, Layout.SCALED):
        return isinstance(weight, StoredTensor)
    return isinstance(weight, _RawRows)


def _copy_pieces(weight: Weight) -> Iterator[Encoded]:
    row = FORMATS[weight.dtype]
    if row.layout in (Layout.FLAT, Layout.SCALED):
        assert isinstance(weight, StoredTensor)
        for done in range(0, weight.size_bytes, PIECE_BYTES):
            piece = np.empty(min(PIECE_BYTES, weight.size_bytes - done), np.uint8)
            weight.file.read_into(weight.offset_bytes + done, piece)
            yield piece
        return
    assert isinstance(weight, _RawRows)
    for start, stop in row_chunks(weight, PIECE_BYTES):
        yield weight.read_raw(start, stop)


def _describe_name(model: Model) -> dict[str, Any]:
    name = model.metadata.get("general.name") or model.metadata.get("name")
    if not isinstance(name, str):
        path = model.path.resolve()
        name = path.name if path.is_dir() else path.stem
    return {"name": name}


def _describe_scaling(rope: Rope) -> dict[str, Any] | None:
    """Long-context scaling as Hugging Face's `rope_scaling`; None where there is none."""
    if rope.scaling.kind == "default":
        return None
    fields = asdict(rope.scaling)
    return _without_none({"rope_type": fields.pop("kind"), **fields})


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class _ArrayWeight:
    """A vector in memory, as a weight."""

    name: str
    values: Float32
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        return self.values[start:stop]

    def read_raw(self, start: int, stop: int) -> Bytes:
        return self.values[start:stop].view(np.uint8)

    def step_squares(self, start: int, stop: int) -> tuple[Float32, int]:
        values = self.values[start:stop]
        return step_squares("F32", values.view(np.uint8), values.size, row_length=1)
