"""Mixtures of experts as other engines dump them: known by name, computed by nothing here."""

from aprcore.network.architectures import blocks
from aprcore.network.architectures.family import Architecture
from aprcore.network.stages import Builder


def _layer(b: Builder) -> None:
    assert b.input is not None
    x = b.input
    normed = blocks.norm(b, "attn_norm", "input_layernorm", x, "RMSNorm before attention")
    mixed = blocks.attention(b, normed)
    x = blocks.residual_after_attention(b, x, mixed, "post_attention_layernorm")
    normed = blocks.norm(b, "ffn_norm", "post_attention_layernorm", x,
                         "RMSNorm before the feed-forward network")  # fmt: skip
    blocks.residual_after_layer(b, x, blocks.experts_of_a_dump(b, normed))


ARCHITECTURE = Architecture("experts", layer=_layer, is_computed=False)
