"""An engine in torch that runs a model stage by stage and can compute any of them wrongly.

It shares no operation with aprcore's backends, and reads masks, caps and scales from a model's
numbers by itself. Every stage is a function of its inputs, so that a stage can be computed
soundly, wrongly and in float64 on the very same tensors: that is how the zoo measures what a
planted fault does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from aprcore.network.config import ModelConfig
from aprcore.network.graph import Graph
from aprcore.network.stages import StageKey

Tensor = torch.Tensor
Wrong = Callable[["Step"], Tensor]

OWN = -1  # a window or cap: the model's


@dataclass(frozen=True)
class Habits:
    """What an engine rounds.

    Attributes:
        told: How a sidecar says it.
        stored: The type of its results.
        but: Stages whose results have another type.
        activations: How activations are rounded before a product: "" (not), "blocks" (32 values by
            a float32 scale), "half blocks" (by a float16 scale), "token" (a row by one scale);
            "tf32" (to nearest) and "tf32 cut", as are weights and both factors of attention.
        cache: The type of keys and values: a type of torch, "blocks" or "half blocks".
        beside: Whether queries and attention weights are rounded to it as well.
        iterated: Whether each angle of RoPE is made from the one before, in float32.
        elementary: Whether exp, roots, quotients, sines and cosines are as far off as those of a
            device may be.
    """

    told: str | Mapping[str, str]
    stored: torch.dtype = torch.float32
    but: Mapping[str, torch.dtype] = field(default_factory=dict)
    activations: str | torch.dtype = ""
    cache: torch.dtype | str | None = None
    beside: bool = False
    iterated: bool = False
    elementary: bool = False


_STREAM = dict.fromkeys(
    (
        "post_attn_residual",
        "post_ffn_residual",
        "attn_norm",
        "ffn_norm",
        "attn_post_norm",
        "ffn_post_norm",
        "final_norm",
        "lm_head",
    ),
    torch.float32,
)
HABITS: Mapping[str, Habits] = {
    "f32": Habits("f32"),
    "f16": Habits("f16", torch.float16),
    "bf16": Habits("bf16", torch.bfloat16),
    "q8_0": Habits("q8_0", activations="blocks"),
    "ggml-q8_0": Habits({"all": "q8_0"}, activations="half blocks"),
    "int8": Habits({"linear": "int8", "head": "int8", "all": "f32"}, activations="token"),
    "kv-f16": Habits({"all": "f32", "kv_cache": "f16"}, cache=torch.float16, beside=True),
    "kv-f16-only": Habits({}, cache=torch.float16),
    "kv-bf16": Habits({"all": "f32", "kv_cache": "bf16"}, cache=torch.bfloat16, beside=True),
    "kv-e4m3": Habits({"kv_cache": "float8_e4m3fn"}, cache=torch.float8_e4m3fn),
    "kv-e5m2": Habits({"kv_cache": "float8_e5m2"}, cache=torch.float8_e5m2),
    "llama.cpp": Habits({"kv_cache": "f16", "angles": "iterated"}, activations="half blocks",
                        cache=torch.float16, beside=True, iterated=True),
    "iterated": Habits({"angles": "iterated"}, iterated=True),
    "stream": Habits({"all": "bf16", "norm": "f32", "residual": "f32", "head": "f32"},
                     torch.bfloat16, but=_STREAM),
    "f16-in": Habits({"linear": "f16:f32", "head": "f16:f32"}, activations=torch.float16),
    "tf32": Habits("tf32", activations="tf32"),
    "tf32-cut": Habits("tf32", activations="tf32 cut"),
    "device": Habits("f32", elementary=True),
    "half-softmax": Habits({"softmax": "f16"}, but={"attn_softmax": torch.float16}),
}  # fmt: skip


@dataclass(frozen=True)
class Frequencies:
    """RoPE's schedule: angle per position of each pair, [D/2], and a factor of sine and cosine."""

    inverse: Tensor
    factor: float = 1.0


def plain_frequencies(theta: float, head_dim: int) -> Frequencies:
    """The schedule of the original paper."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return Frequencies(theta**-exponents)


# The weight that each norm multiplies by. Source: transformers' Llama and Gemma2.
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "ffn_post_norm": "post_feedforward_layernorm",
}  # fmt: skip


def visible(num_tokens: int, window: int | None, *, is_causal: bool = True) -> Tensor:
    """Which positions each query sees, [T, T].

    Source: transformers' masking_utils: a causal query sees `window` positions up to its own, one
    of a bidirectional model what is at most `window` away.
    """
    distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)[None, :]
    if is_causal:
        seen = distance >= 0
        return seen if window is None else seen & (distance < window)
    return torch.ones_like(distance, dtype=torch.bool) if window is None else (
        distance.abs() <= window
    )  # fmt: skip


def soft_capped(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap), or x without a cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


def raised(weight: Tensor, config: ModelConfig) -> Tensor:
    """What a norm multiplies by: Gemma's weights are stored less 1."""
    return 1 + weight if config.architecture == "gemma2" else weight


@dataclass
class Effect:
    """A planted stage computed three ways on the same inputs.

    Attributes:
        wrong: As the fault has it.
        sound: As the engine would have it.
        exact: In float64.
    """

    wrong: Tensor
    sound: Tensor
    exact: Tensor


@dataclass
class Engine:
    """Weights and configuration of a model, and the precision to compute in.

    Attributes:
        config: The model's.
        weights: Float values by canonical name.
        frequencies: RoPE's schedule.
        habits: What it rounds; sums are carried in float32.
        dtype: What it computes in.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor]
    frequencies: Frequencies
    habits: Habits = HABITS["f32"]
    dtype: torch.dtype = torch.float32
    effects: dict[StageKey, Effect] = field(default_factory=dict)

    def exactly(self) -> Engine:
        """The same in float64, without any rounding."""
        return Engine(self.config, self.weights, self.frequencies, self.habits, dtype=torch.float64)

    def weight(self, layer: int | None, name: str) -> Tensor | None:
        """A weight in the engine's type, or None."""
        found = self.weights.get(name if layer is None else f"model.layers.{layer}.{name}")
        return None if found is None else found.to(self.dtype)

    def run(
        self, tokens: Sequence[int], faults: Mapping[StageKey, Wrong]
    ) -> dict[StageKey, Tensor]:
        """Every stage of a pass in canonical layout; what the faults did is left in `effects`."""
        graph = Graph(self.config)
        made: dict[StageKey, Tensor] = {}
        self.effects = {}
        past = {}
        if any(getattr(fault, "reads_past", False) for fault in faults.values()):
            past = self.run(tokens[::-1], {})
        for key in graph.keys:
            inputs = [made[k] for k in graph.inputs(key)]
            step = Step(self, key, tokens, inputs, made, past)
            fault = faults.get(key)
            made[key] = self.rounded(key, (step.sound if fault is None else lambda: fault(step))())  # noqa: B023
            if fault is not None:
                exact = Step(self.exactly(), key, tokens, [x.double() for x in inputs], made)
                sound = self.rounded(key, step.sound())
                self.effects[key] = Effect(made[key], sound, exact.sound())
        return made

    def rounded(self, key: StageKey, x: Tensor) -> Tensor:
        """As the engine stores it."""
        if self.dtype is torch.float64:
            return x
        stored = self.habits.but.get(key.stage, self.habits.stored)
        return x.to(stored).to(self.dtype).contiguous()


@dataclass
class Step:
    """One stage about to be computed.

    Attributes:
        engine: Whose.
        key: Which.
        tokens: Token ids.
        inputs: The stage's inputs: [T, C] or [H, T, T].
        made: Every tensor of the pass so far.
        past: Every tensor of the pass before this one, which a cache may still hold.
    """

    engine: Engine
    key: StageKey
    tokens: Sequence[int]
    inputs: Sequence[Tensor]
    made: Mapping[StageKey, Tensor]
    past: Mapping[StageKey, Tensor] = field(default_factory=dict)

    def sound(self) -> Tensor:
        """The stage as it should be."""
        return OPERATIONS[self.key.stage](self)

    @property
    def config(self) -> ModelConfig:
        return self.engine.config

    @property
    def x(self) -> Tensor:
        """The first input."""
        return self.inputs[0]

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """A weight of this layer, or of another."""
        found = self.engine.weight(self.key.layer if layer is None else layer, name)
        assert found is not None, name
        return found

    def find(self, name: str) -> Tensor | None:
        """A weight of this layer that a model need not have."""
        return self.engine.weight(self.key.layer, name)

    def part(self, letter: str, qkv: Tensor | None = None) -> Tensor:
        """The columns of q, k or v."""
        sizes = self.config.num_heads, self.config.num_kv_heads, self.config.num_kv_heads
        columns = [n * self.config.head_dim for n in sizes]
        return torch.split(self.inputs[-1] if qkv is None else qkv, columns, dim=1)[
            "qkv".index(letter)
        ]

    @property
    def window(self) -> int | None:
        """How far this layer looks back, or None."""
        return window_of(self.config, self.key.layer)

    @property
    def scale(self) -> float:
        """The factor on q·k."""
        stated = self.config.numbers.get("query_pre_attn_scalar")
        return (self.config.head_dim if stated is None else stated) ** -0.5

    @property
    def score_cap(self) -> float | None:
        return self.config.numbers.get("attn_logit_softcapping")

    @property
    def logit_cap(self) -> float | None:
        return self.config.numbers.get("final_logit_softcapping")

    @property
    def embedding_scale(self) -> float:
        is_gemma = self.config.architecture == "gemma2"
        return math.sqrt(self.config.hidden_size) if is_gemma else 1.0

    def gain(self, name: str, layer: int | None = None) -> Tensor:
        """What the norm of that weight multiplies by."""
        return raised(self.weight(name, layer), self.config)

    def own_gain(self) -> Tensor:
        """What this stage's norm multiplies by."""
        if self.key.layer is None:
            return self.gain("model.norm.weight")
        names = GEMMA_NORMS if self.config.architecture == "gemma2" else NORMS
        return self.gain(f"{names[self.key.stage]}.weight")

    def sees(self, window: int | None = OWN, *, is_causal: bool | None = None) -> Tensor:
        """Which positions each query sees, with another window or order if they are given."""
        return visible(
            len(self.tokens), self.window if window == OWN else window,
            is_causal=self.config.is_causal if is_causal is None else is_causal,
        )  # fmt: skip

    # The operations, with everything that a fault may want to change as an argument.

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W^T, with the activations rounded if the engine does that."""
        how = self.engine.habits.activations
        return rounded_factor(x, how) @ (_tensor_floats(weight, how) if _is_tf32(how) else weight).T

    def cached(self, x: Tensor) -> Tensor:
        """Keys or values as the cache holds them."""
        how = self.engine.habits.activations
        return rounded_factor(x, how if _is_tf32(how) else self.engine.habits.cache)

    def beside_cached(self, x: Tensor) -> Tensor:
        """What is multiplied by keys or values, as it is rounded for that."""
        habits = self.engine.habits
        return self.cached(x) if habits.beside or _is_tf32(habits.activations) else x

    def off(self, x: Tensor, ulps: float) -> Tensor:
        """What a device with functions that are good to so many units may give for x."""
        if not self.engine.habits.elementary or self.engine.dtype is torch.float64:
            return x
        generator = torch.Generator().manual_seed(x.numel() + (self.key.layer or 0))
        return x * (1 + (2 * torch.rand(x.shape, generator=generator) - 1) * ulps * 2.0**-23)

    def norm(self, x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
        """RMSNorm over groups of the weight's length."""
        groups = x.reshape(x.shape[0], -1, weight.shape[0])
        eps = self.config.rms_norm_eps if eps is None else eps
        mean = groups.square().mean(dim=-1, keepdim=True)
        return (groups * self.off(torch.rsqrt(mean + eps), 2) * weight).reshape(x.shape)

    def head_normed(self) -> Tensor:
        """q or k before the rotation, normed if the model does that."""
        letter = self.key.stage[0]
        x, weight = self.part(letter), self.find(f"self_attn.{letter}_norm.weight")
        return x if weight is None else self.norm(x, weight)

    def rotate(
        self, x: Tensor, *, inverse: Tensor | None = None, positions: Tensor | None = None,
        factor: float | None = None, sign: float = 1.0, pairs: bool = False,
        width: int | None = None,
    ) -> Tensor:  # fmt: skip
        """RoPE of every head of x, [T, N·D]; `width` dimensions of each, or all."""
        own = self.engine.frequencies
        dim = self.config.head_dim
        width = dim if width is None else width
        inverse = own.inverse if inverse is None else inverse
        if positions is None:
            positions = torch.arange(x.shape[0], dtype=torch.float64)
        # As transformers: in float32, whatever the type of the rest.
        kind = torch.float64 if self.engine.dtype is torch.float64 else torch.float32
        angles = positions.to(kind)[:, None] * inverse[: width // 2].to(kind)[None, :]
        if self.engine.habits.iterated and inverse is own.inverse:
            theta = self.config.rope.theta
            scaling = own.inverse / plain_frequencies(theta, dim).inverse
            angles = (one_by_one(positions, theta, dim) * scaling)[:, : width // 2].to(kind)
        times = own.factor if factor is None else factor
        cos, sin = (
            (self.off(f(angles), 4) * times).to(self.engine.dtype)[:, None, :]
            for f in (torch.cos, torch.sin)
        )
        sin = sin * sign
        heads = x.reshape(x.shape[0], -1, dim)
        rotated, rest = heads[..., :width], heads[..., width:]
        if pairs:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
        else:
            a, b = rotated[..., : width // 2], rotated[..., width // 2 :]
        first, second = a * cos - b * sin, b * cos + a * sin
        joined = (
            torch.stack([first, second], dim=-1).reshape(rotated.shape)
            if pairs
            else torch.cat([first, second], dim=-1)
        )
        return torch.cat([joined, rest], dim=-1).reshape(x.shape)

    def by_head(self, x: Tensor) -> Tensor:
        """[T, N·D] -> [N, T, D]."""
        return x.reshape(x.shape[0], -1, self.config.head_dim).transpose(0, 1)

    def groups(self) -> Tensor:
        """The kv head of each head."""
        return torch.arange(self.config.num_heads) // (
            self.config.num_heads // self.config.num_kv_heads
        )

    def products(
        self, *, scale: float | None = None, groups: Tensor | None = None, cap: float | None = OWN,
    ) -> Tensor:  # fmt: skip
        """q·k, scaled and capped, of every query and position."""
        q, k = (
            self.by_head(self.beside_cached(self.inputs[0])),
            self.by_head(self.cached(self.inputs[1])),
        )
        scale = self.scale if scale is None else scale
        products = q @ k[self.groups() if groups is None else groups].transpose(1, 2) * scale
        return soft_capped(products, self.score_cap if cap == OWN else cap)

    def scores(self, **change: Any) -> Tensor:
        """The products that a query sees, zero elsewhere."""
        return torch.where(self.sees(), self.products(**change), 0.0)

    def softmax(self, scores: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """Weights of what each query sees."""
        x = self.x if scores is None else scores
        x = x.masked_fill(~(self.sees() if seen is None else seen), -torch.inf)
        if not self.engine.habits.elementary:
            return torch.softmax(x, dim=-1)
        powers = self.off(torch.exp(x - x.amax(dim=-1, keepdim=True)), 3)
        return powers * self.off(1 / powers.sum(dim=-1, keepdim=True), 2.5)

    def silu(self) -> Tensor:
        """The activation of the gate, by way of exp and a quotient where those are off."""
        kind = self.config.hidden_act
        if not self.engine.habits.elementary or kind != "silu":
            return activate(self.x, kind)
        return self.off(self.x / (1 + self.off(torch.exp(-self.x), 3)), 2.5)

    def values(self, *, groups: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """softmax·V, [T, H·D]."""
        v = self.by_head(self.cached(self.part("v") if v is None else v))
        out = self.beside_cached(self.x) @ v[self.groups() if groups is None else groups]
        return out.transpose(0, 1).reshape(self.x.shape[1], -1)

    def project(self, module: str, x: Tensor | None = None, layer: int | None = None) -> Tensor:
        """A projection with its bias, if it has one."""
        y = self.linear(self.x if x is None else x, self.weight(f"{module}.weight", layer))
        bias = self.find(f"{module}.bias")
        return y if bias is None else y + bias

    def qkv(self, letters: str = "qkv", layer: int | None = None) -> Tensor:
        """The projections of q, k and v side by side."""
        weights = [self.weight(f"self_attn.{c}_proj.weight", layer) for c in letters]
        return torch.cat([self.linear(self.x, w) for w in weights], dim=1)

    def bias(self, letters: str = "qkv", layer: int | None = None) -> Tensor:
        """The biases of q, k and v side by side, zeros for those that are not in `letters`."""
        every = {c: self.weight(f"self_attn.{c}_proj.bias", layer) for c in "qkv"}
        return torch.cat([b if c in letters else torch.zeros_like(b) for c, b in every.items()])

    def embed(self, tokens: Sequence[int], scale: float | None = None) -> Tensor:
        """Rows of the embedding, times what Gemma multiplies them by."""
        table = self.engine.weight(None, "model.embed_tokens.weight")
        assert table is not None
        rows = table[torch.tensor(list(tokens))]
        return rows * (self.embedding_scale if scale is None else scale)

    def head(self) -> Tensor:
        """The matrix of the head."""
        own = self.engine.weight(None, "lm_head.weight")
        tied = self.engine.weight(None, "model.embed_tokens.weight")
        found = tied if own is None else own
        assert found is not None
        return found

    def logits(self, cap: float | None = OWN) -> Tensor:
        """Of the last token."""
        y = self.linear(self.x[-1:], self.head())[0]
        return soft_capped(y, self.logit_cap if cap == OWN else cap)


def window_of(config: ModelConfig, layer: int | None) -> int | None:
    """The window of a layer; the pattern repeats."""
    return config.windows[(layer or 0) % len(config.windows)]


def activate(x: Tensor, kind: str) -> Tensor:
    """An activation, as torch has it."""
    from torch.nn import functional

    match kind:
        case "gelu":
            return functional.gelu(x)
        case "gelu_pytorch_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
    return functional.silu(x)


def rounded_factor(x: Tensor, how: torch.dtype | str | None) -> Tensor:
    """A factor of a product, rounded as `Habits` says."""
    match how:
        case torch.dtype():
            return x.float().to(how).to(x.dtype)
        case "blocks":
            return quantised_blocks(x)
        case "half blocks":
            return quantised_blocks(x, half=True)
        case "token":
            return quantised_blocks(x, block=x.shape[1])
        case "tf32" | "tf32 cut":
            return _tensor_floats(x, how)
    return x


def _is_tf32(how: torch.dtype | str | None) -> bool:
    return isinstance(how, str) and how.startswith("tf32")


def _tensor_floats(x: Tensor, how: torch.dtype | str | None) -> Tensor:
    """float32 with the last 13 bits of its fraction rounded, ties away from zero, or cut off."""
    bits = x.float().contiguous().view(torch.int32)
    bits = bits + (0 if how == "tf32 cut" else 0x1000) & ~0x1FFF
    return bits.view(torch.float32).to(x.dtype)


def quantised_blocks(x: Tensor, block: int = 32, *, half: bool = False) -> Tensor:
    """Every block of a row rounded to 8-bit integers times its own scale."""
    given = x.float()
    padded = torch.nn.functional.pad(given, (0, -x.shape[1] % block))
    blocks = padded.reshape(x.shape[0], -1, block)
    step = blocks.abs().amax(dim=2, keepdim=True) / 127
    codes = torch.where(step > 0, (blocks / step).round(), 0).to(x.dtype)
    scale = (step.half() if half else step).to(x.dtype)
    return (codes * scale).reshape(x.shape[0], -1)[:, : x.shape[1]]


def one_by_one(positions: Tensor, theta: float, dim: int) -> Tensor:
    """Angles [T, dim / 2], each float32 the one before times a factor, as llama.cpp makes them."""
    factor = torch.tensor(theta ** (-2 / dim), dtype=torch.float32)
    angles = [positions.to(torch.float32)]
    for _ in range(dim // 2 - 1):
        angles.append(angles[-1] * factor)
    return torch.stack(angles, dim=1)


OPERATIONS: Mapping[str, Wrong] = {
    "embedding": lambda s: s.embed(s.tokens),
    "attn_norm": lambda s: s.norm(s.x, s.own_gain()),
    "qkv_matmul": lambda s: s.qkv(),
    "qkv_bias": lambda s: s.x + s.bias(),
    "q_post_rope": lambda s: s.rotate(s.head_normed()),
    "k_post_rope": lambda s: s.rotate(s.head_normed()),
    "attn_scores": lambda s: s.scores(),
    "attn_softmax": lambda s: s.softmax(),
    "attention": lambda s: s.values(),
    "attn_out": lambda s: s.project("self_attn.o_proj"),
    "attn_post_norm": lambda s: s.norm(s.x, s.own_gain()),
    "post_attn_residual": lambda s: s.inputs[0] + s.inputs[1],
    "ffn_norm": lambda s: s.norm(s.x, s.own_gain()),
    "ffn_gate": lambda s: s.project("mlp.gate_proj"),
    "ffn_up": lambda s: s.project("mlp.up_proj"),
    "ffn_silu": Step.silu,
    "ffn_swigl": lambda s: s.inputs[0] * s.inputs[1],
    "ffn_out": lambda s: s.project("mlp.down_proj"),
    "ffn_post_norm": lambda s: s.norm(s.x, s.own_gain()),
    "post_ffn_residual": lambda s: s.inputs[0] + s.inputs[1],
    "final_norm": lambda s: s.norm(s.x, s.own_gain()),
    "lm_head": lambda s: s.logits(),
}


def run_on(
    engine: Engine, key: StageKey, tokens: Sequence[int], read: Callable[[StageKey], Any]
) -> Tensor:
    """One stage on tensors of another pass, such as an oracle's."""
    inputs = [read(k).to(engine.dtype) for k in Graph(engine.config).inputs(key)]
    return Step(engine, key, tokens, inputs, {}).sound()
