"""Text of files, in every place that a file has for it, through every command and view.

Nothing of it may come out as it is: no escape sequence, no direction mark, no line break and no
markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from aprcore.network.stages import StageKey
from aprcore.records.saved_run import save_run
from aprtui.cli import main
from aprtui.widgets.tabs import DetailTab
from dump_files import write_safetensors
from hostile import CONTROLS, HOSTILE, HOSTILE_NAME, assert_harmless, poisoned
from pseudo_terminal import Terminal
from report_runs import Page, found_in, written
from tiny import TOKENS, edited, embedded_tokenizer, trace_model, write_model, write_stages

IDS = ",".join(map(str, TOKENS))
UP = StageKey(1, "ffn_up")
# Of the explorer; without y, which writes the clipboard as it should, and q.
EVERY_KEY = [*"nwpudbstogv", *(tab.key for tab in DetailTab), *"k[]mahHl+-0:xe?"]
Called = Callable[..., tuple[int, str, str]]


@pytest.fixture
def called(capsys: pytest.CaptureFixture[str]) -> Called:
    """Runs a command line: its exit code and what it printed, which is harmless."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert_harmless(out)
        assert_harmless(err)
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its oracle and a wrong dump, all of whose names and texts are hostile."""
    root = tmp_path_factory.mktemp("root") / HOSTILE_NAME
    root.mkdir()
    texts = {"name": HOSTILE, "chat_template": HOSTILE, f"x{HOSTILE}": HOSTILE}
    vocabulary = [HOSTILE, *"What is2+?", "Ġ"]
    model = write_model(root / "m.apr", metadata=texts | embedded_tokenizer(vocabulary))
    tensors = trace_model(model)
    told: dict[str, Any] = {
        "prompt": HOSTILE, "backend": HOSTILE, "device": HOSTILE, "driver": HOSTILE,
        "attention": HOSTILE, "checked": HOSTILE, "created_utc": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
        "model": {"file": HOSTILE, "architecture": HOSTILE, "sha256": HOSTILE},
    }  # fmt: skip
    write_stages(root / "oracle", tensors, **told)
    write_stages(root / "wrong", edited(tensors, UP, lambda x: -x), **told)
    (root / "wrong" / "layer-1" / f"{HOSTILE_NAME}.bin").write_bytes(b"x")
    arrays = {f"{key.path}": values for key, values in tensors.items()}
    arrays[HOSTILE] = arrays[f"{UP.path}"]
    write_safetensors(root / "dump.safetensors", arrays, {HOSTILE: HOSTILE})
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved run, all of whose texts are hostile."""
    path = tmp_path_factory.mktemp("saved") / "r.aprx"
    save_run(path, poisoned(found_in("rope-pairs")), None, ["aprtui", HOSTILE])
    return path


def assert_inert_markdown(text: str) -> None:
    """No image, no link and no element but those that fold a table."""
    pending = MarkdownIt("commonmark").enable("table").parse(text)
    while pending:
        token = pending.pop()
        pending += token.children or ()
        assert token.type not in ("image", "link_open"), token
        if token.type in ("html_block", "html_inline"):
            assert re.fullmatch(r"(</?(details|summary)>|<!-- -->|[\w\s.,%]|not PASS)*",
                                token.content), token  # fmt: skip


def arguments(root: Path) -> dict[str, list[str | Path]]:
    """Command lines that show text of files, by what they are."""
    model, oracle, wrong = root / "m.apr", root / "oracle", root / "wrong"
    dump = root / "dump.safetensors"
    run: list[str | Path] = ["bisect", model, "--trace", wrong, "--oracle", oracle]
    return {
        "bisect": run,
        "bisect alone": ["bisect", model, "--tokens", IDS],
        "bisect prompt": ["bisect", model, "--prompt", "What"],
        "bisect pair": ["bisect", "--trace", wrong, "--against", oracle],
        "bisect dump": ["bisect", model, "--trace", dump, "--tokens", IDS, "--oracle", oracle],
        "bisect json": [*run, "--json"],
        "trace": ["trace", model, "--tokens", "0"],
        "diff": ["diff", wrong, oracle],
        "diff json": ["diff", wrong, oracle, "--json"],
        "diff models": ["diff", model, model],
        "inspect": ["inspect", model],
        "inspect json": ["inspect", model, "--json"],
        "verify": ["inspect", model, "--verify"],
        "run": ["run", model, "--tokens", "0,0", "--max-tokens", "3"],
        "parity": ["parity", model, "--tokens", IDS, "--against", "reference", "--steps", "1"],
    }


@pytest.mark.parametrize("name", arguments(Path()))
def test_what_commands_print(root: Path, called: Called, name: str) -> None:
    code, out, err = called(*arguments(root)[name])
    assert code in (0, 1) and out, err
    if "json" in name:
        json.loads(out)


def test_what_commands_print_of_what_they_write(root: Path, called: Called, tmp_path: Path) -> None:
    target = tmp_path / HOSTILE_NAME
    code, out, _ = called("trace", root / "m.apr", "--tokens", "0", "--save-tensor", "lm_head",
                          "--save-tensor-dir", target)  # fmt: skip
    assert code == 0 and r"\x1b]52;c;UFdO" in out
    assert called("import", root / "m.apr", "-o", f"{target}.apr")[0] in (0, 2)


@pytest.mark.parametrize(
    "words",
    [
        ["bisect"], ["trace"], ["run"], ["inspect"], ["parity"], ["serve"], ["explore"],
        ["sweep"], ["oracle", "-o", "x"], ["import", "-o", "x.apr"], ["diff", "x"],
        ["bisect", "--tolerances"], ["bisect", "m", "--names"], ["demo", "--fault"],
        ["devices", "--device"], ["bisect", "--layers"], ["bisect", "--budget"], [],
    ],
)  # fmt: skip
def test_what_they_refuse(called: Called, words: list[str]) -> None:
    code, out, err = called(*words, HOSTILE_NAME)
    assert code == 2 and not out and err.count("\n") == 1


@pytest.mark.slow  # imports torch and transformers
def test_where_an_oracle_goes(called: Called, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from models import build, save, save_tokenizer, small_model

    made = save(build(small_model("qwen2")), tmp_path / "made")
    save_tokenizer(made)
    model = made.rename(tmp_path / HOSTILE_NAME[:-1])  # transformers opens UTF-8 only
    code, out, _ = called("oracle", model, "-o", tmp_path / f"{HOSTILE_NAME}2", "--prompt", HOSTILE)
    assert code == 0 and r"\x1b]52;c;UFdO" in out


class TestSweep:
    def cases(self, root: Path, folder: Path) -> Path:
        path = folder / "cases.toml"
        # TOML has a way to spell every character that there is in UTF-8.
        (folder / "m.apr").symlink_to(root / "m.apr")
        name = HOSTILE.replace("/", "\\")[:180]
        (folder / name).symlink_to(root / "oracle")
        path.write_text(
            f'[[matrix]]\nmodels = ["m.apr"]\noracles = [{json.dumps(name)}]\n'
            f"prompts = [{{ name = {json.dumps(HOSTILE)}, tokens = [{IDS}] }}]\n"
            f"[[case]]\nmodel = {json.dumps(name)}\n",
            "utf-8",
        )
        return path

    def test_its_table_and_reports(self, root: Path, called: Called, tmp_path: Path) -> None:
        cases = self.cases(root, tmp_path)
        for suffix in ("md", "json"):
            report = tmp_path / f"r.{suffix}"
            code, out, err = called("sweep", cases, "--jobs", "1", "--report", report)
            assert code == 2 and out, err
            text = report.read_text("utf-8")
            assert_harmless(text)
            if suffix == "md":
                assert_inert_markdown(text)

    def test_verdicts_of_a_results_file(self, root: Path, called: Called, tmp_path: Path) -> None:
        cases = self.cases(root, tmp_path)
        called("sweep", cases, "--jobs", "1")
        results = tmp_path / "cases.results.jsonl"
        first = json.loads(results.read_text().splitlines()[0])
        for part in ({"verdict": HOSTILE}, {"counts": {HOSTILE: 1}}):
            results.write_text(json.dumps(first | part) + "\n")
            code, out, err = called("sweep", cases, "--jobs", "1")
            assert code == 2 and not out and "no result of a sweep" in err


class TestSavedRun:
    def test_its_table(self, saved: Path, called: Called) -> None:
        for flags in ([], ["--json"]):
            code, out, _ = called("bisect", saved, *flags)
            assert code == 1 and "pwn()" in out

    def test_its_reports(self, saved: Path, called: Called, tmp_path: Path) -> None:
        for suffix in ("html", "md", "json"):
            report = tmp_path / f"r.{suffix}"
            assert called("bisect", saved, "--report", report)[0] == 1
            text = report.read_text("utf-8")
            assert_harmless(text)
            if suffix == "md":
                assert_inert_markdown(text)
            if suffix == "html":
                sound = tmp_path / "sound"
                sound.mkdir()
                tags = Page(written(found_in("rope-pairs"), ".html", sound, command=["x"])).tags()
                assert Page(text).tags() <= tags
                assert "<script>pwn" not in text and "pwn()" in text

    def test_a_name_of_a_stage_that_does_not_print(self, called: Called, tmp_path: Path) -> None:
        found = found_in("rope-pairs")
        stage = replace(found.stages[0], key=StageKey(0, "\x1b]52;c;UFdO\x07"))
        run = tmp_path / "r.aprx"
        save_run(run, replace(found, stages=(stage, *found.stages[1:])), None, [])
        code, out, err = called("bisect", run)
        assert code == 2 and not out and r"\x1b]52" in err


@pytest.mark.slow  # every key, one after the other
@pytest.mark.parametrize("is_saved", [True, False])
def test_what_the_explorer_draws(saved: Path, root: Path, is_saved: bool) -> None:
    model, wrong, oracle = (str(root / name) for name in ("m.apr", "wrong", "oracle"))
    words = [str(saved)] if is_saved else [model, "--trace", wrong, "--oracle", oracle]
    terminal = Terminal("explore", *words)
    try:
        terminal.wait_for("lm_head", "palette")
        for key in EVERY_KEY:
            terminal.press(key)
            terminal.read()
            terminal.press("\x1b")
            terminal.read()
        terminal.wait_for("lm_head", "palette")
        shown = terminal.output.decode("utf-8", errors="surrogateescape")
        assert "evil" in shown or not is_saved
        for control in CONTROLS:
            assert control not in shown, control
    finally:
        terminal.kill()
