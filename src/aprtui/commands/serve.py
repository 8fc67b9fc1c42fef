"""`aprtui serve`: the explorer in a browser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprtui.commands.explore import add_explorer_options, choose_settings, request_under
from aprtui.commands.run_options import whole_number

if TYPE_CHECKING:
    from aprcore.runs.request import Request

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "serve",
        help="the explorer in a browser",
        description="Serve the explorer as a page, for a machine without a good terminal. Every"
        " tab that opens it is a run of its own. Only this machine can reach it, and only who has"
        " the printed address; from another, open a tunnel: ssh -L 8000:127.0.0.1:8000 MACHINE",
        allow_abbrev=False,
    )
    add_explorer_options(parser)
    _add_server_options(parser)
    parser.set_defaults(run=run)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default=DEFAULT_HOST, help=f"address to listen on (default: {DEFAULT_HOST})"
    )
    parser.add_argument(
        "--port", type=whole_number("a port, which is 0 to 65535", most=65535),
        default=DEFAULT_PORT, metavar="N",
        help=f"port to listen on, 0 for any that is free (default: {DEFAULT_PORT})",
    )  # fmt: skip
    parser.add_argument(
        "--i-know", action="store_true",
        help="listen beyond this machine too: nothing is encrypted, so that whoever is on the way"
        " can read the address and drive the explorer",
    )  # fmt: skip
    parser.add_argument(
        "--no-token", action="store_true",
        help="let everybody in who can reach the port, such as the other users of this machine",
    )  # fmt: skip
    parser.add_argument(
        "--allow-write", type=Path, metavar="DIR",
        help="let the page write reports and runs below DIR (default: it writes nothing)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C.

    Raises:
        AprError: The arguments or the settings are malformed, a file is missing, or the address
            cannot be had.
    """
    from aprcore.ground.errors import PlanError
    from aprtui.text import visible

    folder = _writable_folder(args)
    request = _check(args)

    from aprtui.browser import ExplorerServer, is_loopback, open_socket
    from aprtui.page_guard import make_token

    loopback_only = is_loopback(args.host)
    if not loopback_only and not args.i_know:
        raise PlanError(
            f"whoever is on the way to {args.host} could read along, and drive the explorer",
            hint="use an ssh tunnel to 127.0.0.1, or say --i-know",
        )
    subject = visible((request.model or request.trace or request.saved or Path()).name)
    with open_socket(args.host, args.port) as listener:
        arguments = ["explore", *explorer_arguments(args.argv)]
        server = ExplorerServer(
            arguments, listener, f"aprtui {subject}", loopback_only=loopback_only,
            token=None if args.no_token else make_token(), folder=folder,
        )  # fmt: skip
        print(f"{subject} is at {server.address} (Ctrl-C ends it)", flush=True)
        server.serve()
    return 0


def _writable_folder(args: argparse.Namespace) -> Path | None:
    """Below which explorers may write, if they may.

    Raises:
        PlanError: There is no such folder, or `--save` names a file elsewhere.
        AprError: So too.
    """
    from aprcore.ground.errors import PlanError
    from aprtui.exporting import place_export

    folder: Path | None = args.allow_write
    if folder is not None and not folder.is_dir():
        raise PlanError("is no directory", where=folder, hint="make it first")
    if args.save is not None and folder is None:
        raise PlanError("a page may not write", where=args.save, hint="say --allow-write DIR")
    if args.save is not None:
        place_export(args.save.absolute(), folder)
    return None if folder is None else folder.absolute()


def explorer_arguments(argv: Sequence[str]) -> list[str]:
    """What is left of the command line for the explorer, as the user wrote it.

    Args:
        argv: The whole of it, from "serve" on.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_server_options(own)
    words = list(argv[1:])
    # After "--" nothing is an option.
    end = words.index("--") if "--" in words else len(words)
    _, rest = own.parse_known_args(words[:end])
    return [*rest, *words[end:]]


def _check(args: argparse.Namespace) -> Request:
    """Find out now what every explorer would only say on its screen, or before it has one.

    Raises:
        AprError: As `run`.
    """
    from aprcore.ground.errors import PlanError
    from aprcore.records.saved_run import SavedRun
    from aprcore.runs.open_sides import open_sides
    from aprtui.app import ExplorerApp

    settings = choose_settings(args)
    request = request_under(args, settings)
    for path in (request.model, request.trace, request.oracle, request.against, request.names,
                 request.reference_weights, request.saved, *request.shards):  # fmt: skip
        if path is not None and not path.exists():
            raise PlanError("does not exist", where=path)
    with open_sides(request) if request.saved is None else closing(SavedRun(request.saved)):
        pass  # what can be opened now can be opened for a page
    ExplorerApp(request, settings=settings)
    return request
