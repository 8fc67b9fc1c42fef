"""A model's configuration. `aprcore.network.dialects` reads it from each metadata dialect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aprcore.network.rope import Rope

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the table of stages needs to know of a model.

    Attributes:
        architecture: One of `ARCHITECTURES`.
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
        qkv_bias: Whether q, k and v have biases.
        qk_norm: Whether q and k are normalised per head before RoPE.
        tied_head: Whether the head is the embedding matrix.
        max_position_embeddings: The trained context length, if known.
        sliding_window: Attention window, if the model was trained with one and it is on.
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
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    max_position_embeddings: int | None = None
    sliding_window: int | None = None

    @property
    def features(self) -> frozenset[str]:
        """Features that stages may ask for (`Stage.feature`)."""
        return frozenset({"dense"} | ({"qkv_bias"} if self.qkv_bias else set()))

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

    Weights are named as in `aprcore.network.graph.WEIGHT_SHAPES`: within a layer, or whole.

    Attributes:
        config: The configuration. Its `qkv_bias`, `qk_norm` and `tied_head` are not yet known:
            the tensors decide them.
        promised: Weights that the metadata says exist.
        denied: Weights that the metadata says do not exist.
        tied: Whether the metadata says that the head is the embedding; None if it is silent.
        adjacent_pairs: Whether q and k rows are stored for RoPE on adjacent pairs.
    """

    config: ModelConfig
    promised: frozenset[str] = frozenset()
    denied: frozenset[str] = frozenset()
    tied: bool | None = None
    adjacent_pairs: bool = False
