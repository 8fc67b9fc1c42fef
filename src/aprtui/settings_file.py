"""Reading the settings file; apart from the settings, as only who has one pays for the schema."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from aprcore.ground.fields import convert, read_toml
from aprcore.ground.home import expand_user
from aprtui.settings import (
    DEFAULT_THEME,
    PATH_VARIABLE,
    THEMES,
    TOP_K_STEPS,
    Settings,
    SettingsError,
    settings_path,
)

COSINE_HINT = "three numbers from -1 to 1, each less than the last: [0.99999, 0.999, 0.98]"
_Cosine = Annotated[float, msgspec.Meta(ge=-1, le=1)]


class _SettingsFile(msgspec.Struct, forbid_unknown_fields=True):
    """What a settings file holds; its tables are checked one by one."""

    theme: str = DEFAULT_THEME
    top_k: int | None = None
    hints: bool = True
    keys: dict[str, Any] = {}
    thresholds: dict[str, Any] = {}


class _Thresholds(msgspec.Struct, forbid_unknown_fields=True):
    """The table [thresholds]."""

    cosine: tuple[_Cosine, _Cosine, _Cosine] | None = None
    tolerances: Annotated[str, msgspec.Meta(min_length=1)] | None = None


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
    # A file that was only touched is no fault, though as data it would be.
    is_empty = path.is_file() and path.stat().st_size == 0
    data = {} if is_empty else read_toml(path)
    held = convert(data, _SettingsFile, path, error=SettingsError)
    limits = convert(held.thresholds, _Thresholds, path, prefix="thresholds.", error=SettingsError,
                     hint=f"expected {COSINE_HINT}")  # fmt: skip
    if held.theme not in THEMES:
        raise _wrong(path, "theme", held.theme, f"one of {', '.join(THEMES)}")
    if held.top_k not in (None, *TOP_K_STEPS):
        raise _wrong(path, "top_k", held.top_k, f"one of {', '.join(map(str, TOP_K_STEPS))}")
    if limits.cosine is not None and not limits.cosine[0] > limits.cosine[1] > limits.cosine[2]:
        raise _wrong(path, "thresholds.cosine", limits.cosine, COSINE_HINT)
    tolerances = limits.tolerances
    if tolerances is not None and "\0" in tolerances:
        raise _wrong(path, "thresholds.tolerances", tolerances, "the path of a file")
    return Settings(
        path=path,
        theme=held.theme,
        top_k=held.top_k,
        hints=held.hints,
        keys=MappingProxyType(_read_keys(path, held.keys)),
        cosine=limits.cosine,
        # Beside the settings, unless the path is absolute or starts with ~.
        tolerances=None if tolerances is None else path.parent / expand_user(tolerances),
    )


def _read_keys(path: Path, table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
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
    return keys


def _wrong(path: Path, name: str, value: Any, expected: str) -> SettingsError:
    return SettingsError(f"{name} is {value!r}", where=path, hint=f"expected {expected}")
