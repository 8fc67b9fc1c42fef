"""Importing a model: a GGUF file or a Hugging Face directory -> one .apr file.

The tensors are those of the open model: canonical names, q and k rows in split-half order, q, k
and v apart. A tensor whose stored type the new file keeps is copied byte for byte (rows may move,
their bytes do not change); every other one is read as float32 and encoded, a few rows at a time.
What is quantised on the way is held against what it was made from, as `Rounding`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from aprcore.formats.apr_writer import AprWriter, TensorEntry
from aprcore.formats.storage import StoredTensor
from aprcore.ground.errors import AprError, TokenizerError, WeightError
from aprcore.models.import_types import KEEP_ALL, ImportTypes, RawRows, can_copy
from aprcore.models.model import Model, open_model
from aprcore.models.names import ROPE_DIVISORS
from aprcore.network.config import ModelConfig
from aprcore.network.rope import Rope
from aprcore.network.weights import Weight, row_chunks
from aprcore.quant.encode import Encoded, encode
from aprcore.quant.quantise import QUANTISED, Rounding, measure_rounding
from aprcore.quant.steps import step_squares
from aprcore.quant.types import Bytes, Float32, rows_have_bytes

# Pieces are written in one call each; larger than the readers' so that calls do not dominate.
PIECE_BYTES = 4 * 1024 * 1024

SPLIT_HALVES = 2  # `rope_type` of the metadata


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
        return self.weight.dtype == self.entry.dtype and can_copy(self.weight)


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """What an import writes.

    Attributes:
        metadata: The JSON object of the new file.
        tensors: What becomes of each tensor.
        notes: What could not be taken along, and why.
        roundings: What quantising cost, by type, once it is done.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...] = ()
    roundings: Mapping[str, Rounding] = field(default_factory=dict)

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
        for dtype, rounding in sorted(self.roundings.items()):
            lines.append(
                f"{dtype}: relative RMSE {rounding.relative_rmse:.3g}, error energy "
                f"{rounding.noise_ratio:.2f} of what its steps predict"
            )
        return tuple(lines)


def import_model(
    source: Path,
    target: Path,
    *,
    dtype: str = "keep",
    quantize: str | None = None,
    quantize_embeddings: bool = False,
    overwrite: bool = False,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> ImportPlan:
    """Write a model as one .apr file.

    The file appears under its name only when it is complete; after any error, Ctrl-C included,
    nothing is left behind.

    Args:
        source: A GGUF file, a Hugging Face directory or another .apr file.
        target: The new file.
        dtype, quantize, quantize_embeddings: As in `ImportTypes`.
        overwrite: Whether an existing file is replaced.
        progress: Called after every piece.

    Returns:
        What was done.

    Raises:
        AprError: The arguments, the source or the target cannot be used.
        WeightError: A value has no finite image in the type that was asked for.
    """
    types = ImportTypes(dtype, quantize, quantize_embeddings)
    with open_model(source) as model:
        _check_target(model, target, overwrite)
        plan = plan_import(model, types)
        roundings: dict[str, Rounding] = {}
        by_name = {tensor.entry.name: tensor for tensor in plan.tensors}
        entries = [tensor.entry for tensor in plan.tensors]
        with AprWriter(target, plan.metadata, entries) as writer:
            done_bytes, total_bytes = 0, plan.total_bytes
            for entry in writer.entries:
                for piece in encode_tensor(by_name[entry.name], source, roundings):
                    writer.write(entry.name, piece)
                    done_bytes += piece.nbytes
                    if progress is not None:
                        progress(ConvertProgress(entry.name, done_bytes, total_bytes))
    return replace(plan, roundings=roundings)


def plan_import(model: Model, types: ImportTypes = KEEP_ALL) -> ImportPlan:
    """Decide what a new file holds, without reading any weight.

    Raises:
        AprError: `types` are not known.
    """
    types.check()
    tensors = [_plan_tensor(weight, types) for weight in model.weights.values()]
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
        "sliding_window": config.window,
        "layer_types": _describe_windows(config),
        "is_causal": None if config.is_causal else False,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tied_head,
        **config.numbers,
    }
    return _without_none(fields)


def encode_tensor(
    plan: TensorPlan, source: str | os.PathLike[str], roundings: dict[str, Rounding]
) -> Iterator[Encoded]:
    """The bytes of a tensor in its new type, piece by piece.

    Args:
        plan: What becomes of the tensor.
        source: Names the model in errors.
        roundings: By type; what quantising the tensor costs is added.

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
        if bad:
            continue
        if dtype in QUANTISED:
            cost = measure_rounding(dtype, values, encoded)
            roundings[dtype] = roundings.get(dtype, Rounding()) + cost
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


def _plan_tensor(weight: Weight, types: ImportTypes) -> TensorPlan:
    dtype, reason = types.choose(weight)
    return TensorPlan(weight, TensorEntry(weight.name, dtype, weight.shape), reason)


def _copy_pieces(weight: Weight) -> Iterator[Encoded]:
    if not rows_have_bytes(weight.dtype, weight.shape):
        assert isinstance(weight, StoredTensor)
        for done in range(0, weight.size_bytes, PIECE_BYTES):
            piece = np.empty(min(PIECE_BYTES, weight.size_bytes - done), np.uint8)
            weight.file.read_into(weight.offset_bytes + done, piece)
            yield piece
        return
    assert isinstance(weight, RawRows)
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


def _describe_windows(config: ModelConfig) -> list[str] | None:
    """Hugging Face's `layer_types`; None where all layers are alike."""
    if len(set(config.windows)) == 1:
        return None
    pattern = (config.windows[n % len(config.windows)] for n in range(config.num_layers))
    return ["full_attention" if w is None else "sliding_attention" for w in pattern]


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
