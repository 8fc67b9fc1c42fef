"""The table of stages: the forward pass as data.

One row per intermediate tensor, in the order of computation: its name, where it lives, the stages
it reads, its shape in symbols, the weights it uses and the operation that makes it. The CPU pass,
the reference pass, the oracle, replaying one stage, reading directories and the tree on screen all
derive from `STAGES`. Adding a stage is adding a row (and a method per backend if the operation is
new).

Shapes are spelled as in FORMATS.md: T tokens, H heads, K kv heads, D head dim, E hidden, F ffn,
V vocab, k experts per token. "T,H·D" is two axes on disk, of which the second is a head and a
dimension within it. S is the number of positions attended to: T in a full pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from aprcore.ground.errors import PlanError

if TYPE_CHECKING:
    from aprcore.engines.base import Backend, Site

Array = Any  # whatever the backend computes with


class Scope(Enum):
    """Where a stage's file lives."""

    FIRST_LAYER = "first layer"
    LAYER = "layer"
    MODEL = "model"


class StageKey(NamedTuple):
    """One tensor of a pass: a stage, and its layer unless it belongs to the whole model."""

    layer: int | None
    stage: str

    @property
    def path(self) -> str:
        """The tensor's path inside a directory, without `.bin`: "layer-0/attn_norm"."""
        return self.stage if self.layer is None else f"layer-{self.layer}/{self.stage}"

    def __str__(self) -> str:
        return self.stage if self.layer is None else f"layer {self.layer} · {self.stage}"


# Names a stage may read besides those of other stages.
LAYER_INPUT = "(layer input)"  # the embedding, then the previous layer's post_ffn_residual
QKV = "(qkv)"  # qkv_bias where the model has one, else qkv_matmul

Operation = Callable[..., Array]


@dataclass(frozen=True, slots=True)
class Stage:
    """A row of the table.

    Attributes:
        name: As spelled on disk.
        scope: Where it lives.
        reads: Stages (or `LAYER_INPUT`, `QKV`) whose tensors are its inputs, in argument order.
        shape: Its canonical shape in symbols.
        operation: Called as `operation(backend, site, *inputs)`; None for a stage that dumps of
            other engines contain but no supported architecture computes.
        weights: Weights it needs, relative to the layer.
        optional: Weights it uses when the model has them.
        feature: The `ModelConfig` feature without which the stage does not exist.
        last_token: Whether it reads only the last token's row of its inputs.
        title: What it is, for people.
    """

    name: str
    scope: Scope
    reads: tuple[str, ...]
    shape: str
    operation: Operation | None
    weights: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    feature: str | None = None
    last_token: bool = False
    title: str = ""


Q, K, V, O = (f"self_attn.{letter}_proj" for letter in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))


def _linear(*modules: str) -> Operation:
    def apply(op: Backend, at: Site, x: Array) -> Array:
        return op.linear(x, [at.weight(f"{module}.weight") for module in modules])

    return apply


def _linear_and_bias(module: str) -> Operation:
    def apply(op: Backend, at: Site, x: Array) -> Array:
        y = op.linear(x, [at.weight(f"{module}.weight")])
        bias = at.find(f"{module}.bias")
        return y if bias is None else op.add_bias(y, [bias])

    return apply


def _norm(weight: str) -> Operation:
    def apply(op: Backend, at: Site, x: Array) -> Array:
        return op.rms_norm(x, at.weight(weight), at.config.rms_norm_eps)

    return apply


def _qkv_bias(op: Backend, at: Site, x: Array) -> Array:
    return op.add_bias(x, [at.weight(f"{module}.bias") for module in (Q, K, V)])


def _rotated(norm: str, part: str) -> Operation:
    def apply(op: Backend, at: Site, qkv: Array) -> Array:
        x = op.columns(qkv, *at.config.qkv_columns(part))
        weight = at.find(norm)
        if weight is not None:
            x = op.rms_norm(x, weight, at.config.rms_norm_eps)
        return op.rope(x, at.positions, at.config.rope)

    return apply


def _attn_scores(op: Backend, at: Site, q: Array, k: Array) -> Array:
    keys = at.with_past(op, "k", k)
    return op.attention_scores(q, keys, at.config.num_heads, at.config.num_kv_heads)


def _attention(op: Backend, at: Site, softmax: Array, qkv: Array) -> Array:
    values = at.with_past(op, "v", op.columns(qkv, *at.config.qkv_columns("v")))
    return op.weighted_values(softmax, values, at.config.num_kv_heads)


def _lm_head(op: Backend, at: Site, x: Array) -> Array:
    weight = at.find("lm_head.weight") or at.weight("model.embed_tokens.weight")
    return op.linear(x, [weight])


STAGES: tuple[Stage, ...] = (
    Stage("embedding", Scope.FIRST_LAYER, (), "T,E",
          lambda op, at: op.embed(at.tokens, at.weight("model.embed_tokens.weight")),
          weights=("model.embed_tokens.weight",), title="token embedding"),
    Stage("attn_norm", Scope.LAYER, (LAYER_INPUT,), "T,E", _norm("input_layernorm.weight"),
          weights=("input_layernorm.weight",), title="RMSNorm before attention"),
    Stage("qkv_matmul", Scope.LAYER, ("attn_norm",), "T,(H+2K)·D", _linear(Q, K, V),
          weights=(f"{Q}.weight", f"{K}.weight", f"{V}.weight"),
          title="q, k and v projections, before the bias"),
    Stage("qkv_bias", Scope.LAYER, ("qkv_matmul",), "T,(H+2K)·D", _qkv_bias,
          weights=(f"{Q}.bias", f"{K}.bias", f"{V}.bias"), feature="qkv_bias",
          title="q, k and v after the bias"),
    Stage("q_post_rope", Scope.LAYER, (QKV,), "T,H·D", _rotated("self_attn.q_norm.weight", "q"),
          optional=("self_attn.q_norm.weight",), title="queries after RoPE"),
    Stage("k_post_rope", Scope.LAYER, (QKV,), "T,K·D", _rotated("self_attn.k_norm.weight", "k"),
          optional=("self_attn.k_norm.weight",), title="keys after RoPE, before repeating"),
    Stage("attn_scores", Scope.LAYER, ("q_post_rope", "k_post_rope"), "H,T,S", _attn_scores,
          title="q·k/sqrt(D), zero above the diagonal"),
    Stage("attn_softmax", Scope.LAYER, ("attn_scores",), "H,T,S",
          lambda op, at, scores: op.causal_softmax(scores), title="attention weights"),
    Stage("attention", Scope.LAYER, ("attn_softmax", QKV), "T,H·D", _attention,
          title="softmax·V, before the output projection"),
    Stage("attn_out", Scope.LAYER, ("attention",), "T,E", _linear_and_bias(O),
          weights=(f"{O}.weight",), optional=(f"{O}.bias",), title="attention output projection"),
    Stage("post_attn_residual", Scope.LAYER, (LAYER_INPUT, "attn_out"), "T,E",
          lambda op, at, x, y: op.add(x, y), title="residual stream after attention"),
    Stage("ffn_norm", Scope.LAYER, ("post_attn_residual",), "T,E",
          _norm("post_attention_layernorm.weight"), weights=("post_attention_layernorm.weight",),
          title="RMSNorm before the feed-forward network"),
    Stage("ffn_gate", Scope.LAYER, ("ffn_norm",), "T,F", _linear_and_bias(GATE),
          weights=(f"{GATE}.weight",), optional=(f"{GATE}.bias",), feature="dense",
          title="gate projection"),
    Stage("ffn_up", Scope.LAYER, ("ffn_norm",), "T,F", _linear_and_bias(UP),
          weights=(f"{UP}.weight",), optional=(f"{UP}.bias",), feature="dense",
          title="up projection"),
    Stage("ffn_silu", Scope.LAYER, ("ffn_gate",), "T,F",
          lambda op, at, x: op.activation(x, at.config.hidden_act), feature="dense",
          title="act(gate)"),
    Stage("ffn_swigl", Scope.LAYER, ("ffn_silu", "ffn_up"), "T,F",
          lambda op, at, x, y: op.multiply(x, y), feature="dense", title="act(gate)·up"),
    Stage("ffn_out", Scope.LAYER, ("ffn_swigl",), "T,E", _linear_and_bias(DOWN),
          weights=(f"{DOWN}.weight",), optional=(f"{DOWN}.bias",), feature="dense",
          title="down projection"),
    Stage("moe_router", Scope.LAYER, ("ffn_norm",), "T,k", None, feature="experts",
          title="top-k expert weights"),
    Stage("moe_router_indices", Scope.LAYER, ("ffn_norm",), "T,k", None, feature="experts",
          title="top-k expert ids"),
    Stage("moe_ffn_out", Scope.LAYER, ("ffn_norm", "moe_router", "moe_router_indices"), "T,E",
          None, feature="experts", title="mixture of experts output"),
    Stage("post_ffn_residual", Scope.LAYER, ("post_attn_residual", "ffn_out"), "T,E",
          lambda op, at, x, y: op.add(x, y), title="residual stream after the layer"),
    Stage("final_norm", Scope.MODEL, (LAYER_INPUT,), "T,E", _norm("model.norm.weight"),
          weights=("model.norm.weight",), title="RMSNorm before the head"),
    Stage("lm_head", Scope.MODEL, ("final_norm",), "V", _lm_head,
          weights=("model.embed_tokens.weight",), optional=("lm_head.weight",),
          last_token=True, title="logits of the last token"),
)  # fmt: skip

BY_NAME: Mapping[str, Stage] = {stage.name: stage for stage in STAGES}

# Spellings that other engines use for a stage; accepted wherever a stage is read or named.
ALIASES: Mapping[str, str] = {"layer_output": "post_ffn_residual"}

# The shapes of weights in symbols, by the name inside a layer or the whole name.
WEIGHT_SHAPES: Mapping[str, str] = {
    "model.embed_tokens.weight": "V,E",
    "input_layernorm.weight": "E",
    f"{Q}.weight": "H·D,E",
    f"{K}.weight": "K·D,E",
    f"{V}.weight": "K·D,E",
    f"{Q}.bias": "H·D",
    f"{K}.bias": "K·D",
    f"{V}.bias": "K·D",
    "self_attn.q_norm.weight": "D",
    "self_attn.k_norm.weight": "D",
    f"{O}.weight": "E,H·D",
    f"{O}.bias": "E",
    "post_attention_layernorm.weight": "E",
    f"{GATE}.weight": "F,E",
    f"{GATE}.bias": "F",
    f"{UP}.weight": "F,E",
    f"{UP}.bias": "F",
    f"{DOWN}.weight": "E,F",
    f"{DOWN}.bias": "E",
    "model.norm.weight": "E",
    "lm_head.weight": "V,E",
}


def find_stage(name: str) -> Stage:
    """The row of a stage, by its name in any case or by an alias.

    Raises:
        PlanError: No stage has that name; the message lists those that exist.
    """
    lowered = name.strip().lower()
    stage = BY_NAME.get(ALIASES.get(lowered, lowered))
    if stage is None:
        raise PlanError(f"unknown stage {name!r}", hint=f"stages are {', '.join(BY_NAME)}")
    return stage


@lru_cache(maxsize=1 << 14)  # a directory and its sidecar name every stage several times
def parse_path(path: str) -> StageKey | None:
    """The key of a path such as "layer-3/attn_norm" or "lm_head", or None if it names no stage.

    `embedding` at the top level is read as layer 0's.
    """
    folder, _, name = path.rpartition("/")
    name = ALIASES.get(name, name)
    stage = BY_NAME.get(name)
    if stage is None:
        return None
    if not folder:
        if stage.scope is Scope.MODEL:
            return StageKey(None, name)
        return StageKey(0, name) if stage.scope is Scope.FIRST_LAYER else None
    number = folder.removeprefix("layer-")
    # APRT stores a layer in 32 bits; Python refuses to read thousands of digits.
    if number == folder or not (number.isascii() and number.isdigit() and len(number) <= 10):
        return None
    if stage.scope is Scope.MODEL or (stage.scope is Scope.FIRST_LAYER and int(number) != 0):
        return None
    return StageKey(int(number), name)


def stage_keys(num_layers: int, features: Iterable[str]) -> Iterator[StageKey]:
    """Every tensor of a pass in the order of computation.

    Args:
        num_layers: Layers of the model.
        features: What the model has; a stage with a feature outside it is left out.
    """
    has = set(features)
    rows = [stage for stage in STAGES if stage.feature is None or stage.feature in has]
    for layer in range(num_layers):
        for stage in rows:
            if stage.scope is Scope.LAYER or (stage.scope is Scope.FIRST_LAYER and layer == 0):
                yield StageKey(layer, stage.name)
    for stage in rows:
        if stage.scope is Scope.MODEL:
            yield StageKey(None, stage.name)


_POSITION = {stage.name: position for position, stage in enumerate(STAGES)}


def computation_order(key: StageKey) -> tuple[int, int]:
    """Sorts keys into the order of computation, whole-model stages last."""
    layer = 1 << 62 if key.layer is None else key.layer
    return layer, _POSITION[key.stage]


def input_keys(key: StageKey, num_layers: int, features: Iterable[str]) -> tuple[StageKey, ...]:
    """The tensors that a stage reads, in argument order."""
    has = set(features)
    keys = []
    for name in BY_NAME[key.stage].reads:
        if name == LAYER_INPUT:
            before = num_layers - 1 if key.layer is None else key.layer - 1
            keys.append(
                StageKey(0, "embedding") if before < 0 else StageKey(before, "post_ffn_residual")
            )
            continue
        if name == QKV:
            name = "qkv_bias" if "qkv_bias" in has else "qkv_matmul"
        scope = BY_NAME[name].scope
        keys.append(StageKey(None if scope is Scope.MODEL else key.layer, name))
    return tuple(keys)


@cache
def split_axes(shape: str) -> tuple[tuple[str, ...], ...]:
    """The factors of each axis: "T,(H+2K)·D" -> (("T",), ("(H+2K)", "D"))."""
    return tuple(tuple(axis.split("·")) for axis in shape.split(","))


def resolve_shape(shape: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A symbolic shape in numbers, one per axis on disk.

    Raises:
        KeyError: `sizes` lacks a letter that the shape uses.
    """
    return tuple(_product(factors, sizes) for factors in split_axes(shape))


def resolve_factors(shape: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A symbolic shape in numbers with heads and dimensions apart: "T,H·D" -> (T, H, D)."""
    return tuple(_size(symbol, sizes) for axis in split_axes(shape) for symbol in axis)


AXIS_NAMES = {"T": "token", "S": "position", "H": "head", "K": "head", "(H+2K)": "head",
              "D": "dim", "E": "dim", "F": "dim", "V": "token id", "k": "expert"}  # fmt: skip


@cache
def axis_names(shape: str) -> tuple[str, ...]:
    """What the factors of a shape count: "T,H·D" -> ("token", "head", "dim")."""
    return tuple(AXIS_NAMES[symbol] for axis in split_axes(shape) for symbol in axis)


def _product(factors: Sequence[str], sizes: Mapping[str, int]) -> int:
    product = 1
    for symbol in factors:
        product *= _size(symbol, sizes)
    return product


def _size(symbol: str, sizes: Mapping[str, int]) -> int:
    if symbol == "(H+2K)":
        return sizes["H"] + 2 * sizes["K"]
    return sizes[symbol]
