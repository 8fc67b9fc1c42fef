"""Capturing an oracle from transformers, held against independent computations."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aprcore.capture.oracle import OracleRequest, load_model, quiet_transformers, write_oracle
from aprcore.dumps.directory import TraceDirectory
from aprcore.ground.errors import (
    AprError,
    FormatError,
    OracleError,
    PlanError,
    TokenizerError,
    TraceError,
)
from aprcore.network.graph import outline
from aprcore.network.stages import StageKey
from models import ARCHITECTURES, build, save, save_tokenizer, small_model

torch = pytest.importorskip("torch", reason="torch is not installed (the `oracle` extra)")
pytest.importorskip("transformers", reason="transformers is not installed (the `oracle` extra)")

from aprcore.capture.transformers_pass import capture  # noqa: E402


def capture_all(model, tokens, **options) -> dict[StageKey, np.ndarray]:
    tensors: dict[StageKey, np.ndarray] = {}
    capture(model, tokens, lambda key, x: tensors.__setitem__(key, x.copy()), **options)
    return tensors


def registered_names() -> set[str]:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    return set(AttentionInterface._global_mapping) | set(AttentionMaskInterface._global_mapping)


def count_hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A saved Qwen2 with a tokenizer."""
    directory = save(build(small_model("qwen2")), tmp_path / "model")
    save_tokenizer(directory)
    return directory


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_the_pass_is_bit_equal_to_eager(architecture, num_tokens):
    recipe = small_model(architecture, num_tokens=num_tokens)
    model = build(recipe)
    with torch.inference_mode():
        ids = torch.tensor([recipe.tokens])
        eager = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
    tensors = capture_all(model, recipe.tokens)
    logits = eager.logits[0, -1].numpy()
    assert np.array_equal(tensors[StageKey(None, "lm_head")], logits)
    for layer, weights in enumerate(eager.attentions):
        assert np.array_equal(tensors[StageKey(layer, "attn_softmax")], weights[0].numpy())
    assert np.array_equal(tensors[StageKey(0, "embedding")], eager.hidden_states[0][0].numpy())
    first = tensors[StageKey(0, "post_ffn_residual")]
    assert np.array_equal(first, eager.hidden_states[1][0].numpy())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_stage_of_the_table_in_its_shape(architecture):
    recipe = small_model(architecture, num_key_value_heads=1)
    tensors = capture_all(build(recipe), recipe.tokens)
    also = ("qkv_bias",) if architecture == "qwen2" else ()
    assert set(tensors) == set(outline(2, also, architecture).keys)
    tokens, heads, dim = recipe.num_tokens, 4, 8
    shapes = {
        "embedding": (tokens, 32), "qkv_matmul": (tokens, (heads + 2) * dim),
        "q_post_rope": (tokens, heads * dim), "k_post_rope": (tokens, dim),
        "attn_scores": (heads, tokens, tokens), "attention": (tokens, heads * dim),
        "ffn_swigl": (tokens, 48),
    }  # fmt: skip
    for stage, shape in shapes.items():
        assert tensors[StageKey(0, stage)].shape == shape
    assert tensors[StageKey(None, "lm_head")].shape == (96,)
    assert all(x.dtype == np.float32 and x.flags.c_contiguous for x in tensors.values())


def test_scores_are_those_of_the_captured_queries_and_keys():
    recipe = small_model("llama", num_tokens=6)
    tensors = capture_all(build(recipe), recipe.tokens)
    for layer in range(2):
        q = tensors[StageKey(layer, "q_post_rope")].reshape(6, 4, 8).astype(np.float64)
        k = tensors[StageKey(layer, "k_post_rope")].reshape(6, 2, 8).astype(np.float64)
        scores = np.einsum("ihd,jhd->hij", q, np.repeat(k, 2, axis=1)) / math.sqrt(8)
        captured = tensors[StageKey(layer, "attn_scores")]
        assert np.allclose(np.tril(scores), captured, rtol=1e-5, atol=1e-5)
        above = np.triu(np.ones((6, 6), dtype=bool), 1)
        assert not captured[:, above].any()
        assert not tensors[StageKey(layer, "attn_softmax")][:, above].any()
        assert np.allclose(tensors[StageKey(layer, "attn_softmax")].sum(-1), 1, atol=1e-6)


def test_a_large_bias_does_not_cancel_the_product_in_half_precision():
    recipe = small_model("qwen2")
    model = build(recipe, "float16")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias.fill_(10000.0)
    tensors = capture_all(model, recipe.tokens)
    x = tensors[StageKey(0, "attn_norm")].astype(np.float64)
    attention = model.model.layers[0].self_attn
    weights = [getattr(attention, f"{part}_proj").weight for part in "qkv"]
    expected = x @ np.concatenate([w.detach().double().numpy() for w in weights]).T
    product = tensors[StageKey(0, "qkv_matmul")]
    assert np.abs(product - expected).max() < 0.01
    # Float16 steps by 8 there: nothing of the product is left in the output.
    assert (tensors[StageKey(0, "qkv_bias")][:, 32:48] == 10000).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_captured_exactly(dtype, source, tmp_path):
    summary = write_oracle(OracleRequest(source, tokens=(1, 2, 3), dtype=dtype), tmp_path / "out")
    trace = TraceDirectory(summary.directory)
    assert trace.sidecar.dtype == dtype
    for key in trace.counts:
        values = torch.from_numpy(trace.read(key))
        assert torch.equal(values, values.to(getattr(torch, dtype)).float()), key


def test_hooks_and_registration_are_gone_afterwards():
    recipe = small_model("qwen3")
    model = build(recipe)
    names, hooks = registered_names(), count_hooks(model)
    capture_all(model, recipe.tokens)
    assert (registered_names(), count_hooks(model)) == (names, hooks)
    assert model.config._attn_implementation == "eager"


class Stop(BaseException):
    """As Ctrl-C: no Exception."""


@pytest.mark.parametrize("error", [Stop(), ValueError("no"), TraceError("disk full")])
def test_hooks_and_registration_are_gone_after_an_error(error):
    recipe = small_model("mistral")
    model = build(recipe)
    names, hooks = registered_names(), count_hooks(model)

    def fail(key: StageKey, values: np.ndarray) -> None:
        if key == StageKey(1, "attn_scores"):
            raise error

    with pytest.raises(OracleError if isinstance(error, ValueError) else type(error)):
        capture(model, recipe.tokens, fail)
    assert (registered_names(), count_hooks(model)) == (names, hooks)
    assert model.config._attn_implementation == "eager"


def test_a_layer_range_keeps_its_layers_and_the_whole_model_stages():
    recipe = small_model("llama", num_hidden_layers=4)
    tensors = capture_all(build(recipe), recipe.tokens, layers=range(2, 3))
    assert {key.layer for key in tensors} == {2, None}
    everything = capture_all(build(recipe), recipe.tokens)
    assert all(np.array_equal(x, everything[key]) for key, x in tensors.items())


def test_a_layer_range_beyond_the_model_is_refused():
    recipe = small_model("llama")
    with pytest.raises(PlanError, match=r"2\.\.9 were asked for and the model has 2"):
        capture_all(build(recipe), recipe.tokens, layers=range(2, 9))


@pytest.mark.parametrize(
    ("architecture", "settings", "windowed"),
    [
        ("mistral", {"sliding_window": 5}, {0, 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, {1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
         {0, 1}),
        ("gemma2", {"sliding_window": 5}, {0}),
    ],
)  # fmt: skip
def test_a_sliding_window_is_captured_as_it_is(architecture, settings, windowed):
    model = build(small_model(architecture, **settings))
    for num_tokens in (4, 5, 6, 17):
        tensors = capture_all(model, range(num_tokens))
        for layer in range(2):
            weights = tensors[StageKey(layer, "attn_softmax")]
            seen = (weights > 0).sum(axis=-1)[0]
            expected = np.arange(1, num_tokens + 1)
            assert np.array_equal(seen, np.minimum(expected, 5) if layer in windowed else expected)
            scores = tensors[StageKey(layer, "attn_scores")]
            assert not scores[weights == 0].any()


def test_a_window_that_is_off_is_no_obstacle():
    model = build(small_model("qwen2", use_sliding_window=False, sliding_window=5))
    assert capture_all(model, range(9))


def test_a_model_built_otherwise_is_refused():
    recipe = small_model("llama")
    model = build(recipe)
    del model.model.layers[1].mlp.gate_proj
    with pytest.raises(OracleError, match=r"no module model\.layers\.1\.mlp\.gate_proj"):
        capture_all(model, recipe.tokens)


def test_a_stage_that_never_shows_is_named():
    recipe = small_model("llama")
    model = build(recipe)
    norm = model.model.layers[1].input_layernorm
    norm.__class__ = type("Silent", (type(norm),), {"__call__": lambda self, x: self.forward(x)})
    with pytest.raises(OracleError, match=r"without showing layer-1/attn_norm$"):
        capture_all(model, recipe.tokens)


class TestDirectory:
    """What `write_oracle` leaves on disk."""

    def test_the_sidecar_says_what_was_run(self, source, tmp_path):
        from aprcore.models.model import open_model

        request = OracleRequest(source, prompt="What is 2+2?")
        summary = write_oracle(request, tmp_path / "out")
        sidecar = TraceDirectory(tmp_path / "out").sidecar
        assert sidecar.tokens == summary.tokens == tuple(ord(c) - 32 for c in "What is 2+2?")
        assert sidecar.prompt == "What is 2+2?"
        assert sidecar.positions == tuple(range(12))
        assert sidecar.backend == "transformers"
        assert (sidecar.dtype, sidecar.arithmetic, sidecar.device) == ("float32", "f32", "cpu")
        assert set(sidecar.versions) == {"torch", "transformers", "aprtui"}
        assert summary.count == len(sidecar.stages) == 37
        with open_model(source) as model:
            assert sidecar.model["sha256"] == model.sha256
        assert sidecar.model["architecture"] == "qwen2"
        assert str(tmp_path) not in json.dumps(sidecar.model)

    def test_two_runs_give_the_same_tensors(self, source, tmp_path):
        files = []
        for name in "ab":
            write_oracle(OracleRequest(source, tokens=(5, 6, 7)), tmp_path / name)
            files.append({p.relative_to(tmp_path / name): p.read_bytes()
                          for p in (tmp_path / name).rglob("*.bin")})  # fmt: skip
        assert files[0] == files[1]

    def test_sharded_weights_give_the_same_tensors(self, tmp_path):
        model = build(small_model("mistral", tie_word_embeddings=False))
        for name, options in (("one", {}), ("many", {"max_shard_size": "20KB"})):
            save(model, tmp_path / name, **options)
            write_oracle(OracleRequest(tmp_path / name, tokens=(1, 2)), tmp_path / f"{name}-out")
        assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
        one, many = (TraceDirectory(tmp_path / f"{name}-out") for name in ("one", "many"))
        assert list(one.counts) == list(many.counts)
        assert all(np.array_equal(one.read(key), many.read(key)) for key in one.counts)

    def test_device_auto(self, source, tmp_path):
        pytest.importorskip("accelerate", reason="accelerate is not installed")
        for device in ("cpu", "auto"):
            write_oracle(OracleRequest(source, tokens=(1, 2), device=device), tmp_path / device)
        cpu, auto = (TraceDirectory(tmp_path / device) for device in ("cpu", "auto"))
        same = np.array_equal if not torch.cuda.is_available() else np.allclose
        assert all(same(cpu.read(key), auto.read(key)) for key in cpu.counts)

    def test_weights_that_accelerate_offloads(self, source):
        accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
        model = load_model(OracleRequest(source))
        resident = capture_all(model, (1, 2, 3))
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
        offloaded = capture_all(model, (1, 2, 3))
        assert all(np.array_equal(x, offloaded[key]) for key, x in resident.items())

    def test_progress_counts_to_the_end(self, source, tmp_path):
        seen = []
        request = OracleRequest(source, tokens=(1,), layers=range(1))
        write_oracle(request, tmp_path / "out", lambda done, total: seen.append((done, total)))
        assert seen == [(i + 1, len(seen)) for i in range(len(seen))]

    def test_nothing_remains_after_an_error(self, source, tmp_path):
        def fail(done: int, total: int) -> None:
            if done == 10:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_oracle(OracleRequest(source, tokens=(1, 2)), tmp_path / "a" / "b", fail)
        assert not (tmp_path / "a").exists()


class TestBadInput:
    """One clear line for each."""

    def fails(self, request: OracleRequest, match: str, kind: type[AprError] = OracleError) -> None:
        target = request.source.parent / "out"
        with pytest.raises(kind, match=match) as caught:
            write_oracle(request, target)
        assert "\n" not in str(caught.value)
        assert not target.exists()

    def test_source_is_no_directory(self, tmp_path):
        self.fails(OracleRequest(tmp_path / "nope", tokens=(1,)), "does not exist")
        (tmp_path / "file").write_text("x")
        self.fails(OracleRequest(tmp_path / "file", tokens=(1,)), "is not a directory")

    def test_directory_without_config(self, tmp_path):
        (tmp_path / "model").mkdir()
        self.fails(OracleRequest(tmp_path / "model", tokens=(1,)), "has no config.json")

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
    def test_config_is_damaged(self, source, text):
        (source / "config.json").write_text(text)
        self.fails(OracleRequest(source, tokens=(1,)), "config.json", AprError)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("hidden_size", "many"), ("num_attention_heads", 0), ("hidden_act", "nope"),
         ("rope_parameters", {"rope_type": "nope"}), ("vocab_size", -1)],
    )  # fmt: skip
    def test_config_is_nonsense(self, source, key, value):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {key: value}))
        self.fails(OracleRequest(source, tokens=(1,)), "model: ")

    def test_unsupported_architecture(self, source):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
        self.fails(OracleRequest(source, tokens=(1,)), "architecture 'gpt_neox' is not supported")

    def test_missing_shard(self, tmp_path):
        source = save(build(small_model("llama")), tmp_path / "model", max_shard_size="20KB")
        shard = sorted(source.glob("*.safetensors"))[1]
        shard.unlink()
        self.fails(OracleRequest(source, tokens=(1,)), f"{shard.name}: .* missing", FormatError)

    def test_truncated_weights(self, source):
        path = source / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.fails(OracleRequest(source, tokens=(1,)), "model.safetensors", AprError)

    def test_missing_tensor(self, source):
        from safetensors.numpy import load_file, save_file

        tensors = load_file(source / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        self.fails(OracleRequest(source, tokens=(1,)), r"'model.layers.1.mlp.up_proj.weight' is mi")

    def test_misshaped_tensor(self, source):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
        self.fails(OracleRequest(source, tokens=(1,)), "cannot load it")

    def test_missing_tokenizer(self, tmp_path):
        source = save(build(small_model("qwen2")), tmp_path / "model")
        self.fails(OracleRequest(source, prompt="hello"), "the model has no tokenizer")

    def test_damaged_tokenizer(self, source):
        (source / "tokenizer.json").write_text("{")
        self.fails(
            OracleRequest(source, prompt="hello"), "cannot be read as a tokenizer", TokenizerError
        )

    def test_empty_prompt(self, source):
        self.fails(OracleRequest(source, prompt=""), "the prompt is empty")

    def test_token_outside_the_vocabulary(self, source):
        self.fails(OracleRequest(source, tokens=(1, 96)), "token id 96 .* vocabulary of 96")

    @pytest.mark.parametrize("device", ["nope", "cuda:99"])
    def test_unusable_device(self, source, device):
        self.fails(OracleRequest(source, tokens=(1,), device=device), f"device '{device}'")

    def test_unknown_dtype(self, source):
        self.fails(OracleRequest(source, tokens=(1,), dtype="int8"), "unknown dtype 'int8'")

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_reads_nothing_from_the_network(self, architecture, tmp_path, monkeypatch):
        import socket

        def refuse(*args, **kwargs):
            raise AssertionError("a name was looked up or a connection made")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        source = save(build(small_model(architecture)), tmp_path / "model")
        save_tokenizer(source)
        assert write_oracle(OracleRequest(source, prompt="hello"), tmp_path / "out").count


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_runs_only_when_trusted(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    recipe = small_model("llama")
    model = build(recipe)
    source = save(model, tmp_path / "model")
    (source / "own.py").write_text(REMOTE_CODE)
    config = json.loads((source / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto_map}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(OracleError, match=r"'own' is not supported; .* --trust-remote-code"):
        write_oracle(OracleRequest(source, tokens=recipe.tokens), tmp_path / "out")
    trusting = OracleRequest(source, tokens=recipe.tokens, trust_remote_code=True)
    write_oracle(trusting, tmp_path / "out")
    trace = TraceDirectory(tmp_path / "out")
    expected = capture_all(model, recipe.tokens)
    assert set(trace.counts) == set(expected)
    assert all(np.array_equal(trace.read(key), x.reshape(-1)) for key, x in expected.items())


def run_command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aprtui", "oracle", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip


class TestCommand:
    """`aprtui oracle` as a user runs it."""

    def test_captures(self, source, tmp_path):
        done = run_command(source, "-o", tmp_path / "out", "--prompt", "2+2", "--layers", "0..1")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"20 tensors in {tmp_path / 'out'}, 3 tokens: 18,11,18\n"

    def test_error_is_one_line(self, source, tmp_path):
        done = run_command(source, "-o", tmp_path / "out", "--tokens", "1,2,400")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert "token id 400 is outside the vocabulary of 96" in done.stderr
        assert not (tmp_path / "out").exists()

    def test_arguments_are_checked_before_torch_is_imported(self, tmp_path):
        from aprcore.ground.errors import PlanError
        from aprtui.cli import build_parser

        code = (
            "import sys; from aprtui.cli import main\n"
            "try: code = main(sys.argv[1:])\n"
            "except SystemExit as error: code = error.code\n"
            "assert code == 2, code; assert 'torch' not in sys.modules"
        )
        for arguments in (["--tokens", "1,x"], ["--layers", "3..1"], ["--prompt", ""]):
            full = ["oracle", str(tmp_path), "-o", str(tmp_path / "out"), *arguments]
            done = subprocess.run(
                [sys.executable, "-c", code, *full], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
        with pytest.raises(PlanError, match=r"3\.\.1"):
            args = build_parser().parse_args(["oracle", "d", "-o", "x", "--layers", "3..1"])
            args.run(args)

    def test_without_torch(self, source, tmp_path):
        blocked = tmp_path / "blocked" / "torch"
        blocked.mkdir(parents=True)
        (blocked / "__init__.py").write_text("raise ImportError('no torch')")
        done = run_command(source, "-o", tmp_path / "out", PYTHONPATH=str(blocked.parent))
        assert done.returncode == 2
        assert "needs torch; pip install 'aprtui[oracle]'" in done.stderr
        assert done.stderr.count("\n") == 1


def test_transformers_log_settings_are_put_back():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
