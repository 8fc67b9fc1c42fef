"""The parts of a sweep: its list of cases, its results file, its files and its figures."""

from __future__ import annotations

import json
import os
import re
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import jsonschema
import pytest

from aprcore.engines.engine import Engine
from aprcore.engines.numpy import NumpyBackend
from aprcore.ground.errors import AprError, BackendError, FormatError, PlanError
from aprcore.network.graph import StageKey
from aprcore.runs import second_side
from aprcore.sweep import plan
from aprcore.sweep.cases import CASE_SCHEMA, Case, CaseSettings, Prompt, Source, make_request
from aprcore.sweep.files import NEIGHBOURS, fetch, fingerprint
from aprcore.sweep.plan import MOST_CASES, read_sweep
from aprcore.sweep.report import Spread, find_differences, to_json, to_markdown
from aprcore.sweep.results import (
    CaseResult,
    Fault,
    ResultsFile,
    error_result,
    parse_result,
    result_to_json,
)
from aprcore.sweep.run import Estimate
from aprcore.sweep.worker import run_case
from aprtui.cli import main
from aprtui.commands.sweep import format_duration
from tiny import edited, leftovers, trace_model, write_model, write_stages
from wrong_backends import MissingTail, OutOfMemory

DOCS = Path(__file__).parents[2] / "docs"

UP = StageKey(1, "ffn_up")


def write(folder: Path, text: str) -> Path:
    path = folder / "cases.toml"
    path.write_text(text)
    return path


def make_case(model: str = "m", backend: str = "numpy", prompt: str = "p") -> Case:
    return Case(Source(model, f"/{model}"), None, None, Prompt(prompt, prompt), backend, None,
                CaseSettings())  # fmt: skip


def make_result(case: Case, path: str | None = None, cause: str | None = "theta") -> CaseResult:
    if path is None:
        return CaseResult(case.id, "PASS", False, "fine", elapsed_s=1.0)
    fault = Fault(path, "FAIL", "kernel", cause, f"{cause} (cos 1.0)", 0.5)
    return CaseResult(case.id, "FAIL", True, "first divergence", (fault,), {"FAIL": 1}, 0.5, path,
                      2.0)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model, its oracle, and a model with one wrong weight."""
    root = tmp_path_factory.mktemp("tiny")
    tensors = trace_model(write_model(root / "m.apr"))
    write_stages(root / "oracle", tensors)
    write_stages(root / "wrong", edited(tensors, UP, lambda x: -x))
    return root


class TestPlan:
    def test_every_combination_is_a_case(self, tmp_path: Path) -> None:
        sweep = read_sweep(write(tmp_path, """
            [defaults]
            stages = "attn_norm,ffn_out"
            [[matrix]]
            models = ["a.apr", { path = "b.gguf", name = "B" }]
            oracles = ["stages/{model}/{prompt}"]
            prompts = [{ name = "sum", text = "2+2" }, [1, 2]]
            backends = ["numpy", "opencl"]
            layers = ["0..2", "all"]
            device = "pocl"
            [[case]]
            trace = "dump"
            oracle = "other"
            tokens = [3]
            strict = true
        """))  # fmt: skip
        assert len(sweep.cases) == 2 * 2 * 2 * 2 + 1
        assert len({case.id for case in sweep.cases}) == len(sweep.cases)
        first, *_, last = sweep.cases
        assert first.axes == {
            "model": "a.apr", "trace": "-", "oracle": "a.apr/sum", "prompt": "sum",
            "backend": "numpy", "layers": "0..2",
        }  # fmt: skip
        assert first.settings.stages == "attn_norm,ffn_out"
        oracles = {case.oracle.location for case in sweep.cases if case.oracle}
        assert oracles == {
            str(tmp_path / p)
            for p in (
                "stages/a.apr/sum",
                "stages/a.apr/1,2",
                "stages/B/sum",
                "stages/B/1,2",
                "other",
            )
        }
        assert (last.backend, last.prompt.tokens, last.model) == ("dump", (3,), None)
        assert last.settings.strict and not first.settings.strict

    def test_what_the_documentation_writes_is_understood(self, tmp_path: Path) -> None:
        """A page that shows a wrong key, or leaves one out, is worse than none."""
        page = DOCS / "sweep.md"
        examples = re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL)
        counts = []
        for example in examples:
            path = tmp_path / "cases.toml"
            path.write_text(example.replace("s3://bucket", "weights"))
            counts.append(len(read_sweep(path).cases))
        assert counts == [3 * 2 * 2, 2 * 2 + 1, 1]
        for key in {*plan.Matrix.__struct_fields__, *plan.Single.__struct_fields__}:
            assert f"`{key}`" in page.read_text()

    def test_the_command_lines_limit_holds_whatever_the_file_says(self, tmp_path: Path) -> None:
        path = write(tmp_path, """
            [defaults]
            timeout = 60
            [[matrix]]
            models = ["a"]
            timeout = 1.5
            [[case]]
            model = "b"
        """)  # fmt: skip
        assert [case.settings.timeout_s for case in read_sweep(path).cases] == [1.5, 60.0]
        cases = read_sweep(path, timeout_s=9.0).cases
        assert [case.settings.timeout_s for case in cases] == [9.0, 9.0]
        path.write_text('[[case]]\nmodel = "b"\n')
        assert read_sweep(path).cases[0].settings.timeout_s is None

    def test_an_oracle_of_a_model_or_a_prompt(self, tmp_path: Path) -> None:
        sweep = read_sweep(write(tmp_path, """
            [[matrix]]
            models = [{ path = "a", oracle = "oa" }, { path = "b", oracle = "ob" }]
            [[matrix]]
            models = ["a", "b"]
            prompts = [{ text = "x", oracle = "ox" }, { text = "y", oracle = "{model}-oy" }]
        """))  # fmt: skip
        found = [Path(case.oracle.location).name for case in sweep.cases if case.oracle]
        assert found == ["oa", "ob", "ox", "a-oy", "ox", "b-oy"]

    def test_the_same_case_is_run_once(self, tmp_path: Path) -> None:
        text = '[[case]]\nmodel = "a"\n[[matrix]]\nmodels = ["a", "./a", "b"]\n'
        sweep = read_sweep(write(tmp_path, text))
        assert [Path(case.model.location).name for case in sweep.cases if case.model] == ["a", "b"]
        assert sweep.repeated == 2

    def test_names_tell_files_and_prompts_apart(self, tmp_path: Path) -> None:
        sweep = read_sweep(write(tmp_path, """
            [[matrix]]
            models = ["one/m.gguf", "two/m.gguf", "n.gguf"]
            [[matrix]]
            models = ["n.gguf"]
            prompts = [{ name = "p", text = "x" }, { name = "p", text = "y" }]
        """))  # fmt: skip
        assert [case.axes["model"] for case in sweep.cases[:3]] == [
            "one/m.gguf", "two/m.gguf", "n.gguf"]  # fmt: skip
        assert [case.axes["prompt"] for case in sweep.cases[3:]] == ["p", "p #2"]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("# nothing", ["has no case"]),
            ("models = 1", ["unknown key 'models'"]),
            ("matrix = 3", ["matrix is 3, not a list"]),
            ("defaults = 3", ["defaults is 3, not a table"]),
            ("[defaults]\nmodels = []", ["defaults: unknown key 'models'", "did you mean names?"]),
            ("[[matrix]]\nmodel = 'a'", ["matrix 1: unknown key 'model'", "did you mean models?"]),
            ("[[case]]\nmodels = ['a']", ["case 1: unknown key 'models'", "did you mean model?"]),
            ("[[matrix]]\nmodels = []", ["matrix 1: models is [], not a list of length >= 1"]),
            ("[[matrix]]\nmodels = 'a'", ["models is 'a', not a list"]),
            ("[[matrix]]\nmodels = ['']", ["models[0] is '', not a text"]),
            ("[[matrix]]\nmodels = [{name = 'a'}]", ["models[0].path is missing"]),
            ("[[matrix]]\nmodels = [{path = 'a', nmae = 'b'}]", ["unknown key 'models[0].nmae'"]),
            ("[[matrix]]\nmodels = [{path = 3}]", ["models[0].path is 3, not a text"]),
            ('[[matrix]]\nmodels = ["a\\u0000"]', ["is no path"]),
            ("[[matrix]]\nprompts = ['a']", ["names no model and no trace"]),
            ("[[matrix]]\nmodels = ['a']\nprompts = [[]]", ["prompts[0] is []"]),
            ("[[matrix]]\nmodels = ['a']\nprompts = [[true]]", ["prompts[0][0] is True"]),
            ("[[matrix]]\nmodels = ['a']\nprompts = [{name = 'x'}]", ["'text' and 'tokens'"]),
            ("[[matrix]]\nmodels = ['a']\nbackends = ['cuda']", ["'cuda'", "numpy or opencl"]),
            ("[[matrix]]\nmodels = ['a']\nlayers = ['3..1']", ["'layers'", "'3..1'"]),
            ("[[matrix]]\nmodels = ['a']\nlayers = [3]", ["layers[0] is 3, not a text"]),
            ("[[matrix]]\nmodels = ['a']\nstages = 'attn'", ["'stages'", "'attn'"]),
            ("[[matrix]]\nmodels = ['a']\narithmetic = 'f8'", ["'arithmetic' is 'f8'"]),
            ("[[matrix]]\nmodels = ['a']\nstrict = 1", ["strict is 1, not true or false"]),
            ("[[matrix]]\nmodels = ['a']\ntimeout = 0", ["timeout is 0, not a number > 0"]),
            ("[[matrix]]\nmodels = ['a']\ntimeout = true", ["timeout is True, not a number"]),
            ("[[matrix]]\nmodels = ['a']\ntimeout = inf", ["timeout is inf, not a number"]),
            ("[[case]]\nmodel = '~no-such-user/a'\ntolerances = 'gone.toml'", ["gone.toml"]),
            (f"[[matrix]]\nmodels = ['a']\ntimeout = 1{'0' * 400}", ["timeout is 10000"]),
            ("[defaults]\ntimeout = '9'\n[[matrix]]\nmodels = ['a']", ["defaults: timeout is '9'"]),
            ("[[matrix]]\nmodels = ['a']\nbudgets = ['ffn_out']", ["'budgets'", "'ffn_out'"]),
            ("[[matrix]]\nmodels = ['a']\nbudgets = 3", ["budgets is 3, not a list"]),
            ("[[matrix]]\nmodels = ['a']\ndevice = 'x'", ["'device'", "opencl"]),
            ("[[matrix]]\nmodels = ['a']\ntolerances = 'gone.toml'", ["gone.toml"]),
            ("[[matrix]]\ntraces = ['a']\nbackends = ['numpy']", ["'backends'", "'traces'"]),
            ("[[matrix]]\ntraces = ['{model}']", ["{model}", "no model"]),
            (
                "[[matrix]]\nmodels = [{path = 'a', oracle = 'b'}]\noracles = ['c']",
                ["'oracles' and 'models' both name oracles"],
            ),
            ("[[case]]\nmodel = 'a'\nprompt = 'x'\ntokens = [1]", ["'prompt' and 'tokens'"]),
            ("[[case]]\nmodel = 'a'\nlayers = ['0..1']", ["case 1: layers is ['0..1']"]),
            (f"[[matrix]]\nmodels = ['a']\nprompts = {[[n] for n in range(400)]}\n"
             f"layers = {[f'{n}..400' for n in range(300)]}", [f"more than {MOST_CASES}"]),
            ("[[matrix]\n", ["is not TOML"]),
        ],
    )  # fmt: skip
    def test_a_malformed_list_is_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str]
    ) -> None:
        path = write(tmp_path, text)
        assert main(["sweep", str(path)]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert captured.out == ""
        assert line.startswith(f"aprtui: {tmp_path}")
        for word in words:
            assert word in line
        assert leftovers(tmp_path) == ["cases.toml"]


class TestId:
    def test_it_changes_with_what_determines_the_result(self, tiny: Path) -> None:
        held = make_case()
        source = Source("o", "/o", "1")
        others = [
            replace(held, model=replace(source, location="/n")), replace(held, oracle=source),
            replace(held, oracle=replace(source, mark="2")), replace(held, trace=source),
            replace(held, prompt=Prompt("p", "q")), replace(held, prompt=Prompt("p", None, (1,))),
            replace(held, backend="opencl"), replace(held, layers="0..1"),
            replace(held, settings=CaseSettings(strict=True)),
            replace(held, settings=CaseSettings(cumulative_only=True)),
            replace(held, settings=CaseSettings(stages="lm_head")),
            replace(held, settings=CaseSettings(names=source)),
            replace(held, settings=CaseSettings(arithmetic="f16")),
            replace(held, settings=CaseSettings(reference_weights=source)),
        ]  # fmt: skip
        assert len({held.id, *(case.id for case in others)}) == len(others) + 1

    def test_it_is_the_same_for_the_same_case(self) -> None:
        held = make_case()
        renamed = replace(held, model=Source("other name", "/m"), prompt=Prompt("other", "p"))
        assert renamed.id == held.id
        # Another device is no other case where none is used.
        assert replace(held, settings=CaseSettings(device="pocl")).id == held.id
        # A verdict holds whatever the limit was.
        assert replace(held, settings=CaseSettings(timeout_s=60.0)).id == held.id

    def test_files_that_change_change_it(self, tiny: Path, tmp_path: Path) -> None:
        model = tmp_path / "m.apr"
        model.write_bytes((tiny / "m.apr").read_bytes())
        write_stages(tmp_path / "o", trace_model(model))
        path = write(tmp_path, '[[case]]\nmodel = "m.apr"\noracle = "o"')
        ids = [read_sweep(path).cases[0].id]
        os.utime(model, ns=(1, 1))
        ids.append(read_sweep(path).cases[0].id)
        (tmp_path / "tokenizer.json").write_text("{}")
        ids.append(read_sweep(path).cases[0].id)
        os.utime(tmp_path / "o/layer-1/ffn_up.bin", ns=(1, 1))
        ids.append(read_sweep(path).cases[0].id)
        assert len(set(ids)) == 4
        assert read_sweep(path).cases[0].id == ids[-1]


class TestRequest:
    def test_a_backend_is_asked_for(self, tiny: Path, tmp_path: Path) -> None:
        case = replace(make_case(backend="opencl"), settings=CaseSettings(device="1"))
        request = make_request(case, tmp_path, 2)
        assert (request.gpu, request.device, request.threads) == (True, "1", 2)
        on_cpu = make_request(replace(case, backend="numpy"), tmp_path, 2)
        assert not on_cpu.uses_device

    def test_the_command_line_is_the_case(
        self, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import shlex

        (tmp_path / "tol.toml").write_text("[default]\nany = 1e-9\n")
        (case,) = read_sweep(write(tmp_path, f"""
            [[case]]
            model = "{tiny}/m.apr"
            trace = "{tiny}/wrong"
            oracle = "{tiny}/oracle"
            layers = "1..2"
            stages = "ffn_up,ffn_out"
            arithmetic = "f32"
            budgets = ["ffn_up=9"]
            tolerances = "tol.toml"
            strict = true
        """)).cases  # fmt: skip
        result = run_case(case, tmp_path, 1)
        name, *arguments = shlex.split(case.command())
        assert name == "aprtui"
        code = main([*arguments, "--json"])
        report = json.loads(capsys.readouterr().out)
        assert code == result.diverges
        assert report["summary"] == result.summary
        assert report["counts"] == result.counts
        assert [s["path"] for s in report["stages"]] == ["layer-1/ffn_up", "layer-1/ffn_out"]


class TestCase:
    def test_its_result_is_that_of_a_bisect(self, tiny: Path, tmp_path: Path) -> None:
        text = f'[[case]]\nmodel = "{tiny}/m.apr"\ntrace = "{tiny}/wrong"\noracle = "{tiny}/oracle"'
        result = run_case(read_sweep(write(tmp_path, text)).cases[0], tmp_path, 1)
        assert result.first is not None
        assert (result.verdict, result.diverges, result.first.path) == ("FAIL", True, UP.path)
        assert result.first.blamed == "kernel"
        assert result.worst_relative_l2 == pytest.approx(2.0)
        assert result.worst_path == UP.path

    def test_a_nan_is_worse_than_any_figure(self, tiny: Path, tmp_path: Path) -> None:
        tensors = trace_model(tiny / "m.apr")
        tensors[UP][0, 0] = float("nan")
        write_stages(tmp_path / "nan", tensors)
        text = f'[[case]]\nmodel = "{tiny}/m.apr"\ntrace = "nan"\noracle = "{tiny}/oracle"'
        result = run_case(read_sweep(write(tmp_path, text)).cases[0], tmp_path, 1)
        assert (result.verdict, result.worst_relative_l2) == ("NONFINITE", "nan")
        line = json.dumps(result_to_json(result), allow_nan=False)
        assert parse_result(line.encode()) == result

    def test_a_missing_stage_counts_when_strict(self, tiny: Path, tmp_path: Path) -> None:
        tensors = trace_model(tiny / "m.apr")
        write_stages(tmp_path / "o", {key: x for key, x in tensors.items() if key != UP})
        text = f'[[matrix]]\nmodels = ["{tiny}/m.apr"]\noracles = ["o"]\nstages = "all"\n'
        path = write(tmp_path, text + "strict = true\n" + text)
        strict, lenient = (run_case(case, tmp_path, 1) for case in read_sweep(path).cases)
        assert (strict.verdict, strict.diverges, strict.first) == ("MISSING", True, None)
        assert (lenient.verdict, lenient.diverges) == ("MISSING", False)
        assert "1 MISSING" in strict.clause and lenient.clause == ""

    def test_what_cannot_be_judged_is_an_error(self, tiny: Path, tmp_path: Path) -> None:
        text = f'[[case]]\nmodel = "{tiny}/m.apr"\noracle = "{tiny}/oracle"\ntokens = [1]'
        result = run_case(read_sweep(write(tmp_path, text)).cases[0], tmp_path, 1)
        assert result.is_error and not result.diverges
        assert "oracle" in result.summary and "[1]" in result.summary

    def test_a_file_that_changed_since_is_no_result(self, tiny: Path, tmp_path: Path) -> None:
        model = tmp_path / "m.apr"
        model.write_bytes((tiny / "m.apr").read_bytes())
        text = f'[[case]]\nmodel = "m.apr"\noracle = "{tiny}/oracle"'
        (case,) = read_sweep(write(tmp_path, text)).cases
        assert run_case(case, tmp_path, 1).verdict == "PASS"
        os.utime(model, ns=(1, 1))
        result = run_case(case, tmp_path, 1)
        assert result.is_error and "m.apr: is not what it was" in result.summary


class TestDevice:
    """A device is held against the CPU, and what the CPU computes is not counted as its result."""

    def run(self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any
            ) -> CaseResult:  # fmt: skip
        @contextmanager
        def opened(name: str, **options: Any) -> Iterator[Engine]:
            if isinstance(device, Exception):
                raise device
            yield Engine(device, "a planted device", "0")

        monkeypatch.setattr(second_side, "open_engine", opened)
        text = f"""
            [[case]]
            model = "{tiny}/m.apr"
            oracle = "{tiny}/oracle"
            backend = "opencl"
        """
        return run_case(read_sweep(write(tmp_path, text)).cases[0], tmp_path, 1)

    def test_a_sound_one(self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        result = self.run(tiny, tmp_path, monkeypatch, NumpyBackend(1))
        assert (result.verdict, result.diverges, result.faults) == ("PASS", False, ())
        assert result.worst_relative_l2 == 0

    def test_a_file_that_changes_while_it_is_read_gives_no_result(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Rebuilding(NumpyBackend):
            def embed(self, tokens: Any, weight: Any) -> Any:
                os.utime(tmp_path / "m.apr", ns=(1, 1))
                return super().embed(tokens, weight)

        (tmp_path / "m.apr").write_bytes((tiny / "m.apr").read_bytes())
        write_stages(tmp_path / "oracle", trace_model(tiny / "m.apr"))
        result = self.run(tmp_path, tmp_path, monkeypatch, Rebuilding(1))
        assert result.is_error and "m.apr: is not what it was" in result.summary

    def test_a_wrong_kernel_is_the_first_divergence(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result = self.run(tiny, tmp_path, monkeypatch, MissingTail())
        assert result.first is not None
        assert (result.verdict, result.diverges) == ("FAIL", True)
        assert (result.first.path, result.first.blamed) == ("layer-0/ffn_out", "device")
        assert result.first.clause.startswith("kernel: ")
        # The device's error, and not that of the CPU beside it.
        assert isinstance(result.worst_relative_l2, float) and result.worst_relative_l2 > 0.01

    @pytest.mark.parametrize("device", [BackendError("no such device"), OutOfMemory(0)],
                             ids=["absent", "out of memory"])  # fmt: skip
    def test_one_that_is_given_up_has_no_result(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any
    ) -> None:
        result = self.run(tiny, tmp_path, monkeypatch, device)
        assert (result.verdict, result.diverges, result.faults) == ("ERROR", False, ())
        assert "no such device" in result.summary or "out of memory" in result.summary


class TestResultsFile:
    def test_it_remembers(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        a, b = make_result(make_case("a"), "layer-0/attn_norm"), make_result(make_case("b"))
        with ResultsFile(path) as file:
            assert file.add(a) and file.add(b)
        with ResultsFile(path) as file:
            assert (file.get(a.id), file.get(b.id), file.get("x")) == (a, b, None)

    def test_a_result_counts_once(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        result = make_result(make_case())
        with ResultsFile(path) as file:
            assert file.add(result)
            assert not file.add(replace(result, summary="another time"))
            assert not file.add(error_result(result.id, "lost"))
        assert len(path.read_text().splitlines()) == 1

    def test_an_error_gives_way_to_a_result(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        result = make_result(make_case())
        with ResultsFile(path) as file:
            assert file.add(error_result(result.id, "lost\ntwice"))
            assert file.add(result)
        with ResultsFile(path) as file:
            assert file.get(result.id) == result

    def test_a_torn_last_line_is_forgotten(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        a, b = make_result(make_case("a")), make_result(make_case("b"))
        with ResultsFile(path) as file:
            file.add(a)
            first = path.read_bytes()
            file.add(b)
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with ResultsFile(path) as file:
                assert (file.get(a.id) is not None) == (size >= len(first))
                assert file.get(b.id) is None
                file.add(b)
            with ResultsFile(path) as file:
                assert file.get(b.id) == b

    @pytest.mark.parametrize("fresh", [False, True])
    @pytest.mark.parametrize(
        "text", ["# notes\n", "notes", "{}\n", '{"schema": "other"}\n', "[" * 9999 + "\n"]
    )
    def test_somebody_elses_file_is_left_alone(
        self, tmp_path: Path, text: str, fresh: bool
    ) -> None:
        path = tmp_path / "r.jsonl"
        path.write_text(text)
        with pytest.raises(FormatError, match=r"r\.jsonl"):
            ResultsFile(path, fresh=fresh)
        assert path.read_text() == text

    def test_a_damaged_line_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        result = make_result(make_case())
        with ResultsFile(path) as file:
            file.add(result)
        good = path.read_text()
        damaged = (
            "\n",
            good.replace(CASE_SCHEMA, "x"),
            good.replace('"diverges": false', '"diverges": 3'),
            good.replace('"summary": "fine", ', ""),
        )
        for bad in damaged:
            assert bad != good
            path.write_text(good + bad + good)
            with pytest.raises(FormatError, match="line 2"):
                ResultsFile(path)
        with ResultsFile(path, fresh=True) as file:
            assert file.get(result.id) is None
        assert not path.exists()

    def test_two_sweeps_do_not_share_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        with ResultsFile(path), pytest.raises(PlanError, match="another sweep"):
            ResultsFile(path)
        ResultsFile(path).__exit__(None, None, None)

    @pytest.mark.parametrize("name", [".", "gone/r.jsonl"])
    def test_a_file_that_cannot_be_written(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(AprError, match="cannot be written"):
            ResultsFile(tmp_path / name)

    @pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
    def test_a_device_is_no_file(self, name: str) -> None:
        with pytest.raises(AprError, match="is no regular file"):
            ResultsFile(Path(name))

    def test_a_line_that_did_not_fit_is_forgotten(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        a, b = make_result(make_case("a")), make_result(make_case("b"))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with ResultsFile(path) as file:
            file.add(a)
            room = path.stat().st_size + 20
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            try:
                with pytest.raises(AprError, match="cannot be written"):
                    file.add(b)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.stat().st_size == room
        with ResultsFile(path) as file:
            assert (file.get(a.id), file.get(b.id)) == (a, None)


class TestFiles:
    """Against fsspec's own stores: in memory, and local files as if they were remote."""

    @pytest.fixture
    def store(self, tiny: Path) -> Iterator[Any]:
        system = fsspec.filesystem("memory")
        system.put(str(tiny / "m.apr"), "/s/m.apr")
        system.put(str(tiny / "oracle"), "/s/oracle", recursive=True)
        system.pipe("/s/tokenizer.json", b"{}")
        yield system
        system.rm("/s", recursive=True)

    def test_a_file_is_copied_once_with_its_tokenizer(
        self, store: Any, tiny: Path, tmp_path: Path
    ) -> None:
        mark = fingerprint("memory://s/m.apr", is_model=True)
        path = fetch("memory://s/m.apr", mark, tmp_path, is_model=True)
        assert path.read_bytes() == (tiny / "m.apr").read_bytes()
        assert (path.parent / NEIGHBOURS[0]).read_bytes() == b"{}"
        before = path.stat().st_ino
        assert fetch("memory://s/m.apr", mark, tmp_path, is_model=True) == path
        assert path.stat().st_ino == before

    def test_a_directory_is_copied(self, store: Any, tiny: Path, tmp_path: Path) -> None:
        path = fetch("memory://s/oracle", fingerprint("memory://s/oracle"), tmp_path)
        assert leftovers(path) == leftovers(tiny / "oracle")
        for name in leftovers(path):
            if (path / name).is_file():
                assert (path / name).read_bytes() == (tiny / "oracle" / name).read_bytes()

    def test_a_fingerprint_follows_the_content(self, store: Any, tmp_path: Path) -> None:
        first = fingerprint("memory://s/m.apr", is_model=True)
        assert first is not None
        assert fingerprint("memory://s/m.apr", is_model=True) == first
        store.pipe("/s/tokenizer.json", b"{ }")
        second = fingerprint("memory://s/m.apr", is_model=True)
        assert second != first
        assert fingerprint("memory://s/gone") is None
        held = fetch("memory://s/m.apr", first, tmp_path, is_model=True)
        assert fetch("memory://s/m.apr", second, tmp_path, is_model=True) != held

    def test_what_is_not_there(self, store: Any, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match=r"memory://s/gone: no such file"):
            fetch("memory://s/gone", None, tmp_path)
        with pytest.raises(AprError, match="bogus"):
            fetch("bogus://x", None, tmp_path)
        kept = (".lock", ".partial")
        assert [name for name in leftovers(tmp_path) if not name.endswith(kept)] == []

    def test_a_copy_that_was_cut_off_is_made_again(
        self, store: Any, tiny: Path, tmp_path: Path
    ) -> None:
        path = fetch("memory://s/oracle", "1", tmp_path)
        folder = path.parent
        partial = folder.with_suffix(".partial")
        folder.rename(partial)
        (partial / "oracle/final_norm.bin").unlink()
        (partial / "oracle/stray").write_text("x")
        assert fetch("memory://s/oracle", "1", tmp_path) == path
        assert leftovers(path) == leftovers(tiny / "oracle")

    def test_threads_that_want_one_file_make_one_copy(self, tiny: Path, tmp_path: Path) -> None:
        url = f"file://{tiny}/oracle"
        found: list[Path] = []
        threads = [threading.Thread(target=lambda: found.append(fetch(url, "1", tmp_path)))
                   for _ in range(8)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8 and len(set(found)) == 1
        assert leftovers(found[0]) == leftovers(tiny / "oracle")

    def test_a_case_of_urls_gives_what_one_of_paths_gives(
        self, store: Any, tiny: Path, tmp_path: Path
    ) -> None:
        text = f"""
            [[case]]
            model = "memory://s/m.apr"
            oracle = "memory://s/oracle"
            [[case]]
            model = "{tiny}/m.apr"
            oracle = "{tiny}/oracle"
        """
        there, here = read_sweep(write(tmp_path, text)).cases
        found = [run_case(case, tmp_path / "cache", 1) for case in (there, here)]
        assert [result.verdict for result in found] == ["PASS", "PASS"]
        assert found[0].counts == found[1].counts
        assert found[0].worst_relative_l2 == found[1].worst_relative_l2


class TestDifferences:
    def test_cases_are_grouped_by_stage_and_cause(self) -> None:
        cases = [make_case(m, b) for m in ("q4", "q8") for b in ("numpy", "opencl")]
        results = [
            (case, make_result(case, "layer-1/ffn_up" if case.axes["model"] == "q4" else None))
            for case in cases
        ]
        (finding,) = find_differences(results)
        assert finding.describe() == "layer-1/ffn_up FAIL kernel: theta"
        spreads = {spread.axis: spread for spread in finding.spreads}
        assert spreads.keys() == {"model", "backend"}
        assert spreads["model"].describe() == "always with q4; never with q8"
        assert spreads["backend"].describe() == "makes no difference"

    def test_other_causes_are_other_findings_and_the_most_frequent_is_first(self) -> None:
        cases = [make_case(prompt=p) for p in "abcd"]
        stages = ["layer-1/ffn_up", "layer-1/ffn_up", "layer-1/ffn_up", None]
        causes = ["theta", None, None, None]
        results = [(c, make_result(c, s, x)) for c, s, x in zip(cases, stages, causes)]
        found = find_differences(results)
        assert [(f.cause, [c.prompt.name for c in f.cases]) for f in found] == [
            (None, ["b", "c"]), ("theta", ["a"])]  # fmt: skip
        assert found[0].describe().endswith("None (cos 1.0)")  # the clause of the first case

    def test_an_error_says_nothing_either_way(self) -> None:
        a, b, c = (make_case(m) for m in "abc")
        lost = error_result(c.id, "x")
        results = [(a, make_result(a, "lm_head")), (b, make_result(b)), (c, lost)]
        (finding,) = find_differences(results)
        assert finding.spreads[0].found == {"a": (1, 1), "b": (0, 1)}
        assert find_differences([(c, lost)]) == ()

    def test_shares_that_differ_matter(self) -> None:
        assert Spread("model", {"a": (1, 2), "b": (2, 4)}).describe() == "makes no difference"
        assert Spread("model", {"a": (1, 2), "b": (2, 3), "c": (0, 1)}).describe() == (
            "1 of 2 with a; 2 of 3 with b; never with c"
        )


class TestReport:
    def test_text_from_files_is_not_markup(self) -> None:
        from aprcore.sweep.plan import Sweep
        from aprcore.sweep.run import SweepFinished

        nasty = "<script>|**x**\n`[a](b)\x1b"
        cases = (make_case(nasty), make_case("b"))
        results = tuple((case, make_result(case, "layer-1/ffn_up", nasty)) for case in cases)
        sweep = Sweep(Path("c.toml"), cases)
        text = to_markdown(sweep, SweepFinished(results, 0, 1.0))
        outside = text.split("## Again")[0]
        assert "\x1b" not in text
        assert "<script" not in outside.replace("\\<", "")
        rows = [line for line in outside.splitlines() if line.startswith("| ")]
        assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
        assert len(rows) == 4

    def test_it_gives_away_no_home_directory(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = tmp_path / "secret-name"
        home.mkdir()
        monkeypatch.setenv("HOME", str(home))
        cases = write(home, f"""
            [[matrix]]
            models = ["{tiny}/m.apr", "gone/m.apr", "gone too/gone/m.apr"]
            oracles = ["{tiny}/oracle"]
        """)  # fmt: skip
        for suffix in (".json", ".md"):
            report = tmp_path / f"r{suffix}"
            assert main(["sweep", str(cases), "--report", str(report)]) == 2
            text = report.read_text()
            assert "secret-name" not in text
            assert "aprtui bisect ~/gone/m.apr --oracle" in text
            assert "aprtui bisect ~/'gone too/gone/m.apr' --oracle" in text
        # Where it stays, a path is the path.
        assert str(home / "gone/m.apr") in cases.with_suffix(".results.jsonl").read_text()

    def test_the_json_is_as_published(self) -> None:
        from aprcore.sweep.plan import Sweep
        from aprcore.sweep.run import SweepFinished

        cases = (make_case("a"), make_case("b"), make_case("c"))
        results = (
            (cases[0], replace(make_result(cases[0], "lm_head"), worst_relative_l2="nan")),
            (cases[1], make_result(cases[1])),
            (cases[2], error_result(cases[2].id, "gone")),
        )
        data = to_json(Sweep(Path("c.toml"), cases), SweepFinished(results, 1, 2.0))
        schema = json.loads(
            (Path(__file__).parents[2] / "docs/sweep.schema.json").read_text("utf-8")
        )
        jsonschema.Draft202012Validator.check_schema(schema)
        printed = json.loads(json.dumps(data, allow_nan=False))
        jsonschema.Draft202012Validator(schema).validate(printed)
        assert data["counts"] == {"FAIL": 1, "PASS": 1, "ERROR": 1}
        assert data["diverges"] and data["differences"][0]["spread"]["model"]["always"] == ["a"]


class TestEstimate:
    def test_the_rest_costs_what_its_like_cost(self) -> None:
        small, large, other = make_case("small"), make_case("large"), make_case("other")
        estimate = Estimate([small, small, large, large, large, other])
        assert estimate.left_s(1.0) is None
        estimate.add(small, replace(make_result(small), elapsed_s=1.0))
        estimate.add(large, replace(make_result(large), elapsed_s=9.0))
        # Left: a small one, two large ones, and one that is taken for the average of five; two
        # workers did ten seconds' work in five.
        assert estimate.left_s(5.0) == pytest.approx((1 + 9 + 9 + 5) / 2)
        for case in (small, large, large, other):
            estimate.add(case, make_result(case))
        assert estimate.left_s(9.0) == 0

    def test_errors_and_earlier_runs(self) -> None:
        case = make_case()
        earlier = [(case, replace(make_result(case), elapsed_s=4.0))]
        estimate = Estimate([case] * 3, earlier)
        assert estimate.left_s(1.0) is None  # how fast this machine is, is not known
        estimate.add(case, error_result(case.id, "x"))
        assert estimate.left_s(1.0) is None
        estimate.add(case, replace(make_result(case), elapsed_s=2.0))
        assert estimate.left_s(2.0) == pytest.approx(3.0)

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "0 s"),
            (59.4, "59 s"),
            (59.6, "1 min 00 s"),
            (3599.7, "1 h 00 min"),
            (8000, "2 h 13 min"),
        ],
    )
    def test_durations(self, seconds: float, text: str) -> None:
        assert format_duration(seconds) == text
