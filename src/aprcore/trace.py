"""Directories of stage tensors: APRT files, and the sidecar that says what they are.

Source: FORMATS.md, "APRT stage tensor file". Files are read whole with plain reads, never mapped: a
mapped file that shrinks under the reader kills the process.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aprcore.errors import FormatError, TraceError, TruncatedError
from aprcore.stages import StageKey, computation_order, parse_path

Float32 = NDArray[np.float32]

MAGIC = b"APRT"
WHOLE_MODEL = 0xFFFFFFFF
HEADER = struct.Struct("<4sII")
SIDECAR_NAME = "_trace.json"
PROVENANCE_NAME = "_PROVENANCE.txt"
SIDECAR_SCHEMA = "aprtui-trace-v1"


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What a directory of stage tensors says of itself. None: not recorded.

    Attributes:
        tokens: Token ids of the pass.
        prompt: The text they came from.
        positions: Their positions.
        model: `file`, `sha256`, `size_bytes` and `architecture` of the model.
        backend, device, driver: What computed the tensors.
        arithmetic: Precision of the arithmetic: "f32", "f16", "bf16", "f64".
        dtype: Type of the activations: "float32", "float16", "bfloat16".
        attention: The attention implementation.
        versions: Versions of the software involved.
        created_utc: ISO 8601 time.
        stages: Shape and dtype of every tensor, by its path.
    """

    tokens: tuple[int, ...] | None = None
    prompt: str | None = None
    positions: tuple[int, ...] | None = None
    model: Mapping[str, Any] | None = None
    backend: str | None = None
    device: str | None = None
    driver: str | None = None
    arithmetic: str | None = None
    dtype: str | None = None
    attention: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    created_utc: str | None = None
    stages: Mapping[str, Mapping[str, Any]] | None = None

    def to_json(self) -> str:
        """The text of `_trace.json`."""
        return json.dumps({"schema": SIDECAR_SCHEMA, **asdict(self)}, indent=1, allow_nan=False)


def read_stage_file(path: Path, key: StageKey | None = None) -> tuple[int | None, Float32]:
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
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for a writer
            raise TraceError("is not a regular file", where=path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(HEADER.size)
            layer, count = _parse_header(header, size, path)
            values = np.empty(count, dtype="<f4")
            got = file.readinto(values.data.cast("B")) if count else 0
    except OSError as error:
        raise TraceError(f"cannot be read ({error.strerror})", where=path) from error
    if got != 4 * count:
        raise TruncatedError(
            f"ends {4 * count - got} bytes early", where=path, hint="was it still being written?"
        )
    if key is not None and layer != key.layer:
        said, found = ("the whole model" if x is None else f"layer {x}" for x in (layer, key.layer))
        raise FormatError(
            f"its header says {said}, its place in the directory says {found}",
            where=path,
            hint="dump it again, or move it to where it belongs",
        )
    return layer, values


def _parse_header(header: bytes, size: int, path: Path) -> tuple[int | None, int]:
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
        return self._files[key][0]

    def read(self, key: StageKey) -> Float32:
        """The values of one tensor, flat.

        Raises:
            FormatError: As `read_stage_file`.
        """
        file = self.file(key)
        # A reader also accepts the embedding at the top level, where its header may say either.
        at_top = key.stage == "embedding" and file.parent == self.path
        return read_stage_file(file, None if at_top else key)[1]

    @property
    def num_layers(self) -> int:
        """One more than the highest layer present."""
        return 1 + max((key.layer for key in self._files if key.layer is not None), default=-1)


def _list_stage_files(root: Path) -> tuple[dict[StageKey, tuple[Path, int]], tuple[str, ...]]:
    files: dict[StageKey, tuple[Path, int]] = {}
    ignored = []
    try:
        for entry in _scan(root):
            relative = Path(entry.path).relative_to(root).with_suffix("").as_posix()
            key = parse_path(relative)
            if key is None:
                ignored.append(relative)
            elif key not in files or relative == key.path:  # its own place beats other spellings
                files[key] = (Path(entry.path), entry.stat().st_size)
    except OSError as error:
        raise TraceError(f"cannot be read ({error.strerror})", where=error.filename) from error
    return files, tuple(sorted(ignored))


def _scan(root: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.is_dir() and entry.name.startswith("layer-"):
                with os.scandir(entry.path) as inner:
                    yield from (e for e in sorted(inner, key=lambda e: e.name) if _is_stage(e))
            elif _is_stage(entry):
                yield entry


def _is_stage(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(".bin") and entry.is_file()


def read_sidecar(root: Path) -> Sidecar:
    """The sidecar of a directory; empty if it has none.

    Raises:
        FormatError: `_trace.json` is there but is not what it should be.
    """
    path = root / SIDECAR_NAME
    try:
        if path.exists():
            return _parse_sidecar(path, path.read_text("utf-8"))
        path = root / PROVENANCE_NAME
        if path.exists():
            return _parse_provenance(path.read_text("utf-8", errors="replace"))
    except OSError as error:
        raise TraceError(f"cannot be read ({error.strerror})", where=path) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or an endless number
        raise FormatError("is not valid JSON", where=path, hint="capture it again") from error
    return Sidecar()


def _parse_sidecar(path: Path, text: str) -> Sidecar:
    data = json.loads(text)
    if not isinstance(data, dict):
        raise FormatError("is not a JSON object", where=path, hint="capture it again")
    schema = data.get("schema")
    if not isinstance(schema, str) or not schema.startswith("aprtui-trace-v"):
        raise FormatError(f"has schema {schema!r}, not {SIDECAR_SCHEMA!r}", where=path)

    def text_or_none(name: str) -> str | None:
        value = data.get(name)
        return value if isinstance(value, str) else None

    def object_or_none(name: str) -> Mapping[str, Any] | None:
        value = data.get(name)
        return value if isinstance(value, dict) else None

    return Sidecar(
        tokens=_integers(data.get("tokens"), "tokens", path),
        prompt=text_or_none("prompt"),
        positions=_integers(data.get("positions"), "positions", path),
        model=object_or_none("model"),
        backend=text_or_none("backend"),
        device=text_or_none("device"),
        driver=text_or_none("driver"),
        arithmetic=text_or_none("arithmetic"),
        dtype=text_or_none("dtype"),
        attention=text_or_none("attention"),
        versions={str(k): str(v) for k, v in (object_or_none("versions") or {}).items()},
        created_utc=text_or_none("created_utc"),
        stages=object_or_none("stages"),
    )


def _integers(value: Any, name: str, path: Path) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise FormatError(f"{name!r} is not a list of non-negative integers", where=path)
    return tuple(value)


def _parse_provenance(text: str) -> Sidecar:
    """The other project's `key: value` lines; what cannot be understood is left out."""
    values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    values = {key.strip().lower(): value.strip() for key, value in values.items()}
    listed = values.get("tokens", "")
    tokens = None
    if re.fullmatch(r"\[\s*\d{1,18}(\s*,\s*\d{1,18})*\s*,?\s*\]", listed):
        tokens = tuple(int(number) for number in re.findall(r"\d+", listed))
    prompt = values.get("prompt")
    if prompt is not None and len(prompt) > 1 and prompt[0] == prompt[-1] and prompt[0] in "\"'":
        prompt = prompt[1:-1]
    return Sidecar(tokens=tokens, prompt=prompt, dtype=values.get("dtype"))


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
            hint="free some space or choose another directory",
        )
