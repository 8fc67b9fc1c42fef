"""`aprtui bisect`: the explorer's run without a screen."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprtui.commands.run_options import add_run_options, add_save_option, make_request
from aprtui.rejection import announce

if TYPE_CHECKING:
    from aprcore.records.report import Report
    from aprcore.runs.request import Request
    from aprcore.runs.tensors import LayerInputs


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "bisect",
        help="judge every stage and print a table; for CI",
        description="Judge every stage of a model against an oracle and name the first divergence.",
        allow_abbrev=False,
    )
    add_run_options(parser)
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument(
        "--strict", action="store_true",
        help="let a MISSING or UNJUDGED stage, and noise beyond its --budget, fail the run too",
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path, metavar="FILE", action="append", default=[],
        help="write the run to a .html, .md or .json file to hand on; may be given several times",
    )  # fmt: skip
    add_save_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table or the JSON report, and write the files that were asked for.

    Raises:
        AprError: The arguments or a file are unusable.
    """
    request = make_request(args)
    files = [path for path in (*args.report, args.save) if path is not None]
    return print_run(request, as_json=args.json, strict=args.strict, files=files)


def print_run(
    request: Request, *, as_json: bool = False, strict: bool = False, files: Sequence[Path] = ()
) -> int:
    """Run a request, print what it finds and return the exit code.

    Args:
        request: What to run.
        as_json: Print the report as JSON instead of the table.
        strict: As `Report.diverges`.
        files: Where to write the run, too; their suffixes say as what.
    """
    from aprcore.records.report import PathRejected, Report
    from aprcore.records.report_json import to_json
    from aprcore.runs.bisect import bisect
    from aprcore.runs.tensors import LayerInputs
    from aprtui.exporting import check_export_path
    from aprtui.progress import with_searches_shown
    from aprtui.stage_table import StageTable

    for path in files:
        check_export_path(path)
    table = None if as_json else StageTable()
    kept = LayerInputs() if files else None
    for event in with_searches_shown(bisect(request, kept)):
        if table is not None:
            table.take(event)
        if isinstance(event, PathRejected):
            announce(event.line_reason)
        elif isinstance(event, Report):
            if as_json:
                print(json.dumps(to_json(event, strict=strict), indent=1, allow_nan=False))
            _write_files(files, event, request, kept)
            return int(event.diverges(strict=strict))
    raise AssertionError("a run ends with its report")


def _write_files(
    files: Sequence[Path], report: Report, request: Request, kept: LayerInputs | None
) -> None:
    from aprcore.runs.tensors import open_tensors
    from aprtui.exporting import export
    from aprtui.text import visible

    if not files:
        return
    with closing(open_tensors(request, kept)) as tensors:
        for path in files:
            export(path, report, tensors, sys.argv, picture=None)
            print(f"wrote {visible(str(path))}", file=sys.stderr)
