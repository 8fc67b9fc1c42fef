"""A folder of named tensors: `tensors.safetensors` and, beside it, the sidecar that says what ran.

What captures of other engines are written to: their tensors keep the engine's names, types and
shapes, which `aprcore.dumps.names` reads. See docs/formats.md, "A dump in one file".
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.sidecar import SIDECAR_NAME, Sidecar
from aprcore.ground.errors import TraceError
from aprcore.ground.precision import BFLOAT16
from aprcore.ground.whole_directory import WholeDirectory

TENSORS_NAME = "tensors.safetensors"
_PIECES = "pieces"


@cache
def _type_names() -> dict[np.dtype[Any], str]:
    """What safetensors calls the types that captures hold."""
    return {
        np.dtype(np.float64): "F64", np.dtype(np.float32): "F32", np.dtype(np.float16): "F16",
        BFLOAT16.dtype: "BF16", np.dtype(np.int64): "I64", np.dtype(np.int32): "I32",
        np.dtype(np.int16): "I16", np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8",
        np.dtype(np.bool_): "BOOL",
    }  # fmt: skip


def is_tensor_folder(path: Path) -> bool:
    """Whether a path is a folder that a `TensorFolderWriter` wrote, or one like it."""
    return (path / TENSORS_NAME).is_file()


class Piece(NamedTuple):
    """A tensor, or a part of one, that a writer holds on the disk."""

    offset_bytes: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class TensorFolderWriter:
    """Writes a folder of named tensors, all of it or nothing.

    Tensors may come in pieces, in the order in which an engine computes them, and are held on the
    disk meanwhile. Leaving the `with` block without an error puts the file in place, and the
    sidecar last. On an error, or Ctrl-C, nothing remains.

    Attributes:
        directory: The folder.
        sidecar: What the folder says of itself; may be set until the block ends.
    """

    def __init__(self, directory: Path | str, sidecar: Sidecar | None = None) -> None:
        self.directory = Path(directory)
        self.sidecar = sidecar or Sidecar()
        self._tensors: dict[str, tuple[tuple[Piece, ...], int]] = {}
        self._whole = WholeDirectory(self.directory)
        self._spool: BinaryIO | None = None

    def __enter__(self) -> TensorFolderWriter:
        """Make the folder to write to.

        Raises:
            TraceError: It cannot be, or another process is writing to the target.
        """
        try:
            self._spool = (self._whole.begin() / _PIECES).open("w+b")
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise
        return self

    def __len__(self) -> int:
        """Number of tensors that are written so far."""
        return len(self._tensors)

    def hold(self, values: NDArray[Any]) -> Piece:
        """Put a piece on the disk, to be named in `write`; one that is never named is dropped.

        Raises:
            TraceError: The disk is full, or the type is none that safetensors has.
        """
        assert self._spool is not None, "use as a context manager"
        if values.dtype not in _type_names():
            raise TraceError(f"a tensor of type {values.dtype} cannot be written",
                             where=self.directory)  # fmt: skip
        try:
            offset = self._spool.seek(0, 2)
            self._spool.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise self._failure(error) from error
        return Piece(offset, values.shape, values.dtype)

    def write(self, name: str, pieces: Sequence[Piece], axis: int = 0) -> None:
        """Name a tensor, of one piece or of several that are joined on an axis."""
        assert name not in self._tensors, name
        assert len({piece.dtype for piece in pieces}) == 1, name
        self._tensors[name] = (tuple(pieces), axis)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        except OSError as failure:
            raise self._failure(failure) from failure
        finally:
            self.discard()

    def _commit(self) -> None:
        staging = self._whole.staging
        assert staging is not None and self._spool is not None
        sidecar = self.sidecar
        if sidecar.created_utc is None:
            sidecar = replace(sidecar, created_utc=datetime.now(UTC).isoformat(timespec="seconds"))
        with (staging / TENSORS_NAME).open("wb") as file:
            self._write_file(file)
        (staging / SIDECAR_NAME).write_text(sidecar.to_json(), "utf-8")
        self._spool.close()
        (staging / _PIECES).unlink()
        self._whole.commit()

    def _write_file(self, file: BinaryIO) -> None:
        """The header, with offsets relative to its end, then each tensor's values."""
        entries: dict[str, Any] = {}
        types = _type_names()
        end = 0
        for name, (pieces, axis) in self._tensors.items():
            shape, start = _joined_shape(pieces, axis), end
            end += math.prod(shape) * pieces[0].dtype.itemsize
            entries[name] = {
                "dtype": types[pieces[0].dtype], "shape": shape, "data_offsets": [start, end],
            }  # fmt: skip
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # the values begin at a multiple of eight
        file.write(len(header).to_bytes(8, "little") + header)
        for pieces, axis in self._tensors.values():
            values = [self.read(piece) for piece in pieces]
            joined = np.concatenate(values, axis=axis) if len(values) > 1 else values[0]
            file.write(np.ascontiguousarray(joined).reshape(-1).view(np.uint8).data)

    def read(self, piece: Piece) -> NDArray[Any]:
        """The values of a piece that is held."""
        assert self._spool is not None
        self._spool.seek(piece.offset_bytes)
        size = math.prod(piece.shape) * piece.dtype.itemsize
        return np.frombuffer(self._spool.read(size), piece.dtype).reshape(piece.shape)

    def discard(self) -> None:
        """Remove what has not come into place; for a process that is about to die."""
        if self._spool is not None:
            with suppress(OSError):  # what it still buffers is not wanted any more
                self._spool.close()
        self._whole.discard()

    def _failure(self, error: OSError) -> TraceError:
        return TraceError(
            f"cannot be written ({error.strerror})",
            where=self.directory,
            hint="free some space" if error.errno == errno.ENOSPC else "choose another directory",
        )


def _joined_shape(pieces: Sequence[Piece], axis: int) -> list[int]:
    shape = list(pieces[0].shape)
    if len(pieces) > 1:
        shape[axis] = sum(piece.shape[axis] for piece in pieces)
    return shape
