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
from functools import partial
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
        FormatError: The file is malformed, or a member expands beyond reason.
    """
    DataFile(path).close()  # says what is wrong with the path in our words
    try:
        archive = zipfile.ZipFile(path)
        entries = [(info, _read_npy_header(archive, info)) for info in archive.infolist()
                   if info.filename.endswith(".npy")]  # fmt: skip
    except _NPZ_ERRORS as error:
        raise _npz_error(path, error) from error
    arrays, integers, ignored = {}, {}, []
    texts: dict[str, Any] = {}
    for info, (shape, dtype) in entries:
        name = info.filename.removesuffix(".npy")
        _check_member(path, info, math.prod(shape) * dtype.itemsize)
        is_small = math.prod(shape) <= TOKENS_LIMIT
        if dtype.kind in "iu" and is_small:
            read = partial(_read_member, archive, path, info.filename)
            integers[name] = StoredIntegers(shape, read)
        elif name in (*TOKEN_NAMES, *TEXT_NAMES) and dtype.kind in "US" and shape == ():
            text = _read_member(archive, path, info.filename).item()
            texts[name] = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        elif (kind := _float_name(dtype)) is not None:
            load = _member_loader(archive, path, info.filename)
            arrays[name] = StoredArray(drop_batch(shape), kind, load)
        else:
            ignored.append(name)
    return TensorFile(arrays, integers, make_sidecar(texts, path), tuple(ignored))


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
        return _read_header(stream, info.file_size, info.filename)


def _read_header(
    stream: Any, size_bytes: int, name: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:  # fmt: skip
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"{name} is of version {version}")
    shape, _, dtype = readers[version](stream)
    expected = stream.tell() + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and size_bytes != expected:
        raise ValueError(f"{name} has {size_bytes} bytes where {expected} are due")
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
        return _as_float32(_read_member(archive, path, member))[start:stop]

    return load


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
    DataFile(path).close()
    try:
        with path.open("rb") as stream:
            shape, dtype = _read_header(stream, path.stat().st_size, path.name)
    except (*_NPZ_ERRORS, OSError) as error:
        raise FormatError(f"is no readable .npy file: {error}", where=path,
                          hint="dump it again") from error  # fmt: skip

    def read() -> NDArray[Any]:
        with path.open("rb") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    def load(start: int, stop: int) -> Float32:
        return _as_float32(read())[start:stop]

    nothing: dict[str, Any] = {}
    if dtype.kind in "iu" and math.prod(shape) <= TOKENS_LIMIT:
        return TensorFile(nothing, {"": StoredIntegers(shape, read)}, Sidecar(), ())
    kind = _float_name(dtype)
    if kind is None:
        return TensorFile(nothing, {}, Sidecar(), ("",))
    return TensorFile({"": StoredArray(drop_batch(shape), kind, load)}, {}, Sidecar(), ())


def store_array(array: NDArray[Any]) -> StoredArray | StoredIntegers | None:
    """An array that is at hand as one of a file; None of another type."""
    if array.dtype.kind in "iu" and array.size <= TOKENS_LIMIT:
        return StoredIntegers(array.shape, lambda: array)
    kind = _float_name(array.dtype)
    if kind is None:
        return None
    return StoredArray(drop_batch(array.shape), kind, lambda a, b: _as_float32(array)[a:b])


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
    arrays, integers, ignored = {}, {}, []
    texts: dict[str, Any] = {}
    for name, value in items:
        is_tensor = isinstance(value, torch.Tensor)
        is_integer = is_tensor and str(value.dtype) in ("torch.int64", "torch.int32")
        is_plain = is_tensor and value.layout == torch.strided and value.device.type == "cpu"
        if is_integer and is_plain and value.numel() <= TOKENS_LIMIT:
            integers[name] = StoredIntegers(tuple(value.shape), value.numpy)
        elif name in TOKEN_NAMES and is_tensor:
            raise FormatError("its token ids are not non-negative integers", where=path)
        elif name in (*TOKEN_NAMES, *TEXT_NAMES) and isinstance(value, str):
            texts[name] = value
        elif is_tensor and value.layout == torch.strided and str(value.dtype) in DTYPE_NAMES:
            arrays[name] = _torch_array(path, name, value)
        elif value is not None:  # the bias that a module of vLLM has not
            ignored.append(name)
    listed = [value for name, value in items if name.rpartition(".")[0] in TOKEN_NAMES]
    if listed and all(type(value) is int for value in listed):
        ids = np.asarray(listed)
        integers.setdefault(TOKEN_NAMES[0], StoredIntegers(ids.shape, lambda: ids))
        ignored = [name for name in ignored if name.rpartition(".")[0] not in TOKEN_NAMES]
    return TensorFile(arrays, integers, make_sidecar(texts, path), tuple(ignored))


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
