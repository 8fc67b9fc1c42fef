"""Importing GGUF files and Hugging Face directories, and the encoders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

from aprcore.formats.apr import AprFlag, read_apr, verify_apr
from aprcore.ground.errors import AprError, TokenizerError, WeightError
from aprcore.models.convert import (
    ConvertProgress,
    describe_config,
    import_model,
    plan_import,
)
from aprcore.models.model import open_model
from aprcore.network.rope import Rope, RopeScaling
from aprcore.network.weights import read_all
from aprcore.quant.encode import encode

E, F, H, K, D, V, LAYERS = 256, 512, 4, 2, 64, 48, 2

Tensors = dict[str, np.ndarray]


def make_tensors(bias: bool = True, seed: int = 0) -> Tensors:
    """A model's tensors under canonical names, float32."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, E),
        "model.norm.weight": (E,),
        "lm_head.weight": (V, E),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "input_layernorm": (E,), "post_attention_layernorm": (E,),
            "self_attn.q_proj": (H * D, E), "self_attn.k_proj": (K * D, E),
            "self_attn.v_proj": (K * D, E), "self_attn.o_proj": (E, H * D),
            "mlp.gate_proj": (F, E), "mlp.up_proj": (F, E), "mlp.down_proj": (E, F),
        }.items():  # fmt: skip
            shapes[f"{prefix}{name}.weight"] = shape
        if bias:
            for letter, rows in (("q", H * D), ("k", K * D), ("v", K * D)):
                shapes[f"{prefix}self_attn.{letter}_proj.bias"] = (rows,)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


CONFIG: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": E, "num_hidden_layers": LAYERS,
    "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D, "intermediate_size": F,
    "vocab_size": V, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 512,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def make_huggingface(path: Path, tensors: Tensors, **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, path / "model.safetensors")
    return path


GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
                "model.norm.weight": "output_norm.weight"}[name]  # fmt: skip
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"


def adjacent_pairs(values: np.ndarray) -> np.ndarray:
    """Rows as llama.cpp's converter puts them: (H, 2, D/2, ...) -> (H, D/2, 2, ...)."""
    heads = values.shape[0] // D
    return values.reshape(heads, 2, D // 2, -1).swapaxes(1, 2).reshape(values.shape)


def make_gguf(path: Path, tensors: Tensors, kind: str, divisors: bool = False) -> Path:
    """A llama GGUF whose matrices have one type; K-quants and IQ types get random blocks."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_embedding_length(E)
    writer.add_block_count(LAYERS)
    writer.add_head_count(H)
    writer.add_head_count_kv(K)
    writer.add_feed_forward_length(F)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(V)
    kind_id = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[kind_id]
    rng = np.random.default_rng(5)
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            tensor = adjacent_pairs(tensor)
        if tensor.ndim == 1 or kind == "F32":
            writer.add_tensor(gguf_name(name), tensor)
            continue
        shape = (tensor.shape[0], tensor.shape[1] // values, size)
        blocks = rng.integers(0, 60, shape, dtype=np.uint8).reshape(tensor.shape[0], -1)
        if kind == "Q8_0":
            blocks = quantize(tensor, kind_id)
        writer.add_tensor(gguf_name(name), blocks, raw_dtype=kind_id)
    if divisors:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, D // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_model(source: Path, target: Path) -> None:
    """Both run with the same configuration and the same float32 weights, bit for bit."""
    verify_apr(target).close()
    with open_model(source) as old, open_model(target) as new:
        assert new.config == old.config
        assert set(new.weights) == set(old.weights)
        for name, weight in old.weights.items():
            assert read_all(new.weights[name]).tobytes() == read_all(weight).tobytes(), name


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_huggingface(tmp_path_factory.mktemp("hf") / "tiny-0.5", make_tensors())


class TestKeep:
    @pytest.mark.parametrize("number", [np.float32, np.float16])
    def test_a_huggingface_model(self, tmp_path: Path, number: type[np.floating[Any]]) -> None:
        tensors = {name: t.astype(number) for name, t in make_tensors().items()}
        source = make_huggingface(tmp_path / "tiny-0.5", tensors)
        plan = import_model(source, tmp_path / "m.apr")
        dtype = "F32" if number is np.float32 else "F16"
        assert plan.summary() == (f"{len(tensors)} tensors: {dtype} kept",)
        assert_same_model(source, tmp_path / "m.apr")
        apr = read_apr(tmp_path / "m.apr")
        assert apr.metadata["name"] == "tiny-0.5"
        assert apr.metadata["rope_type"] == 2
        assert apr.flags == AprFlag.ROW_MAJOR
        assert {tensor.dtype for tensor in apr.tensors.values()} == {dtype}

    @pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
    def test_gguf_blocks_are_copied_and_rows_put_into_halves(
        self, tmp_path: Path, kind: str
    ) -> None:
        tensors = make_tensors(bias=False)
        source = make_gguf(tmp_path / "m.gguf", tensors, kind)
        import_model(source, tmp_path / "m.apr")
        assert_same_model(source, tmp_path / "m.apr")
        apr = read_apr(tmp_path / "m.apr")
        q = apr.tensors["model.layers.1.self_attn.q_proj.weight"]
        assert q.dtype == kind
        assert apr.metadata["name"] == "tiny"
        if kind == "F32":
            np.testing.assert_array_equal(read_all(q), tensors[q.name])
        if kind == "Q8_0":
            kind_id = gguf.GGMLQuantizationType.Q8_0
            expected = dequantize(quantize(tensors[q.name], kind_id), kind_id)
            np.testing.assert_array_equal(read_all(q), expected)

    def test_a_type_without_an_id_becomes_float32(self, tmp_path: Path) -> None:
        source = make_gguf(tmp_path / "m.gguf", make_tensors(bias=False), "IQ4_XS")
        plan = import_model(source, tmp_path / "m.apr")
        matrices = sum(len(tensor.entry.shape) == 2 for tensor in plan.tensors)
        assert f"{matrices} tensors: IQ4_XS -> F32 (.apr has no type for IQ4_XS)" in plan.summary()
        assert_same_model(source, tmp_path / "m.apr")

    def test_apr_types_are_copied_from_apr(self, tmp_path: Path, huggingface: Path) -> None:
        # What only .apr holds: blocks over the flattened tensor, and one scale for all.
        from aprcore.formats.apr_writer import AprWriter, TensorEntry

        first, second = tmp_path / "first.apr", tmp_path / "second.apr"
        plan = import_model(huggingface, first)
        kinds = {"mlp.up_proj": "AprQ4", "mlp.down_proj": "AprQ8"}
        entries = [
            dataclasses.replace(t.entry, dtype=next(
                (d for n, d in kinds.items() if n in t.entry.name), "F32"))
            for t in plan.tensors
        ]  # fmt: skip
        rng = np.random.default_rng(8)
        with AprWriter(first, plan.metadata, entries) as writer:
            for entry in writer.entries:
                assert isinstance(entry, TensorEntry)
                writer.write(entry.name, rng.integers(0, 60, entry.size_bytes, dtype=np.uint8))
        import_model(first, second)
        assert_same_model(first, second)
        assert {t.dtype for t in read_apr(second).tensors.values()} == {"F32", "AprQ4", "AprQ8"}

    def test_factors_per_frequency_come_along(self, tmp_path: Path) -> None:
        source = make_gguf(tmp_path / "m.gguf", make_tensors(bias=False), "F32", divisors=True)
        import_model(source, tmp_path / "m.apr", dtype="f16")
        with open_model(source) as old, open_model(tmp_path / "m.apr") as new:
            assert old.config.rope.divisors is not None
            assert new.config.rope == old.config.rope


class TestConfig:
    @pytest.mark.parametrize(
        "scaling",
        [
            None,
            {"rope_type": "linear", "factor": 4.0},
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
             "beta_fast": 16.0, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False},
        ],
    )  # fmt: skip
    def test_the_configuration_survives(self, tmp_path: Path, scaling: Any) -> None:
        source = make_huggingface(tmp_path / "hf", make_tensors(), rope_scaling=scaling)
        import_model(source, tmp_path / "m.apr")
        with open_model(source) as old, open_model(tmp_path / "m.apr") as new:
            assert new.config == old.config

    def test_a_tied_head_stays_tied(self, tmp_path: Path) -> None:
        tensors = make_tensors()
        del tensors["lm_head.weight"]
        source = make_huggingface(tmp_path / "hf", tensors, tie_word_embeddings=True)
        import_model(source, tmp_path / "m.apr")
        assert_same_model(source, tmp_path / "m.apr")
        assert "lm_head.weight" not in read_apr(tmp_path / "m.apr").tensors

    def test_absent_values_are_left_out(self, huggingface: Path) -> None:
        with open_model(huggingface) as model:
            config = dataclasses.replace(
                model.config, rope=Rope(1e4, D, scaling=RopeScaling()), windows=(None,)
            )
        assert None not in describe_config(config).values()
        assert "rope_scaling" not in describe_config(config)


class TestConversion:
    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
    def test_float_types(self, tmp_path: Path, huggingface: Path, dtype: str) -> None:
        import_model(huggingface, tmp_path / "m.apr", dtype=dtype)
        apr = verify_apr(tmp_path / "m.apr")
        for name, values in make_tensors().items():
            found = read_all(apr.tensors[name])
            assert apr.tensors[name].dtype == dtype.upper()
            if dtype == "bf16":
                step = np.spacing(np.abs(values)) * 2.0**16
                assert (np.abs(found - values) <= step / 2).all()
            else:
                expected = values.astype({"f32": np.float32, "f16": np.float16}[dtype])
                np.testing.assert_array_equal(found, expected.astype(np.float32))

    def test_q8_0_spares_vectors_embedding_and_head(
        self, tmp_path: Path, huggingface: Path
    ) -> None:
        plan = import_model(huggingface, tmp_path / "m.apr", quantize="q8_0")
        apr = verify_apr(tmp_path / "m.apr")
        kind = gguf.GGMLQuantizationType.Q8_0
        for name, values in make_tensors().items():
            tensor = apr.tensors[name]
            is_matrix = values.ndim == 2 and name.startswith("model.layers")
            assert tensor.dtype == ("Q8_0" if is_matrix else "F32"), name
            expected = dequantize(quantize(values, kind), kind) if is_matrix else values
            np.testing.assert_array_equal(read_all(tensor), expected)
        assert AprFlag.QUANTIZED in apr.flags
        assert "2 tensors: F32 kept (embedding and head stay float)" in plan.summary()

    def test_quantised_weights_are_widened(self, tmp_path: Path) -> None:
        source = make_gguf(tmp_path / "m.gguf", make_tensors(bias=False), "Q4_K")
        import_model(source, tmp_path / "m.apr", dtype="f32")
        assert_same_model(source, tmp_path / "m.apr")
        assert {t.dtype for t in read_apr(tmp_path / "m.apr").tensors.values()} == {"F32"}

    @pytest.mark.parametrize(
        ("dtype", "values", "words"),
        [
            ("f16", [1e6, -7e4], "2 values have no finite F16"),
            ("bf16", [3.4e38], "1 value has no finite BF16"),
            ("f16", [np.nan, np.inf], "2 values have no finite F16"),
        ],
    )
    def test_values_without_an_image_are_refused(
        self, tmp_path: Path, dtype: str, values: list[float], words: str
    ) -> None:
        tensors = make_tensors()
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name][7, : len(values)] = values
        source = make_huggingface(tmp_path / "hf", tensors)
        with pytest.raises(WeightError, match=f"'{name}': {words}"):
            import_model(source, tmp_path / "m.apr", dtype=dtype)
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    def test_progress_ends_at_the_total(self, tmp_path: Path, huggingface: Path) -> None:
        seen: list[ConvertProgress] = []
        import_model(huggingface, tmp_path / "m.apr", dtype="f16", progress=seen.append)
        assert seen[-1].done_bytes == seen[-1].total_bytes
        assert {now.tensor for now in seen} == set(make_tensors())

    def test_interrupting_leaves_nothing(self, tmp_path: Path, huggingface: Path) -> None:
        def interrupt(now: ConvertProgress) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            import_model(huggingface, tmp_path / "m.apr", progress=interrupt)
        assert list(tmp_path.iterdir()) == []


class TestRefusals:
    def test_the_source_is_not_overwritten(self, tmp_path: Path) -> None:
        source = make_gguf(tmp_path / "m.gguf", make_tensors(bias=False), "F32")
        (tmp_path / "link.apr").symlink_to(source)
        before = source.read_bytes()
        for target in (source, tmp_path / "link.apr"):
            with pytest.raises(AprError, match="would overwrite the model"):
                import_model(source, target, overwrite=True)
        assert source.read_bytes() == before

    def test_an_existing_file_needs_force(self, tmp_path: Path, huggingface: Path) -> None:
        target = tmp_path / "m.apr"
        target.write_bytes(b"mine")
        with pytest.raises(AprError, match=r"m\.apr: the file exists; --force"):
            import_model(huggingface, target)
        assert target.read_bytes() == b"mine"
        import_model(huggingface, target, overwrite=True)
        verify_apr(target)

    def test_an_unknown_type(self, tmp_path: Path, huggingface: Path) -> None:
        with pytest.raises(AprError, match="unknown type 'q3'; types are keep, f32"):
            import_model(huggingface, tmp_path / "m.apr", dtype="q3")

    def test_a_tokenizer_that_cannot_be_read_is_noted(
        self, monkeypatch: pytest.MonkeyPatch, huggingface: Path
    ) -> None:
        def fail(*args: object) -> None:
            raise TokenizerError("it is broken", where="tokenizer.json")

        with open_model(huggingface) as model:
            monkeypatch.setattr("aprcore.models.model.read_tokenizer_json", fail)
            plan = plan_import(model)
        assert plan.notes == ("the tokenizer is left out: tokenizer.json: it is broken",)
        assert not any(key.startswith("tokenizer.") for key in plan.metadata)


class TestEncoders:
    def test_bfloat16_rounds_to_even(self) -> None:
        bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x80000001], np.uint32)
        halves, lost = encode("BF16", bits.view(np.float32))
        assert halves.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x8000]
        assert lost == 0

    def test_bfloat16_is_what_torch_rounds_to(self) -> None:
        torch = pytest.importorskip("torch")
        bits = np.random.default_rng(4).integers(0, 2**32, 20_000, dtype=np.uint64)
        values = bits.astype(np.uint32).view(np.float32)
        values = values[np.isfinite(values)]
        halves, _ = encode("BF16", values)
        expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
        np.testing.assert_array_equal(halves.view(np.int16), expected)

    @pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
    def test_counts_what_is_lost(self, dtype: str) -> None:
        nan = np.uint32(0x7FFFFFFF).view(np.float32)  # rounding would carry it into -0
        values = np.array([1, np.inf, -np.inf, np.nan, nan, 2], np.float32)
        assert encode(dtype, values)[1] == 4


def test_stories260k(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "stories260k"
    import_model(source, tmp_path / "m.apr")
    assert_same_model(source, tmp_path / "m.apr")
    with open_model(source) as old, open_model(tmp_path / "m.apr") as new:
        assert new.tokenizer_data == old.tokenizer_data
