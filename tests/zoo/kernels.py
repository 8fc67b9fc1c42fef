"""Kernel faults: what an engine can compute wrongly in one stage, each a few lines of torch.

They are written from what engines get wrong, apart from `aprcore.causes`: the zoo would prove
nothing if the answer were written twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from aprcore.network.stages import StageKey

from .engine import (
    Step,
    Tensor,
    Wrong,
    activate,
    plain_frequencies,
    quantised_blocks,
    soft_capped,
    window_of,
)


@dataclass(frozen=True)
class KernelFault:
    """A mistake of an engine.

    Attributes:
        stages: What computes wrongly, by stage; one mistake may show in several.
        causes: As of `trial.Planted`, lower case.
    """

    stages: Mapping[str, Wrong]
    causes: tuple[str, ...]


FAULTS: dict[str, KernelFault] = {}


def plant(name: str, causes: str, **stages: Wrong) -> None:
    """Add a fault to the list; `causes` are the accepted words, parted by "|"."""
    assert name not in FAULTS, name
    FAULTS[name] = KernelFault(stages, tuple(causes.split("|")))


def both(function: Wrong) -> dict[str, Wrong]:
    """The same mistake for queries and keys."""
    return {"q_post_rope": function, "k_post_rope": function}


# Rotary embedding.


def wrong_rope(**change: object) -> Wrong:
    return lambda s: s.rotate(s.head_normed(), **change)  # type: ignore[arg-type]


def positions(change: Callable[[Tensor], Tensor]) -> Wrong:
    def rotate(s: Step) -> Tensor:
        given = torch.arange(s.x.shape[0], dtype=torch.float64)
        return s.rotate(s.head_normed(), positions=change(given))

    return rotate


def theta(value: float) -> Wrong:
    return lambda s: s.rotate(
        s.head_normed(), inverse=plain_frequencies(value, s.config.head_dim).inverse
    )


def unscaled(s: Step) -> Tensor:
    plain = plain_frequencies(s.config.rope.theta, s.config.head_dim)
    return s.rotate(s.head_normed(), inverse=plain.inverse, factor=1.0)


def stretched(change: Callable[[Step], tuple[Tensor, float]]) -> Wrong:
    """Another schedule of frequencies, and another factor on sine and cosine."""

    def rotate(s: Step) -> Tensor:
        inverse, factor = change(s)
        return s.rotate(s.head_normed(), inverse=inverse, factor=factor)

    return rotate


def _yarn(s: Step, by: float, length: int, fast: float, slow: float = 1.0) -> Tensor:
    """YaRN's frequencies as llama.cpp makes them: a ramp between two numbers of turns."""
    dim, plain = s.config.head_dim, plain_frequencies(s.config.rope.theta, s.config.head_dim)
    ends = [dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(s.config.rope.theta))
            for turns in (fast, slow)]  # fmt: skip
    low, high = max(0, math.floor(ends[0])), min(dim - 1, math.ceil(ends[1]))
    kept = 1 - ((torch.arange(dim // 2) - low) / max(0.001, high - low)).clamp(0, 1)
    return plain.inverse * kept + plain.inverse / by * (1 - kept)


plant("rope-pairs", "adjacent", **both(wrong_rope(pairs=True)))
plant("rope-pairs-q", "adjacent", q_post_rope=wrong_rope(pairs=True))
plant("rope-theta-10k", "theta", **both(theta(1e4)))
plant("rope-theta-500k", "theta", **both(theta(5e5)))
plant("rope-position-late", "position", **both(positions(lambda p: p + 1)))
plant("rope-position-early-k", "position", k_post_rope=positions(lambda p: (p - 1).clamp(min=0)))
plant("rope-position-restarts", "position|restart|token", **both(positions(lambda p: p % 16)))
plant("rope-absent", "not applied|no rope|not rotated|rope-not|without rope|missing",
      **both(lambda s: s.head_normed()))  # fmt: skip
plant("rope-absent-k", "not applied|no rope|not rotated|rope-not|without rope|missing",
      k_post_rope=lambda s: s.head_normed())  # fmt: skip
plant("rope-partial", "partial|dimension",
      **both(lambda s: s.rotate(s.head_normed(), width=s.config.head_dim // 2)))  # fmt: skip
plant("rope-sine-negated", "sine|sin ", **both(wrong_rope(sign=-1.0)))
plant("rope-scaling-lost", "scaling", **both(unscaled))
plant("rope-position-far", "off by +37", **both(positions(lambda p: p + 37)))
plant("rope-table-ends", "held at 9", **both(positions(lambda p: p.clamp(max=9))))
plant("rope-linear-unasked", "divided by 4", **both(stretched(
    lambda s: (s.engine.frequencies.inverse / 4, 1.0))))  # fmt: skip
plant("rope-yarn-unasked", "yarn by 4", **both(stretched(
    lambda s: (_yarn(s, 4, 4096, 32), 0.1 * math.log(4) + 1))))  # fmt: skip
plant("rope-yarn-beta", "beta_fast 4", **both(stretched(
    lambda s: (_yarn(s, 4, 64, 4), s.engine.frequencies.factor))))  # fmt: skip
plant("rope-yarn-factor", "attention factor of 1.3", **both(stretched(
    lambda s: (s.engine.frequencies.inverse, 1.3))))  # fmt: skip
plant("rope-yarn-length", "original_max_position_embeddings 512", **both(stretched(
    lambda s: (_yarn(s, 4, 512, 32), s.engine.frequencies.factor))))  # fmt: skip
plant("rope-on-v", "rope", attention=lambda s: s.values(v=s.rotate(s.part("v"))))

# Little faults: what a wrong constant in a fused kernel does.


def little(times: float) -> Wrong:
    return lambda s: s.sound() * times


plant("little-out", "factor|scale", attn_out=little(1.005))
plant("little-down", "factor|scale", ffn_out=little(0.999))
plant("little-scores", "factor|scale", attn_scores=little(1.002))
plant("little-values", "factor|scale", attention=little(1.001))
plant("little-norm", "factor|scale|eps|weight", ffn_norm=little(1.001))
plant("local-little-head", "~head|~scale|factor|scale", attention=lambda s: _times_in_head(s, 1.01))


def _times_in_head(s: Step, times: float) -> Tensor:
    heads = s.sound().reshape(s.x.shape[1], -1, s.config.head_dim).clone()
    heads[:, 1] *= times
    return heads.reshape(s.x.shape[1], -1)


# Attention.

plant("scale-hidden", "scale|factor",
      attn_scores=lambda s: s.scores(scale=1 / math.sqrt(s.config.hidden_size)))  # fmt: skip
plant("scale-none", "scale|factor", attn_scores=lambda s: s.scores(scale=1.0))
plant("scale-kv-dim", "scale|factor", attn_scores=lambda s: s.scores(
    scale=1 / math.sqrt(s.config.hidden_size // s.config.num_kv_heads)))  # fmt: skip
plant("mask-none", "mask", attn_softmax=lambda s: s.softmax(
    _unmasked(s), torch.ones_like(s.sees())))  # fmt: skip
plant(
    "mask-late",
    "mask",
    attn_softmax=lambda s: s.softmax(_unmasked(s), torch.ones_like(s.sees()).tril(1)),
)
plant("mask-early", "mask", attn_softmax=lambda s: _first_sees_itself(s))
plant("mask-after", "mask", attn_softmax=lambda s: torch.softmax(_unmasked(s), dim=-1).tril())
plant("softmax-axis", "axis", attn_softmax=lambda s: _other_axis(s))
plant("softmax-no-max", "max|overflow", attn_softmax=lambda s: _without_maximum(s, torch.float32))
plant("softmax-half", "half|precision|f16|bf16|float16|bfloat16",
      attn_softmax=lambda s: _softmax_in(s, torch.float16))  # fmt: skip
plant("softmax-bf16", "half|precision|f16|bf16|float16|bfloat16",
      attn_softmax=lambda s: _softmax_in(s, torch.bfloat16))  # fmt: skip
plant("kv-tiled-scores", "tile", attn_scores=lambda s: s.scores(groups=_tiled(s)))
plant("kv-tiled-values", "tile", attention=lambda s: s.values(groups=_tiled(s)))
plant("kv-tiled", "tile", attn_scores=lambda s: s.scores(groups=_tiled(s)),
      attention=lambda s: s.values(groups=_tiled(s)))  # fmt: skip
plant("kv-groups-count", "group", attn_scores=lambda s: s.scores(groups=s.groups() // 2))
plant(
    "kv-first-only", "group|kv head|tile|head", attention=lambda s: s.values(groups=s.groups() * 0)
)


def _unmasked(s: Step) -> Tensor:
    """The scores that nobody may see too, which the dump leaves out."""
    layer = s.key.layer
    rotated = [s.made[StageKey(layer, name)] for name in ("q_post_rope", "k_post_rope")]
    whole = Step(s.engine, StageKey(layer, "attn_scores"), s.tokens, rotated, s.made).products()
    return torch.where(s.sees(), s.x, whole)


def _first_sees_itself(s: Step) -> Tensor:
    """Each token sees only those before it; the first has nothing else to see than itself."""
    sees = torch.ones(s.x.shape[1:], dtype=torch.bool).tril(-1)
    sees[0, 0] = True
    return torch.softmax(s.x.masked_fill(~sees, -torch.inf), dim=-1)


def _other_axis(s: Step) -> Tensor:
    future = torch.ones(s.x.shape[1:], dtype=torch.bool).triu(1)
    return torch.softmax(s.x.masked_fill(future, -torch.inf), dim=1)


def _without_maximum(s: Step, kind: torch.dtype) -> Tensor:
    powers = s.x.to(kind).exp().tril()
    return (powers / powers.sum(dim=-1, keepdim=True)).to(s.x.dtype)


def _softmax_in(s: Step, kind: torch.dtype) -> Tensor:
    return s.softmax(s.x.to(kind)).to(s.x.dtype)


def _tiled(s: Step) -> Tensor:
    return torch.arange(s.config.num_heads) % s.config.num_kv_heads


# What a query sees: windows, and models that look both ways.


def seeing(change: Callable[[Step], Tensor]) -> Wrong:
    """The softmax over something else than a query sees."""
    return lambda s: s.softmax(_unmasked(s), change(s))


def window(change: Callable[[int], int | None]) -> Wrong:
    """The softmax over another window."""
    return seeing(lambda s: s.sees(change(s.window)))  # type: ignore[arg-type]


def _window_of_next(s: Step) -> Tensor:
    return s.sees(window_of(s.config, s.key.layer + 1))  # type: ignore[operator]


OFF_BY_ONE = "window off by one"
plant("window-ignored", "ignored|no window", attn_softmax=window(lambda w: None))
plant("window-short", OFF_BY_ONE, attn_softmax=window(lambda w: w - 1))
plant("window-long", OFF_BY_ONE, attn_softmax=window(lambda w: w + 1))
plant("window-halved", "window of 3 in place of", attn_softmax=window(lambda w: w // 2))
plant("window-other-layers", "other layers|ignored|no window",
      attn_softmax=seeing(_window_of_next))  # fmt: skip
plant("window-unasked", "only the last 4 positions", attn_softmax=seeing(lambda s: s.sees(4)))
plant("window-short-scores", OFF_BY_ONE,
      attn_scores=lambda s: s.sound() * s.sees(s.window - 1),
      attn_softmax=window(lambda w: w - 1))  # fmt: skip
plant("window-after", "after softmax", attn_softmax=lambda s: (
    s.softmax(_unmasked(s), s.sees(None)) * s.sees()))  # fmt: skip
plant("causal-forced", "is_causal|a causal mask",
      attn_softmax=lambda s: s.softmax(seen=s.sees(is_causal=True)))  # fmt: skip
plant("causal-forced-scores", "is_causal|a causal mask",
      attn_scores=lambda s: s.sound().tril(),
      attn_softmax=lambda s: s.softmax(seen=s.sees(is_causal=True)))  # fmt: skip

# Caches, chunks of a prompt, and kernels of flash attention.


def of_past(wrong: Wrong) -> Wrong:
    """A fault that shows what the cache held before."""
    wrong.reads_past = True  # type: ignore[attr-defined]
    return wrong


def keys(change: Callable[[Step, Tensor], Tensor]) -> Wrong:
    """Scores against other keys."""

    def scores(s: Step) -> Tensor:
        q, k = s.inputs
        return Step(s.engine, s.key, s.tokens, [q, change(s, k)], s.made).scores()

    return scores


def values(change: Callable[[Step, Tensor], Tensor]) -> Wrong:
    """The sum of other values."""
    return lambda s: s.values(v=change(s, s.part("v")))


def _late(s: Step, x: Tensor) -> Tensor:
    """Every row one late, the first empty."""
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def _past_rows(start: int, stop: int, stage: str) -> Callable[[Step, Tensor], Tensor]:
    """Some rows of the text before."""

    def change(s: Step, x: Tensor) -> Tensor:
        held = s.past[StageKey(s.key.layer, stage)].to(x.dtype)
        other = x.clone()
        other[start:stop] = (s.part("v", held) if "qkv" in stage else held)[start:stop]
        return other

    return change


def _qkv_stage(s: Step) -> str:
    """What this model's v is taken from."""
    biased = s.find("self_attn.v_proj.bias") is not None
    return "qkv_bias" if biased else "qkv_matmul"


def _keys_before(s: Step, x: Tensor) -> Tensor:
    return s.made[StageKey(s.key.layer - 1, "k_post_rope")]  # type: ignore[operator]


def _values_before(s: Step, x: Tensor) -> Tensor:
    return s.part("v", s.made[StageKey(s.key.layer - 1, _qkv_stage(s))])  # type: ignore[operator]


def _biased_by_distance(s: Step) -> Tensor:
    heads = s.config.num_heads
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)])[:, None, None]
    place = torch.arange(len(s.tokens))
    return slopes * (place[None, :] - place[:, None])


def _with_sinks(s: Step, logits: Tensor) -> Tensor:
    """Softmax over one more position of each head, which is dropped afterwards."""
    hidden = s.x.masked_fill(~s.sees(), -torch.inf)
    more = logits[:, None, None].to(s.x.dtype).expand(-1, hidden.shape[1], 1)
    return torch.softmax(torch.cat([hidden, more], dim=2), dim=2)[:, :, :-1]


def _own_chunk(s: Step, size: int) -> Tensor:
    chunk = torch.arange(len(s.tokens)) // size
    return s.sees() & (chunk[:, None] == chunk[None, :])


def flash(size: int, keeps_values: bool, keeps_total: bool) -> Wrong:
    """Attention over blocks of keys, whose sums are not rescaled when the maximum grows."""

    def attention(s: Step) -> Tensor:
        scores = s.made[StageKey(s.key.layer, "attn_scores")].to(s.x.dtype)
        hidden = scores.masked_fill(~s.sees(), -torch.inf)
        v = s.by_head(s.part("v"))[s.groups()]
        top = torch.full((*hidden.shape[:2], 1), -torch.inf, dtype=s.x.dtype)
        total, mixed = torch.zeros_like(top), torch.zeros(*hidden.shape[:2], v.shape[2])
        mixed = mixed.to(s.x.dtype)
        for start in range(0, hidden.shape[2], size):
            block = hidden[:, :, start : start + size]
            new = torch.maximum(top, block.amax(dim=2, keepdim=True))
            powers, shrink = torch.exp(block - new), torch.exp(top - new)
            mixed = mixed * (1 if keeps_values else shrink) + powers @ v[:, start : start + size]
            total = total * (1 if keeps_total else shrink) + powers.sum(dim=2, keepdim=True)
            top = new
        return (mixed / total).transpose(0, 1).reshape(s.x.shape[1], -1)

    return attention


def _short_dot(s: Step, kept: int) -> Tensor:
    q, k = (s.by_head(x)[..., :kept].transpose(0, 1) for x in s.inputs)
    products = torch.einsum("thd,shd->hts", q, k[:, s.groups()]) * s.scale
    return torch.where(s.sees(), products, 0.0)


def _strided(s: Step, x: Tensor) -> Tensor:
    return x.reshape(len(x), s.config.head_dim, -1).transpose(1, 2).reshape(x.shape)


def _strided_scores(s: Step) -> Tensor:
    moved = [_strided(s, x) for x in s.inputs]
    return Step(s.engine, s.key, s.tokens, moved, s.made).scores()


plant("cache-layer-keys", "keys of layer", attn_scores=keys(_keys_before))
plant("cache-layer-values", "values of layer", attention=values(_values_before))
plant("cache-layer", "keys and values of layer|keys of layer",
      attn_scores=keys(_keys_before), attention=values(_values_before))  # fmt: skip
plant("cache-late", "one token earlier",
      attn_scores=keys(_late), attention=values(_late))  # fmt: skip
plant("cache-stale-keys", "stale keys at positions 2 to 4",
      attn_scores=of_past(keys(_past_rows(2, 5, "k_post_rope"))))  # fmt: skip
plant("cache-stale-values", "stale values at positions 3 to 4",
      attention=of_past(values(_past_rows(3, 5, "qkv_matmul"))))  # fmt: skip
plant("chunk-blind", "in chunks of 4",
      attn_softmax=lambda s: s.softmax(seen=_own_chunk(s, 4)))  # fmt: skip
plant("flash-unrescaled", "no rescale", attention=flash(4, True, True))  # fmt: skip
plant("flash-values-unrescaled", "flash attention, of the sum of values",
      attention=flash(4, True, False))  # fmt: skip
plant("dot-tail", "the last 4 dimensions",
      attn_scores=lambda s: _short_dot(s, s.config.head_dim // 8 * 8))  # fmt: skip
plant("heads-strided", "head count and head dimension exchanged", attn_scores=_strided_scores)
plant("alibi", "alibi", attn_scores=lambda s: torch.where(
    s.sees(), s.sound() + _biased_by_distance(s), 0.0))  # fmt: skip
plant("alibi-softmax", "alibi",
      attn_softmax=lambda s: s.softmax(s.x + _biased_by_distance(s)))  # fmt: skip
plant("softmax-plus-one", "1 added to the sum",
      attn_softmax=lambda s: _with_sinks(s, torch.zeros(s.config.num_heads)))  # fmt: skip
plant("softmax-sinks", "a sink", attn_softmax=lambda s: _with_sinks(
    s, torch.linspace(-1, 2, s.config.num_heads)))  # fmt: skip
plant(
    "softmax-temperature",
    "temperature of 1.3|attention scale 0.135",
    attn_softmax=lambda s: s.softmax(s.x / 1.3),
)
plant("mask-finite", "mask adds -6", attn_softmax=lambda s: torch.softmax(
    torch.where(s.sees(), _unmasked(s), _unmasked(s) - 6.0), dim=-1))  # fmt: skip

# What Gemma 2 has beside Llama: caps, a scale of its own, norms of outputs and by 1 + w.

plant("cap-missing", "no soft cap", attn_scores=lambda s: s.scores(cap=None))
plant("cap-other", "soft cap of 50", attn_scores=lambda s: s.scores(cap=50.0))
plant("cap-odd", "soft cap of 4.2", attn_scores=lambda s: s.scores(cap=4.2))
plant("cap-unasked", "soft cap of 30", attn_scores=lambda s: s.scores(cap=30.0))
plant("cap-not-rescaled", "not multiplied back",
      attn_scores=lambda s: s.sound() / s.score_cap)  # fmt: skip
plant("cap-after-mask", "mask before|before the soft cap|before the cap|after the mask",
      attn_softmax=lambda s: _capped_after_mask(s))  # fmt: skip
plant("cap-before-scale", "before the scale", attn_scores=lambda s: (
    s.scale * soft_capped(s.scores(scale=1.0, cap=None), s.score_cap)))  # fmt: skip
plant("logit-cap-missing", "no soft cap", lm_head=lambda s: s.logits(cap=None))
plant("logit-cap-other", "soft cap of 30", lm_head=lambda s: s.logits(cap=30.0))
plant("logit-cap-of-scores", "soft cap of 3", lm_head=lambda s: s.logits(cap=s.score_cap))
plant("logit-cap-not-rescaled", "not multiplied back", lm_head=lambda s: s.sound() / s.logit_cap)
plant("query-scale-head-dim", "scale",
      attn_scores=lambda s: s.scores(scale=s.config.head_dim**-0.5))  # fmt: skip
plant("query-scale-twice", "scale", attn_scores=lambda s: s.scores(scale=s.scale**2))
for stage in ("attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm", "final_norm"):
    name = stage.replace("_", "-")
    plant(f"{name}-by-w", "without its 1|by w in place of 1 + w",
          **{stage: lambda s: s.norm(s.x, s.own_gain() - 1)})  # fmt: skip
    plant(f"{name}-by-two-plus-w", "+ 1|once more|twice",
          **{stage: lambda s: s.norm(s.x, s.own_gain() + 1)})  # fmt: skip
    plant(f"{name}-missing", "norm missing", **{stage: lambda s: s.x.clone()})
    plant(f"{name}-twice", "norm applied twice",
          **{stage: lambda s: s.norm(s.sound(), s.own_gain())})  # fmt: skip
plant("post-norm-of-pre", "norm weight of", attn_post_norm=lambda s: s.norm(
    s.x, s.gain("pre_feedforward_layernorm.weight")))  # fmt: skip
plant("embedding-unscaled", "not scaled", embedding=lambda s: s.embed(s.tokens, 1.0))
plant(
    "embedding-scaled-twice", "twice", embedding=lambda s: s.embed(s.tokens, s.embedding_scale**2)
)
plant("embedding-scale-bf16", "rounded to bfloat16",
      embedding=lambda s: s.embed(s.tokens, 17.0))  # fmt: skip
plant("silu", "silu", ffn_silu=lambda s: activate(s.x, "silu"))


def _capped_after_mask(s: Step) -> Tensor:
    """Minus infinity goes through the cap too and becomes no more than its negative."""
    return torch.softmax(s.x.masked_fill(~s.sees(), -s.score_cap), dim=-1)  # type: ignore[operator]


# Projections.


def stale(stage: str, layers_back: int = 0) -> Wrong:
    """What another stage left in the buffer."""
    return lambda s: s.made[StageKey(s.key.layer - layers_back, stage)].clone()  # type: ignore[operator]


def transposed(module: str) -> Wrong:
    return lambda s: s.linear(s.x, s.weight(f"{module}.weight").T)


def of_layer(module: str, step: int) -> Wrong:
    return lambda s: s.project(module, layer=s.key.layer + step)  # type: ignore[operator]


def columns(start: int, stop: int | None, function: Callable[[Tensor], Tensor] = torch.zeros_like):
    """Spoil some output columns of the sound stage; negative ones count from the end."""

    def wrong(s: Step) -> Tensor:
        y = s.sound().clone()
        y[..., start:stop] = function(y[..., start:stop])
        return y

    return wrong


def inputs_cut(module: str, start: int, stop: int | None = None) -> Wrong:
    """A block of the inner dimension left out of the sum."""

    def wrong(s: Step) -> Tensor:
        x = s.x.clone()
        x[:, start:stop] = 0
        return s.project(module, x)

    return wrong


def accumulated_in(module: str, kind: torch.dtype) -> Wrong:
    """Partial sums of 16 products kept in a half type."""

    def wrong(s: Step) -> Tensor:
        weight = s.weight(f"{module}.weight")
        total = torch.zeros(s.x.shape[0], weight.shape[0], dtype=kind)
        for start in range(0, weight.shape[1], 16):
            part = s.x[:, start : start + 16] @ weight[:, start : start + 16].T
            total = (total + part.to(kind)).to(kind)
        return total.to(s.x.dtype)

    return wrong


plant("transposed-out", "transpose", attn_out=transposed("self_attn.o_proj"))
plant("kq-order", "order", qkv_matmul=lambda s: s.qkv("kqv"))
plant("vk-order", "order", qkv_matmul=lambda s: s.qkv("qvk"))
plant("gate-up-swapped", "swap|gate", ffn_gate=lambda s: s.project("mlp.up_proj"),
      ffn_up=lambda s: s.project("mlp.gate_proj"))  # fmt: skip
plant("bias-missing", "bias", qkv_bias=lambda s: s.x.clone())
plant("bias-missing-k", "bias", qkv_bias=lambda s: s.x + s.bias("qv"))
plant("bias-doubled", "bias", qkv_bias=lambda s: s.x + 2 * s.bias())
plant("bias-other-layer", "bias", qkv_bias=lambda s: s.x + s.bias(layer=s.key.layer + 1))
plant("weights-other-layer-down", "layer", ffn_out=of_layer("mlp.down_proj", 1))
plant("weights-other-layer-qkv", "layer", qkv_matmul=lambda s: s.qkv(layer=s.key.layer + 1))
plant("rows-paired", "adjacent|pair|permut", qkv_matmul=lambda s: _paired_rows(s))
plant("tile-missing", "tile|column|block|zero", ffn_gate=columns(16, 32))
plant("last-columns-missing", "column|block|zero|tile", attn_out=columns(-8, None))
plant("last-columns-up", "column|block|zero|tile", ffn_up=columns(-32, None))
plant("reduction-short", "reduction|inner|last|block|column|input",
      ffn_out=inputs_cut("mlp.down_proj", -32))  # fmt: skip
plant("reduction-short-out", "reduction|inner|last|block|column|input",
      attn_out=inputs_cut("self_attn.o_proj", -8))  # fmt: skip
plant("stale-up", "stale|buffer|gate|other stage|another stage", ffn_up=stale("ffn_gate"))
plant("stale-layer", "stale|buffer|layer", ffn_out=stale("ffn_out", 1))
plant("accumulated-f16", "f16|float16|half|precision|accumul",
      ffn_out=accumulated_in("mlp.down_proj", torch.float16))  # fmt: skip
plant("accumulated-bf16", "bf16|bfloat16|half|precision|accumul",
      ffn_gate=accumulated_in("mlp.gate_proj", torch.bfloat16))  # fmt: skip
plant("activations-q8", "q8|activation|rounded|precision",
      ffn_out=lambda s: s.project("mlp.down_proj", quantised_blocks(s.x)))  # fmt: skip


def summed_twice(module: str, parts: int, *which: int) -> Wrong:
    """Split-k: some parts of the sum are added twice."""

    def wrong(s: Step) -> Tensor:
        x = s.x.reshape(len(s.x), parts, -1).clone()
        x[:, list(which)] *= 2
        return s.project(module, x.reshape(s.x.shape))

    return wrong


def _rows_as_of_queries(s: Step) -> Tensor:
    """k's rows through llama.cpp's permute() with the number of query heads."""
    q, k, v = (s.part(c, s.sound()) for c in "qkv")
    heads = s.config.num_heads
    moved = k.reshape(len(k), heads, 2, k.shape[1] // heads // 2).transpose(2, 3)
    return torch.cat([q, moved.reshape(k.shape), v], dim=1)


def _few_bits(x: Tensor, top: int, *, by_token: bool) -> Tensor:
    step = (x.abs().amax(dim=1, keepdim=True) if by_token else x.abs().max()) / top
    return (x / step).round().clamp(-top, top) * step


def _without_a_block(s: Step) -> Tensor:
    weight = s.weight("mlp.up_proj.weight").clone()
    weight[37, 64:96] = 0
    return s.linear(s.x, weight)


plant("split-k-twice", "part 1 of 4 added twice", ffn_out=summed_twice("mlp.down_proj", 4, 1))
plant("split-k-out-twice", "part 7 of 8 added twice",
      attn_out=summed_twice("self_attn.o_proj", 8, 7))  # fmt: skip
plant("k-permuted-as-q", "h in place of k", qkv_matmul=lambda s: _rows_as_of_queries(s))
plant("activations-4-bits", "4 bits (a scale for each token)", ffn_gate=lambda s: s.project(
    "mlp.gate_proj", _few_bits(s.x, 7, by_token=True)))  # fmt: skip
plant("activations-8-bits-tensor", "8 bits (one scale for all tokens)", ffn_out=lambda s: (
    s.project("mlp.down_proj", _few_bits(s.x, 127, by_token=False))))  # fmt: skip
plant("activations-float8", "float8 (a scale for each token)", ffn_up=lambda s: s.project(
    "mlp.up_proj", _in_float8(s.x)))  # fmt: skip
plant("block-empty", "block 2 of row 37 (zero)", ffn_up=_without_a_block)
plant("parallel-norm", "a parallel block", ffn_norm=lambda s: s.norm(
    s.made[stream_of(s)], s.own_gain()))  # fmt: skip
plant("parallel-gate", "a parallel block",
      ffn_gate=lambda s: s.project("mlp.gate_proj", s.made[StageKey(s.key.layer, "attn_norm")]),
      ffn_up=lambda s: s.project("mlp.up_proj", s.made[StageKey(s.key.layer, "attn_norm")]),
)  # fmt: skip
plant("layer-skipped", "what layer 0 gives", attn_norm=lambda s: s.norm(
    s.made[StageKey(s.key.layer - 2, "post_ffn_residual")], s.own_gain()))  # fmt: skip
plant("rope-head-size", "on heads of", **both(lambda s: _on_smaller_heads(s)))
plant("layers-by-name", "order of their names",
      ffn_gate=lambda s: s.project("mlp.gate_proj", layer=10))  # fmt: skip


def stream_of(s: Step) -> StageKey:
    """What the layer is given."""
    layer = s.key.layer
    return StageKey(layer - 1, "post_ffn_residual") if layer else StageKey(0, "embedding")


def _in_float8(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=1, keepdim=True) / 448
    return (x / scale).float().to(torch.float8_e4m3fn).to(x.dtype) * scale


def _on_smaller_heads(s: Step) -> Tensor:
    """Every head taken for two of half its size."""
    x, size = s.head_normed(), s.config.head_dim // 2
    frequencies = plain_frequencies(s.config.rope.theta, size)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies.inverse[None]
    cos, sin = (f(angles)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = x.reshape(len(x), -1, 2, size // 2).unbind(dim=2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=2).reshape(x.shape)


def _paired_rows(s: Step) -> Tensor:
    """Rows of q as the other RoPE convention has them."""
    q, k, v = (s.part(c, s.sound()) for c in "qkv")
    heads = q.reshape(q.shape[0], -1, 2, s.config.head_dim // 2)
    return torch.cat([heads.transpose(2, 3).reshape(q.shape), k, v], dim=1)


# Norms, activation, residuals.


def norm_of(change: Callable[[Step, Tensor, Tensor], Tensor]) -> Wrong:
    return lambda s: change(s, s.x, s.own_gain())


plant("norm-eps", "eps", attn_norm=norm_of(lambda s, x, w: s.norm(x, w, 1e-2)))
plant("norm-eps-tenfold", "eps",
      ffn_norm=norm_of(lambda s, x, w: s.norm(x, w, 10 * s.config.rms_norm_eps)))  # fmt: skip
plant("norm-no-weight", "weight|gain",
      ffn_norm=norm_of(lambda s, x, w: s.norm(x, torch.ones_like(w))))  # fmt: skip
plant("norm-weight-plus-one", "+ 1|plus one|plus-one|+1",
      attn_norm=norm_of(lambda s, x, w: s.norm(x, w + 1)))  # fmt: skip
plant("norm-layer", "layernorm|layer norm|mean",
      ffn_norm=norm_of(lambda s, x, w: s.norm(x - x.mean(1, keepdim=True), w)))  # fmt: skip
plant("norm-axis", "axis|over tokens", attn_norm=norm_of(lambda s, x, w: (
    x * torch.rsqrt(x.square().mean(0, keepdim=True) + s.config.rms_norm_eps) * w)))  # fmt: skip
plant("norm-final-no-weight", "weight|gain", final_norm=lambda s: s.norm(
    s.x, torch.ones_like(s.weight("model.norm.weight"))))  # fmt: skip
plant("qk-norm-missing", "norm", **both(lambda s: s.rotate(s.part(s.key.stage[0]))))
plant("q-norm-missing", "norm", q_post_rope=lambda s: s.rotate(s.part("q")))
plant("gelu", "gelu", ffn_silu=lambda s: activate(s.x, "gelu"))
plant("gelu-tanh", "gelu", ffn_silu=lambda s: activate(s.x, "gelu_pytorch_tanh"))
plant("relu", "relu", ffn_silu=lambda s: activate(s.x, "relu"))
plant(
    "silu-on-up", "up", ffn_silu=lambda s: activate(s.made[StageKey(s.key.layer, "ffn_up")], "silu")
)
plant("gate-not-activated", "activation|linear|not applied|identity|stale",
      ffn_silu=lambda s: s.x.clone())  # fmt: skip
plant("residual-missing", "residual|addend", post_attn_residual=lambda s: s.inputs[1].clone())
plant("residual-missing-ffn", "residual|addend", post_ffn_residual=lambda s: s.inputs[1].clone())
plant("residual-twice", "twice|residual|doubled",
      post_ffn_residual=lambda s: 2 * s.inputs[0] + s.inputs[1])  # fmt: skip
plant("residual-normed", "norm", post_attn_residual=lambda s: (
    s.made[StageKey(s.key.layer, "attn_norm")] + s.inputs[1]))  # fmt: skip
plant("residual-stale", "residual|norm|embedding|layer|stale|input", post_ffn_residual=lambda s: (
    s.made[StageKey(s.key.layer, "ffn_norm")] + s.inputs[1]))  # fmt: skip

# Embedding and head.

plant("embedding-off-by-one", "row|off by one|token",
      embedding=lambda s: s.embed([(t + 1) % s.config.vocab_size for t in s.tokens]))  # fmt: skip
plant("embedding-scaled", "scale|sqrt|factor",
      embedding=lambda s: s.embed(s.tokens) * math.sqrt(s.config.hidden_size))  # fmt: skip
plant("head-tied", "tied|embedding", lm_head=lambda s: s.linear(
    s.x[-1:], s.weight("model.embed_tokens.weight"))[0])  # fmt: skip
plant("head-early-token", "token", lm_head=lambda s: s.linear(s.x[-2:-1], s.head())[0])

# Local faults: a part of a stage computed wrongly, the rest soundly.

Place = Callable[[Tensor, Step], tuple[object, ...]]


def at(place: Place, wrong: Wrong) -> Wrong:
    """`wrong` in one place, the sound stage elsewhere."""

    def spoil(s: Step) -> Tensor:
        y, other = s.sound().clone(), wrong(s)
        where = place(y, s)
        y[where] = other[where]
        return y

    return spoil


def head(number: int) -> Place:
    """One head's columns, or its plane."""

    def place(y: Tensor, s: Step) -> tuple[object, ...]:
        if y.ndim == 3:
            return (number,)
        dim = s.config.head_dim
        return (slice(None), slice(number * dim, (number + 1) * dim))

    return place


def token(number: int) -> Place:
    """One token's row, in every head."""
    return lambda y, s: (slice(None), number) if y.ndim == 3 else (number,)


def span(start: int, stop: int | None) -> Place:
    """Some columns."""
    return lambda y, s: (..., slice(start, stop))


def value(*index: int) -> Place:
    return lambda y, s: index


LAST = -1
plant("local-rope-head", "rope|head", q_post_rope=at(head(3), lambda s: s.head_normed()))
plant("local-rope-pairs-head", "adjacent|head", k_post_rope=at(head(1), wrong_rope(pairs=True)))
plant("local-rope-last-token", "position|token",
      q_post_rope=at(token(LAST), positions(lambda p: p * 0)))  # fmt: skip
plant("local-rope-token-early", "position|token",
      k_post_rope=at(token(4), positions(lambda p: p - 1)))  # fmt: skip
plant(
    "local-scale-head", "scale|factor|head", attn_scores=at(head(2), lambda s: s.scores(scale=1.0))
)
plant("local-scores-row", "token|zero", attn_scores=at(token(3), lambda s: s.sound() * 0))
plant(
    "local-kv-head", "head|tile|group", attention=at(head(1), lambda s: s.values(groups=_tiled(s)))
)
plant("local-kv-scores-head", "head|tile|group",
      attn_scores=at(head(1), lambda s: s.scores(groups=_tiled(s))))  # fmt: skip
plant("local-softmax-last-key", "mask|token|zero",
      attn_softmax=at(token(LAST), lambda s: _forgets_last_key(s)))  # fmt: skip
plant("local-softmax-head-half", "head|half|precision|f16",
      attn_softmax=at(head(1), lambda s: _softmax_in(s, torch.float16)))  # fmt: skip
plant("local-attention-last-block", "column|head|zero|block",
      attention=columns(-16, None))  # fmt: skip
plant("local-gate-rows", "column|row|zero|block|tile", ffn_gate=columns(-8, None))
plant("local-up-row", "negated|sign", ffn_up=columns(37, 38, torch.neg))
plant("local-qkv-rows", "column|row|zero|block|tile|head", qkv_matmul=columns(8, 12))
plant("local-out-row-order", "swapped|permuted", attn_out=at(span(4, 6), lambda s: (
    s.sound()[:, _swapped(s.config.hidden_size, 4, 5)])))  # fmt: skip
plant("local-down-last-token", "token|stale", ffn_out=at(token(LAST), lambda s: (
    s.sound().roll(1, dims=0))))  # fmt: skip
plant("local-down-block", "leaves out|input",
      ffn_out=at(span(0, 16), inputs_cut("mlp.down_proj", -32)))  # fmt: skip
plant("local-norm-token", "token|factor|weight|norm|gain", ffn_norm=at(token(2), norm_of(
    lambda s, x, w: s.norm(x, torch.ones_like(w)))))  # fmt: skip
plant("local-norm-tail", "weight|gain|column|block", attn_norm=at(span(-16, None), norm_of(
    lambda s, x, w: s.norm(x, torch.ones_like(w)))))  # fmt: skip
plant("local-silu-tail", "activation|relu|column|block|linear|gelu|identity|not applied",
      ffn_silu=at(span(-4, None), lambda s: s.x.clone()))  # fmt: skip
plant("local-swigl-value", "~zero", ffn_swigl=at(value(1, 9), lambda s: (
    s.sound() * 0)))  # fmt: skip
plant("local-residual-token", "residual|token|addend",
      post_attn_residual=at(token(0), lambda s: s.inputs[1].clone()))  # fmt: skip
plant("local-residual-tail", "residual|column|block|addend|twice",
      post_ffn_residual=at(span(-8, None), lambda s: s.inputs[0] * 2 + s.inputs[1]))  # fmt: skip
plant("local-embedding-token", "row|token|off by one", embedding=at(token(2), lambda s: (
    s.embed([(t + 1) % s.config.vocab_size for t in s.tokens]))))  # fmt: skip
plant("local-head-rows", "zero|row|column|block", lm_head=columns(-8, None))
plant("local-head-value", "~factor", lm_head=columns(5, 6, lambda y: y * 1.5))
plant("local-bias-head", "bias|head|column", qkv_bias=at(head(2), lambda s: s.x.clone()))
plant("local-gate-percent", "~factor", ffn_gate=at(value(2, 40), lambda s: (
    s.sound() * 1.01)))  # fmt: skip
plant("local-scores-percent", "~factor",
      attn_scores=at(head(1), lambda s: s.sound() * 1.01))  # fmt: skip
plant("local-eps-token", "eps|factor|scale", attn_norm=at(token(1), norm_of(
    lambda s, x, w: s.norm(x, w, 10 * s.config.rms_norm_eps))))  # fmt: skip
plant("local-v-row", "token|value|position|zero|stale", attention=at(token(LAST), lambda s: (
    s.values(v=s.part("v").roll(1, dims=0)))))  # fmt: skip
plant("local-nan", "nan|non-finite|nonfinite", ffn_swigl=at(value(0, 3), lambda s: (
    s.sound() * torch.nan)))  # fmt: skip

plant("local-rope-far-head", "off by +37", q_post_rope=at(head(2), positions(lambda p: p + 37)))
plant("local-rope-linear-head", "divided by 4", k_post_rope=at(head(1), stretched(
    lambda s: (s.engine.frequencies.inverse / 4, 1.0))))  # fmt: skip
plant("local-alibi-head", "alibi", attn_scores=at(head(1), lambda s: torch.where(
    s.sees(), s.sound() + _biased_by_distance(s), 0.0)))  # fmt: skip
plant("local-cache-layer-head", "keys of layer", attn_scores=at(head(2), keys(_keys_before)))
plant("local-values-layer-head", "values of layer",
      attention=at(head(1), values(_values_before)))  # fmt: skip
plant("local-plus-one-head", "1 added to the sum", attn_softmax=at(head(1), lambda s: (
    _with_sinks(s, torch.zeros(s.config.num_heads)))))  # fmt: skip
plant("local-temperature-head", "temperature of 1.3",
      attn_softmax=at(head(2), lambda s: s.softmax(s.x / 1.3)))  # fmt: skip
plant("local-parallel-token", "a parallel block", ffn_norm=at(token(2), lambda s: s.norm(
    s.made[stream_of(s)], s.own_gain())))  # fmt: skip
plant("local-split-rows", "part 1 of 4 added twice",
      ffn_out=at(span(0, 32), summed_twice("mlp.down_proj", 4, 1)))  # fmt: skip
plant("local-float8-rows", "float8 (a scale for each token)", ffn_gate=at(
    span(-64, None), lambda s: s.project("mlp.gate_proj", _in_float8(s.x))))  # fmt: skip

# The same of windows and of Gemma 2.

plant("local-window-head", "window|head", attn_softmax=at(head(2), window(lambda w: None)))
plant("local-window-short-head", "window|head", attn_softmax=at(head(1), window(lambda w: w - 1)))
plant("local-window-last-token", "window|token",
      attn_softmax=at(token(LAST), window(lambda w: w + 1)))  # fmt: skip
plant("local-causal-head", "causal|head", attn_softmax=at(
    head(3), lambda s: s.softmax(seen=s.sees(is_causal=True))))  # fmt: skip
plant("local-causal-token", "causal|token|attended", attn_softmax=at(
    token(2), lambda s: s.softmax(seen=s.sees(is_causal=True))))  # fmt: skip
plant("local-cap-head", "cap", attn_scores=at(head(1), lambda s: s.scores(cap=None)))
plant("local-cap-token", "cap", attn_scores=at(token(LAST), lambda s: s.scores(cap=None)))
plant("local-logit-cap-rows", "cap", lm_head=at(span(-64, None), lambda s: s.logits(cap=None)))
plant("local-query-scale-head", "scale|factor", attn_scores=at(
    head(0), lambda s: s.scores(scale=s.config.head_dim**-0.5)))  # fmt: skip
plant("local-post-norm-token", "norm missing", attn_post_norm=at(token(2), lambda s: s.x.clone()))
plant("local-post-norm-tail", "without its 1|by w in place of 1 + w", ffn_post_norm=at(
    span(-16, None), lambda s: s.norm(s.x, s.own_gain() - 1)))  # fmt: skip
plant("local-norm-offset-token", "without its 1|by w in place of 1 + w", ffn_norm=at(
    token(3), lambda s: s.norm(s.x, s.own_gain() - 1)))  # fmt: skip
plant("local-embedding-unscaled-token", "not scaled",
      embedding=at(token(1), lambda s: s.embed(s.tokens, 1.0)))  # fmt: skip


def _forgets_last_key(s: Step) -> Tensor:
    seen = s.sees().clone()
    seen[-1, -1] = False
    return s.softmax(seen=seen)


def _swapped(size: int, a: int, b: int) -> Tensor:
    order = torch.arange(size)
    order[a], order[b] = b, a
    return order
