"""The commands that run, trace and diff, as a user breaks them: in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.network.graph import known_stages
from aprcore.network.stages import StageKey
from aprtui.cli import main
from tiny import (
    SIZES,
    TOKENS,
    draw_weights,
    edited,
    embedded_tokenizer,
    leftovers,
    trace_model,
    write_model,
    write_stages,
)

IDS = ",".join(map(str, TOKENS))
UP = StageKey(1, "ffn_up")
NASTY = "[bold]\x1b[2J\u202e[/INST]"
NASTY_SHOWN = r"[bold]\x1b[2J\u202e[/INST]"
Command = Callable[..., subprocess.CompletedProcess[str]]
HEAVY = ("torch", "transformers", "pyopencl", "gguf", "numpy", "textual", "rich", "tokenizers")


# What Python runs first where it finds it on PYTHONPATH: the file of the second layer's first stage
# takes for ever to open, so that a run is in its middle for as long as a test likes.
HOLDER = """
import sys, time

def hold(event, arguments):
    while event == "open" and str(arguments[0]).endswith("layer-1/attn_norm.bin"):
        time.sleep(0.01)

sys.addaudithook(hold)
"""


def aprtui(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aprtui", *map(str, arguments)],
        capture_output="stdout" not in options, text=True, timeout=60, check=False, **options,
    )  # fmt: skip


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one line on stderr with those words, nothing on stdout, no escape sequence."""
    assert done.returncode == 2, done.stderr
    assert done.stdout in ("", None)
    (line,) = done.stderr.splitlines()
    assert line.startswith("aprtui")
    assert "Traceback" not in line
    assert line.isprintable()
    for word in words:
        assert word in line


def test_a_crash_does_not_pass_for_a_divergence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from aprtui.commands import demo

    def crash(_: object) -> int:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(demo, "run", crash)
    assert main(["demo", "--no-screen"]) == 2
    found = capsys.readouterr()
    assert "Traceback" in found.err and "ZeroDivisionError: of ours" in found.err
    assert found.err.splitlines()[-1].startswith("aprtui: this is a bug in aprtui")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model, its oracle, a wrong dump, and dumps that are damaged in every way."""
    root = tmp_path_factory.mktemp("root")
    vocabulary = [NASTY, *"What is2+?", "Ġ"]
    model = write_model(root / "m.apr", metadata=embedded_tokenizer(vocabulary))
    tensors = trace_model(model)
    write_stages(root / "oracle", tensors)
    write_stages(root / "wrong", edited(tensors, UP, lambda x: -x))
    write_stages(root / "shallow", {k: x for k, x in tensors.items() if k.layer != 2})
    write_stages(root / "other-prompt", tensors, tokens=(1, 2, 3, 4, 5))
    write_stages(root / "out-of-range", tensors, tokens=(1, 40, 3, 4, 5))
    damage = root / "truncated"
    write_stages(damage, tensors)
    os.truncate(damage / f"{UP.path}.bin", 99)
    moved = root / "moved"
    write_stages(moved, tensors)
    (moved / "layer-2/ffn_up.bin").write_bytes((moved / "layer-1/ffn_up.bin").read_bytes())
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    write_stages(root / "bad-sidecar", tensors)
    (root / "bad-sidecar/_trace.json").write_text("{")
    return root


@pytest.fixture
def called(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """The command in `root` and in this process, for its output: a new one takes half a second."""
    monkeypatch.chdir(root)

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        code = main([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return call


class TestArguments:
    """Refused before the model is opened: there is none."""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], ["COMMAND"]),
            (["bisect"], ["no model given"]),
            (["bisect", "x", "--bogus"], ["--bogus"]),
            (["bisect", "x", "--bo\ngus\x1b[2J"], [r"--bo\ngus\x1b[2J"]),
            (["bisect", "x", "--tokens", "1,x"], ["'x'", "--tokens"]),
            (["bisect", "x", "--tokens", ""], ["--tokens"]),
            (["bisect", "x", "--tokens", "9" * 5000], ["is not a token id"]),
            (["bisect", "x", "--prompt", ""], ["prompt is empty"]),
            (["bisect", "x", "--prompt", "a", "--tokens", "1"], ["not allowed with"]),
            (["bisect", "x", "--layers", "3..1"], ["'3..1'", "END", "START"]),
            (["bisect", "x", "--stages", "a,,b"], ["unknown stage 'a'", *known_stages()]),
            (["bisect", "x", "--threads", "0"], ["'0'"]),
            (["trace", "x", "--save-tensor", "attn_nrm"],
             ["unknown stage 'attn_nrm'", *known_stages()]),
            (["trace", "x", "--save-tensor", "attn_norm,,lm_head"], ["empty stage name"]),
            (["trace", "x", "--save-tensor", "all", "--save-tensor-layers", "-1..2"],
             ["save-tensor-layers"]),
            (["trace", "x", "--save-tensor", "all", "--save-tensor-layers", "2..2"],
             ["'2..2'", "END (2)", "START (2)"]),
            (["trace", "x", "--save-tensor-layers", "0..1"], ["nothing to save"]),
            (["trace", "x", "--prompt", ""], ["prompt is empty"]),
            (["diff", "x"], ["B"]),
            (["diff", "x", "y", "--tolerance", "nan"], ["'nan'"]),
            (["diff", "x", "y", "--tolerance", "-1"], ["--tolerance"]),
            (["diff", "x", "y", "--top", "few"], ["'few'"]),
        ],
    )  # fmt: skip
    def test_a_wrong_argument_is_one_line(
        self, tmp_path: Path, arguments: list[str], words: list[str],
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        code = main(arguments)
        output, errors = capsys.readouterr()
        assert_refused(subprocess.CompletedProcess(arguments, code, output, errors), *words)
        assert leftovers(tmp_path) == []

    def test_so_it_is_in_a_process(self, tmp_path: Path) -> None:
        assert_refused(aprtui("bisect", "x", "--layers", "3..1", cwd=tmp_path), "'3..1'")


class TestFiles:
    @pytest.mark.parametrize(
        ("oracle", "words"),
        [
            ("none", ["none", "does not exist"]),
            ("empty", ["empty", "holds no stage files"]),
            ("file", ["file", "is not a directory"]),
            ("bad-sidecar", ["_trace.json", "not JSON"]),
            ("truncated", ["layer-1/ffn_up.bin", "99 bytes"]),
            ("moved", ["layer-2/ffn_up.bin", "layer 1", "layer 2"]),
            ("other-prompt", ["[1, 2, 3, 4, 5]", "[5, 0, 39, 7, 7]"]),
            ("out-of-range", ["40", "vocabulary of 40"]),
            ("x" * 300, ["xxx", "too long"]),
            ("a\x1b[2J", [r"a\x1b[2J"]),
        ],
    )
    def test_an_unusable_oracle_is_one_line(
        self, root: Path, called: Command, oracle: str, words: list[str]
    ) -> None:
        flags = ["--tokens", IDS] if oracle == "other-prompt" else []
        done = called("bisect", root / "m.apr", "--oracle", root / oracle, "--json", *flags)
        assert_refused(done, *words)

    def test_a_damaged_stage_file_is_found_before_the_first_row(self, root: Path) -> None:
        done = aprtui("bisect", root / "m.apr", "--oracle", root / "truncated")
        assert_refused(done, "layer-1/ffn_up.bin", "99 bytes")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["bisect", "none.apr"], ["none.apr", "no such file"]),
            (["bisect", "file"], ["file", "not a model"]),
            (["bisect", "empty"], ["empty", "config.json"]),
            (["bisect", "m.apr", "--tokens", "1,40"], ["token id 40", "vocabulary of 40"]),
            (["trace", "m.apr", "--tokens", "99999999999999", "--save-tensor", "all"],
             ["token id 99999999999999", "vocabulary of 40"]),
            (["trace", "m.apr", "--save-tensor", "all", "--save-tensor-layers", "3..9"],
             ["layers 3..9", "the model has 3"]),
            (["trace", "m.apr", "--save-tensor", "moe_router"], ["selects no stage"]),
            (["trace", "m.apr", "--save-tensor", "all", "--save-tensor-dir", "file/x"],
             ["file/x", "cannot be written"]),
            (["trace", "m.apr", "--prompt", "\udcff"], ["cannot encode"]),
            (["diff", "none.bin", "file"], ["none.bin", "does not exist"]),
            (["diff", "m.apr", "oracle"], ["two files, two directories or two models"]),
            (["diff", "truncated", "oracle"], ["truncated/layer-1/ffn_up.bin"]),
            (["diff", "oracle/lm_head.bin", "oracle/final_norm.bin"], ["40", "100", "size"]),
            (["diff", "oracle/layer-1/ffn_up.bin", "oracle/layer-2/ffn_up.bin"], ["layer is 2"]),
            (["m.apr", "--oracle", "oracle"], ["needs a terminal"]),
        ],
    )  # fmt: skip
    def test_an_unusable_file_is_one_line_and_nothing_is_written(
        self, root: Path, called: Command, arguments: list[str], words: list[str]
    ) -> None:
        before = leftovers(root)
        assert_refused(called(*arguments), *words)
        assert leftovers(root) == before

    def test_so_it_is_in_a_process(self, root: Path) -> None:
        before = leftovers(root)
        assert_refused(aprtui("bisect", "none.apr", cwd=root), "none.apr", "no such file")
        # The system's own error: what is printed goes nowhere from then on.
        assert_refused(aprtui("bisect", "x" * 300, cwd=root), "too long")
        assert leftovers(root) == before

    def test_names_that_look_like_markup_are_shown_literally(
        self, root: Path, tmp_path: Path
    ) -> None:
        model = tmp_path / f"{NASTY.replace('/', '')}.apr"
        model.write_bytes((root / "m.apr").read_bytes())
        shown = NASTY_SHOWN.replace("/", "")
        for command in (["bisect", model, "--oracle", root / "oracle"],
                        ["trace", model, "--tokens", "0", "--save-tensor", "lm_head"],
                        ["diff", model, model]):  # fmt: skip
            done = aprtui(*command)
            assert done.returncode == 0, done.stderr
            assert "\x1b" not in done.stdout
            assert shown in done.stdout
        # Token 0 is as nasty, and appears among the tokens of the run.
        assert NASTY_SHOWN in aprtui("bisect", model, "--tokens", "0").stdout

    def test_a_name_that_is_not_unicode_is_shown(self, root: Path, tmp_path: Path) -> None:
        model = tmp_path / "m\udcff.apr"
        model.write_bytes((root / "m.apr").read_bytes())
        for flags in ([], ["--json"]):
            done = aprtui("bisect", model, "--oracle", root / "oracle", *flags)
            assert (done.returncode, done.stderr) == (0, "")
            assert r"m\udcff.apr" in done.stdout

    def test_a_terminal_without_the_characters_is_no_error(self, root: Path) -> None:
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        done = aprtui("bisect", root / "m.apr", "--oracle", root / "oracle", env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert "PASS" in done.stdout


class TestBisect:
    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            (["m.apr", "--oracle", "oracle"], 0),
            (["--trace", "oracle", "--oracle", "oracle"], 0),
            (["--trace", "wrong", "--oracle", "oracle"], 1),
            (["m.apr", "--trace", "wrong", "--oracle", "oracle"], 1),
            (["m.apr", "--oracle", "shallow"], 0),
            (["m.apr", "--oracle", "shallow", "--strict"], 1),
            (["m.apr"], 0),
        ],
    )
    def test_exit_codes(self, called: Command, arguments: list[str], code: int) -> None:
        done = called("bisect", *arguments)
        assert (done.returncode, done.stderr) == (code, "")

    def test_json_is_the_same_finding(self, root: Path) -> None:
        arguments = ["bisect", "--trace", "wrong", "--oracle", "oracle"]
        as_json = aprtui(*arguments, "--json", cwd=root)
        assert (as_json.returncode, as_json.stderr) == (1, "")
        report = json.loads(as_json.stdout)
        assert report["schema"] == "aprtui-report-v1"
        assert report["first_divergence"] == "layer-1/ffn_up"
        assert aprtui(*arguments, cwd=root).stdout.splitlines()[-1] == report["summary"]

    def test_the_table_names_the_first_divergence(self, root: Path) -> None:
        lines = aprtui("bisect", "--trace", "wrong", "--oracle", "oracle", cwd=root).stdout
        assert "first divergence: layer 1 · ffn_up FAIL" in lines.splitlines()[-1]
        (row,) = (line for line in lines.splitlines() if line.startswith("layer-1/ffn_up "))
        assert "5x28" in row
        assert "-1.0000000" in row

    def test_missing_layers_are_one_line_and_never_zeros(self, root: Path) -> None:
        lines = aprtui("bisect", "m.apr", "--oracle", "shallow", cwd=root).stdout.splitlines()
        (row,) = (line for line in lines if line.startswith("layer-2/"))
        assert "17 stages" in row
        assert "MISSING  the oracle lacks it" in row

    def test_nan_and_infinity_say_nothing_on_stderr(self, root: Path, tmp_path: Path) -> None:
        weights = draw_weights()
        name = "model.layers.1.mlp.up_proj.weight"
        for value in (np.nan, np.inf):
            model = write_model(tmp_path / "m.apr", changed={name: value * weights[name]})
            done = aprtui("bisect", model, "--oracle", root / "oracle")
            assert (done.returncode, done.stderr) == (1, "")
            done = aprtui("trace", model, "--tokens", "1,2")
            assert (done.returncode, done.stderr) == (0, "")


class TestTrace:
    def test_two_runs_give_identical_bytes_and_the_same_logits_as_without_saving(
        self, root: Path, tmp_path: Path
    ) -> None:
        runs = []
        for name in "ab":
            done = aprtui("trace", root / "m.apr", "--tokens", IDS, "--save-tensor", "ALL",
                          "--save-tensor-layers", "0..2",
                          "--save-tensor-dir", tmp_path / name)  # fmt: skip
            assert (done.returncode, done.stderr) == (0, "")
            runs.append(done.stdout.splitlines()[1:])
        names = [name for name in leftovers(tmp_path / "a") if name.endswith(".bin")]
        assert len(names) == 1 + 2 * 17 + 2
        assert leftovers(tmp_path / "a") == leftovers(tmp_path / "b")
        for name in names:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        unsaved = aprtui("trace", root / "m.apr", "--tokens", IDS).stdout.splitlines()
        assert runs[0] == runs[1] == unsaved

    def test_the_defaults_are_layer_zero_beside_the_model(self, root: Path, tmp_path: Path) -> None:
        model = tmp_path / "q2.5.apr"
        model.write_bytes((root / "m.apr").read_bytes())
        done = aprtui("trace", model, "--save-tensor", " Attn_Norm , lm_head,attn_norm")
        assert done.returncode == 0, done.stderr
        assert leftovers(tmp_path) == [
            "q2.5-trace", "q2.5-trace/_trace.json", "q2.5-trace/layer-0",
            "q2.5-trace/layer-0/attn_norm.bin", "q2.5-trace/lm_head.bin", "q2.5.apr",
        ]  # fmt: skip
        record = json.loads((tmp_path / "q2.5-trace/_trace.json").read_text())
        assert record["prompt"] == "What is 2+2?"
        assert len(record["tokens"]) == 12

    def test_ctrl_c_leaves_nothing_and_says_nothing(self, root: Path, tmp_path: Path) -> None:
        tokens = ",".join(["1"] * 2000)
        holder = tmp_path / "holder"
        holder.mkdir()
        (holder / "sitecustomize.py").write_text(HOLDER)
        process = subprocess.Popen(
            [sys.executable, "-m", "aprtui", "trace", root / "m.apr", "--tokens", tokens,
             "--save-tensor", "all", "--save-tensor-layers", "all",
             "--save-tensor-dir", tmp_path / "new/dir"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(holder), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        while process.poll() is None and not list(tmp_path.rglob("attn_norm.bin")):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        # Python itself may end by the signal when it came during an import; shells show 130 too.
        assert process.returncode in (130, -signal.SIGINT)
        assert (output, errors) == ("", "")
        assert leftovers(tmp_path) == ["holder", "holder/sitecustomize.py"]


class TestDiff:
    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            (["oracle", "oracle"], 0),
            (["oracle", "wrong"], 1),
            (["oracle", "wrong", "--tolerance", "2.01"], 0),
            (["oracle", "shallow"], 0),
            (["oracle", "shallow", "--strict"], 1),
            (["m.apr", "m.apr"], 0),
            (["oracle/layer-1/ffn_up.bin", "wrong/layer-1/ffn_up.bin"], 1),
            (["oracle/lm_head.bin", "wrong/lm_head.bin"], 0),
        ],
    )
    def test_exit_codes(self, called: Command, arguments: list[str], code: int) -> None:
        done = called("diff", *arguments)
        assert (done.returncode, done.stderr) == (code, "")
        assert done.stdout.splitlines()[-1] == (
            "different" if code else "equal within the tolerance"
        )

    @pytest.mark.parametrize(("a", "b", "code"), [("oracle", "wrong", 1), ("m.apr", "m.apr", 0)])
    def test_json(self, called: Command, a: str, b: str, code: int) -> None:
        as_json = called("diff", a, b, "--json")
        assert (as_json.returncode, as_json.stderr) == (code, "")
        assert json.loads(as_json.stdout)["schema"] == "apr-stage-diff-v1"


class TestOutput:
    COMMANDS = (["bisect", "m.apr", "--oracle", "oracle"],
                ["bisect", "m.apr", "--oracle", "oracle", "--json"],
                ["diff", "oracle", "oracle"],
                ["trace", "m.apr", "--tokens", "1"])  # fmt: skip

    @pytest.mark.parametrize("arguments", COMMANDS)
    def test_a_reader_that_leaves_is_no_divergence_and_no_traceback(
        self, root: Path, arguments: list[str]
    ) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = aprtui(*arguments, cwd=root, stdout=writer, stderr=subprocess.PIPE)
        finally:
            os.close(writer)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    @pytest.mark.parametrize("arguments", COMMANDS)
    def test_a_full_disk_behind_stdout_is_one_line(self, root: Path, arguments: list[str]) -> None:
        with Path("/dev/full").open("w") as full:
            done = aprtui(*arguments, cwd=root, stdout=full, stderr=subprocess.PIPE)
        assert_refused(done, "No space left on device")


class TestImports:
    def loaded(self, code: str) -> set[str]:
        """Heavy packages in a fresh interpreter after `code`."""
        probe = f"{code}\nimport sys; print(*({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
        probe = probe.replace(repr(HEAVY), repr(set(HEAVY)))
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True,
                              timeout=60, check=True)  # fmt: skip
        return set(done.stderr.split())

    def test_the_command_line_loads_nothing_heavy(self) -> None:
        assert self.loaded("import aprtui.cli") == set()

    @pytest.mark.parametrize("command", ["", "bisect", "trace", "diff"])
    def test_help_loads_nothing_heavy(self, command: str) -> None:
        call = [*([command] if command else []), "--help"]
        assert self.loaded(f"from aprtui.cli import main; assert main({call}) == 0") == set()

    def test_comparing_two_directories_loads_no_model_library(self, root: Path) -> None:
        call = ["bisect", "--trace", str(root / "oracle"), "--oracle", str(root / "oracle")]
        found = self.loaded(f"from aprtui.cli import main; assert main({call}) == 0")
        assert found & {"torch", "transformers", "pyopencl", "gguf", "tokenizers"} == set()

    def test_version(self) -> None:
        done = aprtui("--version")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("aprtui ")


def test_sizes_used_above() -> None:
    assert (SIZES["V"], SIZES["F"], len(TOKENS) * SIZES["E"]) == (40, 28, 100)
