"""Dumps written as other tools write them, by hand: each is judged without a map."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
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
from tiny import NUM_LAYERS, SIZES, TOKENS, Tensors, trace_model, write_model, write_stages

H, K, D, E, V = (SIZES[letter] for letter in "HKDEV")
T = len(TOKENS)
MODULES = {"attn_norm": "input_layernorm", "attn_out": "self_attn.o_proj",
           "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
           "ffn_up": "mlp.up_proj", "ffn_silu": "mlp.act_fn", "ffn_out": "mlp.down_proj",
           "attention": "self_attn.o_proj.input", "post_attn_residual":
           "post_attention_layernorm.input", "post_ffn_residual": ""}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.apr")


@pytest.fixture(scope="module")
def tensors(model: Path) -> Tensors:
    return trace_model(model)


def modules(tensors: Tensors) -> dict[str, np.ndarray]:
    """What a pass gives by transformers' names, without logits."""
    found = {f"model.layers.{key.layer}.{MODULES[key.stage]}".rstrip("."): x.reshape(T, -1)
             for key, x in tensors.items() if key.stage in MODULES}  # fmt: skip
    found["model.embed_tokens"] = tensors[StageKey(0, "embedding")].reshape(T, E)
    found["model.norm"] = tensors[StageKey(None, "final_norm")].reshape(T, E)
    return found


def judge(model: Path, dump: Path, **settings: Any) -> Report:
    return run(Request(model=model, trace=dump, **{"tokens": TOKENS, **settings}))


def check(report: Report, count: int) -> None:
    """All of `count` stages are right, and no name is left over."""
    assert {str(s.key): s.reason for s in report.stages if s.verdict is not Verdict.PASS} == {}
    assert len(report.stages) == count
    assert not [note for note in report.header.notes if "left out" in note]


COUNT = NUM_LAYERS * len(MODULES) + 2


def save_pt(path: Path, value: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (the `oracle` extra)")
    path.parent.mkdir(parents=True, exist_ok=True)

    def convert(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: convert(y) for name, y in x.items()}
        return torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x

    torch.save(convert(value), path)


def test_sglang_dumper(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    ids = {"value": np.array(TOKENS), "meta": {"rank": 0}}
    save_pt(tmp_path / "step=0___rank=0___dump_index=0___name=input_ids.pt", ids)
    for index, (name, x) in enumerate(modules(tensors).items(), 1):
        layer = name.split(".")[2] if ".layers." in name else None
        short = name.split(".", 3)[3] if name.count(".") > 2 else name
        if layer is None or short == name:
            file = f"step=0___rank=0___dump_index={index}___name=non_intrusive__{name}.output"
            file = file.replace(".input.output", ".inputs.0")
        else:
            file = f"name={short}___step=0___rank=0___dump_index={index}___layer_id={layer}"
        save_pt(tmp_path / f"{file}.pt", {"value": x, "meta": {"rank": 0, "tp": {"size": 1}}})
    report = judge(model, tmp_path, tokens=None)
    assert report.header.tokens == TOKENS
    check(report, COUNT)
    save_pt(tmp_path / "step=1___rank=0___dump_index=99___name=hidden_states.pt", ids)
    with pytest.raises(AprError, match="holds several runs: step=0 rank=0, step=1 rank=0"):
        judge(model, tmp_path)


def test_a_file_for_each_tensor(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    from dump_files import write_safetensors

    for number, (name, x) in enumerate(modules(tensors).items()):
        match number % 3:
            case 0:
                np.save(tmp_path / f"{name}.npy", x[None])
            case 1:
                save_pt(tmp_path / f"{name}.pt", x)
            case 2:
                write_safetensors(tmp_path / f"{name}.safetensors", {"data": x})
    np.save(tmp_path / "input_ids.npy", np.array([TOKENS]))
    report = judge(model, tmp_path, tokens=None)
    assert report.header.tokens == TOKENS
    check(report, COUNT)
    (tmp_path / "model.norm.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(AprError, match=r"model.norm.npy: is no readable .npy file"):
        judge(model, tmp_path)


@pytest.mark.parametrize("place", ["PP_1/TP_1/iteration_7", "PP_0/TP_0"])
def test_tensorrt_llm(model: Path, tensors: Tensors, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "tllm_debug" / place
    folder.mkdir(parents=True)
    for name, x in modules(tensors).items():
        np.save(folder / f"{name.replace('model.', 'transformer.')}.npy", x)
        (folder / f"{name}.txt").write_text("1\n")
    check(judge(model, tmp_path / "tllm_debug"), COUNT)
    other = tmp_path / "tllm_debug" / "PP_1" / "TP_2"
    other.mkdir(parents=True)
    np.save(other / "input_ids.npy", np.array(TOKENS))
    with pytest.raises(AprError, match="holds several runs: PP_"):
        judge(model, tmp_path / "tllm_debug")


def encoded(x: np.ndarray) -> dict[str, Any]:
    stream = io.BytesIO()
    np.save(stream, x)
    array = {"array": base64.b64encode(stream.getvalue()).decode(), "polygraphy_class": "ndarray"}
    return {"values": array, "polygraphy_class": "LazyArray"}


def test_polygraphy(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    outputs = {name: encoded(x[None]) for name, x in modules(tensors).items()}
    outputs["input_ids"] = encoded(np.array([TOKENS]))
    result = {"outputs": outputs, "runtime": 0.1, "runner_name": "trt",
              "polygraphy_class": "IterationResult"}  # fmt: skip
    results = {"lst": [["trt", [result]]], "polygraphy_class": "RunResults"}
    dump = tmp_path / "results.json"
    dump.write_text(json.dumps(results))
    report = judge(model, dump, tokens=None)
    assert report.header.tokens == TOKENS
    check(report, COUNT)
    for damage, told in (
        ({"lst": [["trt", [result]], ["onnxrt", [result]]]}, r"holds 2 runners \(trt, onnxrt\)"),
        ({"lst": [["trt", [result, result]]]}, "1 runners .trt. and 2 iterations"),
        ({"polygraphy_class": "Other"}, "is no RunResults file"),
        ({"lst": [["trt", [{"outputs": {"x": {"array": "!"}}}]]]}, "'x' is damaged"),
    ):
        dump.write_text(json.dumps({**results, **damage}))
        with pytest.raises(AprError, match=told):
            judge(model, dump)


def test_hidden_states(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    """The last has been through the final norm."""
    states = [tensors[StageKey(0, "embedding")]]
    states += [tensors[StageKey(i, "post_ffn_residual")] for i in range(NUM_LAYERS - 1)]
    states += [tensors[StageKey(None, "final_norm")]]
    weights = {i: tensors[StageKey(i, "attn_softmax")] for i in range(NUM_LAYERS)}
    held = {f"hidden_states.{i}": x.reshape(1, T, E) for i, x in enumerate(states)}
    held |= {f"attentions.{i}": x.reshape(1, H, T, T) for i, x in weights.items()}
    np.savez(tmp_path / "a.npz", logits=tensors[StageKey(None, "lm_head")].reshape(1, V), **held)
    report = judge(model, tmp_path / "a.npz")
    check(report, 1 + (NUM_LAYERS - 1) + NUM_LAYERS + 2)
    held["hidden_states.2"] = held["hidden_states.2"] * np.float32(1.01)
    np.savez(tmp_path / "b.npz", **held)
    first = judge(model, tmp_path / "b.npz").first_divergence
    assert first is not None
    assert first.key == StageKey(1, "post_ffn_residual")


def test_hidden_states_alone(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    """`torch.save(outputs.hidden_states, path)`: one more than layers, by number."""
    states = [tensors[StageKey(0, "embedding")]]
    states += [tensors[StageKey(i, "post_ffn_residual")] for i in range(NUM_LAYERS - 1)]
    states += [tensors[StageKey(None, "final_norm")]]
    held = [x.reshape(1, T, E) for x in states]
    torch = pytest.importorskip("torch", reason="torch is not installed (the `oracle` extra)")
    torch.save(tuple(map(torch.from_numpy, held)), tmp_path / "a.pt")
    check(judge(model, tmp_path / "a.pt"), NUM_LAYERS + 1)
    np.savez(tmp_path / "b.npz", **{f"hidden_states.{i}": x for i, x in enumerate(held)})
    pair = run(Request(trace=tmp_path / "a.pt", oracle=tmp_path / "b.npz"))
    assert {stage.verdict for stage in pair.stages} == {Verdict.PASS}
    torch.save(tuple(map(torch.from_numpy, held[1:])), tmp_path / "c.pt")
    with pytest.raises(AprError, match="no tensor with the name of a stage; it has 0, 1, 2"):
        judge(model, tmp_path / "c.pt")


def divergence_base(logits: np.ndarray, ids: np.ndarray, chunks: int = 1) -> bytes:
    """As `llama-perplexity --kl-divergence-base` writes it.

    Args:
        logits: Of the later half of the tokens, but for the last, [rows, V].
        ids: Of all tokens, [n_ctx].
        chunks: How often the chunk is repeated.
    """
    rows = []
    for row in logits.astype(np.float32):
        top = row.max()
        least = max(row.min(), top - np.float32(16))
        total = np.log(np.exp(row - top).sum())
        step = (top - least) / np.float32(65535)
        words = np.where(row > least, np.rint((row - least) / step), 0).astype("<u2")
        head = np.array([step, least - top - total], "<f4").view("<u2")
        padding = np.zeros(len(row) % 2, "<u2")
        rows.append(np.concatenate([head, words, padding]).tobytes())
    sizes = np.array([len(ids), logits.shape[1], chunks], "<i4")
    body = b"".join(rows) * chunks
    return b"_logits_" + sizes.tobytes() + np.tile(ids, chunks).astype("<i4").tobytes() + body


@pytest.mark.parametrize("vocabulary", [V, V - 1])
def test_divergence_base(tmp_path: Path, vocabulary: int) -> None:
    from tiny import draw_weights

    whole = draw_weights()["model.embed_tokens.weight"][:vocabulary]
    model = write_model(
        tmp_path / "m.apr", changed={"model.embed_tokens.weight": whole * np.float32(8)},
        metadata={"vocab_size": vocabulary},
    )  # fmt: skip
    ids = np.array([5, 0, 3, 7, 7, 11, 2])
    last = StageKey(None, "lm_head")
    rows = [trace_model(model, tuple(ids[:n].tolist()))[last] for n in range(4, 7)]
    logits = np.stack(rows).reshape(3, vocabulary)
    assert np.ptp(logits[-1]) > 16  # some are cut off
    base = tmp_path / "base.kld"
    base.write_bytes(divergence_base(logits, ids, chunks=2))
    report = run(Request(model=model, oracle=base))
    assert report.header.tokens == tuple(ids[:-1].tolist())
    assert [(s.key, s.verdict) for s in report.stages] == [(last, Verdict.PASS)]
    found = report.stages[0].logits
    assert found is not None
    assert found.comparison.agree
    assert found.comparison.kl < 1e-6

    base.write_bytes(divergence_base(logits[:, ::-1], ids))
    report = run(Request(model=model, oracle=base))
    assert report.stages[0].verdict is not Verdict.PASS
    tokens = tuple(ids[:-1].tolist())
    trace = write_stages(tmp_path / "t", trace_model(model, tokens), tokens=tokens)
    base.write_bytes(divergence_base(logits, ids))
    pair = run(Request(trace=base, oracle=trace))
    assert {s.key: s.verdict for s in pair.stages}[last] is Verdict.PASS
    base.write_bytes(base.read_bytes()[:-2])
    with pytest.raises(AprError, match="where 1 chunks of 7 tokens take"):
        run(Request(model=model, oracle=base))


def test_two_files_of_one_name_do_not_hide_each_other(
    model: Path, tensors: Tensors, tmp_path: Path
) -> None:
    x = tensors[StageKey(None, "final_norm")].reshape(T, E)
    np.save(tmp_path / "model.norm.npy", x)
    np.savez(tmp_path / "model.norm.npz", data=2 * x)
    with pytest.raises(AprError, match=r"npz: has a tensor 'model.norm', as another file"):
        judge(model, tmp_path)


def test_llama_debug(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    logits = tensors[StageKey(None, "lm_head")].astype("<f4")
    logits.tofile(tmp_path / "llamacpp-tiny.bin")
    np.array(TOKENS, "<i4").tofile(tmp_path / "llamacpp-tiny-tokens.bin")
    oracle = write_stages(tmp_path / "oracle", tensors)
    dump = tmp_path / "llamacpp-tiny.bin"
    report = judge(model, dump, oracle=oracle, tokens=None)
    head = report.stages[-1]
    assert report.header.tokens == TOKENS
    assert (head.key, head.verdict) == (StageKey(None, "lm_head"), Verdict.PASS)
    alone = judge(model, dump, tokens=None)
    assert [stage.verdict for stage in alone.stages] == [Verdict.UNJUDGED]
    assert alone.diverges()
    other = tmp_path / "folder"
    other.mkdir()
    for file in tmp_path.glob("llamacpp-*"):
        (other / file.name).write_bytes(file.read_bytes())
    assert judge(model, other, oracle=oracle, tokens=None).header.tokens == TOKENS
    (other / "llamacpp-large.bin").write_bytes(bytes(8))
    with pytest.raises(AprError, match=r"logits of 2 runs: llamacpp-large.bin, llamacpp-tiny.bin"):
        judge(model, other)
    dump.write_bytes(bytes(7))
    with pytest.raises(AprError, match="is 7 bytes long, no whole number of float32"):
        judge(model, dump)


def write_positions(root: Path, tensors: Tensors) -> Path:
    """As `apr parity --per-op`: one token's stages in each directory."""
    for at in range(T):
        part: Tensors = {}
        for key, x in tensors.items():
            if key.stage in ("attn_scores", "attn_softmax"):
                part[key] = x.reshape(H, T, T)[:, at, : at + 1]
            elif key.stage == "lm_head":
                part[key] = x
            else:
                part[key] = x.reshape(T, -1)[at]
        folder = write_stages(root / f"pos-{at:04d}", part)
        (folder / "_trace.json").unlink(missing_ok=True)
    return root


def test_a_directory_for_each_position(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    gpu = write_positions(tmp_path / "out" / "gpu", tensors)
    report = judge(model, gpu)
    check(report, len(tensors))
    other = {key: x * np.float32(1.02 if key == StageKey(1, "ffn_up") else 1)
             for key, x in tensors.items()}  # fmt: skip
    cpu = write_positions(tmp_path / "out" / "cpu", other)
    first = judge(model, cpu).first_divergence
    assert first is not None
    assert first.key == StageKey(1, "ffn_up")
    pair = run(Request(trace=gpu, against=cpu))
    assert pair.first_parity_fault is not None
    assert pair.first_parity_fault.key == StageKey(1, "ffn_up")
    with pytest.raises(AprError, match="holds the dumps of cpu and gpu; name one"):
        judge(model, tmp_path / "out")
    (gpu / "pos-0002").rename(gpu / "pos-0009")
    with pytest.raises(AprError, match="has no pos-0002: a pass needs every position"):
        judge(model, gpu)


FAULTS: dict[str, Callable[[dict[str, np.ndarray]], None]] = {
    "ids": lambda held: held.update(input_ids=np.array([TOKENS, TOKENS])),
    "shapes": lambda held: held.update({n: np.stack([x, x]) for n, x in held.items()}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_batch_is_told_by_its_ids_or_its_shapes(
    model: Path, tensors: Tensors, tmp_path: Path, fault: str
) -> None:
    held = modules(tensors)
    held = {name: np.stack([x, 2 * x]) for name, x in held.items()} if fault == "ids" else held
    FAULTS[fault](held)
    np.savez(tmp_path / "a.npz", **held)
    with pytest.raises(AprError, match="holds a batch of 2 sequences"):
        judge(model, tmp_path / "a.npz")
    check(judge(model, tmp_path / "a.npz", row=0), COUNT)


def test_sequences_one_after_the_other(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    """As vLLM and SGLang run several: along the tokens, with where each begins."""
    held = {name: np.concatenate([x[:3] * 3, x]) for name, x in modules(tensors).items()}
    ids = np.array([1, 2, 3, *TOKENS])
    for extra in ({"seq_lens": np.array([3, T])}, {"cu_seqlens": np.array([0, 3, 3 + T])}):
        np.savez(tmp_path / "a.npz", input_ids=ids, **held, **extra)
        with pytest.raises(AprError, match="holds a batch of 2 sequences"):
            judge(model, tmp_path / "a.npz", tokens=None)
        report = judge(model, tmp_path / "a.npz", tokens=None, row=1)
        assert report.header.tokens == TOKENS
        check(report, COUNT)
