"""A run in one file, .aprx: opens again without its model and oracle, on another machine.

A zip archive of `aprx.json` (what it is, and what made it), `report.msgpack` (the whole report) and
`tensors/`: both sides of the diverging stages as .npy, as far as they are small.

It is passed on, so it says nothing of the user's home directory: paths below it begin with "~".
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.archive import Archive
from aprcore.ground.errors import AprError, FormatError
from aprcore.ground.fields import parse_object
from aprcore.ground.npy import NpyArray
from aprcore.ground.whole_file import write_whole
from aprcore.judging.layouts import Layout
from aprcore.network.stages import StageKey
from aprcore.pictures.plane import MemoryPlane, Plane, TensorPair
from aprcore.records.checking import check_report
from aprcore.records.environment import (
    Environment,
    read_environment,
    with_home_in_command,
    without_home_in_command,
)
from aprcore.records.report import Report, RunEvent, StageReport
from aprcore.records.sharing import shareable
from aprcore.records.tensor_source import TensorSource

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = "aprtui-run-v1"
ABOUT, REPORT, TENSORS = "aprx.json", "report.msgpack", "tensors/"

# Both sides of this many values in all, of the first divergences; a report of 28 x 20 stages with
# their largest differences takes 1 to 2 MB beside them.
MOST_SAVED_VALUES = 16 * 1024 * 1024
# A report compresses to a third or a quarter. One that claims to unpack to more is not one of ours,
# unless it is small: a byte of it can make eight.
HARMLESS_REPORT_BYTES = 16 * 1024 * 1024
REPORT_EXPANSION_LIMIT = 6
MOST_ABOUT_BYTES = 1024 * 1024


def save_run(
    path: Path, report: Report, tensors: TensorSource | None = None, command: Sequence[str] = ()
) -> None:
    """Write a run; the file is there as a whole or not at all.

    Args:
        path: Where to; an existing file is replaced.
        report: The finished run.
        tensors: Where to get the tensors of diverging stages; None leaves them out. A saved run
            also says what made it, which is then said again.
        command: The command line that made the run.

    Raises:
        AprError: The file cannot be written.
    """
    import msgspec

    if isinstance(tensors, SavedRun):
        command, about = tensors.command, tensors.about
    else:
        about = {
            "schema": SCHEMA,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": asdict(read_environment()),
        }
    about = about | {"command": without_home_in_command(command)}
    with (
        write_whole(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive,
    ):
        archive.writestr(ABOUT, json.dumps(about, indent=1))
        archive.writestr(REPORT, msgspec.msgpack.encode(shareable(report), enc_hook=_encode_array))
        if tensors is not None:
            for name, values in _tensors_of(report, tensors):
                with archive.open(name, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)


def _tensors_of(report: Report, tensors: TensorSource) -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors to save, by their names in the archive."""
    left = MOST_SAVED_VALUES
    for stage in report.stages:
        if not stage.is_divergence:
            continue
        try:
            pair = tensors.open(stage)
        except AprError:  # gone since: the report is whole without it
            continue
        planes = {"trace": pair.trace, "oracle": pair.oracle}
        needed = sum(_count(plane) for plane in planes.values() if plane is not None)
        if needed > left:
            continue
        left -= needed
        for side, plane in planes.items():
            if plane is not None:
                values = plane.read_flat(0, _count(plane))
                yield _member(stage.key, side), values.reshape(plane.layout.shape)


def _count(plane: Plane) -> int:
    rows, columns = plane.shape
    return rows * columns


def _member(key: StageKey, side: str) -> str:
    return f"{TENSORS}{key.path}.{side}.npy"


class SavedRun:
    """An open .aprx file.

    Attributes:
        path: The file.
        about: What it says of itself: "made", "command", "environment".
        command: The command line that made the run, below the home directory of whoever reads it.
        environment: Where it was made.
        report: The run.
    """

    def __init__(self, path: Path) -> None:
        """Read the report.

        Raises:
            FormatError: The file is missing, broken, or not a saved run of this version.
        """
        self.path = path
        self._archive = Archive(path, "is not a saved run, or broken", "save it again")
        try:
            self.about = self._read_about()
            self.command, self.environment = self._read_origin()
            self.report = self._read_report()
            for name in self._archive.members:
                if name.startswith(TENSORS):
                    self._find_tensor(name)
        except BaseException:
            self._archive.close()
            raise

    def events(self) -> Iterator[RunEvent]:
        """The run as it was streamed: its header, the device, every stage, the report."""
        report = self.report
        yield report.header
        if report.device is not None:
            yield report.device
        parity = {stage.key: stage for stage in report.parity}
        for stage in report.stages:
            yield stage
            if stage.key in parity:
                yield parity[stage.key]
        if report.rejected is not None:
            yield report.rejected
        yield report

    def open(self, report: StageReport) -> TensorPair:
        """Both sides of a stage.

        Raises:
            AprError: They were not saved, or the file is broken.
        """
        names = set(self._archive.members)
        sides = {side: _member(report.key, side) for side in ("trace", "oracle")}
        if not names.intersection(sides.values()):
            raise AprError(
                "tensors of this stage were not saved with the run", where=self.path,
                hint="only those of diverging stages are; open the model and the oracle",
            )  # fmt: skip
        planes = {
            side: self._plane(name, report) if name in names else None
            for side, name in sides.items()
        }
        return TensorPair(report.key, planes["trace"], planes["oracle"])

    def close(self) -> None:
        """Close the file."""
        self._archive.close()

    def _plane(self, name: str, report: StageReport) -> MemoryPlane:
        array = self._find_tensor(name)
        values = np.ascontiguousarray(array.read(), dtype=np.float32)
        layout = report.layout
        if layout is None or layout.shape != values.shape:
            layout = Layout((values.size,), (values.size,), ("index",))
        return MemoryPlane(values.reshape(-1), layout)

    def _find_tensor(self, name: str) -> NpyArray:
        """A tensor by its header."""
        array = NpyArray.in_archive(self._archive, name)
        if array is None or array.dtype != np.float32 or not array.shape:
            raise self._archive.broken(f"{name} is no array of float32")
        if array.count > MOST_SAVED_VALUES:
            raise self._archive.broken(f"{name} is larger than what is saved")
        return array

    def _read_about(self) -> dict[str, Any]:
        try:
            about = parse_object(self._member(ABOUT, MOST_ABOUT_BYTES), self.path, ABOUT)
        except FormatError as error:
            raise self._archive.broken(error.what) from error
        if about.get("schema") != SCHEMA:
            raise FormatError(
                f"is no saved run of this version: its schema is {about.get('schema')!r},"
                f" not {SCHEMA!r}", where=self.path, hint="open it with the aprtui that wrote it",
            )  # fmt: skip
        return about

    def _read_origin(self) -> tuple[tuple[str, ...], Environment]:
        import msgspec

        try:
            command = msgspec.convert(self.about.get("command"), list[str | list[str]])
            environment = msgspec.convert(self.about.get("environment"), Environment)
        except msgspec.MsgspecError as error:
            raise self._archive.broken(f"{ABOUT}: {error}") from error
        return with_home_in_command(command), environment

    def _read_report(self) -> Report:
        import msgspec

        most = max(HARMLESS_REPORT_BYTES, REPORT_EXPANSION_LIMIT * self._archive.size_bytes)
        data = self._member(REPORT, most)
        try:
            report = msgspec.msgpack.decode(data, type=Report, dec_hook=_decode_array)
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
            raise self._archive.broken(f"{REPORT}: {error}") from error
        try:
            check_report(report)
        except ValueError as error:
            raise self._archive.broken(f"{REPORT}: {error}") from error
        return report

    def _member(self, name: str, most_bytes: int) -> bytes:
        """The bytes of a member, refused before they are unpacked if they are too many."""
        member = self._archive.members.get(name)
        if member is None:
            raise self._archive.broken(f"it lacks {name}")
        if member.size_bytes > most_bytes:
            raise self._archive.broken(f"{name} claims to be larger than any run")
        return self._archive.read(name)


def _encode_array(value: object) -> object:
    """Rankings hold arrays of int64 and float64."""
    if isinstance(value, np.ndarray):
        flat = np.ascontiguousarray(value).reshape(-1)
        kind = {"i": "<i8", "f": "<f8"}[flat.dtype.kind]
        return kind, flat.astype(kind).tobytes()
    raise NotImplementedError(f"cannot save a {type(value).__name__}")


def _decode_array(kind: type, value: Any) -> Any:
    if get_origin(kind) is np.ndarray or kind is np.ndarray:
        name, data = value
        if name not in ("<i8", "<f8") or not isinstance(data, bytes):
            raise ValueError("no array of a ranking")
        return np.frombuffer(data, dtype=name)
    raise NotImplementedError(f"cannot read a {kind}")
