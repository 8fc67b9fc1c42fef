"""A trace saved again as one file, under the names that other engines use."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.source import StageSource
from aprcore.network.config import ModelConfig
from aprcore.network.stages import StageKey

Arrays = dict[str, NDArray[Any]]

HF_LAYER = {
    "attn_norm": "input_layernorm", "attention": "self_attn.o_proj.input",
    "attn_out": "self_attn.o_proj", "post_attn_residual": "post_attention_layernorm.input",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_silu": "mlp.act_fn", "ffn_swigl": "mlp.down_proj.input", "ffn_out": "mlp.down_proj.output",
}  # fmt: skip
LLAMA_LAYER = {
    "attn_norm": "attn_norm", "attention": "kqv_out", "attn_out": "attn_out",
    "post_attn_residual": "ffn_inp", "ffn_norm": "ffn_norm", "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up", "ffn_silu": "ffn_silu", "ffn_swigl": "ffn_swiglu", "ffn_out": "ffn_out",
    "post_ffn_residual": "l_out",
}  # fmt: skip
DTYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "int64": "I64", "bool": "BOOL"}


def write_safetensors(
    path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write the format by hand; uint16 stands for bfloat16."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": DTYPES.get(array.dtype.name, "BF16"), "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 values, as uint16."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def own_names(source: StageSource) -> Arrays:
    return {f"{key.path}.bin": source.read(key) for key in source.keys()}


def huggingface_names(source: StageSource, config: ModelConfig) -> Arrays:
    """As hooks on transformers' modules see them: [1, T, C], q, k and v apart, all logits."""
    arrays: Arrays = {}
    num_tokens = source.counts[StageKey(0, "attn_norm")] // config.hidden_size
    for key in source.keys():
        x = source.read(key)
        if key.stage == "lm_head":
            logits = np.zeros((1, num_tokens, x.size), np.float32)
            logits[0, -1] = x
            arrays["lm_head"] = logits
            continue
        x = x.reshape(1, num_tokens, -1)
        prefix = f"model.layers.{key.layer}"
        if key.stage == "qkv_bias":
            for letter in "qkv":
                start, stop = config.qkv_columns(letter)
                arrays[f"{prefix}.self_attn.{letter}_proj"] = x[:, :, start:stop]
        elif key.stage in HF_LAYER:
            arrays[f"{prefix}.{HF_LAYER[key.stage]}"] = x
        elif key.stage == "post_ffn_residual":
            arrays[f"{prefix}.output.0"] = x
        elif key.stage in ("embedding", "final_norm"):
            arrays["model.embed_tokens" if key.layer == 0 else "model.norm"] = x
    return arrays


def llama_cpp_names(source: StageSource, config: ModelConfig, padding: int = 32) -> Arrays:
    """As llama.cpp's eval callback sees them: scores unscaled, over the padded cache."""
    arrays: Arrays = {}
    num_tokens = source.counts[StageKey(0, "attn_norm")] // config.hidden_size
    whole = {"final_norm": "result_norm", "lm_head": "result_output", "embedding": "inp_embd"}
    for key in source.keys():
        x = source.read(key)
        match key.stage:
            case "attn_scores" | "attn_softmax":
                padded = np.zeros((config.num_heads, num_tokens, padding), np.float32)
                padded[:, :, :num_tokens] = x.reshape(config.num_heads, num_tokens, num_tokens)
                is_raw = key.stage == "attn_scores"
                name = "kq" if is_raw else "kq_soft_max"
                scale = np.float32(config.head_dim**0.5) if is_raw else np.float32(1)
                arrays[f"{name}-{key.layer}"] = padded * scale
            case "q_post_rope" | "k_post_rope":
                name = "Qcur" if key.stage[0] == "q" else "Kcur"
                arrays[f"{name}-{key.layer}"] = x.reshape(num_tokens, -1, config.head_dim)
            case stage if stage in LLAMA_LAYER:
                arrays[f"{LLAMA_LAYER[stage]}-{key.layer}"] = x.reshape(num_tokens, -1)
            case stage if stage in whole:
                arrays[whole[stage]] = x if stage == "lm_head" else x.reshape(num_tokens, -1)
    return arrays
