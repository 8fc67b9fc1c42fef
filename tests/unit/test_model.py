"""Opening models of every format: names, order of rows, and what the stages demand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from aprcore.formats.apr_writer import AprWriter, TensorEntry
from aprcore.ground.errors import ConfigError, FormatError, TokenizerError, WeightError
from aprcore.models.model import Model, open_model
from aprcore.models.names import SplitHalves
from aprcore.network.weights import read_all, row_chunks

H, K, D, E, F, V, LAYERS = 4, 2, 8, 32, 48, 40, 2

SIZES = {
    "hidden_size": E, "num_hidden_layers": LAYERS, "num_attention_heads": H,
    "num_key_value_heads": K, "intermediate_size": F, "vocab_size": V, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}  # fmt: skip

Tensors = dict[str, np.ndarray]


def make_tensors(*, bias: bool = False, qk_norm: bool = False, head: bool = True) -> Tensors:
    """Random tensors of a small model under Hugging Face names."""
    rng = np.random.default_rng(3)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, E),
        "model.norm.weight": (E,),
        **({"lm_head.weight": (V, E)} if head else {}),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (E,),
            f"{at}post_attention_layernorm.weight": (E,),
            f"{at}self_attn.o_proj.weight": (E, H * D),
            f"{at}mlp.gate_proj.weight": (F, E),
            f"{at}mlp.up_proj.weight": (F, E),
            f"{at}mlp.down_proj.weight": (E, F),
        }
        for letter, rows in (("q", H * D), ("k", K * D), ("v", K * D)):
            shapes[f"{at}self_attn.{letter}_proj.weight"] = (rows, E)
            if bias:
                shapes[f"{at}self_attn.{letter}_proj.bias"] = (rows,)
            if qk_norm and letter != "v":
                shapes[f"{at}self_attn.{letter}_norm.weight"] = (D,)
    return {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}


def permute(weights: np.ndarray, n_head: int) -> np.ndarray:
    """As in llama.cpp's convert_hf_to_gguf.py, `LlamaModel.permute`."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def permuted(tensors: Tensors) -> Tensors:
    """The tensors as llama.cpp stores those of a llama model."""
    heads = {"q_proj": H, "k_proj": K, "q_norm": 1, "k_norm": 1}
    return {
        name: permute(value, next(h for part, h in heads.items() if part in name))
        if any(part in name for part in heads)
        else value
        for name, value in tensors.items()
    }


def gguf_name(name: str, architecture: gguf.MODEL_ARCH = gguf.MODEL_ARCH.QWEN3) -> str:
    found = gguf.get_tensor_name_map(architecture, LAYERS).get_name(
        name, try_suffixes=(".weight", ".bias")
    )
    assert found is not None
    return found


def write_hf(path: Path, tensors: Tensors, **config: Any) -> Path:
    from safetensors.numpy import save_file

    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **config}))
    save_file(tensors, path / "model.safetensors")
    return path


def write_gguf(
    path: Path, tensors: Tensors, architecture: str = "llama", *,
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:  # fmt: skip
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(E)
    writer.add_block_count(LAYERS)
    writer.add_head_count(H)
    writer.add_head_count_kv(K)
    writer.add_feed_forward_length(F)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if extra:
        extra(writer)
    for name, tensor in tensors.items():
        writer.add_tensor(gguf_name(name) if name.startswith(("model.", "lm_")) else name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_apr(path: Path, tensors: Tensors, **metadata: Any) -> Path:
    entries = [TensorEntry(name, "F32", value.shape) for name, value in sorted(tensors.items())]
    with AprWriter(path, {"architecture": "llama", **SIZES, **metadata}, entries) as writer:
        for name, value in sorted(tensors.items()):
            writer.write(name, value.tobytes())
    return path


def assert_holds(model: Model, tensors: Tensors) -> None:
    assert model.weights.keys() == tensors.keys()
    for name, weight in model.weights.items():
        assert (weight.name, weight.shape, weight.dtype) == (name, tensors[name].shape, "F32")
        np.testing.assert_array_equal(read_all(weight), tensors[name], err_msg=name)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_models_saved_by_transformers(tmp_path: Path, architecture: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, **SIZES, head_dim=16, tie_word_embeddings=architecture == "qwen2"
    )
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if architecture == "llama" else "1GB")
    with open_model(tmp_path) as model:
        assert model.format == "huggingface"
        assert model.config.architecture == architecture
        assert model.config.qkv_bias is (architecture == "qwen2")
        assert model.config.qk_norm is (architecture == "qwen3")
        assert model.config.tied_head is (architecture == "qwen2")
        assert len(model.files) > 1 or architecture != "llama"
        state = {name: value.numpy() for name, value in theirs.state_dict().items()}
        if architecture == "qwen2":
            del state["lm_head.weight"]
        assert_holds(model, state)


@pytest.mark.parametrize(("bias", "head"), [(True, True), (False, False)])
def test_llama_gguf_rows_come_back_in_order(tmp_path: Path, bias: bool, head: bool) -> None:
    tensors = make_tensors(bias=bias, head=head)
    with open_model(write_gguf(tmp_path / "m.gguf", permuted(tensors))) as model:
        assert model.format == "gguf"
        assert (model.config.qkv_bias, model.config.tied_head) == (bias, not head)
        assert model.config.vocab_size == V
        assert_holds(model, tensors)


@pytest.mark.parametrize(("architecture", "bias", "qk_norm"), [("qwen2", 1, 0), ("qwen3", 0, 1)])
def test_qwen_gguf_rows_stay(tmp_path: Path, architecture: str, bias: int, qk_norm: int) -> None:
    tensors = make_tensors(bias=bool(bias), qk_norm=bool(qk_norm))
    with open_model(write_gguf(tmp_path / "m.gguf", tensors, architecture)) as model:
        assert (model.config.qkv_bias, model.config.qk_norm) == (bool(bias), bool(qk_norm))
        assert_holds(model, tensors)


@pytest.mark.parametrize("names", ["huggingface", "gguf"])
@pytest.mark.parametrize("rope_type", [0, 2, None])
def test_apr_with_either_names_and_order(tmp_path: Path, names: str, rope_type: int | None) -> None:
    tensors = make_tensors(bias=True, qk_norm=True)
    adjacent = rope_type == 0 or (rope_type is None and names == "gguf")
    stored = permuted(tensors) if adjacent else tensors
    if names == "gguf":
        stored = {gguf_name(name): value for name, value in stored.items()}
    with open_model(write_apr(tmp_path / "m.apr", stored, rope_type=rope_type)) as model:
        assert model.format == "apr"
        assert_holds(model, tensors)


def test_permuted_rows_can_be_read_in_any_pieces(tmp_path: Path) -> None:
    tensors = make_tensors()
    name = "model.layers.1.self_attn.q_proj.weight"
    with open_model(write_gguf(tmp_path / "m.gguf", permuted(tensors))) as model:
        weight = model.weights[name]
        assert isinstance(weight, SplitHalves)
        for start in range(H * D + 1):
            for stop in range(start, H * D + 1):
                out = np.full((H * D + 1) * E, 7, np.float32)
                rows = weight.read(start, stop, out)
                np.testing.assert_array_equal(rows, tensors[name][start:stop])
                assert rows.flags.c_contiguous and (not rows.size or np.shares_memory(rows, out))
                assert (out[(stop - start) * E :] == 7).all()
        raw = weight.read_raw(3, 21)
        np.testing.assert_array_equal(raw.view("<f4").reshape(18, E), tensors[name][3:21])
        pieces = [weight.read(*piece) for piece in row_chunks(weight, 5 * 4 * E)]
        np.testing.assert_array_equal(np.concatenate(pieces), tensors[name])
        with pytest.raises(IndexError):
            weight.read(0, H * D + 1)


def test_quantised_rows_are_permuted_whole(tmp_path: Path) -> None:
    tensors = make_tensors()
    name = "model.layers.0.self_attn.k_proj.weight"
    raw = gguf.quants.quantize(permute(tensors[name], K), gguf.GGMLQuantizationType.Q8_0)
    stored = permuted(tensors)
    del stored[name]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    with open_model(write_gguf(tmp_path / "m.gguf", stored, extra=add)) as model:
        assert model.weight_types == {"F32", "Q8_0"}
        plain = gguf.quants.quantize(tensors[name], gguf.GGMLQuantizationType.Q8_0)
        expected = gguf.quants.dequantize(plain, gguf.GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(read_all(model.weights[name]), expected)


@pytest.mark.parametrize("adjacent", [False, True])
def test_fused_qkv_is_split(tmp_path: Path, adjacent: bool) -> None:
    tensors = make_tensors(bias=True)
    stored = permuted(tensors) if adjacent else dict(tensors)
    for layer in range(LAYERS):
        for kind in ("weight", "bias"):
            parts = [stored.pop(f"model.layers.{layer}.self_attn.{p}_proj.{kind}") for p in "qkv"]
            stored[f"model.layers.{layer}.self_attn.qkv_proj.{kind}"] = np.concatenate(parts)
    path = write_apr(tmp_path / "m.apr", stored, rope_type=0 if adjacent else 2)
    with open_model(path) as model:
        assert_holds(model, tensors)
        weight = model.weights["model.layers.0.self_attn.v_proj.weight"]
        np.testing.assert_array_equal(weight.read(3, 9), tensors[weight.name][3:9])
        with pytest.raises(IndexError):
            weight.read(0, K * D + 1)


def test_fused_qkv_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    stored = make_tensors()
    for letter in "qkv":
        del stored[f"model.layers.0.self_attn.{letter}_proj.weight"]
    stored["model.layers.0.self_attn.qkv_proj.weight"] = np.ones((H * D, E), np.float32)
    with pytest.raises(WeightError, match=f"expected {(H + 2 * K) * D} rows"):
        open_model(write_apr(tmp_path / "m.apr", stored))


def test_rope_divisors(tmp_path: Path) -> None:
    divisors = np.array([1, 1, 4, 8], np.float32)
    stored = {**permuted(make_tensors()), "rope_freqs.weight": divisors}
    with open_model(write_gguf(tmp_path / "m.gguf", stored)) as model:
        assert model.config.rope.divisors == (1, 1, 4, 8)
        assert "rope_freqs.weight" not in model.weights
    stored["rope_freqs.weight"] = divisors[:3]
    with pytest.raises(WeightError, match=r"shape \[3\], expected \[4\]"):
        open_model(write_gguf(tmp_path / "m.gguf", stored))
    stored["rope_freqs.weight"] = divisors * 0
    with pytest.raises(WeightError, match="not positive"):
        open_model(write_gguf(tmp_path / "m.gguf", stored))


def test_leftover_frequencies_are_ignored(tmp_path: Path) -> None:
    tensors = make_tensors()
    leftover = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    with open_model(write_hf(tmp_path / "m", {**tensors, **leftover})) as model:
        assert_holds(model, tensors)


NEEDED = [name for name in make_tensors(bias=True, qk_norm=True) if ".0." not in name]


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = make_tensors(bias=True, qk_norm=True)
    del tensors[name]
    with pytest.raises(WeightError, match=name.replace(".", r"\.") + "' is missing"):
        open_model(write_hf(tmp_path / "m", tensors, model_type="qwen2"))


@pytest.mark.parametrize("name", NEEDED)
def test_a_misshaped_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = make_tensors(bias=True, qk_norm=True)
    shape = list(tensors[name].shape)
    tensors[name] = np.ones([shape[0] + 1, *shape[1:]], np.float32)
    with pytest.raises(WeightError) as caught:
        open_model(write_hf(tmp_path / "m", tensors, model_type="qwen2"))
    assert f"{name!r} has shape {list(tensors[name].shape)}, expected {shape}" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.layers.2.input_layernorm.weight", "blk.0.ffn_gate_inp.weight", "extra",
             "model.layers.0.self_attn.rotary_emb.weight"],
)  # fmt: skip
def test_a_tensor_that_no_stage_uses_is_named(tmp_path: Path, name: str) -> None:
    tensors = {**make_tensors(), name: np.ones(E, np.float32)}
    with pytest.raises(WeightError, match="no stage uses tensor '" + name.replace(".", r"\.")):
        open_model(write_apr(tmp_path / "m.apr", tensors))


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    tensors = {**make_tensors(), "output_norm.weight": np.ones(E, np.float32)}
    with pytest.raises(WeightError, match=r"model\.norm\.weight is stored twice"):
        open_model(write_apr(tmp_path / "m.apr", tensors))


@pytest.mark.parametrize("equal", [False, True])
def test_tied_models_with_a_stored_head_are_as_in_transformers(tmp_path: Path, equal: bool) -> None:
    from transformers import AutoModelForCausalLM

    tensors = make_tensors()
    if equal:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    path = write_hf(tmp_path / "m", tensors, tie_word_embeddings=True)
    theirs = AutoModelForCausalLM.from_pretrained(path).get_output_embeddings().weight
    with open_model(path) as model:
        np.testing.assert_array_equal(
            read_all(model.weights["lm_head.weight"]), theirs.detach().numpy()
        )


def test_a_tied_model_may_store_only_its_head(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tensors = make_tensors()
    del tensors["model.embed_tokens.weight"]
    path = write_hf(tmp_path / "m", tensors, tie_word_embeddings=True)
    theirs = AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight
    with open_model(path) as model:
        assert model.config.tied_head and "lm_head.weight" not in model.weights
        ours = model.weights["model.embed_tokens.weight"]
        assert ours.name == "model.embed_tokens.weight"
        np.testing.assert_array_equal(read_all(ours), theirs.detach().numpy())


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"'lm_head\.weight' is missing; the configuration"):
        open_model(write_hf(tmp_path / "m", make_tensors(head=False)))
    with open_model(write_apr(tmp_path / "m.apr", make_tensors(head=False))) as model:
        assert model.config.tied_head


def test_biases_must_be_as_the_configuration_says(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"q_proj\.bias' exists"):
        open_model(write_hf(tmp_path / "a", make_tensors(bias=True), attention_bias=False))
    with pytest.raises(WeightError, match=r"bias' is missing; the configuration"):
        open_model(write_hf(tmp_path / "b", make_tensors(), attention_bias=True))


def test_an_absurd_number_of_layers_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"model\.layers\.2\."):
        open_model(write_hf(tmp_path / "m", make_tensors(), num_hidden_layers=2_000_000_000))


def test_the_format_is_told_by_content(tmp_path: Path) -> None:
    tensors = make_tensors()
    as_gguf = write_gguf(tmp_path / "m.gguf", permuted(tensors)).rename(tmp_path / "m.bin")
    with open_model(as_gguf) as model:
        assert_holds(model, tensors)
    as_apr = write_apr(tmp_path / "m.apr", tensors).rename(tmp_path / "m.gguf")
    with open_model(str(as_apr)) as model:
        assert model.format == "apr"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.txt", b"hello", "not a model"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", "name the directory"),
        ("empty.gguf", b"", "empty"),
        ("x.apr", b"GG", "x.apr"),
        ("missing", None, "no such file"),
    ],
)
def test_anything_else_is_refused(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError) as caught:
        open_model(tmp_path / name)
    assert said in str(caught.value) and name in str(caught.value)
    with pytest.raises(FormatError, match=r"no config\.json"):
        open_model(tmp_path)


def test_fingerprint_and_closing(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", make_tensors())
    blob = (path / "model.safetensors").read_bytes()
    with open_model(path) as model:
        expected = hashlib.sha256(
            blob[: 2**20] + blob[-(2**20) :] + len(blob).to_bytes(8, "little")
        )
        assert model.sha256 == expected.hexdigest()
        weight = model.weights["model.norm.weight"]
    with pytest.raises(ValueError, match="closed"):
        weight.read(0, 1)


def test_a_damaged_tokenizer_does_not_stop_a_model(tmp_path: Path) -> None:
    path = write_apr(tmp_path / "m.apr", make_tensors(), **{"tokenizer.vocabulary": 3})
    with open_model(path) as model, pytest.raises(TokenizerError, match=r"tokenizer\.vocabulary"):
        model.tokenizer()


def test_the_embedded_tokenizer_comes_before_a_neighbour(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    neighbour = Tokenizer(models.BPE(vocab={"b": 0, "a": 1}, merges=[]))
    neighbour.save(str(tmp_path / "tokenizer.json"))
    embedded = {"tokenizer.vocabulary": ["a", "b"], "tokenizer.merges": []}
    for metadata, expected in [
        (embedded, [0]),
        ({}, [1]),
        ({**embedded, "tokenizer.pre_type": "gibberish"}, [1]),
    ]:
        with open_model(write_apr(tmp_path / "m.apr", make_tensors(), **metadata)) as model:
            assert model.tokenizer().encode("a") == expected
    (tmp_path / "tokenizer.json").unlink()
    with (
        open_model(write_apr(tmp_path / "m.apr", make_tensors())) as model,
        pytest.raises(TokenizerError, match="no tokenizer"),
    ):
        model.tokenizer()


def test_stories260k(shared: Path) -> None:
    from safetensors.numpy import load_file

    folder = shared / "data" / "stories260k"
    with open_model(folder) as model:
        assert_holds(model, load_file(folder / "model.safetensors"))
        assert model.config.tied_head and model.config.num_layers == 5
        assert model.tokenizer().encode("Once upon a time") == [1, 403, 407, 261, 378]
