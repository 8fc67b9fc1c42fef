"""A guide's commands, run one after the other, and what they print held against the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from markdown_it import MarkdownIt


def steps(page: Path) -> list[tuple[str, list[str]]]:
    """Every command behind a `$`, with the lines printed below it."""
    found: list[tuple[str, list[str]]] = []
    for token in MarkdownIt().parse(page.read_text("utf-8")):
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


def walk(page: Path, folder: Path) -> None:
    """Run a page's commands in a folder; assignments hold for those that follow."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assignments = ""
    for command, lines in steps(page):
        if re.match(r"\w+=", command):
            assignments += f"{command}\n"
        ran = subprocess.run(
            ["bash", "-c", f"{assignments}{command}"], cwd=folder, text=True, timeout=120,
            env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert re.fullmatch(pattern(lines), ran.stdout), f"$ {command}\n{ran.stdout}"
