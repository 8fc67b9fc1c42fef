"""The operations that stages are made by, as data: what each needs, and how a backend is called.

An operation is a value: what a model states (an epsilon, a window, a cap) is in it, so that causes
can try another one and the judge can replay it. Called as `operation(backend, site, *inputs)`. A
new operation is a class here and, if no method of `aprcore.network.backend.Backend` computes it, a
method there and in each backend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from aprcore.network.mask import CAUSAL, Mask

if TYPE_CHECKING:
    from aprcore.network.backend import Backend, Site

Array = Any  # whatever the backend computes with

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FINAL_NORM = "model.norm.weight"
PARTS = ("q", "k", "v")  # of the joined projection, in order


class WeightUse(NamedTuple):
    """A weight that an operation uses.

    Attributes:
        name: Relative to the layer, or whole for a whole-model stage; Hugging Face's.
        shape: Its shape in symbols.
        needed: Whether the operation cannot do without it.
    """

    name: str
    shape: str
    needed: bool = True


class Module(NamedTuple):
    """A linear module of transformers: its path in the layer, and its sizes out and in."""

    path: str
    rows: str
    columns: str

    @property
    def weight(self) -> str:
        """Its matrix."""
        return f"{self.path}.weight"

    @property
    def bias(self) -> str:
        """Its bias, if it has one."""
        return f"{self.path}.bias"


Q, K, V = (Module(f"self_attn.{part}_proj", f"{heads}·D", "E")
           for part, heads in (("q", "H"), ("k", "K"), ("v", "K")))  # fmt: skip
O = Module("self_attn.o_proj", "E", "H·D")  # noqa: E741
GATE, UP = (Module(f"mlp.{name}_proj", "F", "E") for name in ("gate", "up"))
DOWN = Module("mlp.down_proj", "E", "F")
Q_NORM, K_NORM = "self_attn.q_norm.weight", "self_attn.k_norm.weight"


@dataclass(frozen=True, slots=True)
class Operation:
    """What makes a tensor.

    Attributes:
        row_wise: Whether each output row depends on the same row of the inputs only.
        cached: What it reads of the tokens before, in a decoding step: "k" or "v".
        role: What it is called where an engine's arithmetic is told; empty for what has no name.
    """

    row_wise: ClassVar[bool] = True
    role: ClassVar[str] = ""
    cached: ClassVar[str] = ""

    @property
    def weights(self) -> tuple[WeightUse, ...]:
        """The weights that it uses."""
        return ()

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        raise NotImplementedError

    def altered(self, **changes: Any) -> Operation:
        """The same with something changed, for an experiment."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Embed(Operation):
    """Rows of the embedding by token id, times `scale`."""

    role = "embedding"
    row_wise = False
    scale: float = 1.0

    @property
    def weights(self) -> tuple[WeightUse, ...]:
        """The embedding."""
        return (WeightUse(EMBEDDING, "V,E"),)

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        x = op.embed(at.tokens, at.weight(EMBEDDING))
        return x if self.scale == 1 else op.scale(x, self.scale)


@dataclass(frozen=True, slots=True)
class Norm(Operation):
    """RMSNorm by `offset` + weight."""

    role = "norm"
    weight: str
    eps: float
    offset: float = 0.0

    @property
    def weights(self) -> tuple[WeightUse, ...]:
        """The gain."""
        return (WeightUse(self.weight, "E"),)

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        return op.rms_norm(inputs[0], at.weight(self.weight), self.eps, self.offset)


@dataclass(frozen=True, slots=True)
class Linear(Operation):
    """One product by several matrices side by side; by a single one, plus its bias if it has one.

    Attributes:
        modules: The matrices.
        takes_bias: Whether a bias belongs to it, and is not a stage of its own.
    """

    role = "linear"
    modules: tuple[Module, ...]
    takes_bias: bool = True

    @property
    def weights(self) -> tuple[WeightUse, ...]:
        """The matrices, and the biases where it takes them."""
        uses = [WeightUse(m.weight, f"{m.rows},{m.columns}") for m in self.modules]
        if self.takes_bias:
            uses += [WeightUse(m.bias, m.rows, needed=False) for m in self.modules]
        return tuple(uses)

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        y = op.linear(inputs[0], [at.weight(m.weight) for m in self.modules])
        biases = [at.find(m.bias) for m in self.modules] if self.takes_bias else []
        present = [bias for bias in biases if bias is not None]
        return op.add_bias(y, present) if present else y


@dataclass(frozen=True, slots=True)
class AddBias(Operation):
    """The biases of modules side by side."""

    role = "bias"
    modules: tuple[Module, ...]

    @property
    def weights(self) -> tuple[WeightUse, ...]:
        """The biases."""
        return tuple(WeightUse(m.bias, m.rows) for m in self.modules)

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        return op.add_bias(inputs[0], [at.weight(m.bias) for m in self.modules])


@dataclass(frozen=True, slots=True)
class Rotate(Operation):
    """One part of the joined projection, normalised per head where there is a norm, rotated.

    Attributes:
        part: "q" or "k".
        norm: The norm's weight, if the architecture may have one.
        eps, offset: As in `Norm`.
    """

    role = "rope"
    part: str
    norm: str
    eps: float
    offset: float = 0.0

    @property
    def weights(self) -> tuple[WeightUse, ...]:
        """The norm."""
        return (WeightUse(self.norm, "D", needed=False),)

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        x = op.columns(inputs[0], *at.config.qkv_columns(self.part))
        weight = at.find(self.norm)
        if weight is not None:
            x = op.rms_norm(x, weight, self.eps, self.offset)
        return op.rope(x, at.positions, at.config.rope)


@dataclass(frozen=True, slots=True)
class Scores(Operation):
    """Queries times keys, scaled, capped by tanh where there is a cap; zero where masked.

    Attributes:
        scale: The factor on q·k, 1/sqrt(D) as a rule.
        cap: Scores become cap · tanh(score / cap).
        mask: What each query sees.
    """

    role = "scores"
    cached = "k"
    row_wise = False
    scale: float
    cap: float | None = None
    mask: Mask = CAUSAL

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        queries, keys = inputs
        config = at.config
        scores = op.attention_scores(
            queries, at.with_past(op, "k", keys), config.num_heads, config.num_kv_heads,
            self.scale, self.mask,
        )  # fmt: skip
        return scores if self.cap is None else op.soft_cap(scores, self.cap)


@dataclass(frozen=True, slots=True)
class Softmax(Operation):
    """Softmax over what each query sees, zero elsewhere."""

    role = "softmax"
    row_wise = False
    mask: Mask = CAUSAL

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        return op.masked_softmax(inputs[0], self.mask)


@dataclass(frozen=True, slots=True)
class Values(Operation):
    """The softmax times the values."""

    role = "values"
    cached = "v"
    row_wise = False

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        softmax, qkv = inputs
        values = at.with_past(op, "v", op.columns(qkv, *at.config.qkv_columns("v")))
        return op.weighted_values(softmax, values, at.config.num_kv_heads)


@dataclass(frozen=True, slots=True)
class Activate(Operation):
    """The activation function."""

    role = "activation"
    kind: str

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        return op.activation(inputs[0], self.kind)


@dataclass(frozen=True, slots=True)
class Multiply(Operation):
    """Two tensors, elementwise."""

    role = "product"

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        return op.multiply(*inputs)


@dataclass(frozen=True, slots=True)
class Add(Operation):
    """Two tensors: the residual stream and a branch."""

    role = "residual"

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        return op.add(*inputs)


@dataclass(frozen=True, slots=True)
class Head(Operation):
    """Logits: by the head, or the embedding where the two are tied; capped where there is a cap."""

    role = "head"
    cap: float | None = None

    @property
    def weights(self) -> tuple[WeightUse, ...]:
        """The head and the embedding."""
        return WeightUse(EMBEDDING, "V,E"), WeightUse(HEAD, "V,E", needed=False)

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        y = op.linear(inputs[0], [at.find(HEAD) or at.weight(EMBEDDING)])
        return y if self.cap is None else op.soft_cap(y, self.cap)
