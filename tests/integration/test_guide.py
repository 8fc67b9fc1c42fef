"""The guide's commands, run one after the other, print what the guide says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def steps() -> list[tuple[str, list[str]]]:
    """Every command behind a `$`, with the lines printed below it."""
    found: list[tuple[str, list[str]]] = []
    for token in MarkdownIt().parse(GUIDE.read_text("utf-8")):
        if token.type != "fence" or token.info != "console":
            continue
        for line in token.content.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif line.startswith("> "):
                found[-1] = (f"{found[-1][0]}\n{line[2:]}", [])
            else:
                found[-1][1].append(line)
    return found


def pattern(lines: list[str]) -> str:
    """`...` stands for any text of a line; on its own, for any lines."""
    return "".join(
        r"(?:.*\n)*?" if line == "..." else ".*".join(map(re.escape, line.split("..."))) + r"\n"
        for line in lines
    )


@pytest.mark.slow
def test_the_commands_print_what_the_guide_says(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assignments = ""
    for command, lines in steps():
        if re.match(r"\w+=", command):
            assignments += f"{command}\n"
        ran = subprocess.run(
            ["bash", "-c", f"{assignments}{command}"], cwd=tmp_path, text=True, timeout=120,
            env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert re.fullmatch(pattern(lines), ran.stdout), f"$ {command}\n{ran.stdout}"


def test_an_output_that_differs_is_noticed() -> None:
    lines = ["...", "next token: ... the same", "exit code 0"]
    said = "a\nb\nnext token: 20 '4', the same\nexit code 0\n"
    assert re.fullmatch(pattern(lines), said)
    assert not re.fullmatch(pattern(lines), said.replace("code 0", "code 1"))
    assert not re.fullmatch(pattern(lines), said + "more\n")
