"""What layers are made of: attention, the gated feed-forward network, norms, residuals.

Each block adds its stages to a `Builder` and gives the key of what comes out. A stage says where
transformers, llama.cpp, vLLM and TransformerLens show it. Source: modules of transformers 5.23;
`cb(...)` in llama.cpp's `llama-graph.cpp` and `src/models`; vLLM's `model_executor/models`, whose
layers hand on the residual stream beside what is to be added to it; hook points of TransformerLens.
"""

from __future__ import annotations

from aprcore.network.mask import CAUSAL
from aprcore.network.operations import (
    DOWN,
    FINAL_NORM,
    GATE,
    K_NORM,
    Q_NORM,
    UP,
    Activate,
    Add,
    AddBias,
    Embed,
    Head,
    K,
    Linear,
    Multiply,
    Norm,
    O,
    Operation,
    Q,
    Rotate,
    Scores,
    Softmax,
    V,
    Values,
)
from aprcore.network.stages import Builder, Node, Reading, Scope, Stage, StageKey

_QKV = (Q, K, V)
_QKV_SHOWN = (tuple(module.path for module in _QKV), ("self_attn.qkv_proj",))
_QKV_HOOKS = (("attn.hook_q", "attn.hook_k", "attn.hook_v"),
              ("attn.q.hook_out", "attn.k.hook_out", "attn.v.hook_out"))  # fmt: skip
# vLLM's and SGLang's attention has these; transformers' has neither.
_FUSED_ATTENTION = ("self_attn.attn",)
_FUSED_MLP = ("mlp.gate_up_proj", *_FUSED_ATTENTION)
_NORM_HOOKS = {"attn_norm": "ln1", "attn_post_norm": "ln1_post", "ffn_norm": "ln2",
               "ffn_post_norm": "ln2_post"}  # fmt: skip
# Until early 2025 llama.cpp's kqv_out was the output of the projection, since then it is its input.
# The old graph gives itself away by what it calls the input.
_OLD_LLAMA_CPP = ("kqv_merged_cont", "kqv_wo")


def embedding(b: Builder, scale: float = 1.0) -> StageKey:
    """The residual stream that the first layer is given."""
    return b.add(Stage(
        "embedding", Scope.FIRST_LAYER, "T,E", Embed(scale), "token embedding",
        shown=(("embed_tokens",),),
        nodes=(Node(("inp_scaled",)), Node(("inp_embd",)), Node(("embd",))),
        hooks=(("hook_embed",), ("embed.hook_out",)),
    ))  # fmt: skip


def head(b: Builder, cap: float | None = None, offset: float = 0.0) -> None:
    """The last norm and the logits."""
    assert b.input is not None
    normed = b.add(Stage(
        "final_norm", Scope.MODEL, "T,E", Norm(FINAL_NORM, b.config.rms_norm_eps, offset),
        "RMSNorm before the head", shown=(("norm",),), nodes=(Node(("result_norm",)),),
        hooks=(("ln_final.hook_out",), ("unembed.hook_in",)),
    ), b.input)  # fmt: skip
    b.add(Stage(
        "lm_head", Scope.MODEL, "V", Head(cap), "logits of the last token",
        shown=(("logits",),) if cap is not None else (("lm_head",), ("logits",)),
        nodes=(Node(("result_output",)),), fused=(Node(("logits_processor",)),),
        hooks=(("unembed.hook_out",), ("hook_unembed",)) if cap is None else (), last_token=True,
    ), normed)  # fmt: skip


def norm(
    b: Builder, name: str, weight: str, x: StageKey, title: str, *, node: str = "",
    offset: float = 0.0,
) -> StageKey:  # fmt: skip
    """RMSNorm by a weight of the layer; llama.cpp calls it as we do unless `node` is given."""
    operation = Norm(f"{weight}.weight", b.config.rms_norm_eps, offset)
    hooks = ((f"{_NORM_HOOKS[name]}.hook_out",),) if name in _NORM_HOOKS else ()
    return b.add(_layer_stage(name, "T,E", operation, title, weight, node or name, hooks=hooks), x)


def attention(
    b: Builder, x: StageKey, *, scale: float | None = None, cap: float | None = None,
    norm_offset: float = 0.0,
) -> StageKey:  # fmt: skip
    """Attention of grouped query heads over x, to its output projection.

    Args:
        b: The layer.
        x: What is projected to q, k and v.
        scale: The factor on q·k; None for 1/sqrt(D).
        cap: See `Scores`.
        norm_offset: See `Norm`, of the norms of q and k.
    """
    config = b.config
    mask = config.mask(b.layer)
    # llama.cpp calls the projection, its sum with the bias and what is rotated all Qcur; a capture
    # that keeps them apart adds what they are.
    projection = Stage("qkv_matmul", Scope.LAYER, "T,(H+2K)·D", Linear(_QKV, takes_bias=False),
                       "q, k and v projections, before the bias", shown=_QKV_SHOWN,
                       hooks=_QKV_HOOKS,
                       nodes=(Node(("Qcur_pre", "Kcur_pre", "Vcur_pre")),))  # fmt: skip
    biased = Stage("qkv_bias", Scope.LAYER, "T,(H+2K)·D", AddBias(_QKV),
                   "q, k and v after the bias", shown=_QKV_SHOWN, hooks=_QKV_HOOKS,
                   conditional=True,
                   nodes=(Node(("Qcur_bias", "Kcur_bias", "Vcur_bias")),))  # fmt: skip
    qkv = b.add(projection, x)
    if b.has(biased):
        qkv = b.add(biased, qkv)
    rotated = [
        b.add(Stage(name, Scope.LAYER, f"T,{heads}·D",
                    Rotate(part, weight, config.rms_norm_eps, norm_offset), title,
                    nodes=(Node((node,)),), fused=(Node((module,), beside=_FUSED_ATTENTION),),
                    hooks=((f"attn.hook_rot_{part}",),)), qkv)
        for name, heads, part, weight, node, module, title in (
            ("q_post_rope", "H", "q", Q_NORM, "Qcur", "self_attn.rotary_emb", "queries after RoPE"),
            ("k_post_rope", "K", "k", K_NORM, "Kcur", "self_attn.rotary_emb.1",
             "keys after RoPE, before repeating"),
        )
    ]  # fmt: skip
    capped = "" if cap is None else ", capped"
    hidden = (
        "zero above the diagonal" if mask == CAUSAL else f"zero where masked ({mask.describe()})"
    )
    scores = b.add(Stage(
        "attn_scores", Scope.LAYER, "H,T,S",
        Scores(config.head_dim**-0.5 if scale is None else scale, cap, mask),
        f"q·k/sqrt(D){capped}, {hidden}",
        # Scaling is left to the softmax, and both hold the cache's padded length of positions.
        nodes=(Node(("kq", "Qcur"), Reading.SCORES),) if cap is None else (),
        hooks=(("attn.hook_attn_scores",),),
    ), *rotated)  # fmt: skip
    weights = b.add(Stage(
        "attn_softmax", Scope.LAYER, "H,T,S", Softmax(mask), "attention weights",
        shown=(("self_attn.1",),), hooks=(("attn.hook_pattern",),),
        nodes=(Node(("kq_soft_max",), Reading.PADDED), Node(("kq_soft_max_ext",), Reading.PADDED)),
    ), scores)  # fmt: skip
    mixed = b.add(Stage(
        "attention", Scope.LAYER, "T,H·D", Values(), "softmax·V, before the output projection",
        shown=(("self_attn.o_proj.input",),),
        nodes=(Node(("kqv_merged_cont",)), Node(("kqv_out",), without=_OLD_LLAMA_CPP)),
        fused=(Node(_FUSED_ATTENTION),), hooks=(("attn.hook_z",), ("attn.o.hook_in",)),
    ), weights, qkv)  # fmt: skip
    return b.add(Stage(
        "attn_out", Scope.LAYER, "T,E", Linear((O,)), "attention output projection",
        shown=(("self_attn.o_proj",), ("self_attn",)),
        nodes=(Node(("kqv_out",), beside=_OLD_LLAMA_CPP), Node(("attn_out",))),
        hooks=(("hook_attn_out",), ("attn.hook_out",), ("attn.o.hook_out",)),
    ), mixed)  # fmt: skip


def residual_after_attention(b: Builder, x: StageKey, y: StageKey, read_by: str) -> StageKey:
    """The stream with attention added; transformers shows it to the module that reads it."""
    return b.add(Stage(
        "post_attn_residual", Scope.LAYER, "T,E", Add(), "residual stream after attention",
        shown=((f"{read_by}.input",),), nodes=(Node(("ffn_inp",)), Node(("sa_out",))),
        fused=(Node((f"{read_by}.1",)), Node(("1",), beside=_FUSED_MLP)),
        hooks=(("hook_resid_mid",), ("ln2.hook_in",)),
    ), x, y)  # fmt: skip


def residual_after_layer(b: Builder, x: StageKey, y: StageKey) -> StageKey:
    """The stream with the feed-forward network added: what the layer gives."""
    return b.add(_layer_stage(
        "post_ffn_residual", "T,E", Add(), "residual stream after the layer", "", "l_out",
        fused=(
            Node(("input_layernorm.1",), ahead=1), Node((" + 1",)), Node(("input",), ahead=1),
            # A norm that adds the residual is given something else.
            Node(("norm.input",), ahead=1, without=("input_layernorm.1", *_FUSED_MLP)),
        ),
        hooks=(("hook_resid_post",), ("hook_out",)),
    ), x, y)  # fmt: skip


def gated_mlp(b: Builder, x: StageKey) -> StageKey:
    """down(act(gate(x)) · up(x))."""
    gate = b.add(_layer_stage("ffn_gate", "T,F", Linear((GATE,)), "gate projection",
                              "mlp.gate_proj", "ffn_gate_b", "ffn_gate",
                              fused=(Node(("mlp.gate_up_proj[0/2]",)),),
                              hooks=(("mlp.hook_pre",), ("mlp.gate.hook_out",))), x)  # fmt: skip
    up = b.add(_layer_stage("ffn_up", "T,F", Linear((UP,)), "up projection",
                            "mlp.up_proj", "ffn_up_b", "ffn_up",
                            fused=(Node(("mlp.gate_up_proj[1/2]",)),),
                            hooks=(("mlp.hook_pre_linear",), ("mlp.in.hook_out",))), x)  # fmt: skip
    active = b.add(_layer_stage("ffn_silu", "T,F", Activate(b.config.hidden_act), "act(gate)",
                                "mlp.act_fn", "ffn_silu", "ffn_gelu"), gate)  # fmt: skip
    product = b.add(
        _layer_stage("ffn_swigl", "T,F", Multiply(), "act(gate)·up",
                     "mlp.down_proj.input", "ffn_gate_par", "ffn_swiglu", "ffn_geglu",
                     fused=(Node(("mlp.act_fn",), beside=_FUSED_MLP),),
                     hooks=(("mlp.hook_post",), ("mlp.out.hook_in",))),
        active, up,
    )  # fmt: skip
    return b.add(Stage(
        "ffn_out", Scope.LAYER, "T,E", Linear((DOWN,)), "down projection",
        shown=(("mlp.down_proj",), ("mlp",)), nodes=(Node(("ffn_out",)),),
        hooks=(("hook_mlp_out",), ("mlp.hook_out",), ("mlp.out.hook_out",)),
    ), product)  # fmt: skip


def experts_of_a_dump(b: Builder, x: StageKey) -> StageKey:
    """A mixture of experts as other engines dump it; nothing here computes one."""
    weights = b.add(Stage("moe_router", Scope.LAYER, "T,k", None, "top-k expert weights"), x)
    ids = b.add(Stage("moe_router_indices", Scope.LAYER, "T,k", None, "top-k expert ids"), x)
    return b.add(
        Stage("moe_ffn_out", Scope.LAYER, "T,E", None, "mixture of experts output"),
        x, weights, ids,
    )  # fmt: skip


def _layer_stage(
    name: str, shape: str, operation: Operation, title: str, shown: str, *nodes: str,
    fused: tuple[Node, ...] = (), hooks: tuple[tuple[str, ...], ...] = (),
) -> Stage:  # fmt: skip
    return Stage(name, Scope.LAYER, shape, operation, title, shown=((shown,),),
                 nodes=tuple(Node((node,)) for node in nodes),
                 fused=fused, hooks=hooks)  # fmt: skip


def pre_norm_layer(b: Builder) -> None:
    """A layer of Llama and all that follow it: norm, attention, add; norm, gated MLP, add."""
    assert b.input is not None
    x = b.input
    normed = norm(b, "attn_norm", "input_layernorm", x, "RMSNorm before attention")
    x = residual_after_attention(b, x, attention(b, normed), "post_attention_layernorm")
    normed = norm(b, "ffn_norm", "post_attention_layernorm", x,
                  "RMSNorm before the feed-forward network")  # fmt: skip
    residual_after_layer(b, x, gated_mlp(b, normed))
