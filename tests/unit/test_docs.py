"""What README and guide name exists: commands, options, keys, pictures, files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from textual.binding import Binding, BindingType

from aprtui.app import ExplorerApp
from aprtui.cli import COMMANDS, build_parser
from aprtui.keys import EXPLORER_KEYS
from aprtui.widgets.stage_tree import StageTree

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
SHELL = ("", "sh", "console")
PICTURES = sorted(DOCS.glob("**/*.svg"))


def command_lines() -> Iterator[tuple[str, str]]:
    """Every command line of ours in a block of code, with its page."""
    for page in PAGES:
        for token in MarkdownIt().parse(page.read_text("utf-8")):
            if token.type != "fence" or token.info not in SHELL:
                continue
            for line in token.content.splitlines():
                if token.info == "console" and not line.startswith("$ "):
                    continue
                for part in re.split(r";|\||&&|>", line.removeprefix("$ ")):
                    if part.strip().startswith("aprtui "):
                        yield page.name, part.strip()


def arguments_of(line: str) -> list[str]:
    _, *arguments = shlex.split(line, comments=True)
    return arguments if arguments[0] in (*COMMANDS, "--version") else ["explore", *arguments]


@pytest.mark.parametrize(("page", "line"), list(command_lines()))
def test_a_command_line_is_understood(page: str, line: str) -> None:
    assert callable(build_parser().parse_args(arguments_of(line)).run)


def test_command_lines_are_found() -> None:
    lines = [line for page, line in command_lines() if page == "guide.md"]
    used = {arguments_of(line)[0] for line in lines}
    assert used >= {"explore", "bisect", "diff", "import", "run", "parity", "sweep", "serve"}


def test_a_line_that_is_not_understood_is_noticed() -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(arguments_of("aprtui bisect --no-such-option"))


def test_the_readme_lists_every_command() -> None:
    listed = set(re.findall(r"^\| `aprtui (\w+)", PAGES[0].read_text("utf-8"), re.MULTILINE))
    # The word `explore` may be left out, and is.
    assert listed - {"MODEL"} == set(COMMANDS) - {"explore"}


def known_keys() -> set[str]:
    bindings: list[BindingType] = [*EXPLORER_KEYS, *ExplorerApp.BINDINGS, *StageTree.BINDINGS]
    known = {"ctrl+p", "ctrl+c"}
    for binding in bindings:
        assert isinstance(binding, Binding)
        known |= {binding.key_display} if binding.key_display else set(binding.key.split(","))
    return known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_key_is_one_of_the_explorer(page: Path) -> None:
    named = set(re.findall(r"<kbd>(.+?)</kbd>", page.read_text("utf-8")))
    assert named <= known_keys()
    assert named or page.name != "guide.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_linked_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_picture_is_shown_somewhere() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert [picture.name for picture in PICTURES if picture.name not in text] == []


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_a_picture_is_whole_and_fetches_nothing(picture: Path) -> None:
    text = picture.read_text("utf-8")
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert not re.findall(r"(?:href=\"|url\(\"?|@import)(?!#)", text)
