"""Small random transformers models for tests, and writers of their other file formats.

Random initialisation makes every bias zero and every norm one, so that a test of them passes
whatever the code does: every parameter is drawn anew here, at the scale of a trained model's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aprcore.formats.apr_writer import AprWriter, TensorEntry

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
VOCAB_SIZE = 96
FIRST_GEMMA = 200


@dataclass(frozen=True)
class RandomModel:
    """A recipe: the same one always gives the same weights.

    Attributes:
        architecture: `model_type`.
        settings: Arguments of the transformers configuration.
        seed: Of the weights and the tokens.
        num_tokens: Length of the pass.
    """

    architecture: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    num_tokens: int = 7

    @property
    def tokens(self) -> tuple[int, ...]:
        generator = random.Random(self.seed + 1)
        size = self.settings.get("vocab_size", VOCAB_SIZE)
        return tuple(generator.randrange(size) for _ in range(self.num_tokens))

    def __str__(self) -> str:
        return f"{self.seed}-{self.architecture}-T{self.num_tokens}"


def small_model(architecture: str, *, seed: int = 0, num_tokens: int = 7, **settings: Any):
    """A recipe of two layers with grouped kv heads; `settings` override."""
    defaults = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        **({"sliding_window": None} if architecture == "mistral" else {}),
        **({"head_dim": 8} if architecture in ("qwen3", "gemma2") else {}),
        # Caps so strong that every score and logit feels them.
        **({"query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0, "sliding_window": 4,
            "final_logit_softcapping": 1.5} if architecture == "gemma2" else {}),
    }  # fmt: skip
    return RandomModel(architecture, {**defaults, **settings}, seed, num_tokens)


def random_config(seed: int) -> RandomModel:
    """A recipe of an odd shape.

    Seeds of one residue mod 4 share the architecture; from `FIRST_GEMMA` on all are Gemma 2.
    """
    draw = random.Random(seed)
    architecture = "gemma2" if seed >= FIRST_GEMMA else ARCHITECTURES[seed % 4]
    heads = draw.choice([1, 2, 3, 4, 5, 6, 7, 9])
    kv_heads = draw.choice([n for n in (1, 2, 3, heads) if heads % n == 0])
    head_dim = draw.choice([2, 4, 6, 8, 10, 16, 20])
    hidden = heads * draw.choice([4, 6, 8, 12])
    if architecture not in (
        "llama",
        "gemma2",
    ):  # which refuse a hidden size that the heads do not divide
        hidden += draw.choice([0, 0, 1, 5])
    settings: dict[str, Any] = {
        "vocab_size": draw.choice([17, 64, VOCAB_SIZE, 131]),
        "hidden_size": hidden,
        "intermediate_size": draw.choice([7, 24, 40, 65]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": draw.choice([16, 128, 4096]),
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "tie_word_embeddings": draw.random() < 0.5,
        "hidden_act": draw.choice(["silu"] * 6 + ["gelu", "gelu_pytorch_tanh"]),
        "rope_parameters": _random_rope(draw),
    }
    if architecture == "llama":
        settings["attention_bias"] = draw.random() < 0.4
        settings["mlp_bias"] = draw.random() < 0.4
    if architecture == "qwen3":
        settings["attention_bias"] = draw.random() < 0.4
    if architecture == "mistral":
        settings["sliding_window"] = draw.choice([None, 65])
    # One token has no causal structure and 65 end a block of 64: more of both than chance gives.
    num_tokens = draw.choice([1, 65, *(draw.randint(1, 65) for _ in range(6))])
    layers = settings["num_hidden_layers"]
    window = draw.choice([1, 2, 5, max(1, num_tokens - 1), num_tokens, num_tokens + 3])
    if architecture == "gemma2":
        kind = settings["hidden_act"]
        settings["hidden_activation"] = "gelu_pytorch_tanh" if kind == "silu" else kind
        settings |= {
            "num_hidden_layers": layers + 1, "sliding_window": window,
            "query_pre_attn_scalar": draw.choice([head_dim, 7, 64]),
            "attn_logit_softcapping": draw.choice([None, 0.7, 5.0, 50.0]),
            "final_logit_softcapping": draw.choice([None, 4.0, 30.0]),
        }  # fmt: skip
    elif architecture != "llama" and has_window(seed):
        settings |= {"sliding_window": window}
        if architecture != "mistral":
            settings |= {"use_sliding_window": True, "max_window_layers": draw.randint(0, layers)}
        if architecture == "qwen3" and draw.random() < 0.5:
            kinds = ["sliding_attention", "full_attention"]
            settings["layer_types"] = [draw.choice(kinds) for _ in range(layers)]
    return RandomModel(architecture, settings, seed, num_tokens)


def has_window(seed: int) -> bool:
    """Whether a recipe that may have windows gets them: every third of 150."""
    return seed // 4 % 3 == 1


def _random_rope(draw: random.Random) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": draw.choice([100.0, 10000.0, 500000.0, 1e6])}
    kind = draw.choice(["default", "default", "linear", "llama3", "yarn"])
    rope["rope_type"] = kind
    if kind != "default":
        rope["factor"] = draw.choice([2.0, 4.0, 8.0])
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = draw.choice([16, 64, 512])
    if kind == "yarn" and draw.random() < 0.5:
        rope |= draw.choice([
            {"attention_factor": 1.25},
            {"beta_fast": 16.0, "beta_slow": 2.0},
            {"mscale": 1.0, "mscale_all_dim": 0.7},
            {"truncate": False},
        ])  # fmt: skip
    return rope


def build(recipe: RandomModel, dtype: str = "float32") -> Any:
    """The transformers model of a recipe, with eager attention, in evaluation mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _silence()
    # Layers so small take longer on several threads, and several times as long where other
    # programs hold a processor that one of the threads waits for.
    torch.set_num_threads(1)
    config = AutoConfig.for_model(recipe.architecture, **recipe.settings)
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        generator = torch.Generator().manual_seed(recipe.seed)
        perturb(model, generator)
    return model.to(getattr(torch, dtype)).eval()


def perturb(model: Any, generator: Any) -> None:
    """Draw every parameter: products keep their input's size, norms are near one."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                is_offset = model.config.model_type == "gemma2"  # it multiplies by 1 + w
                parameter.copy_((0 if is_offset else 1) + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Save a model as a Hugging Face directory."""
    _silence()
    model.save_pretrained(directory, **options)
    return directory


def save_tokenizer(directory: Path) -> None:
    """Put a tokenizer beside a model: the id of a printable character is its code less 32."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level, because that is what transformers makes of any Qwen2 tokenizer.
    vocabulary = {"Ġ": 0, **{chr(32 + i): i for i in range(1, 95)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def _silence() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _weights(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield name, tensor.float().numpy()


def to_adjacent_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k [N·D, ...] reordered for RoPE on adjacent pairs.

    Source: `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py.
    """
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _paired(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    if ".q_proj." in name:
        return to_adjacent_pairs(values, config.num_attention_heads)
    if ".k_proj." in name:
        return to_adjacent_pairs(values, config.num_key_value_heads)
    if name.endswith(("q_norm.weight", "k_norm.weight")):  # one head, applied before RoPE
        return to_adjacent_pairs(values, 1)
    return values


def write_apr(model: Any, path: Path, *, rope_type: int = 2) -> Path:
    """Write a model as float32 .apr without a tokenizer.

    Args:
        model: A transformers model.
        path: The file.
        rope_type: 2 for split halves, 0 for q and k rows stored as adjacent pairs.
    """
    config = model.config
    rope = dict(config.rope_parameters)
    metadata = {
        "architecture": config.model_type, "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers, "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads, "head_dim": head_dim(config),
        "vocab_size": config.vocab_size, "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope.pop("rope_theta"), "rope_type": rope_type,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "hidden_act": activation(config), "rms_norm_eps": config.rms_norm_eps,
        **window_metadata(config),
        **{key: getattr(config, key, None) for key in NUMBERS},
    }  # fmt: skip
    weights = dict(_weights(model))
    if rope_type == 0:
        weights = {name: _paired(name, values, config) for name, values in weights.items()}
    entries = [TensorEntry(name, "F32", values.shape) for name, values in weights.items()]
    with AprWriter(path, metadata, entries) as writer:
        for entry in writer.entries:
            writer.write(entry.name, np.ascontiguousarray(weights[entry.name]))
    return path


NUMBERS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")


def activation(config: Any) -> str:
    """The activation function of a transformers configuration."""
    return getattr(config, "hidden_activation", None) or config.hidden_act


def window_metadata(config: Any) -> dict[str, Any]:
    """The windows of a transformers configuration under .apr's keys."""
    kinds = getattr(config, "layer_types", None)
    on = config.model_type == "mistral" or "sliding_attention" in (kinds or ())
    window = getattr(config, "sliding_window", None) if on else None
    return {"sliding_window": window, "layer_types": kinds if window else None}


GEMMA2_NAMES = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output",
}  # fmt: skip


def write_gguf(model: Any, path: Path, *, says_no_vocabulary: bool = False) -> Path:
    """Write a model as llama.cpp's converter would, in float32 and without a tokenizer.

    llama.cpp itself opens such a file only if it says so.
    """
    import gguf

    config = model.config
    paired = config.model_type in ("llama", "mistral")
    writer = gguf.GGUFWriter(path, "llama" if paired else config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if says_no_vocabulary:
        writer.add_tokenizer_model("no_vocab")
    _add_gguf_rope(writer, model)
    windows = window_metadata(config)
    if windows["sliding_window"]:
        writer.add_sliding_window(windows["sliding_window"])
        if config.model_type != "gemma2" and windows["layer_types"]:
            flags = [kind == "sliding_attention" for kind in windows["layer_types"]]
            writer.add_sliding_window_pattern(flags)
    is_gemma = config.model_type == "gemma2"
    if is_gemma:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping or 0.0)
        writer.add_final_logit_softcapping(config.final_logit_softcapping or 0.0)
    names = GGUF_NAMES | (GEMMA2_NAMES if is_gemma else {})
    for name, values in _weights(model):
        if paired:
            values = _paired(name, values, config)
        if is_gemma and name.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(_gguf_name(name, names), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_gguf_rope(writer: Any, model: Any) -> None:
    import gguf

    rope = model.config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        case "llama3":
            half = np.arange(0, head_dim(model.config), 2) / head_dim(model.config)
            plain = rope["rope_theta"] ** -half
            scaled = model.model.rotary_emb.inv_freq.double().numpy()
            writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))


def _gguf_name(name: str, names: Mapping[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        number, _, inner = module.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{names[inner]}.{kind}"
    return f"{names[module]}.{kind}"


def gguf_can_hold(recipe: RandomModel) -> bool:
    """Whether GGUF has keys for all of a recipe: no activation, nor yarn's rarer fields."""
    rare = {"attention_factor", "beta_fast", "mscale", "truncate"}
    rope = recipe.settings["rope_parameters"]
    settings = recipe.settings
    if recipe.architecture == "gemma2":
        usual = settings["query_pre_attn_scalar"] == settings["head_dim"]
        usual &= settings["hidden_activation"] == "gelu_pytorch_tanh"
        return usual and not rare & set(rope)
    return settings["hidden_act"] == "silu" and not rare & set(rope)


def head_dim(config: Any) -> int:
    """D of a transformers configuration."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)
