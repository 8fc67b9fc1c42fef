"""A Hugging Face model directory: `config.json` and one or several `.safetensors` files.

Source: the safetensors format (8-byte header length, JSON header, data) and transformers'
sharding index.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from aprcore.formats.storage import StoredTensor
from aprcore.ground.data_file import Cursor, DataFile
from aprcore.ground.errors import FormatError
from aprcore.ground.fields import convert, parse_object, read_object

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
METADATA_NAME = "__metadata__"  # the entry of a safetensors header that is no tensor

HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library's own
MOST_AXES = 64  # numpy's own
JSON_LIMIT_BYTES = 64 * 1024 * 1024

Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Index(msgspec.Struct):
    """What is read of a sharded model's index: the file of each tensor."""

    weight_map: Annotated[dict[str, str], msgspec.Meta(min_length=1)]


class _HeaderEntry(msgspec.Struct):
    """A tensor's record in the header of a safetensors file."""

    dtype: str
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=MOST_AXES)]
    data_offsets: tuple[Size, Size]


@dataclass(frozen=True, slots=True)
class HuggingFaceFiles:
    """An open model directory.

    Attributes:
        path: The directory.
        config: The contents of `config.json`.
        tensors: Every stored tensor, by its stored name.
        files: The weight files, in the order of their names.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[DataFile, ...]

    @property
    def config_path(self) -> Path:
        """Where the configuration is."""
        return self.path / CONFIG_NAME


def read_huggingface(path: Path) -> HuggingFaceFiles:
    """Open a model directory and read its headers.

    Raises:
        FormatError: A file is missing or malformed, or two shards hold the same tensor.
    """
    config = read_object(path / CONFIG_NAME, limit_bytes=JSON_LIMIT_BYTES)
    # transformers looks for the single file first.
    if (path / WEIGHTS_NAME).exists():
        tensors = read_safetensors(path / WEIGHTS_NAME)
        return _collect(path, config, {WEIGHTS_NAME: tensors})
    if not (path / INDEX_NAME).exists():
        raise FormatError(
            f"has neither {WEIGHTS_NAME} nor {INDEX_NAME}", where=path,
            hint="save the model with safetensors; pickled .bin weights are not read",
        )  # fmt: skip
    locations = _read_index(path / INDEX_NAME)
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(locations.values())):
        if not (path / shard).exists():
            raise FormatError("this shard is missing", where=path / shard,
                              hint=f"{INDEX_NAME} lists it; download it")  # fmt: skip
        shards[shard] = read_safetensors(path / shard)
    for name, shard in locations.items():
        if name not in shards[shard]:
            raise FormatError(f"tensor {name!r} is not in it, though {INDEX_NAME} says so",
                              where=path / shard)  # fmt: skip
    return _collect(path, config, shards)


def _collect(
    path: Path, config: dict[str, Any], shards: dict[str, dict[str, StoredTensor]]
) -> HuggingFaceFiles:
    """All shards' tensors in one table. As transformers does, whether or not the index has them.

    Raises:
        FormatError: Two shards hold the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    files: dict[Path, DataFile] = {}
    for shard, held in shards.items():
        for name, tensor in held.items():
            if name in tensors:
                raise FormatError(
                    f"tensor {name!r} is also in {tensors[name].file.path.name}",
                    where=path / shard,
                )
            tensors[name] = tensor
            files[tensor.file.path] = tensor.file
    return HuggingFaceFiles(path, config, tensors, tuple(files.values()))


def _read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor.

    Raises:
        FormatError: The index is malformed, or names a file outside its directory.
    """
    data = read_object(path, limit_bytes=JSON_LIMIT_BYTES)
    locations = convert(data, _Index, path).weight_map
    for name, shard in locations.items():
        if not shard.endswith(".safetensors"):
            raise FormatError(f"weight_map gives {shard!r} for {name!r}, not a .safetensors file",
                              where=path)  # fmt: skip
        # An index is a download: it must not make us read files elsewhere.
        if "/" in shard or "\\" in shard or "\0" in shard:
            raise FormatError(f"weight_map gives {shard!r} for {name!r}, outside the directory",
                              where=path)  # fmt: skip
    return locations


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one `.safetensors` file, by name; only the header is read.

    Raises:
        FormatError: The header is malformed or a tensor's bytes do not fit its shape.
        TruncatedError: The file ends before the header or a tensor does.
    """
    file, data_bytes, header = read_safetensors_header(path)
    return {
        name: read_entry(file, data_bytes, name, entry)
        for name, entry in header.items()
        if name != METADATA_NAME
    }


def read_safetensors_header(path: Path) -> tuple[DataFile, int, dict[str, Any]]:
    """An open `.safetensors` file, where its data begin, and its header's entries as stored.

    Raises:
        FormatError: The header is malformed.
        TruncatedError: The file ends before the header does.
    """
    file = DataFile(path)
    cursor = Cursor(file, what="safetensors header")
    size_bytes = cursor.u64()
    if size_bytes > HEADER_LIMIT_BYTES:
        raise FormatError(
            f"the header claims {size_bytes} bytes, above the format's {HEADER_LIMIT_BYTES}",
            where=path, offset_bytes=0, hint="this is no safetensors file, or it is damaged",
        )  # fmt: skip
    header = parse_object(cursor.take(size_bytes), path, "the safetensors header", unique=True)
    return file, cursor.offset_bytes, header


def read_entry(file: DataFile, data_bytes: int, name: str, entry: Any) -> StoredTensor:
    """One tensor's record of the header.

    Raises:
        FormatError: It is malformed.
    """
    record = convert(entry, _HeaderEntry, file.path, prefix=f"tensor {name!r}: ")
    begin, end = record.data_offsets
    if begin > end:
        raise FormatError(f"tensor {name!r} has data_offsets {[begin, end]}", where=file.path)
    return StoredTensor(name, record.shape, record.dtype, file, data_bytes + begin, end - begin)
