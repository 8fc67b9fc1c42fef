"""`aprtui MODEL --oracle DIR`: the explorer."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from aprtui.commands.run_options import add_run_options, make_request

if TYPE_CHECKING:
    from aprcore.request import Request


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "explore",
        help="the explorer; the default, so the word may be left out",
        description="Watch every stage of a model being judged against an oracle.",
        allow_abbrev=False,
    )
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Open the explorer.

    Raises:
        AprError: The arguments are malformed, or there is no terminal.
    """
    return open_explorer(make_request(args))


def open_explorer(request: Request) -> int:
    """Explore a run on the terminal and return the exit code.

    Raises:
        PlanError: There is no terminal.
    """
    from aprcore.errors import PlanError

    # A dumb terminal has no cursor to move; the explorer would draw into it for ever.
    is_dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")
    if is_dumb or not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise PlanError(
            "the explorer needs a terminal", hint="use `aprtui bisect` for a table or --json"
        )
    from aprtui.app import run_explorer

    return run_explorer(request)
