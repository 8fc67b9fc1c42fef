"""Where a run was made: versions, machine and command line. Nothing secret: a report is shared.

No environment variables, no host or user name, and the home directory is written "~".
"""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from aprcore.ground.home import expand_user

# What the figures of a run may depend on; what is not installed is left out.
PACKAGES = ("aprtui", "numpy", "gguf", "tokenizers", "transformers", "torch", "pyopencl")

# Not "/home/ann" of "/srv/home/ann"; nor, where it ends, of "/home/anna" or "/home/ann.old".
_PATH_BEGINS = r"(?:(?<![\w./~-])|(?<=file://))"
_NAME_ENDS = r"(?=$|[^\w.-]|\.(?:\s|$))"


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine and the software of a run.

    Attributes:
        versions: Installed packages that matter, with their versions.
        python: Version of the interpreter.
        platform: Operating system, its version and the processor's architecture.
        cpu: Name of the processor; empty where it cannot be told.
        processors: Logical processors of the machine.
    """

    versions: tuple[tuple[str, str], ...]
    python: str
    platform: str
    cpu: str
    processors: int


def read_environment() -> Environment:
    """The environment of this process. Imports none of the packages that it names."""
    return Environment(
        versions=tuple((name, found) for name in PACKAGES if (found := _version(name))),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=platform.platform(),
        cpu=_cpu_name(),
        processors=os.cpu_count() or 1,
    )


def without_home(text: str) -> str:
    """`text` with the home directory written "~", wherever a path begins with it."""
    return "~".join(_split_at_home(text))


def format_command(arguments: Sequence[str]) -> str:
    """A command line that a shell reads back as these arguments.

    The program stands by its name alone: where it is installed is this machine's business.
    """
    return " ".join(_shell_word(word) for word in _with_bare_program(arguments))


def without_home_in_command(arguments: Sequence[str]) -> list[str | list[str]]:
    """The arguments as they may be passed on; `with_home_in_command` reads them back.

    One with the home directory in it becomes the pieces between: a "~" may be the user's own.
    """
    pieces = [_split_at_home(word) for word in _with_bare_program(arguments)]
    return [found[0] if len(found) == 1 else found for found in pieces]


def with_home_in_command(arguments: Sequence[str | Sequence[str]]) -> tuple[str, ...]:
    """The arguments of `without_home_in_command` for whoever reads them, below their own home."""
    home = str(expand_user("~")).rstrip(os.sep)
    return tuple(word if isinstance(word, str) else home.join(word) for word in arguments)


def _with_bare_program(arguments: Sequence[str]) -> list[str]:
    if not arguments:
        return []
    program, *rest = arguments
    name = Path(program).name
    return ["aprtui" if name == "__main__.py" else name, *rest]


def _shell_word(argument: str) -> str:
    before, *after = _split_at_home(argument)
    if not before and len(after) == 1:
        rest = after[0].removeprefix("/")
        if rest != after[0]:  # a tilde in quotes is only a tilde
            return f"~/{shlex.quote(rest) if rest else ''}"
        if not rest:
            return "~"
    pieces = [shlex.quote(piece) if piece else "" for piece in (before, *after)]
    return '"$HOME"'.join(pieces) or "''"


def as_unicode(text: str) -> str:
    """A text that every encoding can write: bytes of a path that are no UTF-8 as "\\udcff"."""
    return text.encode("utf-8", "backslashreplace").decode()


def _split_at_home(text: str) -> list[str]:
    text = as_unicode(text)
    home = str(expand_user("~"))
    # A path that was resolved has the directory by its other name, where it is a link.
    names = {home, os.path.realpath(home)} - {os.sep} if home != "~" else set()
    if not names:
        return [text]
    either = "|".join(re.escape(name) for name in sorted(names))
    return re.split(rf"{_PATH_BEGINS}(?:{either}){_NAME_ENDS}", text)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    """As Linux names it; elsewhere what Python knows, which may be nothing."""
    try:
        # Only the first processor is looked at: a server lists hundreds.
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in ("model name", "Model", "cpu model"):
                    return value.strip()
                if not line.strip():
                    break
    except OSError:
        pass
    return platform.processor()
