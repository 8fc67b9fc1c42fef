"""A serving engine in torch under the hooks of the tools that dump such engines.

Each tool's hooks are written here as the tool has them: its folders are judged as they come.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aprcore.ground.errors import AprError
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.records.report import Report
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from aprtui.cli import main
from tiny import NUM_LAYERS, SIZES, TOKENS, draw_weights, write_model

torch = pytest.importorskip("torch", reason="torch is not installed (the `oracle` extra)")

H, K, D = (SIZES[letter] for letter in "HKD")
IN_LAYER = 13  # all but the scores, the softmax and act(gate), which no module shows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.apr", has_bias=False)


def build(*, next_norm: bool = False) -> Any:
    from fused_engine import LlamaForCausalLM

    return LlamaForCausalLM(
        draw_weights(has_bias=False), NUM_LAYERS, H, K, next_norm=next_norm
    ).eval()  # fmt: skip


def forward(engine: Any) -> None:
    with torch.no_grad():
        engine(torch.tensor(TOKENS), torch.arange(len(TOKENS)))


def hook_outputs(engine: Any, path: Path) -> Path:
    """What people write for vLLM: a dict of the modules' outputs."""
    held: dict[str, Any] = {}
    for name, module in engine.named_modules():
        if name:
            module.register_forward_hook(lambda _m, _i, out, name=name: held.update({name: out}))
    forward(engine)
    torch.save(held, path / "outputs.pt")
    return path / "outputs.pt"


def sglang_dumper(engine: Any, path: Path) -> Path:
    """`register_non_intrusive_dumper` in the mode "all"."""
    state = {"index": 0}
    context: dict[str, int] = {}

    def save(name: str, value: Any) -> None:
        state["index"] += 1
        tags = {"step": 0, "rank": 0, "dump_index": state["index"], "name": name,
                "recompute_status": "disabled", **context}  # fmt: skip
        file = "___".join(f"{key}={word}" for key, word in tags.items())
        meta = {**tags, "world_rank": 0, "world_size": 1, "dims": "t h"}
        torch.save({"value": value, "meta": meta}, path / f"{file}.pt")

    def dump(module: str, value: Any, side: str) -> None:
        held = [x for x in value if torch.is_tensor(x)] if isinstance(value, tuple) else [value]
        for index, x in enumerate(held):
            key = str(index) if len(held) > 1 else ""
            save("non_intrusive__" + ".".join(filter(None, (module, side, key))), x)

    def before(_module: Any, args: Any, kwargs: Any, name: str) -> None:
        for index, x in enumerate(args):
            if torch.is_tensor(x):
                dump(name, x, f"inputs.{index}")
        for word, x in kwargs.items():
            dump(name, x, f"inputs.{word}")

    for name, module in engine.named_modules():
        parts = name.split(".")
        if parts[-2:-1] == ["layers"]:
            number = int(parts[-1])
            module.register_forward_pre_hook(lambda _m, _a, n=number: context.update(layer_id=n))
            module.register_forward_hook(lambda _m, _a, _o: context.clear())
        module.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: before(m, args, kwargs, name), with_kwargs=True
        )
        module.register_forward_hook(lambda _m, _a, out, name=name: dump(name, out, "output"))
    engine.register_forward_pre_hook(lambda _m, args: save("input_ids", args[0]))
    forward(engine)
    return path


def tensorrt_llm(engine: Any, path: Path) -> Path:
    """`debug_mode(model, path)`: the calls' numbers and classes, arguments again after the call."""
    names: list[str] = []
    counters: list[int] = []
    folder = path / "rank0"
    folder.mkdir()

    def save(module: Any, side: str, values: list[Any]) -> None:
        arguments = inspect.getfullargspec(module.forward).args[1:]
        calls = "-".join(f"{number}.{name}" for number, name in zip(counters, names))
        flat: list[Any] = []

        def flatten(value: Any) -> None:
            if torch.is_tensor(value):
                flat.append(value)
            elif isinstance(value, tuple | list):
                for x in value:
                    flatten(x)

        flatten(values)
        for index, x in enumerate(flat):
            name = arguments[index] if index < len(arguments) else str(index)
            torch.save(x, folder / f"{calls}-{side}.{name}.pt")

    def before(module: Any, args: Any, _kwargs: Any) -> None:
        names.append(type(module).__name__)
        if not counters:
            counters.append(0)
        if len(names) >= len(counters):
            counters.append(0)
        counters[len(names) - 1] += 1
        save(module, "input", list(args))

    def after(module: Any, args: Any, _kwargs: Any, output: Any) -> None:
        save(module, "output", [args, output])
        names.pop()
        counters.pop()

    for name, module in engine.named_modules():
        if name:
            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after, with_kwargs=True)
    forward(engine)
    return path


def judge(model: Path, dump: Path, **settings: Any) -> Report:
    return run(Request(model=model, trace=dump, **{"tokens": TOKENS, **settings}))


def wrong(report: Report) -> dict[str, str]:
    return {str(s.key): s.reason for s in report.stages if s.verdict is not Verdict.PASS}


@pytest.mark.parametrize("dump", [hook_outputs, sglang_dumper])
def test_every_stage_that_is_dumped_is_right(
    model: Path, tmp_path: Path, dump: Callable[[Any, Path], Path]
) -> None:
    report = judge(model, dump(build(), tmp_path))
    assert wrong(report) == {}
    assert len(report.stages) == NUM_LAYERS * IN_LAYER + 3


@pytest.mark.parametrize("next_norm", [False, True], ids=["own norm", "next norm"])
def test_tensorrt_llm_names_modules_by_their_calls(
    model: Path, tmp_path: Path, next_norm: bool
) -> None:
    report = judge(model, tensorrt_llm(build(next_norm=next_norm), tmp_path))
    assert wrong(report) == {}
    held = {(s.key.layer, s.key.stage) for s in report.stages}
    for layer in range(NUM_LAYERS):
        for stage in ("attn_norm", "qkv_matmul", "attn_out", "post_attn_residual", "ffn_norm",
                      "ffn_gate", "ffn_up", "ffn_out", "post_ffn_residual"):  # fmt: skip
            assert (layer, stage) in held
    assert {(0, "embedding"), (None, "final_norm"), (None, "lm_head")} <= held


def gate_and_up_swapped(engine: Any) -> StageKey:
    activation = engine.model.layers[1].mlp.act_fn
    activation.forward = lambda x: torch.nn.functional.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0]
    return StageKey(1, "ffn_swigl")


def residual_forgotten(engine: Any) -> StageKey:
    norm = engine.model.layers[1].post_attention_layernorm
    right = norm.forward
    norm.forward = lambda hidden_states, residual=None: right(hidden_states, residual * 0)
    return StageKey(1, "post_attn_residual")


def heads_tiled(engine: Any) -> StageKey:
    attn = engine.model.layers[1].self_attn.attn
    right = attn.forward
    attn.forward = lambda q, k, v: right(q.view(len(q), K, -1, D).transpose(1, 2).reshape(q.shape),
                                         k, v)  # fmt: skip
    return StageKey(1, "attention")


FAULTS = (gate_and_up_swapped, residual_forgotten, heads_tiled)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dump", [hook_outputs, sglang_dumper, tensorrt_llm])
def test_a_fault_is_found_where_it_is(
    model: Path, tmp_path: Path, dump: Callable[[Any, Path], Path],
    fault: Callable[[Any], StageKey],
) -> None:  # fmt: skip
    engine = build()
    key = fault(engine)
    first = judge(model, dump(engine, tmp_path)).first_divergence
    assert first is not None
    assert first.key == key


def split(name: str, x: Any, rank: int) -> Any:
    """A rank's share of a tensor: half of the heads, half of the columns."""
    if name.endswith("qkv_proj.output"):
        parts = x.split([H * D, K * D, K * D], 1)
        return torch.cat([part.chunk(2, 1)[rank] for part in parts], 1)
    if name.endswith("gate_up_proj.output"):
        return torch.cat([part.chunk(2, 1)[rank] for part in x.chunk(2, 1)], 1)
    is_narrow = "rotary_emb.output" in name or name.endswith(("attn.output", "act_fn.output"))
    return x.chunk(2, 1)[rank] if is_narrow and "self_attn.output" not in name else x


def test_ranks_in_one_folder_are_joined(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SGLang's dumper writes all ranks of a run to one folder."""
    whole, both = tmp_path / "whole", tmp_path / "both"
    whole.mkdir()
    both.mkdir()
    sglang_dumper(build(), whole)
    for file in whole.iterdir():
        held = torch.load(file)
        name = file.stem.split("___")[3].removeprefix("name=non_intrusive__")
        for rank in range(2):
            value = split(name, held["value"], rank)
            torch.save({**held, "value": value}, both / file.name.replace("rank=0", f"rank={rank}"))
    with pytest.raises(AprError, match=f"holds several runs.*with --shards {both}"):
        judge(model, both)
    report = judge(model, both, shards=(both,))
    assert wrong(report) == {}
    assert len(report.stages) == NUM_LAYERS * IN_LAYER + 3
    assert main(["bisect", str(model), "--shards", str(both)]) == 0
    capsys.readouterr()
