"""`aprtui bisect`: the explorer's run without a screen."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from aprtui.commands.run_options import add_run_options, make_request

if TYPE_CHECKING:
    from aprcore.request import Request


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
        help="let a MISSING stage, and noise beyond its --budget, fail the run too",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table or the JSON report.

    Raises:
        AprError: The arguments or a file are unusable.
    """
    return print_run(make_request(args), as_json=args.json, strict=args.strict)


def print_run(request: Request, *, as_json: bool = False, strict: bool = False) -> int:
    """Run a request, print what it finds and return the exit code."""
    if as_json:
        import json

        from aprcore.bisect import run as run_to_end
        from aprcore.report import to_json

        report = run_to_end(request)
        print(json.dumps(to_json(report, strict=strict), indent=1, allow_nan=False))
        return int(report.diverges(strict=strict))

    from aprcore.bisect import bisect
    from aprcore.report import RunHeader, StageReport
    from aprtui.stage_table import StageTable

    table = StageTable()
    for event in bisect(request):
        match event:
            case RunHeader():
                table.open(event)
            case StageReport():
                table.add(event)
            case _:
                table.close(event)
                return int(event.diverges(strict=strict))
    raise AssertionError("a run ends with its report")
