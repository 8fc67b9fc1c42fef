"""Files of named tensors that other engines dump: .safetensors, .npz and .pt.

Headers are read on opening, values when they are asked for; only a .pt file, which has no header,
is read whole. Nothing in a file is ever run: no pickled objects but tensors in dicts and lists.
"""

from __future__ import annotations

import math
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.plan import parse_tokens
from aprcore.dumps.sidecar import Sidecar
from aprcore.formats.huggingface import METADATA_NAME, read_entry, read_safetensors_header
from aprcore.formats.storage import StoredTensor
from aprcore.ground.data_file import DataFile
from aprcore.ground.errors import AprError, FormatError, TraceError, UnsupportedError
from aprcore.ground.precision import BFLOAT16

Float32 = NDArray[np.float32]

# Members of these names say what was run, and are no stage.
TOKEN_NAMES = ("tokens", "input_ids", "token_ids")
TEXT_NAMES = ("prompt", "dtype", "arithmetic", "backend")

# Nothing that an engine computes is a hundred times smaller compressed; a file made to fill the
# memory is. Below the size nothing can be filled.
EXPANSION_LIMIT = 100
HARMLESS_BYTES = 256 * 1024 * 1024
# Ids of tokens: more than any context.
TOKENS_LIMIT = 1 << 24

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
class TensorFile:
    """What one file holds.

    Attributes:
        arrays: Its floating-point tensors by name.
        sidecar: What it says of itself: tokens, prompt, dtype, arithmetic, backend.
        ignored: Names of what is no floating-point tensor.
    """

    arrays: Mapping[str, StoredArray]
    sidecar: Sidecar
    ignored: tuple[str, ...]


def drop_batch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without a leading axis of one; two axes are taken for tokens and a width."""
    return shape[1:] if len(shape) > 2 and shape[0] == 1 else shape


def make_sidecar(texts: Mapping[str, Any], tokens: Any, where: Path) -> Sidecar:
    """What a file says of itself.

    Args:
        texts: Strings by name, those of `TEXT_NAMES` and "tokens".
        tokens: An array of ids, or None.
        where: The file, for errors.

    Raises:
        FormatError: The token ids are no such thing.
    """
    ids: tuple[int, ...] | None = None
    text = next((texts[name] for name in TOKEN_NAMES if name in texts), None)
    if tokens is not None:
        flat = np.asarray(tokens).reshape(-1)
        if flat.dtype.kind not in "iu" or flat.size == 0 or int(flat.min()) < 0:
            raise FormatError("its token ids are not non-negative integers", where=where)
        ids = tuple(int(token) for token in flat)
    elif isinstance(text, str):
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
    ignored, tokens = [], None
    for name, entry in header.items():
        try:
            stored = read_entry(file, data_bytes, name, entry)
        except UnsupportedError:  # masks and indices have types that no weight has
            ignored.append(name)
            continue
        if name in TOKEN_NAMES:
            tokens = _read_integers(stored)
        elif stored.dtype not in DTYPE_NAMES:
            ignored.append(name)
        else:
            shape = drop_batch(stored.shape)
            load = replace(stored, shape=shape).read
            arrays[name] = StoredArray(shape, DTYPE_NAMES[stored.dtype], load)
    sidecar = make_sidecar(texts if isinstance(texts, dict) else {}, tokens, path)
    return TensorFile(arrays, sidecar, tuple(ignored))


def _read_integers(stored: StoredTensor) -> NDArray[Any] | None:
    kind = {"I64": "<i8", "I32": "<i4"}.get(stored.dtype)
    count = math.prod(stored.shape)
    if kind is None or count > TOKENS_LIMIT:
        raise FormatError(f"tensor {stored.name!r} ({stored.dtype}) holds no token ids",
                          where=stored.file.path, hint="store them as int64")  # fmt: skip
    ids = np.empty(count, kind)
    stored.file.read_into(stored.offset_bytes, ids)
    return ids


def read_npz_dump(path: Path) -> TensorFile:
    """An .npz file; members `tokens` (integers) and `prompt` (text) say what was run.

    Two-byte values of no type are bfloat16: that is what numpy makes of them.

    Raises:
        FormatError: The file is malformed, or a member expands beyond reason.
    """
    DataFile(path).close()  # says what is wrong with the path in our words
    try:
        archive = zipfile.ZipFile(path)
        entries = [(info, _read_npy_header(archive, info)) for info in archive.infolist()
                   if info.filename.endswith(".npy")]  # fmt: skip
    except _NPZ_ERRORS as error:
        raise _npz_error(path, error) from error
    arrays, ignored = {}, []
    texts: dict[str, Any] = {}
    tokens = None
    for info, (shape, dtype) in entries:
        name = info.filename.removesuffix(".npy")
        _check_member(path, info, math.prod(shape) * dtype.itemsize)
        is_small = math.prod(shape) <= TOKENS_LIMIT
        if name in TOKEN_NAMES and dtype.kind in "iu" and is_small:
            tokens = _read_member(archive, path, info.filename)
        elif name in (*TOKEN_NAMES, *TEXT_NAMES) and dtype.kind in "US" and shape == ():
            text = _read_member(archive, path, info.filename).item()
            texts[name] = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        elif (kind := _float_name(dtype)) is not None:
            load = _member_loader(archive, path, info.filename)
            arrays[name] = StoredArray(drop_batch(shape), kind, load)
        else:
            ignored.append(name)
    return TensorFile(arrays, make_sidecar(texts, tokens, path), tuple(ignored))


_NPZ_ERRORS = (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError, RuntimeError)


def _npz_error(path: Path, error: Exception) -> FormatError:
    return FormatError(f"is no readable .npz file: {error}", where=path, hint="dump it again")


def _read_npy_header(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a member; its size must be what they take.

    Raises:
        ValueError: The header is malformed or the member has another size.
    """
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"{info.filename} is of version {version}")
        shape, _, dtype = readers[version](stream)
        expected = stream.tell() + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and info.file_size != expected:
        raise ValueError(f"{info.filename} has {info.file_size} bytes where {expected} are due")
    return tuple(int(size) for size in shape), dtype


def _check_member(path: Path, info: zipfile.ZipInfo, size_bytes: int) -> None:
    if size_bytes > HARMLESS_BYTES and size_bytes > EXPANSION_LIMIT * max(1, info.compress_size):
        raise FormatError(
            f"{info.filename} expands from {info.compress_size} to {size_bytes} bytes", where=path,
            hint="if that is meant, save it with numpy.savez, which does not compress",
        )  # fmt: skip


def _float_name(dtype: np.dtype[Any]) -> str | None:
    if dtype.kind == "f":
        return DTYPE_NAMES.get(dtype.newbyteorder("=").name)
    return "bfloat16" if dtype.kind == "V" and dtype.itemsize == 2 and not dtype.names else None


def _read_member(archive: zipfile.ZipFile, path: Path, member: str) -> NDArray[Any]:
    try:
        with archive.open(member) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except _NPZ_ERRORS as error:
        raise _npz_error(path, error) from error


def _member_loader(
    archive: zipfile.ZipFile, path: Path, member: str
) -> Callable[[int, int], Float32]:
    def load(start: int, stop: int) -> Float32:
        array = _read_member(archive, path, member)
        if array.dtype.kind == "V":
            array = array.view(BFLOAT16.dtype)
        with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite
            array = np.ascontiguousarray(array, dtype=np.float32)
        return array.reshape(drop_batch(array.shape) or (1,))[start:stop]

    return load


def read_torch_dump(path: Path) -> TensorFile:
    """A .pt file: a dict or list of tensors, nested as it likes; names are joined with dots.

    Raises:
        TraceError: torch is not installed.
        FormatError: The file holds anything but tensors and plain values, or is damaged.
    """
    DataFile(path).close()
    try:
        import torch
    except ImportError as error:
        raise TraceError(
            "needs torch to be read", where=path,
            hint="pip install 'aprtui[oracle]', or save it as .safetensors or .npz",
        ) from error  # fmt: skip
    try:
        with warnings.catch_warnings():  # about damage that is reported below
            warnings.simplefilter("ignore")
            held = torch.load(path, map_location="cpu", weights_only=True)
        items = list(_flatten(held, ""))
    except pickle.UnpicklingError as error:
        raise FormatError("holds more than tensors in dicts and lists", where=path,
                          hint="save a plain dict of tensors") from error  # fmt: skip
    except Exception as error:  # a damaged pickle fails in any way at all
        raise FormatError("is no readable .pt file", where=path, hint="dump it again") from error
    arrays, ignored = {}, []
    texts: dict[str, Any] = {}
    tokens = None
    for name, value in items:
        is_tensor = isinstance(value, torch.Tensor)
        if name in TOKEN_NAMES and is_tensor:
            tokens = value.numpy()
        elif name in (*TOKEN_NAMES, *TEXT_NAMES) and isinstance(value, str):
            texts[name] = value
        elif is_tensor and value.layout == torch.strided and str(value.dtype) in DTYPE_NAMES:
            arrays[name] = _torch_array(path, name, value)
        else:
            ignored.append(name)
    listed = [value for name, value in items if name.rpartition(".")[0] in TOKEN_NAMES]
    if tokens is None and listed and all(type(value) is int for value in listed):
        tokens = np.asarray(listed)
        ignored = [name for name in ignored if name.rpartition(".")[0] not in TOKEN_NAMES]
    return TensorFile(arrays, make_sidecar(texts, tokens, path), tuple(ignored))


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, item in items:
        yield from _flatten(item, f"{name}.{key}" if name else str(key))


def _torch_array(path: Path, name: str, tensor: Any) -> StoredArray:
    size_bytes = tensor.numel() * tensor.element_size()
    stored_bytes = tensor.untyped_storage().nbytes()
    if size_bytes > HARMLESS_BYTES and size_bytes > EXPANSION_LIMIT * max(1, stored_bytes):
        raise FormatError(f"{name!r} repeats {stored_bytes} stored bytes to {size_bytes}",
                          where=path, hint="save a contiguous copy")  # fmt: skip
    shape = drop_batch(tuple(tensor.shape))
    rows = tensor.detach().reshape(shape or (1,))

    def load(start: int, stop: int) -> Float32:
        values: Float32 = rows[start:stop].float().contiguous().numpy()
        return values

    return StoredArray(shape, DTYPE_NAMES[str(tensor.dtype)], load)
