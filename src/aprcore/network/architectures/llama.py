"""Llama: what nearly every dense decoder is built like."""

from aprcore.network.architectures.family import ATTENTION_BIASES, MLP_BIASES, Architecture

ARCHITECTURE = Architecture(
    "llama",
    defaults={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
        "attention_bias": False, "mlp_bias": False,
    },
    switches={"attention_bias": ATTENTION_BIASES, "mlp_bias": MLP_BIASES},
    gguf_adjacent_pairs=True,
)  # fmt: skip
