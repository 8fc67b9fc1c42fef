"""Qwen3: norms of q and k in place of their biases."""

from aprcore.network.architectures.family import ATTENTION_BIASES, Architecture, qwen_windows
from aprcore.network.architectures.qwen2 import DEFAULTS

ARCHITECTURE = Architecture(
    "qwen3",
    defaults={**DEFAULTS, "head_dim": 128, "attention_bias": False},
    switches={"attention_bias": ATTENTION_BIASES},
    windows=qwen_windows,
)
