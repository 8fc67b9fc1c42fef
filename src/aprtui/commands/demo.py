"""`aprtui demo`: the bundled model, with a planted fault or without."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from aprtui.commands.explore import add_theme_option, choose_settings, open_explorer

if TYPE_CHECKING:
    from aprcore.runs.request import Request
    from aprtui.settings import Settings


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "demo",
        help="the explorer on a bundled model with a planted fault",
        description="Explore a tiny bundled model that answers sums, with a planted fault."
        " Needs no download, no torch and no transformers.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--fault", metavar="NAME|none|list",
        help="which fault to plant, several separated by commas one after the other, none for the"
        " sound model, list to see the names",
    )  # fmt: skip
    parser.add_argument(
        "--no-screen", action="store_true", help="print the table of `aprtui bisect` instead"
    )
    add_theme_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Open the demo.

    Raises:
        AprError: There is no such fault, or no terminal.
    """
    from aprtui.demo import load_faults

    faults = load_faults()
    if args.fault == "list":
        for fault in faults.values():
            print(f"{fault.name:<16} {fault.description}")
        return 0
    names = list(faults)[:1] if args.fault is None else args.fault.split(",")
    requests = [_request(name.strip()) for name in names]
    settings = None if args.no_screen else choose_settings(args)
    code = 0
    for request in requests:
        code = max(code, _show(request, settings))
    return code


def _show(request: Request, settings: Settings | None) -> int:
    if settings is None:
        from aprtui.commands.bisect import print_run

        return print_run(request)
    return open_explorer(request, settings)


def _request(name: str) -> Request:
    from aprcore.ground.errors import PlanError
    from aprcore.runs.request import Request
    from aprtui.demo import demo_path, load_faults

    root = demo_path()
    faults = load_faults()
    if name == "none":
        return Request(model=root / "sound.apr", oracle=root / "oracle")
    if name not in faults:
        raise PlanError(f"there is no fault {name!r}", hint=f"choose none, {', '.join(faults)}")
    fault = faults[name]
    return Request(model=fault.model, trace=fault.trace, oracle=root / "oracle")
