"""Dumps of other engines beside the project are read as their tools write them, without a map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.ground.errors import AprError
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.records.report import Report
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from aprtui.cli import main

TOKENS = (3, 5, 7, 11, 13, 17, 19)


@pytest.fixture
def engines(shared: Path) -> Path:
    pytest.importorskip("torch", reason="torch is not installed (the `oracle` extra)")
    found = shared / "cases" / "engines"
    if not found.exists():
        pytest.skip("the cases are not at hand")
    return found


def judge(engines: Path, dump: str, **settings: Any) -> Report:
    model = engines.parent / "models" / "llama"
    return run(Request(model=model, trace=engines / dump, **settings))


def left_out(report: Report) -> list[str]:
    return [note for note in report.header.notes if "left out" in note]


# Of llama with 4 layers: stages per layer, and those of the whole model.
@pytest.mark.parametrize(
    ("dump", "in_layer", "around"),
    [("vllm-llama.pt", 13, 3), ("tl.pt", 15, 3), ("mad_tensors", 12, 3), ("msprobe", 13, 3)],
)
def test_a_sound_dump_is_judged_in_every_stage(
    engines: Path, dump: str, in_layer: int, around: int
) -> None:
    report = judge(engines, dump, tokens=TOKENS)
    assert {stage.verdict for stage in report.stages} == {Verdict.PASS}
    assert len(report.stages) == 4 * in_layer + around
    assert left_out(report) == []


@pytest.mark.parametrize("dump", ["tl.pt", "mad_tensors", "msprobe"])
def test_the_ids_in_a_dump_are_those_that_ran(engines: Path, dump: str) -> None:
    assert judge(engines, dump).header.tokens == TOKENS
    with pytest.raises(AprError, match=r"--tokens gives \[4, 5\]"):
        judge(engines, dump, tokens=(4, 5))


@pytest.mark.parametrize(("row", "tokens"), [(0, (3, 5, 7, 11)), (1, (13, 17, 19, 23, 29, 31, 37))])
def test_a_sequence_of_a_batch_is_read_without_its_padding(
    engines: Path, row: int, tokens: tuple[int, ...]
) -> None:
    report = judge(engines, "leftpad-sound.pt", row=row)
    assert {stage.verdict for stage in report.stages} == {Verdict.PASS}
    assert report.header.tokens == tokens


def test_a_batch_is_never_joined(engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, dump = engines.parent / "models" / "llama", engines / "leftpad-sound.pt"
    arguments = ["bisect", str(model), "--trace", str(dump)]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "holds a batch of 2 sequences; say which with --row N, from 0 to 1" in told
    assert main([*arguments, "--row", "1"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--row", "2"]) == 2
    assert "has no row 2" in capsys.readouterr().err


LLAMA_CPP_TOKENS = (1, 403, 407, 261, 378, 285, 432, 261, 396)


@pytest.fixture
def llama_cpp(shared: Path) -> Path:
    found = shared / "cases" / "llama_cpp"
    if not found.exists():
        pytest.skip("the cases are not at hand")
    return found


@pytest.mark.parametrize("dump", ["f32.npz", "f16.npz", "f16-flash.npz"])
def test_llama_cpp_is_judged_to_the_logits(llama_cpp: Path, dump: str) -> None:
    """Behind the last layer's attention it goes on with the last token's row alone."""
    request = Request(model=llama_cpp / "st.gguf", trace=llama_cpp / dump, tokens=LLAMA_CPP_TOKENS)
    report = run(request)
    assert {stage.verdict for stage in report.stages} == {Verdict.PASS, Verdict.LAYOUT}
    assert left_out(report) == []
    last = {s.key.stage: s for s in report.stages if s.key.layer in (4, None)}
    for name in ("post_attn_residual", "ffn_norm", "ffn_out", "post_ffn_residual", "final_norm"):
        found = last[name]
        assert found.layout is not None
        assert found.layout.shape == (1, 64), name
    for stage in report.stages:
        assert stage.kernel is not None
    head = last["lm_head"].kernel
    assert head is not None and head.span == ()


def test_a_fault_in_a_row_that_is_left_is_found(llama_cpp: Path, tmp_path: Path) -> None:
    with np.load(llama_cpp / "f32.npz") as file:
        held = dict(file)
    held["ffn_out-4"] = held["ffn_out-4"] * np.float32(1.01)
    np.savez(tmp_path / "wrong.npz", **held)
    request = Request(
        model=llama_cpp / "st.gguf", trace=tmp_path / "wrong.npz", tokens=LLAMA_CPP_TOKENS
    )
    failed = [stage for stage in run(request).stages if stage.is_divergence]
    assert failed[0].key == StageKey(4, "ffn_out")
    assert {stage.key.stage for stage in failed} <= {"ffn_out", "post_ffn_residual"}


def test_a_shard_is_named_and_refused(engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, dump = engines.parent / "models" / "llama", engines / "tp2_rank0.pt"
    told = "is one shard of 2 of a tensor-parallel run: layer 0 · qkv_matmul has 448 values where"
    for names in ([], ["--names", str(engines / "tp2.toml")]):
        assert main(["bisect", str(model), "--trace", str(dump), *names]) == 2
        said = capsys.readouterr().err
        assert told in said
        assert "give all of them, in order, with --shards rank*/" in said
    assert main(["bisect", str(model), "--shards", str(dump)]) == 2
    assert "is one shard of 2, and --shards names 1" in capsys.readouterr().err


def _ranks(engines: Path, folder: Path, *, reduced: bool) -> list[Path]:
    """The dump of vLLM as two ranks would have written it: half of the heads and columns each."""
    import torch

    from aprcore.models.model import open_model
    from aprcore.network.weights import read_all

    whole = torch.load(engines / "vllm-llama.pt")
    paths = []
    with open_model(engines.parent / "models" / "llama") as model:
        weights = {name: torch.from_numpy(read_all(w)) for name, w in model.weights.items()}
    for rank in range(2):
        held: dict[str, Any] = {}
        for name, x in whole.items():
            x = x[0] if isinstance(x, tuple) and name.endswith("_proj") else x
            start = name.rpartition(".")[0].replace("self_attn.attn", "self_attn")
            if name.endswith("qkv_proj"):
                x = torch.cat([y.chunk(2, 1)[rank] for y in x.split([64, 32, 32], 1)], 1)
            elif name.endswith("gate_up_proj"):
                x = torch.cat([y.chunk(2, 1)[rank] for y in x.chunk(2, 1)], 1)
            elif name.endswith(("rotary_emb",)):
                x = tuple(y.chunk(2, 1)[rank] for y in x)
            elif name.endswith(("self_attn.attn", "act_fn")):
                x = x.chunk(2, 1)[rank]
            elif name.endswith(("o_proj", "down_proj")) and not reduced:
                source = "attn" if name.endswith("o_proj") else "act_fn"
                weight = weights[f"{name}.weight"].chunk(2, 1)[rank]
                x = whole[f"{start}.{source}"].chunk(2, 1)[rank] @ weight.T
            held[name] = x
        paths.append(folder / f"rank{rank}.pt")
        torch.save(held, paths[-1])
    return paths


@pytest.mark.parametrize("reduced", [False, True], ids=["parts of sums", "added up"])
def test_all_ranks_are_joined(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reduced: bool
) -> None:
    paths = _ranks(engines, tmp_path, reduced=reduced)
    model = engines.parent / "models" / "llama"
    report = run(Request(model=model, trace=paths[0], shards=tuple(paths), tokens=TOKENS))
    assert {stage.verdict for stage in report.stages} == {Verdict.PASS}
    assert len(report.stages) == 4 * 13 + 3
    tokens = ["--tokens", ",".join(map(str, TOKENS))]
    assert main(["bisect", str(model), "--shards", *map(str, paths), *tokens]) == 0
    capsys.readouterr()
    assert main(["bisect", str(model), "--shards", *map(str, reversed(paths)), *tokens]) == 1
    assert "first divergence: layer 0 · qkv_matmul" in capsys.readouterr().out


def test_what_cannot_be_judged_says_why(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    held = torch.load(engines / "vllm-llama.pt")
    held["model.layers.0.mlp.act_fn"] = held["model.layers.0.mlp.act_fn"][:, ::2]
    torch.save(held, tmp_path / "half.pt")
    model = engines.parent / "models" / "llama"
    arguments = ["bisect", str(model), "--trace", str(tmp_path / "half.pt"), "--tokens",
                 ",".join(map(str, TOKENS))]  # fmt: skip
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "? UNJUDGED  it has 336 values where 672 are due for 7 tokens" in told
    assert "1 of 55 stages could not be judged (layer 0 · ffn_swigl: it has 336" in told
    assert main([*arguments, "--strict"]) == 1


def test_ids_that_nobody_gave_are_told_by_the_embedding(engines: Path) -> None:
    report = judge(engines, "vllm-llama.pt")
    assert report.header.tokens == TOKENS
    assert {stage.verdict for stage in report.stages} == {Verdict.PASS}
    assert any("its rows of the embedding tell them" in note for note in report.header.notes)


def test_another_number_of_tokens_is_named_with_the_ids_that_ran(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(engines.parent / "models" / "llama")
    dump = str(engines / "vllm-llama.pt")
    assert main(["bisect", model, "--trace", dump, "--tokens", "1,3,5,7,11,13,17,19"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "has 7 tokens where 8 were given" in told
    assert "its embedding is that of --tokens 3,5,7,11,13,17,19" in told

    import torch

    held = torch.load(dump)
    torch.save({**held, "tokens": torch.tensor(TOKENS[1:])}, tmp_path / "short.pt")
    assert main(["bisect", model, "--trace", str(tmp_path / "short.pt")]) == 2
    assert "has 7 tokens where 6 are recorded" in capsys.readouterr().err
    held = {name: x for name, x in held.items() if name != "model.embed_tokens"}
    torch.save(held, tmp_path / "without.pt")
    assert main(["bisect", model, "--trace", str(tmp_path / "without.pt"), "--tokens", "3,5"]) == 2
    assert "give the token ids that it was made from" in capsys.readouterr().err


def test_the_last_token_alone_is_judged_at_its_position(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def last(x: Any) -> Any:
        return tuple(map(last, x)) if isinstance(x, tuple) else None if x is None else x[-1:]

    held = {name: last(x) for name, x in torch.load(engines / "vllm-llama.pt").items()}
    torch.save(held, tmp_path / "last.pt")
    dump = tmp_path / "last.pt"
    model = engines.parent / "models" / "llama"
    report = run(Request(model=model, trace=dump, tokens=TOKENS))
    found = {stage.key: stage.verdict for stage in report.stages}
    unjudged = {key for key, verdict in found.items() if verdict is not Verdict.PASS}
    assert unjudged == {StageKey(layer, "attention") for layer in range(4)}
    assert {found[key] for key in unjudged} == {Verdict.UNJUDGED}
    assert any("the last token alone, at position 6" in note for note in report.header.notes)

    bisect = ["bisect", str(model), "--trace", str(dump)]
    assert main([*bisect, "--tokens", "3,5,7,11"]) == 2
    assert "it is not the last; its embedding is that of --tokens 19" in capsys.readouterr().err
    assert main(bisect) == 2
    assert "has one token, 19, and does not say at which position" in capsys.readouterr().err
    q = held["model.layers.1.self_attn.rotary_emb"]
    held["model.layers.1.self_attn.rotary_emb"] = (q[0].flip(1), q[1])
    torch.save(held, dump)
    first = run(Request(model=model, trace=dump, tokens=TOKENS)).first_divergence
    assert first is not None
    assert first.key == StageKey(1, "q_post_rope")


@pytest.mark.parametrize("order", ["outermost", "innermost"])
def test_four_axes_of_ggml_are_joined(llama_cpp: Path, tmp_path: Path, order: str) -> None:
    with np.load(llama_cpp / "f32.npz") as file:
        held = {name: x for name, x in file.items() if "(" not in name}
    four = {
        name: x.reshape((1,) * (4 - x.ndim) + x.shape) if x.dtype.kind == "f" else x
        for name, x in held.items()
    }
    if order == "innermost":
        four = {name: x.reshape(x.shape[::-1]) for name, x in four.items()}
    np.savez(tmp_path / "four.npz", **four)
    reports = [
        run(Request(model=llama_cpp / "st.gguf", trace=dump))
        for dump in (llama_cpp / "f32.npz", tmp_path / "four.npz")
    ]
    expected, found = ([(s.key, s.verdict) for s in report.stages] for report in reports)
    assert found == expected
