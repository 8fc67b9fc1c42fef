"""Qwen2: biases on q, k and v."""

from aprcore.network.architectures.family import Architecture, qwen_windows

DEFAULTS = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip

ARCHITECTURE = Architecture("qwen2", defaults=DEFAULTS, windows=qwen_windows)
