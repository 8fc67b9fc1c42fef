"""What a file may hold is a type; a fault is one line with the file, the key and the value."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest

from aprcore.ground.errors import FormatError, PlanError
from aprcore.ground.fields import convert, parse_object, read_object, read_toml


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    path: str
    count: Annotated[int, msgspec.Meta(ge=0)] = 0


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    ratio: Annotated[float, msgspec.Meta(ge=0, le=1e300)] | None = None
    mixed: list[str | tuple[int, ...]] = []
    flag: bool = False
    some: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = ("a",)
    table: dict[str, int] = {}
    inner: list[Inner] = []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"ratio": "x"}, "ratio is 'x', not a number"),
        ({"ratio": -1}, "ratio is -1, not a number >= 0.0"),
        ({"ratio": float("nan")}, "ratio is nan, not a number >= 0.0"),
        ({"ratio": 10**400}, f"ratio is 1{'0' * 56}..., out of range"),
        ({"mixed": [3]}, "mixed[0] is 3, not a text or a list"),
        ({"mixed": ["a", [1, True]]}, "mixed[1][1] is True, not an integer"),
        ({"flag": 1}, "flag is 1, not true or false"),
        ({"some": []}, "some is [], not a list of length >= 1"),
        ({"table": {"k": "v"}}, "table has an entry that is not an integer"),
        ({"inner": [{"path": "a"}, {}]}, "inner[1].path is missing"),
        ({"inner": [{"path": "a", "count": -1}]}, "inner[0].count is -1, not an integer >= 0"),
        ({"inner": [{"path": "a", "size": 1}]}, "unknown key 'inner[0].size'"),
        ({"rato": 1}, "unknown key 'rato'; did you mean ratio? There are ratio, mixed, flag,"),
        (3, "the whole is 3, not a table"),
    ],
)
def test_a_fault_names_key_value_and_what_is_allowed(value: Any, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        convert(value, Outer, "f.toml")
    assert str(caught.value).startswith(f"f.toml: {said}")


def test_a_prefix_says_which_table() -> None:
    for prefix, said in (
        ("b.", "unknown key 'b.flg'; did you mean b.flag?"),
        ("matrix 1: ", "matrix 1: unknown key 'flg'; did you mean flag?"),
    ):
        with pytest.raises(PlanError) as caught:
            convert({"flg": 1}, Outer, "f", prefix=prefix, error=PlanError, hint="read the page")
        assert str(caught.value).startswith(f"f: {said}")
    with pytest.raises(PlanError, match=r"f: b\.flag is 1, not true or false; read the page"):
        convert({"flag": 1}, Outer, "f", prefix="b.", error=PlanError, hint="read the page")


def test_of_a_json_key_that_is_there_twice_the_last_counts() -> None:
    assert parse_object(b'{"a": 1, "a": 2}', "f", "it") == {"a": 2}


def test_what_python_writes_for_infinity_is_read() -> None:
    assert parse_object(b'{"a": -Infinity}', "f", "it") == {"a": -math.inf}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[]", "it is not a JSON object"),
        (b'{"a": }', "it is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "it is not JSON"),
        (b'{"\xff": 1}', "it is not UTF-8"),
        (b"[" * 100_000, "it nests too deeply"),
    ],
)
def test_what_is_no_json_object(data: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=f"f: {said}"):
        parse_object(data, "f", "it")


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}" + " " * 100)
    with pytest.raises(FormatError, match="102 bytes are too many"):
        read_object(tmp_path / "a.json", limit_bytes=10)


def test_half_a_character_is_no_text() -> None:
    """No encoding can write it, so nothing that is made of it could be saved or printed."""
    with pytest.raises(FormatError, match="half of a character"):
        parse_object(b'{"a": ["\\ud83d"]}', "f.json", "the file")
    assert parse_object(b'{"a": "\\ud83d\\ude00 \\\\ud83d"}', "f.json", "the file") == {
        "a": "\U0001f600 \\ud83d"
    }


@pytest.mark.parametrize("text", ["a." * 200_000 + "b = 1", "[" + "'a' . " * 90_000 + "b]",
                                  "x = {" + "a." * 1000 + "b = 1}"],
    ids=["key", "table", "inline"])  # fmt: skip
def test_a_key_of_many_parts_is_refused_before_it_is_parsed(tmp_path: Path, text: str) -> None:
    """Python's parser takes a minute for the first."""
    path = tmp_path / "t.toml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(FormatError, match="a key of more than 100 parts"):
        read_toml(path)
    assert time.process_time() - began < 1
    path.write_text(f'a.b.c = [{"1.5, " * 500}]\nd = "{"e. " * 99}{"word word. " * 100}"')
    assert len(read_toml(path)["a"]["b"]["c"]) == 500


def test_a_value_of_thousands_of_digits() -> None:
    with pytest.raises(FormatError, match="too much to show"):
        convert({"flag": 16**9999}, Outer, "f")
