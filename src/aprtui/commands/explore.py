"""`aprtui MODEL --oracle DIR`: the explorer."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprtui.commands.run_options import add_run_options, add_save_option, make_request
from aprtui.outgoing import is_terminal
from aprtui.screen_options import ALLOW_WRITE_VARIABLE, ScreenOptions
from aprtui.settings import THEMES

if TYPE_CHECKING:
    from aprcore.runs.request import Request
    from aprtui.settings import Settings

# What the server of a browser's page has its explorers draw with.
WEB_DRIVER = "textual.drivers.web_driver:WebDriver"


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "explore",
        help="the explorer; the default, so the word may be left out",
        description="Watch every stage of a model being judged against an oracle.",
        allow_abbrev=False,
    )
    add_explorer_options(parser)
    parser.set_defaults(run=run)


def add_explorer_options(parser: argparse.ArgumentParser) -> None:
    """Everything that the explorer takes, on a terminal or in a browser."""
    add_run_options(parser)
    add_theme_option(parser)
    add_save_option(parser)
    parser.add_argument(
        "--watch", action="store_true",
        help="run again whenever the model, the trace or the oracle changes",
    )  # fmt: skip


def add_theme_option(parser: argparse.ArgumentParser) -> None:
    """`--theme`."""
    parser.add_argument(
        "--theme", choices=tuple(THEMES),
        help="colours (default: those of the settings file, else the first)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Open the explorer.

    Raises:
        AprError: The arguments or the settings are malformed, or there is no terminal.
    """
    settings = choose_settings(args)
    options = ScreenOptions(args.watch, args.save, tuple(sys.argv))
    if os.environ.get("TEXTUAL_DRIVER") == WEB_DRIVER:
        options = _in_browser(options)
    return open_explorer(request_under(args, settings), settings, options)


def _in_browser(options: ScreenOptions) -> ScreenOptions:
    """Options of an explorer that may write where its server says, and else nowhere."""
    allowed = os.environ.get(ALLOW_WRITE_VARIABLE, "")
    return replace(
        options,
        save=None if options.save is None else options.save.absolute(),
        may_write=bool(allowed),
        folder=Path(allowed) if allowed else None,
    )


def choose_settings(args: argparse.Namespace) -> Settings:
    """The user's settings, under the options of the command line.

    Raises:
        AprError: The settings file cannot be used.
    """
    from aprtui.settings_file import load_settings

    settings = load_settings()
    return settings if args.theme is None else replace(settings, theme=args.theme)


def request_under(args: argparse.Namespace, settings: Settings) -> Request:
    """The run that the options ask for, with the settings' tolerances where they give none.

    Raises:
        AprError: An option or the file of tolerances is malformed.
    """
    from aprcore.runs.request import is_saved_run

    # A saved run has its verdicts.
    is_judged = args.model is not None and is_saved_run(args.model)
    if is_judged or args.tolerances is not None or settings.tolerances is None:
        return make_request(args)
    args.tolerances = settings.tolerances
    # They can change a verdict, which nothing may do silently.
    note = (f"tolerances of {settings.tolerances}, as {settings.path} says; `aprtui bisect` reads"
            " no settings: give it --tolerances")  # fmt: skip
    return replace(make_request(args), notes=(note,))


def open_explorer(
    request: Request, settings: Settings, options: ScreenOptions | None = None
) -> int:
    """Explore a run on the terminal and return the exit code.

    Args:
        request: What to run.
        settings: How the user likes it.
        options: What is asked of the screen.

    Raises:
        PlanError: There is no terminal.
        SettingsError: The settings' keys cannot be used.
    """
    from aprcore.ground.errors import PlanError

    # A dumb terminal has no cursor to move; the explorer would draw into it for ever.
    is_dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")
    has_terminal = not is_dumb and sys.stdin.isatty() and is_terminal(sys.stdout)
    # `aprtui serve` puts a browser in the terminal's place.
    if not has_terminal and os.environ.get("TEXTUAL_DRIVER") != WEB_DRIVER:
        raise PlanError(
            "the explorer needs a terminal", hint="use `aprtui bisect` for a table or --json"
        )
    from aprtui.app import run_explorer

    return run_explorer(request, settings, options)
