"""JSON and TOML that a stranger wrote, held against types or looked up key by key.

Every error names the key as the file spells it, and the file.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aprcore.ground.data_file import read_small
from aprcore.ground.errors import AprError, ConfigError, FormatError, Where, nearest

# Larger than any size of a real model, small enough that products of three fit in an int64.
MAX_SIZE = 2**31 - 1

TOML_LIMIT_BYTES = 1024 * 1024

Keys = Sequence[str]
Schema = TypeVar("Schema")

# msgspec's names of types, in words for whoever wrote the file.
_WORDS = {"str": "a text", "int": "an integer", "float": "a number", "bool": "true or false",
          "array": "a list", "object": "a table"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object or GGUF's key-values, with the file it came from.

    A key is looked up under each of its aliases; null counts as absent.

    Attributes:
        values: The metadata.
        where: The file, for errors.
        prefix: Put before each key in errors ("rope_scaling.").
    """

    values: Mapping[str, Any]
    where: Where
    prefix: str = ""

    def find(self, keys: Keys) -> tuple[str, Any] | None:
        """The first alias that has a value, with that value."""
        for key in keys:
            value = self.values.get(key)
            if value is not None:
                return key, value
        return None

    def fault(self, key: str, value: Any, expected: str) -> ConfigError:
        """The error for a value that is not what it should be."""
        what = f"{self.prefix}{key} is {_shorten(value)}, not {expected}"
        return ConfigError(what, where=self.where)

    def missing(self, keys: Keys) -> ConfigError:
        """The error for a key that the file must have."""
        aliases = f" (also spelled {', '.join(keys[1:])})" if len(keys) > 1 else ""
        return ConfigError(f"{self.prefix}{keys[0]} is missing{aliases}", where=self.where)

    def size(self, keys: Keys, default: int | None = None) -> int:
        """A positive integer.

        Raises:
            ConfigError: It is absent without a default, or is not a positive integer.
        """
        found = self.optional_size(keys)
        if found is not None:
            return found
        if default is None:
            raise self.missing(keys)
        return default

    def optional_size(self, keys: Keys) -> int | None:
        """A positive integer, or None if it is absent.

        Raises:
            ConfigError: It is not a positive integer.
        """
        found = self.find(keys)
        if found is None:
            return None
        key, value = found
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not 0 < value <= MAX_SIZE:
            raise self.fault(key, value, "a positive integer")
        return int(value)

    def number(self, keys: Keys, default: float | None = None, *, above: float = 0.0) -> float:
        """A finite number greater than `above`.

        Raises:
            ConfigError: It is absent without a default, or is no such number.
        """
        found = self.optional_number(keys, above=above)
        if found is not None:
            return found
        if default is None:
            raise self.missing(keys)
        return default

    def optional_number(self, keys: Keys, *, above: float = 0.0) -> float | None:
        """A finite number greater than `above`, or None if it is absent.

        Raises:
            ConfigError: It is no such number.
        """
        found = self.find(keys)
        if found is None:
            return None
        key, value = found
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fault(key, value, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or number <= above:
            raise self.fault(key, value, f"a finite number above {above:g}")
        return number

    def boolean(self, key: str) -> bool | None:
        """True or false, or None if it is absent.

        Raises:
            ConfigError: It is neither.
        """
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fault(key, value, "true or false")
        return value

    def text(self, keys: Keys) -> str | None:
        """A string, or None if it is absent.

        Raises:
            ConfigError: It is not a string.
        """
        found = self.find(keys)
        if found is None:
            return None
        key, value = found
        if not isinstance(value, str):
            raise self.fault(key, value, "a string")
        return value

    def object(self, key: str) -> Fields | None:
        """A nested object, or None if it is absent or empty.

        Raises:
            ConfigError: It is not an object.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.fault(key, value, "an object")
        return Fields(value, self.where, f"{self.prefix}{key}.") if value else None


def convert(
    value: Any, schema: type[Schema], where: Where, *, prefix: str = "",
    error: type[AprError] = FormatError, hint: str | None = None,
) -> Schema:  # fmt: skip
    """A value out of a file as a type whose fields say what is allowed.

    Args:
        value: As read.
        schema: What it should be: a `msgspec.Struct`, a dataclass or any other annotation.
        where: The file, for errors.
        prefix: Put before each key in errors: "thresholds.", or "matrix 1: " for a table of many.
        error: What is raised.
        hint: What the user can do about it; for an unknown key that is said here.

    Raises:
        AprError: The value is something else; it names the key, what it has and what is allowed.
    """
    import msgspec  # takes longer to import than all that reads `Fields`

    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as fault:
        what = _describe(str(fault), value, prefix)
        if unknown := re.fullmatch("Object contains unknown field `(.*)`", str(fault)):
            within = prefix.rpartition(": ")[2]
            known = [f"{within}{name}" for name in schema.__struct_fields__]  # type: ignore[attr-defined]
            slip = nearest(f"{within}{unknown[1]}", known)
            hint = f"did you mean {slip}? There are {', '.join(known)}"
        raise error(what, where=where, hint=hint) from fault
    except RecursionError as fault:
        what = f"{prefix.rstrip('.: ') or 'the whole'} nests too deeply"
        raise error(what, where=where, hint=hint) from fault


def _describe(fault: str, value: Any, prefix: str) -> str:
    """msgspec's words for a fault, with the key in front and the value that it has."""
    what, _, path = fault.partition(" - at `")
    path = path.rstrip("`").partition("$")[2].removeprefix(".")
    if found := re.fullmatch("Object (contains unknown|missing required) field `(.*)`", what):
        table, _, within = prefix.rpartition(": ")
        key = f"{within}{path}{'.' if path else ''}{found[2]}"
        fact = f"unknown key {key!r}" if "unknown" in found[1] else f"{key} is missing"
        return f"{table}: {fact}" if table else fact
    if found := re.fullmatch("Expected `([^`]*)`(,? .*)?", what):
        names = [_WORDS.get(name, name) for name in found[1].split(" | ") if name != "null"]
        what = f"not {' or '.join(names)}{(found[2] or '').partition(', got')[0]}"
    what = what.replace("Number out", "out")
    named, inside, _ = path.partition("[...]")
    key = f"{prefix}{named}".rstrip(".: ") or "the whole"
    if inside:
        return f"{key} has an entry that is {what}"
    for step in re.findall(r"[^.\[\]]+", path):
        value = value[int(step) if isinstance(value, Sequence) else step]
    return f"{key} is {_shorten(value)}, {what}"


def _shorten(value: Any) -> str:
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deep nesting
        return "too much to show"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def parse_object(data: bytes, where: Where, what: str, *, unique: bool = False) -> dict[str, Any]:
    """A JSON object out of bytes.

    Args:
        data: UTF-8 text.
        where: The file, for errors.
        what: What the text is, for errors.
        unique: Whether a key that is there twice is an error; otherwise the last counts.

    Raises:
        FormatError: The bytes are no JSON object, nest too deeply, or hold what is no Unicode.
    """
    # Not by msgspec, which refuses the NaN and Infinity that Python itself writes.
    hook = _unique if unique else None
    value = _parsed(
        lambda: json.loads(data.decode(), object_pairs_hook=hook), where, f"{what} ", "JSON"
    )
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object", where=where)
    if _HALF_CHARACTER.search(data) and not _is_unicode(value):
        raise FormatError(f"{what} has half of a character in a text (a lone surrogate)",
                          where=where)  # fmt: skip
    return value


# What may be half of a character beyond U+FFFF: JSON can write one that no encoding can.
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_object(path: Path, *, limit_bytes: int) -> dict[str, Any]:
    """A JSON object out of a file of at most `limit_bytes`.

    Raises:
        FormatError: The file cannot be read, is larger, or is no JSON object.
    """
    return parse_object(read_small(path, limit_bytes), path, "the file")


# "a.b.c" of a hundred parts: Python's parser takes the square of their number, in time and memory.
_LONG_KEY = re.compile(rb"""(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){100}""")


def read_toml(path: Path) -> dict[str, Any]:
    """A table out of a TOML file that a person wrote.

    Raises:
        FormatError: The file cannot be read, is far too large, is not TOML, or has a key of more
            than 100 parts.
    """
    data = read_small(path, TOML_LIMIT_BYTES)
    if _LONG_KEY.search(data):
        raise FormatError("has a key of more than 100 parts", where=path)
    table: dict[str, Any] = _parsed(lambda: tomllib.loads(data.decode()), path, "", "TOML")
    return table


def _parsed(parse: Callable[[], Any], where: Where, subject: str, kind: str) -> Any:
    try:
        return parse()
    except UnicodeDecodeError as error:
        raise FormatError(f"{subject}is not UTF-8", where=where) from error
    except RecursionError as error:
        raise FormatError(f"{subject}nests too deeply", where=where) from error
    except ValueError as error:  # says where; also an integer of more digits than Python parses
        raise FormatError(f"{subject}is not {kind}: {error}", where=where) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r} appears twice")
    return values
