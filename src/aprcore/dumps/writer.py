"""Writing a directory of stage files, which is there as a whole or not at all."""

from __future__ import annotations

import errno
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from aprcore.dumps.sidecar import SIDECAR_NAME, Sidecar
from aprcore.dumps.stage_file import write_stage_file
from aprcore.ground.errors import TraceError
from aprcore.ground.whole_directory import WholeDirectory
from aprcore.network.graph import computation_order
from aprcore.network.stages import StageKey


class TraceWriter:
    """Writes a directory of stage tensors, all of it or nothing.

    Tensors go to a hidden directory beside the target; leaving the `with` block without an error
    writes the sidecar and lets the two change places. Other files of the target are kept. On an
    error, or Ctrl-C, nothing remains.
    """

    def __init__(self, directory: Path | str, sidecar: Sidecar) -> None:
        self.directory = Path(directory)
        self._sidecar = sidecar
        self._written: dict[StageKey, dict[str, Any]] = {}
        self._whole = WholeDirectory(self.directory)

    def __enter__(self) -> TraceWriter:
        """Make the directory to write to.

        Raises:
            TraceError: It cannot be, or another process is writing to the target.
        """
        try:
            self._whole.begin()
        except BaseException as error:
            self._whole.discard()
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise
        return self

    def write(self, key: StageKey, values: NDArray[Any]) -> None:
        """Add one tensor in canonical shape; it is stored as float32.

        Raises:
            TraceError: The disk is full or the folder cannot be written to.
        """
        assert self._whole.staging is not None, "use as a context manager"
        path = self._whole.staging / f"{key.path}.bin"
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
        except OSError as failure:
            raise self._failure(failure) from failure
        finally:
            self._whole.discard()

    def _commit(self) -> None:
        assert self._whole.staging is not None
        stages = {
            key.path: self._written[key] for key in sorted(self._written, key=computation_order)
        }
        sidecar = replace(self._sidecar, stages=stages)
        if sidecar.created_utc is None:
            sidecar = replace(sidecar, created_utc=datetime.now(UTC).isoformat(timespec="seconds"))
        (self._whole.staging / SIDECAR_NAME).write_text(sidecar.to_json(), "utf-8")
        self._whole.commit()

    def _failure(self, error: OSError) -> TraceError:
        return TraceError(
            f"cannot be written ({error.strerror})",
            where=self.directory,
            hint="free some space" if error.errno == errno.ENOSPC else "choose another directory",
        )
