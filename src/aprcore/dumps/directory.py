"""Directories of stage files, and the sidecar that says what they are."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.sidecar import read_sidecar
from aprcore.dumps.stage_file import (
    HEADER,
    SUFFIX,
    check_header,
    read_stage_file,
    read_stage_part,
    use_file,
)
from aprcore.ground.errors import TraceError
from aprcore.ground.whole_directory import check_finished
from aprcore.network.backend import KeyValueCache
from aprcore.network.config import ModelConfig
from aprcore.network.graph import computation_order, known_stages, parse_path
from aprcore.network.stages import Scope, StageKey

Float32 = NDArray[np.float32]


class TraceDirectory:
    """The stage tensors under one directory, read one at a time.

    Attributes:
        path: The directory.
        sidecar: What it says of itself; all None when it has neither kind of sidecar.
        counts: Number of values of every tensor by key, in the order of computation.
        ignored: Names of `.bin` files that are no stage.
        unlisted: Stages with a file that the sidecar does not list: of an earlier run, not read.
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
        check_finished(self.path)
        self.sidecar = read_sidecar(self.path)
        found, self.ignored = _list_stage_files(self.path)
        self.unlisted: tuple[StageKey, ...] = ()
        if self.sidecar.stages is not None:
            # Files of an earlier run may lie beside those of the last one.
            listed = {parse_path(name) for name in self.sidecar.stages}
            self.unlisted = tuple(sorted(found.keys() - listed, key=computation_order))
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
        shape = self._stated_shape(key)
        return shape if shape is not None and math.prod(shape) == self.counts[key] else None

    def _stated_shape(self, key: StageKey) -> tuple[int, ...] | None:
        entry = (self.sidecar.stages or {}).get(key.path)
        shape = entry.get("shape") if isinstance(entry, Mapping) else None
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            return None
        return tuple(shape)

    def file(self, key: StageKey) -> Path:
        """The file of a tensor."""
        return Path(self._files[key][0])

    def past(self, config: ModelConfig) -> KeyValueCache | None:
        """What lies before a decoding step, of which stage files show nothing."""
        first = (self.sidecar.positions or (0,))[0]
        return KeyValueCache(first) if first else None

    def is_exact(self, key: StageKey) -> bool:
        """True: what is stored is what the engine went on with, but for its type."""
        return True

    def read(self, key: StageKey) -> Float32:
        """The values of one tensor, flat.

        Raises:
            FormatError: As `read_stage_file`.
        """
        return read_stage_file(self._files[key][0], self._place(key))[1]

    def read_part(self, key: StageKey, start: int, stop: int) -> Float32:
        """Some of the values of one tensor, flat.

        Raises:
            FormatError: As `read_stage_file`.
        """
        return read_stage_part(self._files[key][0], self._place(key), start, stop)

    def check_headers(self) -> None:
        """Look at the header of every file, so that a damaged one is found before a run begins.

        Raises:
            FormatError: As `read_stage_file`.
            TraceError: A file has another size than the sidecar says: it is another run's.
        """
        for key, (path, _) in self._files.items():
            use_file(path, partial(check_header, path, self._place(key)))
            shape = self._stated_shape(key)
            if shape is not None and math.prod(shape) != self.counts[key]:
                raise TraceError(
                    f"has {self.counts[key]} values, and the sidecar says {list(shape)}: files of"
                    " two runs are mixed", where=path, hint="dump it again",
                )  # fmt: skip

    def _place(self, key: StageKey) -> StageKey | None:
        """What a file's header must say; the first layer's own at the top level may say either."""
        is_first = known_stages()[key.stage].scope is Scope.FIRST_LAYER
        at_top = is_first and self.file(key).parent == self.path
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
