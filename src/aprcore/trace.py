"""Directories of stage tensors: APRT files, and the sidecar that says what they are.

Source: FORMATS.md, "APRT stage tensor file". Files are read whole with plain reads, never mapped: a
mapped file that shrinks under the reader kills the process.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from aprcore.errors import FormatError, TraceError, TruncatedError
from aprcore.sidecar import SIDECAR_NAME, Sidecar, read_sidecar
from aprcore.stages import StageKey, computation_order, parse_path

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
    return _use_file(path, partial(_read, path, key))


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


def _use_file(path: Path | str, function: Callable[[int, int], Result]) -> Result:
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


def _check_header(path: Path | str, key: StageKey | None, descriptor: int, size: int) -> None:
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


class StageSource(Protocol):
    """Stage tensors of one side, read one at a time."""

    @property
    def path(self) -> Path:
        """The directory or file."""
        ...

    @property
    def sidecar(self) -> Sidecar:
        """What it says of itself."""
        ...

    @property
    def counts(self) -> Mapping[StageKey, int]:
        """Number of values of every tensor, in the order of computation."""
        ...

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names in it that are no stage."""
        ...

    @property
    def num_layers(self) -> int:
        """One more than the highest layer present."""
        ...

    def __contains__(self, key: StageKey) -> bool: ...

    def keys(self) -> tuple[StageKey, ...]:
        """Every tensor, in the order of computation."""
        ...

    def shape(self, key: StageKey) -> tuple[int, ...] | None:
        """The recorded shape of a tensor, if it fits the number of values."""
        ...

    def read(self, key: StageKey) -> Float32:
        """The values of one tensor, flat."""
        ...


class TraceDirectory:
    """The stage tensors under one directory, read one at a time.

    Attributes:
        path: The directory.
        sidecar: What it says of itself; all None when it has neither kind of sidecar.
        counts: Number of values of every tensor by key, in the order of computation.
        ignored: Names of `.bin` files that are no stage of the table.
    """

    def __init__(self, path: Path | str) -> None:
        """List a directory; no tensor is read.

        Raises:
            TraceError: The directory is missing, unreadable or holds no stage file.
            FormatError: Its sidecar cannot be parsed.
        """
        self.path = Path(path)
        try:
            if not self.path.is_dir():
                fault = "is not a directory" if self.path.exists() else "does not exist"
                raise TraceError(
                    fault, where=path,
                    hint="give a directory of stage files, or one .safetensors, .npz or .pt file",
                )  # fmt: skip
        except OSError as error:  # a name too long, a folder that may not be entered
            raise TraceError(f"cannot be read ({error.strerror})", where=path) from error
        self.sidecar = read_sidecar(self.path)
        found, self.ignored = _list_stage_files(self.path)
        if self.sidecar.stages is not None:
            # Files of an earlier run may lie beside those of the last one.
            listed = {parse_path(name) for name in self.sidecar.stages}
            found = {key: file for key, file in found.items() if key in listed}
        if not found:
            raise TraceError(
                "holds no stage files (layer-<N>/<stage>.bin)",
                where=path,
                hint="make one with `aprtui oracle` or `aprtui trace`",
            )
        self._files = {key: found[key] for key in sorted(found, key=computation_order)}
        self.counts: Mapping[StageKey, int] = {
            key: max(0, size - HEADER.size) // 4 for key, (_, size) in self._files.items()
        }

    def __contains__(self, key: StageKey) -> bool:
        return key in self._files

    def keys(self) -> tuple[StageKey, ...]:
        """Every tensor, in the order of computation."""
        return tuple(self._files)

    def shape(self, key: StageKey) -> tuple[int, ...] | None:
        """The recorded shape of a tensor, if it fits the number of values."""
        entry = (self.sidecar.stages or {}).get(key.path)
        shape = entry.get("shape") if isinstance(entry, Mapping) else None
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            return None
        return tuple(shape) if math.prod(shape) == self.counts[key] else None

    def file(self, key: StageKey) -> Path:
        """The file of a tensor."""
        return Path(self._files[key][0])

    def read(self, key: StageKey) -> Float32:
        """The values of one tensor, flat.

        Raises:
            FormatError: As `read_stage_file`.
        """
        return read_stage_file(self._files[key][0], self._place(key))[1]

    def check_headers(self) -> None:
        """Look at the header of every file, so that a damaged one is found before a run begins.

        Raises:
            FormatError: As `read_stage_file`.
        """
        for key, (path, _) in self._files.items():
            _use_file(path, partial(_check_header, path, self._place(key)))

    def _place(self, key: StageKey) -> StageKey | None:
        """What a file's header must say; the embedding at the top level may say either."""
        at_top = key.stage == "embedding" and self.file(key).parent == self.path
        return None if at_top else key

    @property
    def num_layers(self) -> int:
        """One more than the highest layer present."""
        return 1 + max((key.layer for key in self._files if key.layer is not None), default=-1)


def _list_stage_files(root: Path) -> tuple[dict[StageKey, tuple[str, int]], tuple[str, ...]]:
    """Path and size of every stage file, and the names of those that are no stage.

    Paths are text: to make a `Path` of each takes longer than to open the file.
    """
    files: dict[StageKey, tuple[str, int]] = {}
    ignored = []
    try:
        for folder, entry in _scan(root):
            relative = folder + entry.name.removesuffix(SUFFIX)
            path = entry.path.removeprefix("./")
            key = parse_path(relative)
            if key is None:
                ignored.append(relative)
            elif key not in files or relative == key.path:  # its own place beats other spellings
                files[key] = (path, entry.stat().st_size)
    except OSError as error:
        raise TraceError(f"cannot be read ({error.strerror})", where=error.filename) from error
    return files, tuple(sorted(ignored))


def _scan(root: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Files that may be stages, each with the folder below the root: "" or "layer-3/"."""
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.is_dir() and entry.name.startswith("layer-"):
                with os.scandir(entry.path) as inner:
                    for file in sorted(inner, key=lambda e: e.name):
                        if _is_stage(file):
                            yield f"{entry.name}/", file
            elif _is_stage(entry):
                yield "", entry


def _is_stage(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(SUFFIX) and entry.is_file()


class TraceWriter:
    """Writes a directory of stage tensors, all of it or nothing.

    Tensors go to a temporary folder inside the target; leaving the `with` block without an error
    moves them into place and writes the sidecar last. On an error, or Ctrl-C, nothing remains.
    """

    def __init__(self, directory: Path | str, sidecar: Sidecar) -> None:
        self.directory = Path(directory)
        self._sidecar = sidecar
        self._written: dict[StageKey, dict[str, Any]] = {}
        self._staging: Path | None = None
        self._made: list[Path] = []
        self._moved: list[Path] = []

    def __enter__(self) -> TraceWriter:
        """Create the target if it is missing.

        Raises:
            TraceError: It cannot be written to.
        """
        try:
            missing = self.directory
            while not missing.exists():
                self._made.append(missing)
                missing = missing.parent
            self.directory.mkdir(parents=True, exist_ok=True)
            self._staging = Path(tempfile.mkdtemp(prefix=".aprtui-", dir=self.directory))
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise
        return self

    def write(self, key: StageKey, values: NDArray[Any]) -> None:
        """Add one tensor in canonical shape; it is stored as float32.

        Raises:
            TraceError: The disk is full or the folder cannot be written to.
        """
        assert self._staging is not None, "use as a context manager"
        path = self._staging / f"{key.path}.bin"
        try:
            path.parent.mkdir(exist_ok=True)
            write_stage_file(path, key.layer, values)
        except OSError as error:
            raise self._failure(error) from error
        self._written[key] = {"shape": list(values.shape), "dtype": "float32"}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
                self._made.clear()
                self._moved.clear()
        except OSError as failure:
            raise self._failure(failure) from failure
        finally:
            self._discard()

    def _commit(self) -> None:
        assert self._staging is not None
        stages = {
            key.path: self._written[key] for key in sorted(self._written, key=computation_order)
        }
        sidecar = replace(self._sidecar, stages=stages)
        if sidecar.created_utc is None:
            sidecar = replace(sidecar, created_utc=datetime.now(UTC).isoformat(timespec="seconds"))
        staged = self._staging / SIDECAR_NAME
        staged.write_text(sidecar.to_json(), "utf-8")
        # Without its sidecar a half-moved directory does not pass for a trace of the old run.
        (self.directory / SIDECAR_NAME).unlink(missing_ok=True)
        for key in self._written:
            target = self.directory / f"{key.path}.bin"
            if not target.parent.exists():
                self._made.insert(0, target.parent)
                target.parent.mkdir()
            self._moved.append(target)
            (self._staging / f"{key.path}.bin").replace(target)
        staged.replace(self.directory / SIDECAR_NAME)

    def _discard(self) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
        # A failure halfway through moving: no file of this run may remain among older ones.
        for file in self._moved:
            with suppress(OSError):
                file.unlink()
        for folder in self._made:  # innermost first; only those that this run created
            with suppress(OSError):
                folder.rmdir()

    def _failure(self, error: OSError) -> TraceError:
        return TraceError(
            f"cannot be written ({error.strerror})",
            where=self.directory,
            hint="free some space" if error.errno == errno.ENOSPC else "choose another directory",
        )
