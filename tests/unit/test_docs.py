"""What README and guide name exists: commands, options, keys, pictures, files."""

from __future__ import annotations

import ast
import importlib
import io
import re
import shlex
import tokenize
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
CONTRACTS = sorted((DOCS / "contracts").glob("*.yaml"))
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("src", "tools", "tests")
    for path in (ROOT / folder).rglob("*.*")
    if path.suffix in (".py", ".cl", ".tcss")
)
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


# What begins with one of these, or ends as our own texts and sources do, is a file of ours.
_FOLDER = r"(?:src|docs|tests|tools|snapshots|aprcore|aprtui)/"
_NAME = r"[\w.*-]*(?:/[\w.*-]+)*"
_FILE = re.compile(rf"(?<![\w/.<-])({_FOLDER}{_NAME}|[\w/-]+\.(?:md|cl|schema\.json))(?![\w/])")
_DOTTED = re.compile(r"`(apr(?:core|tui)(?:\.\w+)+)(?:\(.*?\))?`")
# Files of other projects, and files that a command is told to write.
FOREIGN = {"src/models", "src/models/gemma2-iswa.cpp"}  # fmt: skip


def cited_files(text: str) -> list[str]:
    """What looks like a file of this repository, without the end of a sentence."""
    return [name.rstrip(".-") for name in _FILE.findall(text)]


def is_there(name: str) -> bool:
    """Whether a file or folder exists, `NAME` standing for any word."""
    places = (ROOT, ROOT / "src", DOCS, ROOT / "src/aprcore/engines/opencl/kernels")
    return any([*place.glob(name.replace("NAME", "*"))] for place in places)


def is_defined(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            annotated = attribute in getattr(found, "__annotations__", {})
            if not annotated and not hasattr(found, attribute):
                return False
            found = getattr(found, attribute, None)
        return True
    return False


def words_of(path: Path) -> str:
    """A source's comments and docstrings, or the whole of a file that is no Python."""
    text = (ROOT / path).read_text("utf-8")
    if path.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    said = [token.string for token in tokens if token.type == tokenize.COMMENT]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return "\n".join([*said, *filter(None, map(ast.get_docstring, nodes))])


@pytest.mark.parametrize(
    "page", [*PAGES, *CONTRACTS, ROOT / "CHANGELOG.md"], ids=lambda page: page.name
)
def test_a_page_cites_what_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    quoted = " ".join(re.findall(r"`([^`\n]+)`", text)) if page.suffix == ".md" else text
    assert [n for n in cited_files(quoted) if n not in FOREIGN and not is_there(n)] == []
    assert [name for name in _DOTTED.findall(text) if not is_defined(name)] == []


@pytest.mark.parametrize("folder", ["src", "tools", "tests"])
def test_a_docstring_cites_what_is_there(folder: str) -> None:
    gone = []
    for path in SOURCES:
        if path.parts[0] != folder:
            continue
        said = words_of(path)
        gone += [(path, n) for n in cited_files(said) if n not in FOREIGN and not is_there(n)]
        gone += [(path, name) for name in _DOTTED.findall(said) if not is_defined(name)]
    assert gone == []


def test_what_is_gone_is_noticed() -> None:
    cited = cited_files("see FORMATS.md, src/aprcore/stages.py and docs/formats.md.")
    assert cited == ["FORMATS.md", "src/aprcore/stages.py", "docs/formats.md"]
    assert [is_there(name) for name in cited] == [False, False, True]
    assert is_there("aprcore/network/architectures/NAME.py")
    assert is_defined("aprcore.network.graph.Stage.shown")
    assert not is_defined("aprcore.stages") and not is_defined("aprcore.network.graph.Stages")


def test_every_picture_is_shown_somewhere() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert [picture.name for picture in PICTURES if picture.name not in text] == []


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_a_picture_is_whole_and_fetches_nothing(picture: Path) -> None:
    text = picture.read_text("utf-8")
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert not re.findall(r"(?:href=\"|url\(\"?|@import)(?!#)", text)
