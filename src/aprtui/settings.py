"""What a user has chosen once for all runs: the settings file, and whether they are new here.

The file is read when the explorer opens; nothing ever writes it, so its comments stay. This module
does not load the toolkit: the command line names the themes in its help.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from aprcore.ground.errors import AprError
from aprcore.ground.home import expand_user

# How many of the largest differences the explorer shows: more than 200 rows take too long to fill.
TOP_K_STEPS = (5, 10, 20, 50, 100, 200)
DEFAULT_TOP_K = 10

DEFAULT_THEME = "okabe-ito"
# Name to what it is for; `aprtui.theme` paints them.
THEMES: Mapping[str, str] = {
    DEFAULT_THEME: "dark, told apart by every kind of colour vision",
    "okabe-ito-light": "the same on a light ground",
    "high-contrast": "on black, at 7 to 1 and more",
    "monochrome": "two colours; verdicts differ by underline and reverse",
}

# Where the settings file is, if the user says so.
PATH_VARIABLE = "APRTUI_SETTINGS"


class SettingsError(AprError):
    """The settings file says something that cannot be done."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The choices of a settings file, or the defaults.

    Attributes:
        path: The file; None without one.
        theme: A name of `THEMES`.
        top_k: How many of the largest differences are shown at first; None: the explorer's default.
        hints: Whether somebody new is told the first keys.
        keys: Id of a binding to its keys, separated by commas.
        cosine: From which cosine on each of the three better inks holds, best first; None: the
            theme's.
        tolerances: The file of budgets where `--tolerances` is not given.
    """

    path: Path | None = None
    theme: str = DEFAULT_THEME
    top_k: int | None = None
    hints: bool = True
    keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    cosine: tuple[float, float, float] | None = None
    tolerances: Path | None = None


def settings_path() -> Path:
    """Where the settings file is looked for: the user's word, else the desktop's convention."""
    said = os.environ.get(PATH_VARIABLE)
    return Path(said) if said else _xdg_home("XDG_CONFIG_HOME", ".config") / "settings.toml"


def is_first_use() -> bool:
    """Whether this user has not left the explorer yet, as far as can be known."""
    try:
        return not _seen_path().exists()
    except OSError:
        return False


def remember_use() -> None:
    """Note that the user knows the explorer; where that cannot be written, nobody minds."""
    path = _seen_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return


def _seen_path() -> Path:
    return _xdg_home("XDG_STATE_HOME", ".local/state") / "seen"


def _xdg_home(variable: str, default: str) -> Path:
    """Our folder in one of the user's. Source: XDG Base Directory Specification 0.8."""
    said = os.environ.get(variable, "")
    # Relative paths are to be ignored, says the specification.
    home = Path(said) if Path(said).is_absolute() else expand_user(f"~/{default}")
    return home / "aprtui"
