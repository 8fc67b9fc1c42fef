"""A finished run as a file, and a row as text for the clipboard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aprcore.records.telling import figures_of, finding_of, format_cosine, judgment_table
from aprtui.rows import Row
from aprtui.run_state import RunState
from aprtui.theme import mark_of

if TYPE_CHECKING:
    from aprcore.records.report import Report, RunHeader, StageReport
    from aprcore.records.tensor_source import TensorSource

KINDS = (".html", ".md", ".json", ".svg", ".aprx")


def check_export_path(path: Path, *, has_screen: bool = False) -> None:
    """Find out whether a run can be written to a path.

    Args:
        path: Where to.
        has_screen: Whether there is a screen, and so can be a picture of it.

    Raises:
        AprError: The suffix is of no kind, or the file cannot be written.
    """
    from aprcore.ground.errors import AprError
    from aprcore.ground.whole_file import check_writable
    from aprcore.reports.files import check_report_path
    from aprcore.runs.request import SUFFIX

    suffix = path.suffix.lower()
    if has_screen and suffix not in KINDS:
        what = f"{suffix} is no kind of report" if suffix else "a report's name needs a suffix"
        raise AprError(what, where=path, hint=f"end it in {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if suffix in ((".svg", SUFFIX) if has_screen else (SUFFIX,)):
        check_writable(path)
    else:
        check_report_path(path)


def place_export(path: Path, folder: Path | None) -> Path:
    """Where a file is written that a user has named.

    Args:
        path: The name.
        folder: Below which it has to be, and where a relative name begins; None: anywhere.

    Raises:
        AprError: It would be elsewhere, be it by a link.
    """
    from aprcore.ground.errors import AprError

    if folder is None:
        return path
    try:
        root, place = folder.resolve(), (folder / path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null byte
        raise AprError("is no place for a file", where=path) from error
    if root not in place.parents:
        raise AprError("lies elsewhere than this page may write", where=path,
                       hint=f"name a file in {root}")  # fmt: skip
    return place


def export(
    path: Path, report: Report, tensors: TensorSource | None, command: Sequence[str],
    picture: str | None,
) -> None:  # fmt: skip
    """Write a run to a file, whose suffix says as what. Takes seconds: call it from a thread.

    Args:
        path: Where to.
        report: The run.
        tensors: Where the maps of failing stages come from, if from anywhere.
        command: The command line of the run; a saved one has its own.
        picture: The screen as SVG; None where there is no screen.

    Raises:
        AprError: The suffix is of no kind, or the file cannot be written.
    """
    from aprcore.ground.whole_file import write_whole
    from aprcore.records.saved_run import SavedRun, save_run
    from aprcore.reports.collect import collect_maps
    from aprcore.reports.files import write_report
    from aprcore.runs.request import SUFFIX

    check_export_path(path, has_screen=picture is not None)
    match path.suffix.lower():
        case ".svg" if picture is not None:
            with write_whole(path) as file:
                file.write(picture.encode())
        case suffix if suffix == SUFFIX:
            save_run(path, report, tensors, command)
        case _:
            has_maps = tensors is not None and path.suffix.lower() == ".html"
            maps = collect_maps(report, tensors) if tensors is not None and has_maps else ()
            # What made a run is what reproduces it, not what opened it again, here or elsewhere.
            environment = None
            if isinstance(tensors, SavedRun):
                command, environment = tensors.command, tensors.environment
            write_report(path, report, maps=maps, command=command, environment=environment)


def describe_row(state: RunState, row: Row) -> str:
    """A row in a few lines of plain text."""
    if row.key is not None and (report := state.reports.get(row.key)) is not None:
        assert state.header is not None
        return "\n".join(_stage_lines(report, state.header))
    if row.layer is not None:
        keys = state.keys_by_layer.get(row.layer, ())
        reports = [state.reports[key] for key in keys if key in state.reports]
        return "\n".join([f"layer {row.layer}", *(_line(report) for report in reports)])
    if row.key is not None:
        return f"{row.key}  pending"
    if state.report is not None:
        return state.report.summary()
    return f"{len(state.reports)} of {len(state.keys)} stages judged"


def _line(report: StageReport) -> str:
    found = report.comparison
    cosine = "" if found is None else f"  cosine {format_cosine(figures_of(found)[0])}"
    return f"{report.key.stage}  {mark_of(report).word}{cosine}"


def _stage_lines(report: StageReport, header: RunHeader) -> list[str]:
    lines = [f"{report.key}  {mark_of(report).word}".rstrip(), finding_of(report)]
    for name, error, bound, cosine, *_, finding in judgment_table(report, header).rows:
        own = f", bound {bound}: {finding}" if finding else f", cosine {cosine}"
        lines.append(f"{name}: relative L2 {error}{own}")
    return [line for line in lines if line]
