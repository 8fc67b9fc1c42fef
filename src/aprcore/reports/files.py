"""Writing a report to a file: what kind it is follows from the name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aprcore.ground.errors import AprError
from aprcore.ground.whole_file import check_writable, write_whole
from aprcore.records.environment import Environment, format_command, read_environment
from aprcore.records.report import Report
from aprcore.records.report_json import format_json, json_ready, picked, to_json
from aprcore.records.sharing import shareable
from aprcore.reports.maps import StageMap
from aprcore.reports.markdown import render_markdown
from aprcore.reports.page import render_page

SUFFIXES = (".html", ".md", ".json")
_KINDS = "name a .html, .md or .json file"


def check_report_path(path: Path) -> None:
    """Find out before a long run whether its report can be written.

    Raises:
        AprError: The suffix is of no kind of report, or the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix == ".svg":
        raise AprError(
            "a picture of the screen takes the explorer", where=path,
            hint=f"press e there, or {_KINDS}",
        )  # fmt: skip
    if suffix not in SUFFIXES:
        what = f"{suffix} is no kind of report" if suffix else "a report's name needs a suffix"
        raise AprError(what, where=path, hint=_KINDS)
    check_writable(path)


def write_report(
    path: Path, report: Report, *, maps: Sequence[StageMap] = (), command: Sequence[str] = (),
    environment: Environment | None = None,
) -> None:  # fmt: skip
    """Write a report as HTML, Markdown or JSON; the file is whole or as it was before.

    Args:
        path: Its suffix says which: .html, .md or .json.
        report: The finished run.
        maps: Pictures of failing stages; only HTML has a place for them.
        command: The command line of the run, to reproduce it.
        environment: Where the run was made; None: here.

    Raises:
        AprError: The suffix is of no kind of report, or the file cannot be written.
    """
    check_report_path(path)
    environment, report = environment or read_environment(), shareable(report)
    match path.suffix.lower():
        case ".html":
            text = render_page(report, maps, command, environment)
        case ".md":
            text = render_markdown(report, command, environment)
        case _:
            text = render_json(report, command, environment)
    with write_whole(path) as file:
        file.write(text.encode())


def render_json(report: Report, command: Sequence[str], environment: Environment) -> str:
    """The report as `docs/report.schema.json` describes it, with where and how it was made."""
    data = to_json(report)
    data["command"] = format_command(command) or None
    data["environment"] = {
        **picked(environment, "python", "platform"),
        "cpu": environment.cpu or None,
        "processors": environment.processors,
        "versions": dict(environment.versions),
    }
    return format_json(json_ready(data)) + "\n"
