"""Parallel: attention and the feed-forward network read the same norm, and are added together."""

from aprcore.network.architectures import blocks
from aprcore.network.architectures.family import Architecture, Number
from aprcore.network.operations import Add, AddScaled, Norm
from aprcore.network.stages import Builder, Node, Scope, Stage


def _layer(b: Builder) -> None:
    assert b.input is not None
    x, config = b.input, b.config
    normed = blocks.norm(b, "attn_norm", "input_layernorm", x, "RMSNorm before both halves")
    mixed = blocks.attention(b, normed)
    made = blocks.gated_mlp(b, normed)
    both = b.add(Stage(
        "branch_sum", Scope.LAYER, "T,E", Add(), "both halves together", nodes=(Node(("both",)),),
    ), mixed, made)  # fmt: skip
    branch_norm = Stage(
        "branch_norm", Scope.LAYER, "T,E",
        Norm("post_attention_layernorm.weight", config.rms_norm_eps), "RMSNorm of both halves",
        shown=(("post_attention_layernorm",),), nodes=(Node(("both_normed",)),), conditional=True,
    )  # fmt: skip
    if b.has(branch_norm):
        both = b.add(branch_norm, both)
    factor = config.numbers.get("residual_multiplier", 1.0)
    b.add(Stage(
        "post_ffn_residual", Scope.LAYER, "T,E", AddScaled(factor), "residual stream",
        shown=(("",),), nodes=(Node(("l_out",)),),
    ), x, both)  # fmt: skip


ARCHITECTURE = Architecture(
    "parallel",
    gguf="parallel-lm",
    layer=_layer,
    numbers=(Number("residual_multiplier", "residual_scale", 1.0),),
)
