"""One stage tensor in a file of its own: APRT.

The bytes are in docs/formats.md, "APRT stage file". Files are read whole with plain reads, never
mapped: a mapped file that shrinks under the reader kills the process.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.errors import FormatError, TraceError, TruncatedError
from aprcore.network.stages import StageKey

Float32 = NDArray[np.float32]
Result = TypeVar("Result")

MAGIC = b"APRT"
SUFFIX = ".bin"
WHOLE_MODEL = 0xFFFFFFFF
HEADER = struct.Struct("<4sII")


def read_stage_file(path: Path | str, key: StageKey | None = None) -> tuple[int | None, Float32]:
    """The layer and the values of one `.bin` file.

    Args:
        path: The file.
        key: What its place in a directory says it is, to hold against the header.

    Returns:
        The layer (None for a whole-model stage) and the values, flat, bit for bit.

    Raises:
        TruncatedError: The file is shorter than its header promises.
        FormatError: The file is not an APRT file, is longer than it should be, or belongs to
            another layer.
        TraceError: It cannot be read at all.
    """
    return use_file(path, partial(_read, path, key))


def _read(
    path: Path | str, key: StageKey | None, descriptor: int, size: int
) -> tuple[int | None, Float32]:
    layer, count = _parse_header(os.read(descriptor, HEADER.size), size, path, key)
    values = np.empty(count, dtype="<f4")
    memory = values.view(np.uint8).data
    got = 0
    while got < 4 * count and (more := os.readv(descriptor, [memory[got:]])):
        got += more  # one call reads 2 GiB at most
    if got != 4 * count:
        raise TruncatedError(
            f"ends {4 * count - got} bytes early", where=path, hint="was it still being written?"
        )
    return layer, values


def read_stage_part(path: Path | str, key: StageKey | None, start: int, stop: int) -> Float32:
    """Values `start` to `stop` of one `.bin` file, flat.

    Raises:
        FormatError, TraceError: As `read_stage_file`.
    """
    return use_file(path, partial(_read_part, path, key, start, stop))


def _read_part(
    path: Path | str, key: StageKey | None, start: int, stop: int, descriptor: int, size: int
) -> Float32:
    _parse_header(os.read(descriptor, HEADER.size), size, path, key)
    data = os.pread(descriptor, 4 * (stop - start), HEADER.size + 4 * start)
    if len(data) != 4 * (stop - start):
        raise TruncatedError("became shorter while it was read", where=path,
                             hint="was it still being written?")  # fmt: skip
    return np.frombuffer(data, dtype="<f4").copy()


def use_file(path: Path | str, function: Callable[[int, int], Result]) -> Result:
    """What `function` makes of the descriptor of a regular file, and its size.

    Plain system calls: a directory holds thousands of files, and making a file object takes about
    as long as reading one.
    """
    try:
        # Without O_NONBLOCK a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise TraceError("is not a regular file", where=path)
            return function(descriptor, status.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise TraceError(f"cannot be read ({error.strerror})", where=path) from error


def check_header(path: Path | str, key: StageKey | None, descriptor: int, size: int) -> None:
    """Hold the header of an open file against its size and its place; for `use_file`.

    Raises:
        FormatError: As `read_stage_file`.
    """
    _parse_header(os.read(descriptor, HEADER.size), size, path, key)


def _parse_header(
    header: bytes, size: int, path: Path | str, key: StageKey | None
) -> tuple[int | None, int]:
    """The layer and the number of values that follow; `key` is what the file's place says."""
    layer, count = _parse_size(header, size, path)
    if key is not None and layer != key.layer:
        said, found = ("the whole model" if x is None else f"layer {x}" for x in (layer, key.layer))
        raise FormatError(
            f"its header says {said}, its place in the directory says {found}",
            where=path,
            hint="dump it again, or move it to where it belongs",
        )
    return layer, count


def _parse_size(header: bytes, size: int, path: Path | str) -> tuple[int | None, int]:
    if len(header) < HEADER.size:
        raise TruncatedError(
            f"is {size} bytes long, shorter than a stage file's header of {HEADER.size}", where=path
        )
    magic, layer, count = HEADER.unpack(header)
    if magic != MAGIC:
        raise FormatError(
            f"is not a stage file: it begins with {magic!r}, not {MAGIC!r}", where=path
        )
    expected = HEADER.size + 4 * count
    if size != expected:
        error = TruncatedError if size < expected else FormatError
        raise error(
            f"its header promises {count} values ({expected} bytes) but it is {size} bytes long",
            where=path,
            hint="dump it again",
        )
    return (None if layer == WHOLE_MODEL else layer), count


def write_stage_file(path: Path, layer: int | None, values: NDArray[Any]) -> None:
    """Write one APRT file. Not atomic: `TraceWriter` moves whole directories into place."""
    flat = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
    number = WHOLE_MODEL if layer is None else layer
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, number, flat.size))
        file.write(flat.data.cast("B"))
