"""The guide's commands, run one after the other, print what the guide says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guides import pattern, walk

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


@pytest.mark.slow
def test_the_commands_print_what_the_guide_says(tmp_path: Path) -> None:
    walk(GUIDE, tmp_path)


def test_an_output_that_differs_is_noticed() -> None:
    lines = ["...", "next token: ... the same", "exit code 0"]
    said = "a\nb\nnext token: 20 '4', the same\nexit code 0\n"
    assert re.fullmatch(pattern(lines), said)
    assert not re.fullmatch(pattern(lines), said.replace("code 0", "code 1"))
    assert not re.fullmatch(pattern(lines), said + "more\n")
