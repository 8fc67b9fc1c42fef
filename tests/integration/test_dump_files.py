"""A dump in one file is judged as the directory that it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.dumps.directory import TraceDirectory
from aprcore.ground.errors import AprError, PlanError
from aprcore.judging.verdict import Verdict
from aprcore.models.model import open_model
from aprcore.network.stages import StageKey
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from aprtui.cli import main
from aprtui.demo import demo_path, load_faults
from dump_files import (
    Arrays,
    huggingface_names,
    llama_cpp_names,
    own_names,
    write_safetensors,
)

SOUND = demo_path() / "sound.apr"
ORACLE = demo_path() / "oracle"
KINDS = ("safetensors", "npz", "pt")
MAP = """[names]
"step.{layer}.normed" = "attn_norm"
qkv_bias = ["step.{layer}.q", "step.{layer}.k", "step.{layer}.v"]
"step.{layer}.rotated_q" = "q_post_rope"
"step.{layer}.rotated_k" = "k_post_rope"
"step.{layer}.products" = "attn_scores"
"""


@pytest.fixture(scope="module")
def config():
    with open_model(SOUND) as model:
        return model.config


def save(path: Path, arrays: Arrays, tokens: tuple[int, ...]) -> Path:
    match path.suffix:
        case ".safetensors":
            return write_safetensors(path, arrays, {"tokens": str(list(tokens)), "dtype": "F32"})
        case ".npz":
            np.savez(path, tokens=np.asarray(tokens), **arrays)
        case ".pt":
            import torch

            tensors = {name: torch.from_numpy(x.copy()) for name, x in arrays.items()}
            torch.save({"tokens": list(tokens), **tensors}, path)
    return path


def mapped_names(source: TraceDirectory, config: Any) -> Arrays:
    names = {"attn_norm": "normed", "q_post_rope": "rotated_q", "k_post_rope": "rotated_k",
             "attn_scores": "products"}  # fmt: skip
    arrays: Arrays = {}
    for key in source.keys():
        x = source.read(key)
        if key.stage in names:
            arrays[f"step.{key.layer}.{names[key.stage]}"] = x
        elif key.stage == "qkv_bias":
            x = x.reshape(-1, config.qkv_columns("v")[1])
            for letter in "qkv":
                start, stop = config.qkv_columns(letter)
                arrays[f"step.{key.layer}.{letter}"] = x[:, start:stop]
    return arrays


def verdicts(report: Any) -> dict[StageKey, tuple[Verdict, str | None]]:
    return {s.key: (s.verdict, s.blamed) for s in report.stages if s.trace or s.comparison}


@pytest.fixture(scope="module")
def judged() -> dict[str, Any]:
    """The report of each planted dump, as a directory."""
    return {
        fault.name: run(Request(model=SOUND, trace=fault.trace, oracle=ORACLE, arithmetic="f32"))
        for fault in load_faults().values() if fault.trace is not None
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["kv-tiled", "residual-normed"])
@pytest.mark.parametrize("naming", ["own", "huggingface", "llama.cpp", "mapped"])
def test_the_verdicts_are_those_of_the_directory(
    fault: str, kind: str, naming: str, tmp_path: Path, config: Any, judged: dict[str, Any]
) -> None:
    source = TraceDirectory(load_faults()[fault].trace or "")
    make = {"huggingface": huggingface_names, "llama.cpp": llama_cpp_names, "mapped": mapped_names}
    arrays = own_names(source) if naming == "own" else make[naming](source, config)
    tokens = source.sidecar.tokens
    assert tokens is not None
    dump = save(tmp_path / f"dump.{kind}", arrays, tokens)
    names = None
    if naming == "mapped":
        names = tmp_path / "map.toml"
        names.write_text(MAP)
    report = run(Request(model=SOUND, trace=dump, oracle=ORACLE, names=names, arithmetic="f32"))

    found, expected = verdicts(report), verdicts(judged[fault])
    held = {"own": 17, "huggingface": 12, "llama.cpp": 14, "mapped": 5}[naming] * config.num_layers
    present = {key: v for key, v in found.items() if v[0] is not Verdict.MISSING}
    assert len(present) >= held
    assert present == {key: expected[key] for key in present}
    first = judged[fault].first_divergence.key
    if first in present:
        assert report.first_divergence is not None
        assert report.first_divergence.key == first
    assert not any("left out" in note for note in report.header.notes)


def test_the_oracle_may_be_a_file_too(tmp_path: Path) -> None:
    source = TraceDirectory(ORACLE)
    dump = save(tmp_path / "oracle.npz", own_names(source), source.sidecar.tokens or ())
    plain, filed = (run(Request(model=SOUND, oracle=path)) for path in (ORACLE, dump))
    assert [(s.key, s.verdict, s.reason) for s in plain.stages] == [
        (s.key, s.verdict, s.reason) for s in filed.stages
    ]


def test_projections_without_a_model_are_what_the_other_side_calls_them(
    tmp_path: Path, config: Any
) -> None:
    source = TraceDirectory(ORACLE)
    dump = save(
        tmp_path / "a.safetensors", huggingface_names(source, config), source.sidecar.tokens or ()
    )
    report = run(Request(trace=dump, oracle=ORACLE))
    found = {s.key: s.verdict for s in report.stages if s.key.layer == 0}
    assert found[StageKey(0, "qkv_bias")] is Verdict.PASS
    assert found[StageKey(0, "qkv_matmul")] is Verdict.MISSING


class TestCommandLine:
    def request(self, *arguments: str) -> int:
        fault = load_faults()["kv-tiled"]
        return main(["bisect", str(SOUND), "--trace", str(fault.trace), "--oracle", str(ORACLE),
                     "--arithmetic", "f32", *arguments])  # fmt: skip

    def test_a_failing_row_says_at_which_tolerance_it_passes(self, capsys: Any) -> None:
        assert self.request("--json") == 1
        report = json.loads(capsys.readouterr().out)
        failing = [s for s in report["stages"] if s["verdict"] == "FAIL"]
        assert failing[0]["path"] == report["first_divergence"]
        for stage in failing:
            assert stage["passes_at_relative_l2"] == stage["kernel"]["relative_l2"]
        assert all(s["passes_at_relative_l2"] is None
                   for s in report["stages"] if s["verdict"] != "FAIL")  # fmt: skip

        budgets = [f"{s['path']}={s['passes_at_relative_l2']}" for s in failing]
        options = [part for budget in budgets for part in ("--budget", budget)]
        assert self.request("--json", *options) == 0
        stages = {s["path"]: s for s in json.loads(capsys.readouterr().out)["stages"]}
        for stage in failing:
            accepted = stages[stage["path"]]
            assert accepted["verdict"] == "NOISE"
            assert accepted["budget_relative_l2"] == stage["passes_at_relative_l2"]
            assert accepted["accepted"] and not stage["accepted"]
        path, _, tolerance = budgets[0].partition("=")
        assert self.request(*options, "--budget", f"{path}={float(tolerance) * 0.999}") == 1

    def test_the_table_says_so_too(self, capsys: Any) -> None:
        assert self.request() == 1
        options = []
        for row in capsys.readouterr().out.splitlines():
            if "passes at" in row:
                options += ["--budget", row.split()[0] + "=" + row.rsplit(" ", 1)[1]]
        assert options
        assert self.request(*options) == 0

    def test_strict_holds_sound_stages_to_their_budget(self, capsys: Any) -> None:
        sound = ["bisect", str(SOUND), "--oracle", str(ORACLE), "--budget", "ffn_down=1e-12"]
        assert main(sound) == 0
        capsys.readouterr()
        assert main([*sound, "--strict", "--json"]) == 1
        report = json.loads(capsys.readouterr().out)
        failing = [s for s in report["stages"] if s["verdict"] == "FAIL"]
        assert {s["stage"] for s in failing} == {"ffn_out"}
        assert all("noise beyond the budget: relative L2" in s["reason"] for s in failing)
        assert all(s["passes_at_relative_l2"] > 1e-12 for s in failing)
        assert all(s["blamed"] in ("kernel", "model") for s in failing)

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["--budget", "layer99.ffn_out=1"], "a budget is for layer 99"),
            (["--budget", "ffn_out"], "cannot read the budget"),
            (["--names", "map.toml"], "--names is for dumps of named tensors"),
            (["--tolerances", "none.toml"], "none.toml: no such file"),
            (["--reference-weights", "none", "--cumulative-only"], "needs a model, --oracle"),
        ],
    )
    def test_unusable_options(self, arguments: list[str], line: str, capsys: Any) -> None:
        assert self.request(*arguments) == 2
        assert line in capsys.readouterr().err


def test_a_file_of_nothing_known_says_what_it_holds(tmp_path: Path) -> None:
    dump = save(tmp_path / "a.npz", {"x": np.ones(3, np.float32)}, (1,))
    with pytest.raises(AprError, match=r"no tensor with the name of a stage; it has x"):
        run(Request(model=SOUND, trace=dump))
    with pytest.raises(PlanError, match="names no"):
        (tmp_path / "m.toml").write_text("[names]\n")
        run(Request(model=SOUND, trace=dump, names=tmp_path / "m.toml"))
