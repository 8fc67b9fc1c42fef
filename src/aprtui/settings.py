"""What a user has chosen once for all runs: the settings file, and whether they are new here.

The file is read when the explorer opens; nothing ever writes it, so its comments stay. This module
does not load the toolkit: the command line names the themes in its help.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

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


def load_settings() -> Settings:
    """The settings of the user.

    Raises:
        AprError: The file is there but cannot be used; it says which key and what is allowed.
    """
    path = settings_path()
    # A file that the user names has to be there, the usual one need not.
    if not os.environ.get(PATH_VARIABLE) and not path.exists():
        return Settings()
    return read_settings(path)


def read_settings(path: Path) -> Settings:
    """The settings of a file.

    Raises:
        FormatError: The file cannot be read or is not TOML.
        SettingsError: It has an unknown key, or a value that is not allowed.
    """
    from aprcore.ground.fields import read_toml

    # A file that was only touched is no fault, though as data it would be.
    is_empty = path.is_file() and path.stat().st_size == 0
    data = {} if is_empty else read_toml(path)
    known = ("theme", "top_k", "hints", "keys", "thresholds")
    _check_names(path, data, known, "")
    thresholds = _table(path, data, "thresholds")
    _check_names(path, thresholds, ("cosine", "tolerances"), "thresholds.")
    return Settings(
        path=path,
        theme=_one_of(path, "theme", data.get("theme", DEFAULT_THEME), THEMES),
        top_k=_one_of(path, "top_k", data["top_k"], TOP_K_STEPS) if "top_k" in data else None,
        hints=_one_of(path, "hints", data.get("hints", True), (True, False)),
        keys=_read_keys(path, _table(path, data, "keys")),
        cosine=_read_cosines(path, thresholds.get("cosine")),
        tolerances=_read_path(path, "thresholds.tolerances", thresholds.get("tolerances")),
    )


def nearest(name: str, known: Collection[str]) -> str:
    """The known name that is most like another, which may be a slip of the hand."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


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


def _check_names(path: Path, table: Mapping[str, Any], known: Collection[str], prefix: str) -> None:
    for name in table:
        if name not in known:
            raise SettingsError(
                f"there is no setting {prefix + name!r}", where=path,
                hint=f"did you mean {prefix}{nearest(name, known)}? There are"
                f" {', '.join(prefix + one for one in known)}",
            )  # fmt: skip


def _table(path: Path, data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = data.get(name, {})
    if not isinstance(table, dict):
        raise _wrong(path, name, table, f"a table; write [{name}]")
    return table


def _one_of(path: Path, name: str, value: Any, allowed: Collection[Any]) -> Any:
    # 1 == True, and neither stands for the other.
    if any(value == one and type(value) is type(one) for one in allowed):
        return value
    names = ", ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in allowed)
    raise _wrong(path, name, value, f"one of {names}")


def _read_keys(path: Path, table: Mapping[str, Any], prefix: str = "") -> Mapping[str, str]:
    """Id to keys. `explorer.next = "j"` is a table in TOML unless it is quoted: both are meant."""
    keys: dict[str, str] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            keys.update(_read_keys(path, value, f"{prefix}{name}."))
            continue
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(one, str) and one.strip() for one in names):
            raise _wrong(path, f"keys.{prefix}{name}", value, 'a key such as "j", or ["j", "down"]')
        keys[prefix + name] = ",".join(one.strip() for one in names)
    return MappingProxyType(keys)


def _read_cosines(path: Path, value: Any) -> tuple[float, float, float] | None:
    if value is None:
        return None
    is_listed = isinstance(value, list) and len(value) == 3
    if not is_listed or not all(type(one) in (int, float) and -1 <= one <= 1 for one in value):
        expected = "three numbers from -1 to 1, such as [0.99999, 0.999, 0.98]"
        raise _wrong(path, "thresholds.cosine", value, expected)
    first, second, third = (float(one) for one in value)
    if not first > second > third:
        raise _wrong(path, "thresholds.cosine", value, "three numbers, each less than the last")
    return first, second, third


def _read_path(path: Path, name: str, value: Any) -> Path | None:
    """A file beside the settings, unless its path is absolute or starts with ~."""
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise _wrong(path, name, value, "the path of a file")
    return path.parent / expand_user(value)


def _wrong(path: Path, name: str, value: Any, expected: str) -> SettingsError:
    return SettingsError(f"{name} is {value!r}", where=path, hint=f"expected {expected}")
