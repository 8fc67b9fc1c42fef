"""Gemma 2: norms by 1 + w, before and after each half of a layer; capped scores and logits.

Source: transformers' Gemma2; llama.cpp's `src/models/gemma2-iswa.cpp` and its conversion, which
stores 1 + w, leaves q and k as they are, and does not store `query_pre_attn_scalar`.
"""

from __future__ import annotations

import math
from typing import Any

from aprcore.ground.fields import Fields
from aprcore.network.architectures import blocks
from aprcore.network.architectures.family import (
    ATTENTION_BIASES,
    Architecture,
    Number,
    Windows,
    windows_of_layer_types,
)
from aprcore.network.stages import Builder, StageKey

OFFSET = 1.0  # norms multiply by 1 + w
_LAYERS_OF_27B = 46


def _begin(b: Builder) -> StageKey:
    return blocks.embedding(b, scale=math.sqrt(b.config.hidden_size))


def _layer(b: Builder) -> None:
    assert b.input is not None
    numbers, x = b.config.numbers, b.input
    scalar = numbers.get("query_pre_attn_scalar") or _scalar_of_gguf(b)
    normed = blocks.norm(b, "attn_norm", "input_layernorm", x, "RMSNorm before attention",
                         offset=OFFSET)  # fmt: skip
    mixed = blocks.attention(b, normed, scale=scalar**-0.5,
                             cap=numbers.get("attn_logit_softcapping"))  # fmt: skip
    mixed = blocks.norm(b, "attn_post_norm", "post_attention_layernorm", mixed,
                        "RMSNorm after attention", offset=OFFSET)  # fmt: skip
    x = blocks.residual_after_attention(b, x, mixed, "pre_feedforward_layernorm")
    normed = blocks.norm(b, "ffn_norm", "pre_feedforward_layernorm", x,
                         "RMSNorm before the feed-forward network", offset=OFFSET)  # fmt: skip
    out = blocks.norm(b, "ffn_post_norm", "post_feedforward_layernorm", blocks.gated_mlp(b, normed),
                      "RMSNorm after the feed-forward network", offset=OFFSET)  # fmt: skip
    blocks.residual_after_layer(b, x, out)


def _scalar_of_gguf(b: Builder) -> float:
    """What llama.cpp takes for it: the head's size, but for the 27B."""
    config = b.config
    if config.num_layers == _LAYERS_OF_27B:
        return config.hidden_size / config.num_heads
    return config.head_dim


def _end(b: Builder) -> None:
    blocks.head(b, cap=b.config.numbers.get("final_logit_softcapping"), offset=OFFSET)


def _windows(fields: Fields, num_layers: int) -> Windows:
    window = fields.optional_size(("sliding_window",))
    return windows_of_layer_types(fields, num_layers, window) or (window, None)


def _gguf_windows(window: int | None, pattern: Any, num_layers: int) -> Windows:
    """llama.cpp gives every second layer the window, from the first on."""
    return (window, None)


ARCHITECTURE = Architecture(
    "gemma2",
    layer=_layer,
    begin=_begin,
    end=_end,
    defaults={
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192, "sliding_window": 4096, "tie_word_embeddings": True,
        "attention_bias": False,
    },
    switches={"attention_bias": ATTENTION_BIASES},
    windows=_windows,
    gguf_windows=_gguf_windows,
    numbers=(
        Number("query_pre_attn_scalar", "", 256.0),
        Number("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
        Number("final_logit_softcapping", "final_logit_softcapping", 30.0),
    ),
    attention_keywords=frozenset({"sliding_window", "softcap"}),
    gguf_norm_offset=OFFSET,
)  # fmt: skip
