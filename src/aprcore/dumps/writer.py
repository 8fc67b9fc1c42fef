"""Writing a directory of stage files, which is there as a whole or not at all."""

from __future__ import annotations

import errno
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from aprcore.dumps.sidecar import SIDECAR_NAME, Sidecar
from aprcore.dumps.stage_file import write_stage_file
from aprcore.ground.errors import TraceError
from aprcore.network.graph import computation_order
from aprcore.network.stages import StageKey


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
