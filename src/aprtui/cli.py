"""The command line: parses arguments, maps outcomes to exit codes.

`aprtui --help` must not pay for numpy: modules of commands import what they need when they run.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from aprtui import __version__
from aprtui.commands import (
    bisect,
    capture,
    demo,
    devices,
    diff,
    explore,
    import_model,
    inspect,
    oracle,
    parity,
    run,
    serve,
    sweep,
    trace,
)

# Exit codes (docs/contracts/exit-codes.yaml): 0 nothing wrong found, 1 a divergence was found.
UNUSABLE = 2
# As shells report a signal: 128 + SIGINT, 128 + SIGPIPE. Not 0: nobody has seen the verdict.
INTERRUPTED, BROKEN_PIPE = 130, 141

COMMANDS = {
    "explore": explore,
    "bisect": bisect,
    "trace": trace,
    "diff": diff,
    "oracle": oracle,
    "capture": capture,
    "import": import_model,
    "inspect": inspect,
    "demo": demo,
    "run": run,
    "parity": parity,
    "devices": devices,
    "serve": serve,
    "sweep": sweep,
}

DESCRIPTION = """\
git bisect for an LLM's arithmetic: run a transformer with every intermediate tensor in view, hold
each against a Hugging Face oracle, and find the one operation that is wrong."""

EXAMPLES = """\
main use:
  aprtui MODEL --oracle DIR         explore MODEL (.apr, .gguf or a Hugging Face directory)
  aprtui --trace DIR --oracle DIR   explore another engine's stage files

settings: $APRTUI_SETTINGS, else ~/.config/aprtui/settings.toml (docs/settings.md)
exit codes: 0 nothing wrong found, 1 a divergence was found, 2 the arguments or a file are unusable
"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        from aprtui.text import visible

        self.exit(UNUSABLE, f"{self.prog}: {visible(message)}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = _Parser(
        prog="aprtui",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"aprtui {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for command in COMMANDS.values():
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code."""
    from aprtui.outgoing import gated

    with gated():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(arguments: list[str]) -> int:
    from aprcore.ground.errors import AprError
    from aprtui.text import ERROR_LIMIT, visible

    # A NaN or an overflow in a tensor is a finding and is reported as one.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="aprcore")
    if arguments and arguments[0] not in (*COMMANDS, "-h", "--help", "--version"):
        arguments.insert(0, "explore")
    try:
        args = build_parser().parse_args(arguments, argparse.Namespace(argv=arguments))
        code = int(args.run(args))
        sys.stdout.flush()
    except AprError as error:
        return _fail(visible(str(error), limit=ERROR_LIMIT))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # the reader (head, less) has gone
        return BROKEN_PIPE
    except OSError as error:  # a full disk behind stdout, a file name that is too long
        _drop_output()
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(visible(f"{where}{error.strerror or error}", limit=ERROR_LIMIT))
    except MemoryError:
        return _fail("out of memory; try fewer tokens, layers or stages")
    except SystemExit as end:  # argparse has printed its line
        return end.code if isinstance(end.code, int) else UNUSABLE
    except Exception as error:
        if _comes_from_interrupt(error):
            return INTERRUPTED
        import traceback

        # Python's own exit code would be 1, and a crash must not pass for a divergence.
        traceback.print_exc()
        return _fail("this is a bug in aprtui; please report it with the command you ran")
    return code


def _comes_from_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: inside an import Python may wrap it (`__set_name__`)."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _drop_output() -> None:
    """Send what is still buffered nowhere, so that nothing is said at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(line: str) -> int:
    print(f"aprtui: {line}", file=sys.stderr)
    return UNUSABLE
