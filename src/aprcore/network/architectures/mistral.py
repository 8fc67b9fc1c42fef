"""Mistral: Llama with a sliding window in every layer, where it has one."""

from __future__ import annotations

from aprcore.ground.errors import ConfigError
from aprcore.ground.fields import Fields
from aprcore.network.architectures.family import Architecture, Windows, windows_of_layer_types


def _windows(fields: Fields, num_layers: int) -> Windows:
    """Source: MistralModel, which gives all layers the window and does not read `layer_types`."""
    window = fields.optional_size(("sliding_window",))
    stated = windows_of_layer_types(fields, num_layers, window)
    if stated is not None and set(stated) != {window}:
        raise ConfigError(
            "layer_types differ from layer to layer, and a mistral has one window for all",
            where=fields.where, hint="the model may be of another architecture",
        )  # fmt: skip
    return (window,)


ARCHITECTURE = Architecture(
    "mistral",
    defaults={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    windows=_windows,
    gguf_adjacent_pairs=True,
)  # fmt: skip
