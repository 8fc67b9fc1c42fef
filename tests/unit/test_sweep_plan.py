"""A sweep's list of cases: what CASES.toml may say, and what a case is told by."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from aprcore.sweep import plan
from aprcore.sweep.cases import CaseSettings, Prompt, Source
from aprcore.sweep.plan import MOST_CASES, read_sweep
from aprtui.cli import main
from sweep_cases import make_case, write
from tiny import leftovers, trace_model, write_stages

DOCS = Path(__file__).parents[2] / "docs"


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
            ("[[matrix]]\nmodels = ['a']\narithmetic = 'f8'",
             ["'arithmetic'", "'f8' is not known for all; one of f32"]),
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
