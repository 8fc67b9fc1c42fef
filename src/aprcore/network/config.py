"""A model's configuration. `aprcore.network.dialects` reads it from each metadata dialect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aprcore.network.mask import Mask
from aprcore.network.rope import Rope

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the graph needs to know of a model.

    Attributes:
        architecture: A name in `aprcore.network.architectures`.
        hidden_size: E.
        num_layers: Number of layers.
        num_heads: H.
        num_kv_heads: K; divides H.
        head_dim: D; even.
        intermediate_size: F.
        vocab_size: V.
        rms_norm_eps: Added to the mean square in every norm.
        rope: The schedule of angles.
        hidden_act: One of `ACTIVATIONS`.
        found: Conditional stages whose weights the file has.
        qk_norm: Whether q and k are normalised per head before RoPE.
        tied_head: Whether the head is the embedding matrix.
        max_position_embeddings: The trained context length, if known.
        windows: How many positions a query sees, its own among them, by layer, repeated as often
            as it takes; None: everything that the mask allows.
        is_causal: Whether a query sees nothing of what comes after it.
        numbers: What is particular to the architecture; see its `Architecture.numbers`.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: Rope
    hidden_act: str = "silu"
    found: frozenset[str] = frozenset()
    qk_norm: bool = False
    tied_head: bool = False
    max_position_embeddings: int | None = None
    windows: tuple[int | None, ...] = (None,)
    is_causal: bool = True
    numbers: Mapping[str, float] = field(default_factory=dict)

    def mask(self, layer: int | None) -> Mask:
        """What the queries of a layer see.

        Source: transformers' masks: a causal query sees `window` positions up to its own, one that
        is not sees as many on either side of its own.
        """
        window = self.windows[(layer or 0) % len(self.windows)]
        if self.is_causal:
            return Mask(None if window is None else window - 1, 0)
        return Mask(window, window)

    @property
    def found_in_tensors(self) -> Mapping[str, bool]:
        """What the tensors of a file decide and its metadata do not say."""
        others = dict.fromkeys(sorted(self.found), True)
        return {"qkv_bias": self.qkv_bias, "qk_norm": self.qk_norm} | others

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return "qkv_bias" in self.found

    @property
    def window(self) -> int | None:
        """The smallest window of any layer, if there is one."""
        return min((window for window in self.windows if window is not None), default=None)

    def sizes(self, num_tokens: int, num_positions: int | None = None) -> Mapping[str, int]:
        """Numbers for the letters of a symbolic shape."""
        return {
            "T": num_tokens,
            "S": num_tokens if num_positions is None else num_positions,
            "H": self.num_heads,
            "K": self.num_kv_heads,
            "D": self.head_dim,
            "E": self.hidden_size,
            "F": self.intermediate_size,
            "V": self.vocab_size,
        }

    def qkv_columns(self, part: str) -> tuple[int, int]:
        """First and last (exclusive) column of q, k or v in the concatenated projection."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[part]


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a file's metadata says about a model, before its tensors were looked at.

    Weights are named as in `aprcore.network.operations`: within a layer, or whole.

    Attributes:
        config: The configuration. Its `found`, `qk_norm` and `tied_head` are not yet known: the
            tensors decide them.
        promised: Weights that the metadata says exist.
        denied: Weights that the metadata says do not exist.
        tied: Whether the metadata says that the head is the embedding; None if it is silent.
        adjacent_pairs: Whether q and k rows are stored for RoPE on adjacent pairs.
        norm_offset: What was added to the weights of norms when they were stored.
    """

    config: ModelConfig
    promised: frozenset[str] = frozenset()
    denied: frozenset[str] = frozenset()
    tied: bool | None = None
    adjacent_pairs: bool = False
    norm_offset: float = 0.0
