"""Files of named tensors that other engines dump: .safetensors, .npz and .pt.

Headers are read on opening, values when they are asked for. Nothing in a file is ever run: of what
is pickled, tensors in dicts and lists are understood, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.plan import parse_tokens
from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.torch_file import MOST_OBJECTS, TorchTensor, open_torch_file
from aprcore.formats.huggingface import METADATA_NAME, read_entry, read_safetensors_header
from aprcore.formats.storage import StoredTensor
from aprcore.ground.archive import EXPANSION_LIMIT, HARMLESS_BYTES, Archive
from aprcore.ground.data_file import DataFile
from aprcore.ground.errors import AprError, FormatError, UnsupportedError
from aprcore.ground.npy import NpyArray
from aprcore.ground.precision import BFLOAT16

Float32 = NDArray[np.float32]

# Members of these names say what was run, and are no stage.
TOKEN_NAMES = ("tokens", "input_ids", "token_ids")
TEXT_NAMES = ("prompt", "dtype", "arithmetic", "backend")

# Ids of tokens: more than any context that is dumped.
TOKENS_LIMIT = 1 << 22

# How deeply dicts and lists may lie in each other, and how long the joined names may become.
DEEPEST, LONGEST_NAME = 64, 512

# What a type is called in sidecars. Values are held as float32, so float64 counts as that.
DTYPE_NAMES = {
    "F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "float64": "float32", "float32": "float32", "float16": "float16", "bfloat16": "bfloat16",
    "f64": "float32", "f32": "float32", "f16": "float16", "bf16": "bfloat16",
    "torch.float64": "float32", "torch.float32": "float32", "torch.float16": "float16",
    "torch.bfloat16": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredArray:
    """A floating-point tensor in a file.

    Attributes:
        shape: Its sizes without a batch axis of one.
        dtype: The stored type: "float32", "float16" or "bfloat16".
        load: Reads rows start to stop of the first axis, as float32.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[int, int], Float32]

    def read(self) -> Float32:
        """All of it, in its shape."""
        rows = self.shape[0] if self.shape else 1
        return self.load(0, rows).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class StoredIntegers:
    """An array of integers in a file: ids, positions, masks.

    Attributes:
        shape: Its sizes.
        read: All of it.
    """

    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """What one file, or a folder of files, holds.

    Attributes:
        arrays: Its floating-point tensors by name.
        integers: Its arrays of integers by name.
        sidecar: What it says of itself: tokens, prompt, dtype, arithmetic, backend.
        ignored: Names of what is no floating-point tensor.
    """

    arrays: Mapping[str, StoredArray]
    integers: Mapping[str, StoredIntegers]
    sidecar: Sidecar
    ignored: tuple[str, ...]


def drop_batch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without leading axes of one; two axes are taken for tokens and a width."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape


def make_sidecar(texts: Mapping[str, Any], where: Path) -> Sidecar:
    """What the texts in a file say of it.

    Args:
        texts: Strings by name, those of `TEXT_NAMES` and "tokens".
        where: The file, for errors.

    Raises:
        FormatError: The token ids are no such thing.
    """
    ids: tuple[int, ...] | None = None
    text = next((texts[name] for name in TOKEN_NAMES if name in texts), None)
    if isinstance(text, str):
        try:
            ids = parse_tokens(text)
        except AprError as error:
            raise FormatError(f"its token ids cannot be read: {error.what}", where=where) from error
    found = {name: texts[name] for name in TEXT_NAMES if isinstance(texts.get(name), str)}
    dtype = DTYPE_NAMES.get(found.pop("dtype", ""))
    return Sidecar(tokens=ids, dtype=dtype, **found)


def read_safetensors_dump(path: Path) -> TensorFile:
    """A .safetensors file; its metadata may say `tokens`, `prompt`, `dtype` and `arithmetic`.

    Raises:
        FormatError: The file is malformed.
    """
    file, data_bytes, header = read_safetensors_header(path)
    texts = header.pop(METADATA_NAME, None)
    arrays: dict[str, StoredArray] = {}
    integers: dict[str, StoredIntegers] = {}
    ignored = []
    for name, entry in header.items():
        try:
            stored = read_entry(file, data_bytes, name, entry)
        except UnsupportedError:  # masks and indices have types that no weight has
            ignored.append(name)
            continue
        if stored.dtype in _INTEGER_TYPES and math.prod(stored.shape) <= TOKENS_LIMIT:
            integers[name] = StoredIntegers(stored.shape, partial(_read_integers, stored))
        elif name in TOKEN_NAMES:
            raise FormatError(f"tensor {name!r} ({stored.dtype}) holds no token ids",
                              where=path, hint="store them as int64")  # fmt: skip
        elif stored.dtype not in DTYPE_NAMES:
            ignored.append(name)
        else:
            shape = drop_batch(stored.shape)
            load = replace(stored, shape=shape).read
            arrays[name] = StoredArray(shape, DTYPE_NAMES[stored.dtype], load)
    sidecar = make_sidecar(texts if isinstance(texts, dict) else {}, path)
    return TensorFile(arrays, integers, sidecar, tuple(ignored))


_INTEGER_TYPES = {"I64": "<i8", "I32": "<i4"}


def _read_integers(stored: StoredTensor) -> NDArray[Any]:
    values = np.empty(math.prod(stored.shape), _INTEGER_TYPES[stored.dtype])
    stored.file.read_into(stored.offset_bytes, values)
    return values.reshape(stored.shape)


def read_npz_dump(path: Path) -> TensorFile:
    """An .npz file; members `tokens` (integers) and `prompt` (text) say what was run.

    Two-byte values of no type are bfloat16: that is what numpy makes of them.

    Raises:
        FormatError: The file is malformed, or expands beyond reason.
    """
    archive = Archive(path, "is no readable .npz file", "dump it again")
    arrays: dict[str, StoredArray] = {}
    integers: dict[str, StoredIntegers] = {}
    ignored = []
    texts: dict[str, Any] = {}
    for member in archive.members:
        if not member.endswith(".npy"):
            continue
        name = member.removesuffix(".npy")
        array = NpyArray.in_archive(archive, member)
        is_text = array is not None and array.dtype.kind in "US" and array.shape == ()
        stored = None if array is None else store_npy(array)
        if array is not None and is_text and name in (*TOKEN_NAMES, *TEXT_NAMES):
            texts[name] = array.read_text()
        elif isinstance(stored, StoredArray):
            arrays[name] = stored
        elif isinstance(stored, StoredIntegers):
            integers[name] = stored
        else:
            ignored.append(name)
    return TensorFile(arrays, integers, make_sidecar(texts, path), tuple(ignored))


def _float_name(dtype: np.dtype[Any]) -> str | None:
    if dtype.kind == "f":
        return DTYPE_NAMES.get(dtype.newbyteorder("=").name)
    return "bfloat16" if dtype.kind == "V" and dtype.itemsize == 2 and not dtype.names else None


def _as_float32(array: NDArray[Any]) -> Float32:
    """Rows of values, without a batch axis of one."""
    if array.dtype.kind == "V":
        array = array.view(BFLOAT16.dtype)
    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite
        array = np.ascontiguousarray(array, dtype=np.float32)
    return array.reshape(drop_batch(array.shape) or (1,))


def read_npy_dump(path: Path) -> TensorFile:
    """A .npy file: one array, without a name.

    Raises:
        FormatError: The file is malformed.
    """
    array = NpyArray.in_file(path)
    stored = None if array is None else store_npy(array)
    if isinstance(stored, StoredIntegers):
        return TensorFile({}, {"": stored}, Sidecar(), ())
    if stored is None:
        return TensorFile({}, {}, Sidecar(), ("",))
    return TensorFile({"": stored}, {}, Sidecar(), ())


def store_npy(array: NpyArray) -> StoredArray | StoredIntegers | None:
    """An array of a file as floating-point values or as integers; None of another type."""
    if array.dtype.kind in "iu" and array.count <= TOKENS_LIMIT:
        return StoredIntegers(array.shape, array.read)
    kind = _float_name(array.dtype)
    if kind is None:
        return None
    return StoredArray(
        drop_batch(array.shape), kind, lambda start, stop: _as_float32(array.read())[start:stop]
    )


def read_torch_dump(path: Path) -> TensorFile:
    """A .pt file: a dict or list of tensors, nested as it likes; names are joined with dots.

    Raises:
        FormatError: The file holds anything but tensors and plain values, or is damaged.
    """
    if _is_old_torch_file(path):
        raise UnsupportedError(
            "was written by torch before 1.6, or without its zip format", where=path,
            hint="torch.load it, and torch.save it again",
        )  # fmt: skip
    archive, held = open_torch_file(path)
    arrays: dict[str, StoredArray] = {}
    integers: dict[str, StoredIntegers] = {}
    ignored = []
    texts: dict[str, Any] = {}
    listed: list[int] = []
    size_bytes = 0
    for name, value in _flatten(held, path):
        stored = _store_torch(archive, value) if isinstance(value, TorchTensor) else None
        if isinstance(stored, StoredIntegers):
            integers[name] = stored
        elif name in TOKEN_NAMES and not isinstance(value, str | int | float | None):
            raise FormatError(f"{name!r} holds no token ids", where=path,
                              hint="save them as a dense tensor of int64")  # fmt: skip
        elif name in (*TOKEN_NAMES, *TEXT_NAMES) and isinstance(value, str):
            texts[name] = value
        elif isinstance(stored, StoredArray):
            arrays[name] = stored
            size_bytes += 4 * math.prod(stored.shape)
            if size_bytes > max(HARMLESS_BYTES, EXPANSION_LIMIT * archive.size_bytes):
                raise FormatError(
                    f"{name!r} repeats {value.storage_bytes} stored bytes as"
                    f" {list(value.shape)}", where=path, hint="save contiguous copies",
                )  # fmt: skip
        elif type(value) is int and name.rpartition(".")[0] in TOKEN_NAMES:
            listed.append(value)
        elif value is not None:  # the bias that a module of vLLM has not
            ignored.append(name)
    if listed:
        ids = np.asarray(listed)
        integers.setdefault(TOKEN_NAMES[0], StoredIntegers(ids.shape, lambda: ids))
    return TensorFile(arrays, integers, make_sidecar(texts, path), tuple(ignored))


def _is_old_torch_file(path: Path) -> bool:
    """Whether a file is a bare pickle or a tar archive, as torch wrote before its zip format."""
    with DataFile(path) as file:
        start = file.read_bytes(0, min(262, file.size_bytes))
    return start[:1] == b"\x80" or start[257:] == b"ustar"


def _flatten(held: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """What dicts and lists hold, under their keys joined with dots.

    Raises:
        FormatError: There is no end to it: one that lies in itself, or in many others.
    """
    seen = 0
    # An iterator for each dict and list that is open: names of what is in them are made one by one.
    opened: list[tuple[str, Iterator[tuple[Any, Any]]]] = [("", iter([("", held)]))]
    while opened:
        within, items = opened[-1]
        for key, value in items:
            seen += 1
            name = f"{within}.{key}" if within else str(key)
            if seen > MOST_OBJECTS or len(opened) > DEEPEST or len(name) > LONGEST_NAME:
                raise FormatError("its dicts and lists have no end", where=path,
                                  hint="save a plain dict of tensors")  # fmt: skip
            if isinstance(value, Mapping):
                opened.append((name, iter(value.items())))
                break
            if isinstance(value, list | tuple):
                opened.append((name, iter(enumerate(value))))
                break
            yield name, value
        else:
            opened.pop()


def _store_torch(archive: Archive, tensor: TorchTensor) -> StoredArray | StoredIntegers | None:
    """A tensor as floating-point values or as integers; None of another type."""
    if tensor.dtype in ("int64", "int32") and math.prod(tensor.shape) <= TOKENS_LIMIT:
        return StoredIntegers(tensor.shape, lambda: _read_rows(archive, tensor, tensor.shape))
    if tensor.dtype not in DTYPE_NAMES:
        return None
    shape = drop_batch(tensor.shape)

    def load(start: int, stop: int) -> Float32:
        return _as_float32(_read_rows(archive, tensor, shape, start, stop))

    return StoredArray(shape, DTYPE_NAMES[tensor.dtype], load)


def _read_rows(
    archive: Archive, tensor: TorchTensor, shape: tuple[int, ...], start: int = 0,
    stop: int | None = None,
) -> NDArray[Any]:  # fmt: skip
    """Rows of a tensor, `shape` being its own without leading axes of one."""
    strides = tensor.strides[len(tensor.strides) - len(shape) :] if shape else ()
    rows = replace(tensor, shape=shape or (1,), strides=strides or (1,))
    found = rows.read(archive, start, rows.shape[0] if stop is None else stop)
    return found if shape else found.reshape(())
