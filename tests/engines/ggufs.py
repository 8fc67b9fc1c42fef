"""GGUF files for the real llama.cpp: the demo model, and one that can be quantised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aprcore.models.model import open_model
from aprcore.network.weights import read_all
from aprtui.demo import SOUND_MODEL, demo_path
from models import RandomModel, build, small_model, to_adjacent_pairs, write_gguf

# Rows of 256 values and more: the K-quants and IQ4_XS have blocks of that size.
BLOCKS_RECIPE = small_model(
    "llama", seed=5, num_tokens=11, vocab_size=288, hidden_size=256, intermediate_size=512,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip

# Names of `enum llama_ftype`: LLAMA_FTYPE_MOSTLY_...
QUANTISED: Mapping[str, str] = {
    "F16": "LLAMA_FTYPE_MOSTLY_F16",
    "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "Q4_1": "LLAMA_FTYPE_MOSTLY_Q4_1",
    "Q5_1": "LLAMA_FTYPE_MOSTLY_Q5_1",
    "Q4_K": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
    "Q6_K": "LLAMA_FTYPE_MOSTLY_Q6_K",
    "IQ4_XS": "LLAMA_FTYPE_MOSTLY_IQ4_XS",
}

_DEMO_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


_kept: list[object] = []  # llama.cpp calls the last callback that it was given, to the end


def blocks_model(path: Path, recipe: RandomModel = BLOCKS_RECIPE) -> Path:
    """A random model whose rows are whole blocks, in float32."""
    return write_gguf(build(recipe), path, says_no_vocabulary=True)


def quantise(source: Path, target: Path, kind: str) -> Path:
    """A GGUF file by llama.cpp's own quantiser, in one of the `QUANTISED` types throughout."""
    from llama_cpp import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(silent, None)
    _kept.append(silent)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, QUANTISED[kind])
    parameters.nthread = 2
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    assert code == 0, f"llama.cpp cannot quantise to {kind}"
    return target


def demo_gguf(path: Path) -> Path:
    """The sound demo model with its tokenizer.

    As a llama, whose rows are in the order of adjacent pairs: of a qwen2 llama.cpp takes for
    granted that heads times their size are the hidden size, and this model's are not.
    """
    import gguf

    with open_model(demo_path() / SOUND_MODEL) as model:
        config, metadata = model.config, model.metadata
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_heads)
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope.theta)
        writer.add_tokenizer_model(metadata["tokenizer.model_type"])
        writer.add_tokenizer_pre(metadata["tokenizer.pre_type"])
        writer.add_token_list(metadata["tokenizer.vocabulary"])
        writer.add_token_merges(metadata["tokenizer.merges"])
        writer.add_token_types(metadata["tokenizer.token_type"])
        writer.add_eos_token_id(metadata["tokenizer.eos_token_id"])
        writer.add_add_bos_token(metadata["tokenizer.add_bos_token"])
        for name, weight in model.weights.items():
            values = read_all(weight)
            for part, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
                if part in name:
                    values = to_adjacent_pairs(values, heads)
            writer.add_tensor(_gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{_DEMO_NAMES[module]}.{kind}"
    number, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_DEMO_NAMES[inner]}.{kind}"
