"""A converter that writes .apr files, and the ways in which it can write them wrongly.

A `Draft` is a model about to be written: float weights, metadata, and after encoding the stored
bytes, each of which a fault may spoil.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.formats.apr_writer import AprWriter, TensorEntry
from aprcore.quant.encode import encode

Float32 = NDArray[np.float32]
Blocks = NDArray[np.uint8]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUANTISED = ("Q8_0", "Q4_0", "Q4_K", "Q6_K")


@dataclass
class Draft:
    """A model file about to be written.

    Attributes:
        metadata: The JSON of the file.
        weights: Float values by name.
        dtype: "F32", "F16", "BF16" or one of `QUANTISED`; with "+embed", embedding and head too.
        tokens: Ids that will be run.
        cache: Sound encodings, shared by the drafts of one model and type.
        changed: Tensors that a fault replaced.
        spoilt: What a fault does to stored bytes, by tensor.
    """

    metadata: dict[str, Any]
    weights: dict[str, Float32]
    dtype: str = "F32"
    tokens: tuple[int, ...] = ()
    cache: dict[str, NDArray[Any]] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    spoilt: dict[str, Callable[[Blocks], None]] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, K and D."""
        return tuple(self.metadata[n] for n in ("num_heads", "num_kv_heads", "head_dim"))  # type: ignore[return-value]

    def get(self, layer: int | None, name: str) -> Float32:
        """A copy of a weight."""
        return self.weights[_full(layer, name)].copy()

    def put(self, layer: int | None, name: str, values: Float32) -> None:
        """Replace a weight."""
        full = _full(layer, name)
        self.weights[full] = np.ascontiguousarray(values, np.float32)
        self.changed.add(full)

    def stored_type(self, name: str) -> str:
        """The type in which a tensor is stored."""
        base, _, embed = self.dtype.partition("+")
        if base not in QUANTISED:
            return base
        if self.weights[name].ndim < 2 or (name in (EMBEDDING, HEAD) and not embed):
            return "F32"
        if base in ("Q8_0", "Q4_0") and self.weights[name].shape[1] % 32:
            return "F32"  # as the importer does: such rows are no whole blocks
        return base

    def write(self, path: Path) -> Path:
        """Write the file."""
        entries = [TensorEntry(n, self.stored_type(n), w.shape) for n, w in self.weights.items()]
        with AprWriter(path, self.metadata, entries) as writer:
            for entry in writer.entries:
                writer.write(entry.name, self._encoded(entry))
        return path

    def _encoded(self, entry: TensorEntry) -> NDArray[Any]:
        name = entry.name
        if name in self.cache and name not in self.changed:
            data = self.cache[name]
        else:
            data, lost = encode(entry.dtype, np.ascontiguousarray(self.weights[name]))
            assert not lost, f"{name}: {lost} values cannot be stored as {entry.dtype}"
            if name not in self.changed:
                self.cache[name] = data
        if name in self.spoilt:
            data = data.copy()
            self.spoilt[name](data)
        return data


def _full(layer: int | None, name: str) -> str:
    return name if layer is None else f"model.layers.{layer}.{name}"


Spoil = Callable[[Draft, int], None]


@dataclass(frozen=True)
class FileFault:
    """A mistake of a converter.

    Attributes:
        stages: Stages of the layer (or of the whole model) that the wrong file computes wrongly.
        spoil: What it does to a layer of a draft.
        causes: As of `trial.Planted`, lower case.
        everywhere: Whether metadata is wrong, and with it the stages of every layer.
    """

    stages: tuple[str, ...]
    spoil: Spoil
    causes: tuple[str, ...]
    everywhere: bool = False


FAULTS: dict[str, FileFault] = {}


def plant(name: str, stages: str, causes: str, spoil: Spoil, *, everywhere: bool = False) -> None:
    """Add a fault to the list; several stages or accepted words are parted by "|"."""
    assert name not in FAULTS, name
    FAULTS[name] = FileFault(
        tuple(stages.split("|")), spoil, tuple(causes.split("|")), everywhere=everywhere
    )


def change(name: str, function: Callable[[Float32], Float32], *, layer: bool = True) -> Spoil:
    """Replace one weight by what `function` makes of it."""
    return lambda d, n: d.put(n if layer else None, name,
                              function(d.get(n if layer else None, name)))  # fmt: skip


def swap(a: str, b: str) -> Spoil:
    def spoil(d: Draft, n: int) -> None:
        first, second = d.get(n, a), d.get(n, b)
        d.put(n, a, second)
        d.put(n, b, first)

    return spoil


def take_from(name: str, step: int) -> Spoil:
    """The tensor of another layer."""
    return lambda d, n: d.put(n, name, d.get(n + step, name))


def zero(part: Any) -> Callable[[Float32], Float32]:
    return times(part, 0.0)


def times(part: Any, factor: float) -> Callable[[Float32], Float32]:
    def spoil(w: Float32) -> Float32:
        w[part] *= np.float32(factor)
        return w

    return spoil


def declare(**values: Any) -> Spoil:
    return lambda d, n: d.metadata.update(values)


Q, K, V, O = (f"self_attn.{c}_proj.weight" for c in "qkvo")
QB, KB, VB = (f"self_attn.{c}_proj.bias" for c in "qkv")
GATE, UP, DOWN = (f"mlp.{n}_proj.weight" for n in ("gate", "up", "down"))
ATTN, FFN = "input_layernorm.weight", "post_attention_layernorm.weight"
EVERY_NORM = "attn_norm|q_post_rope|k_post_rope|attn_post_norm|ffn_norm|ffn_post_norm|final_norm"


def _pair_rows(rows: Float32, heads: int) -> Float32:
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _leave_pairs(d: Draft, n: int) -> None:
    heads, kv_heads, _ = d.sizes
    for name, count in ((Q, heads), (K, kv_heads), (QB, heads), (KB, kv_heads)):
        if _full(n, name) in d.weights:
            d.put(n, name, _pair_rows(d.get(n, name), count))


def _leave_pairs_k(d: Draft, n: int) -> None:
    d.put(n, K, _pair_rows(d.get(n, K), d.sizes[1]))


def _lose_bias(d: Draft, n: int) -> None:
    for name in (QB, KB, VB):
        d.put(n, name, d.get(n, name) * 0)


def _swap_heads(d: Draft, n: int) -> None:
    dim = d.sizes[2]
    w = d.get(n, V)
    w[: 2 * dim] = np.roll(w[: 2 * dim], dim, axis=0)
    d.put(n, V, w)


def _interleave(d: Draft, n: int) -> None:
    """Rows of gate and up alternate, as a fused matrix may have them."""
    both = np.stack([d.get(n, GATE), d.get(n, UP)], axis=1).reshape(-1, d.get(n, GATE).shape[1])
    d.put(n, GATE, both[: len(both) // 2])
    d.put(n, UP, both[len(both) // 2 :])


plant("file-transposed-out", "attn_out", "transpose", change(O, lambda w: w.T))
plant("file-transposed-q", "qkv_matmul", "transpose", change(Q, lambda w: w.T))
plant("file-qk-swapped", "qkv_matmul", "order|swap", swap(Q, K))
plant("file-kv-swapped", "qkv_matmul", "order|swap", swap(K, V))
plant("file-gate-up-swapped", "ffn_gate|ffn_up", "swap|gate", swap(GATE, UP))
plant("file-gate-up-interleaved", "ffn_gate|ffn_up", "interleav|gate|up|row|permut", _interleave)
plant("file-pairs", "qkv_matmul|qkv_bias", "adjacent|pair|permut", _leave_pairs)
plant("file-pairs-k", "qkv_matmul", "adjacent|pair|permut", _leave_pairs_k)
plant("file-bias-lost", "qkv_bias", "bias", _lose_bias)
plant("file-bias-q-lost", "qkv_bias", "bias", change(QB, lambda w: w * 0))
plant("file-bias-doubled", "qkv_bias", "bias", change(VB, lambda w: w * 2))
plant("file-bias-other-layer", "qkv_bias", "bias", take_from(KB, 1))
plant("file-layer-down", "ffn_out", "layer", take_from(DOWN, 1))
plant("file-layer-q", "qkv_matmul", "layer", take_from(Q, 1))
plant("file-layer-norm", "attn_norm", "layer|norm", take_from(ATTN, 1))
plant("file-norms-swapped", "attn_norm|ffn_norm", "norm|weight|swap|layer", swap(ATTN, FFN))
plant("file-norm-ones", "ffn_norm|attn_post_norm", "weight|gain", change(FFN, np.ones_like))
plant("file-norm-plus-one", "attn_norm", "+ 1|- 1|1 + w", change(ATTN, lambda w: w + 1))
plant("file-norm-minus-one", "ffn_norm", "- 1|+ 1|weight",
      change(FFN, lambda w: w - 1))  # fmt: skip
plant("file-final-norm-ones", "final_norm", "weight|gain",
      change("model.norm.weight", np.ones_like, layer=False))  # fmt: skip
plant("file-qk-norm-ones", "q_post_rope", "norm",
      change("self_attn.q_norm.weight", np.ones_like))  # fmt: skip
plant("file-down-scaled", "ffn_out", "scale|factor", change(DOWN, lambda w: w * np.float32(1.25)))
plant("file-up-negated", "ffn_up", "sign|negated", change(UP, np.negative))
plant("file-embedding-off", "embedding", "row|off by one|token",
      change(EMBEDDING, lambda w: np.roll(w, 1, axis=0), layer=False))  # fmt: skip
plant("file-embedding-scaled", "embedding", "scale|sqrt|factor",
      change(EMBEDDING, lambda w: w * np.float32(np.sqrt(w.shape[1])), layer=False))  # fmt: skip
plant("file-head-tied", "lm_head", "tied|embedding",
      lambda d, n: d.put(None, HEAD, d.get(None, EMBEDDING)))  # fmt: skip
plant("file-theta", "q_post_rope|k_post_rope", "theta", declare(rope_theta=7e5), everywhere=True)
plant("file-scaling-lost", "q_post_rope|k_post_rope", "scaling", declare(rope_scaling=None),
      everywhere=True)  # fmt: skip
plant("file-eps", EVERY_NORM, "eps",
      declare(rms_norm_eps=1e-2), everywhere=True)  # fmt: skip
plant("file-act", "ffn_silu", "gelu|silu", declare(hidden_act="gelu_pytorch_tanh"), everywhere=True)

# What a config says of windows and of Gemma 2.

POST_ATTN, POST_FFN = "post_attention_layernorm.weight", "post_feedforward_layernorm.weight"
SEEN = "attn_scores|attn_softmax"
WINDOW, TYPES = "sliding_window", "layer_types"


def _other_window(function: Callable[[int], int]) -> Spoil:
    def spoil(d: Draft, n: int) -> None:
        d.metadata[WINDOW] = function(d.metadata[WINDOW])

    return spoil


def _shift_layer_types(d: Draft, n: int) -> None:
    kinds = d.metadata[TYPES]
    d.metadata[TYPES] = [*kinds[1:], kinds[0]]


def _raise_norms(d: Draft, n: int) -> None:
    """As GGUF stores them: 1 + w."""
    for name in d.weights:
        if name.endswith("norm.weight"):
            d.put(None, name, d.get(None, name) + 1)


plant("file-window-lost", SEEN, "last|window", declare(sliding_window=None, layer_types=None),
      everywhere=True)  # fmt: skip
plant("file-window-short", SEEN, "window off by one", _other_window(lambda w: w - 1),
      everywhere=True)  # fmt: skip
plant("file-window-long", SEEN, "window off by one", _other_window(lambda w: w + 1),
      everywhere=True)  # fmt: skip
plant("file-window-halved", SEEN, "window of", _other_window(lambda w: w // 2),
      everywhere=True)  # fmt: skip
plant("file-window-unasked", SEEN, "no window", declare(sliding_window=4), everywhere=True)
plant("file-layers-shifted", SEEN, "other layers|no window", _shift_layer_types, everywhere=True)
plant("file-causal", SEEN, "no causal mask", declare(is_causal=True), everywhere=True)
plant("file-bidirectional", SEEN, "a causal mask", declare(is_causal=False), everywhere=True)
plant("file-cap-lost", "attn_scores", "soft cap of 3 ", declare(attn_logit_softcapping=None),
      everywhere=True)  # fmt: skip
plant("file-cap-other", "attn_scores", "soft cap of 3 ", declare(attn_logit_softcapping=50.0),
      everywhere=True)  # fmt: skip
plant("file-logit-cap-lost", "lm_head", "soft cap of 10 ", declare(final_logit_softcapping=None),
      everywhere=True)  # fmt: skip
plant("file-logit-cap-other", "lm_head", "soft cap of 10 ", declare(final_logit_softcapping=30.0),
      everywhere=True)  # fmt: skip
plant("file-query-scalar", "attn_scores", "attention scale", declare(query_pre_attn_scalar=64),
      everywhere=True)  # fmt: skip
plant("file-norms-raised", EVERY_NORM, "1 + w", _raise_norms, everywhere=True)
plant("file-norm-raised", "attn_norm", "1 + w", change(ATTN, lambda w: w + 1))
plant("file-post-norm-raised", "ffn_post_norm", "1 + w", change(POST_FFN, lambda w: w + 1))
plant("file-post-norms-swapped", "attn_post_norm|ffn_post_norm", "norm weight stored as",
      swap(POST_ATTN, POST_FFN))  # fmt: skip
plant("file-post-norm-lost", "attn_post_norm", "norm weight",
      change(POST_ATTN, np.zeros_like))  # fmt: skip
plant("file-embedding-unscaled", "embedding", "scaled|factor", change(
    EMBEDDING, lambda w: w / np.float32(np.sqrt(w.shape[1])), layer=False))  # fmt: skip
plant("file-act-silu", "ffn_silu", "gelu", declare(hidden_act="silu"), everywhere=True)

# Local ones.

plant("file-post-norm-tail", "attn_post_norm", "zero|column|block|weight",
      change(POST_ATTN, zero(np.s_[-4:])))  # fmt: skip
plant("file-rows-zero", "ffn_gate", "zero|row|column|block", change(GATE, zero(np.s_[-8:])))
plant("file-row-zero", "attn_out", "zero|row|column|value", change(O, zero(np.s_[11])))
plant("file-columns-zero", "ffn_out", "zero|column|block|reduction|inner|input",
      change(DOWN, zero(np.s_[:, -32:])))  # fmt: skip
plant("file-head-zero", "qkv_matmul", "zero|head|column|block", lambda d, n: d.put(
    n, Q, zero(np.s_[3 * d.sizes[2]: 4 * d.sizes[2]])(d.get(n, Q))))  # fmt: skip
plant("file-kv-heads-swapped", "qkv_matmul", "swapped|permuted|exchanged", _swap_heads)
plant("file-row-negated", "ffn_up", "sign|negated", change(UP, times(np.s_[40], -1)))
plant("file-block-scaled", "ffn_gate", "scale|factor|halved|doubled",
      change(GATE, times(np.s_[64:68, :], 2)))  # fmt: skip
plant("file-embedding-row", "embedding", "~token", lambda d, n: d.put(
    None, EMBEDDING, zero(np.s_[d.tokens[0]])(d.get(None, EMBEDDING))))  # fmt: skip
plant("file-head-rows", "lm_head", "zero|row|column|block",
      change(HEAD, zero(np.s_[-8:]), layer=False))  # fmt: skip
plant("file-norm-tail", "attn_norm", "zero|column|block|weight", change(ATTN, zero(np.s_[-4:])))
plant("file-bias-tail", "qkv_bias", "zero|bias|column|block", change(VB, zero(np.s_[-8:])))


# Small ones, near the noise of some types and far above that of others.


def one(*index: Any, to: float) -> Callable[[Float32], Float32]:
    def spoil(w: Float32) -> Float32:
        w[index] = np.float32(to)
        return w

    return spoil


def _roll_rows(w: Float32) -> Float32:
    w[20:24] = np.roll(w[20:24], 1, axis=0)
    return w


def _tenfold_eps(d: Draft, n: int) -> None:
    d.metadata["rms_norm_eps"] *= 10


def _near_theta(d: Draft, n: int) -> None:
    d.metadata["rope_theta"] *= 1.01


def _scale_v_head(d: Draft, n: int) -> None:
    d.put(n, V, times(np.s_[: d.sizes[2]], 1.05)(d.get(n, V)))


plant("small-weight", "ffn_out", "wrong value", change(DOWN, one(5, 17, to=4.0)))
plant("small-row-scaled", "attn_out", "~factor", change(O, times(np.s_[30], 1.1)))
plant("small-rows-rolled", "ffn_up", "~dim", change(UP, _roll_rows))
plant("small-column-zero", "ffn_gate", "zero", change(GATE, zero(np.s_[:, 77])))
plant("small-norm-value", "ffn_norm|attn_post_norm", "weight", change(FFN, times(np.s_[9], 1.05)))
plant("small-bias-value", "qkv_bias", "~factor|~offset|~dim", change(QB, times(np.s_[12], 1.1)))
plant("small-v-head", "qkv_matmul", "~factor|~head", _scale_v_head)
plant("small-embedding-value", "embedding", "~factor|~token", lambda d, n: d.put(
    None, EMBEDDING, times(np.s_[d.tokens[0], 3], 1.1)(d.get(None, EMBEDDING))))  # fmt: skip
plant(
    "file-eps-tenfold",
    EVERY_NORM,
    "eps",
    _tenfold_eps,
    everywhere=True,
)
plant("file-theta-near", "q_post_rope|k_post_rope", "theta", _near_theta, everywhere=True)

# Stored bytes.


def bytes_of(name: str, spoil: Callable[[Blocks], None]) -> Spoil:
    def plan(d: Draft, n: int) -> None:
        d.spoilt[_full(n, name)] = spoil

    return plan


def _swap_nibbles(blocks: Blocks) -> None:
    codes = blocks.reshape(-1, 144)[:, 16:]
    codes[...] = codes >> 4 | codes << 4


def _ignore_minimum(blocks: Blocks) -> None:
    blocks.reshape(-1, 144)[:, 2:4] = 0


def _misread_scale_bits(blocks: Blocks) -> None:
    """The upper two bits of the last four scales lost."""
    blocks.reshape(-1, 144)[:, 4:8] &= 0x3F


def _neighbouring_block(blocks: Blocks) -> None:
    """A super-block of a row taken from the row below."""
    rows = blocks.reshape(-1, 144)
    rows[6] = rows[7]


def _shift_blocks(blocks: Blocks) -> None:
    """Row padding left out: from the second row on, every block comes one too early."""
    rows = blocks.reshape(-1, 144)
    rows[1:-1] = rows[2:].copy()


def _double_scale(blocks: Blocks) -> None:
    """One Q8_0 block with the scale of its neighbour times two: one bit of the exponent."""
    blocks.reshape(-1, 34)[5, 1] += 4


def _neighbouring_scales(blocks: Blocks) -> None:
    rows = blocks.reshape(-1, 34)
    rows[:, :2] = np.roll(rows[:, :2], 1, axis=0)


def _one_scale(blocks: Blocks) -> None:
    """One bit of one sub-block's six-bit scale."""
    blocks.reshape(-1, 144)[9, 5] ^= 8


def _one_code(blocks: Blocks) -> None:
    blocks.reshape(-1, 34)[40, 7] ^= 64


def _negate_minimum(blocks: Blocks) -> None:
    blocks.reshape(-1, 144)[:, 3] ^= 0x80


def _as_q4_0_spans(blocks: Blocks) -> None:
    """Nibbles of every 32 values in 16 bytes of their own."""
    codes = blocks.reshape(-1, 144)[:, 16:]
    values = np.stack([codes.reshape(-1, 4, 32) & 15, codes.reshape(-1, 4, 32) >> 4], axis=2)
    halves = values.reshape(-1, 8, 2, 16)
    codes[...] = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(-1, 128)


def _in_turn(blocks: Blocks) -> None:
    """Q4_0's values in the order of its bytes: low, high, low, high."""
    codes = blocks.reshape(-1, 18)[:, 2:]
    values = np.concatenate([codes & 15, codes >> 4], axis=1)
    codes[...] = values[:, 0::2] | values[:, 1::2] << 4


def _reverse_fields(blocks: Blocks) -> None:
    """Q6_K's two-bit fields from the highest down."""
    high = blocks.reshape(-1, 210)[:, 128:192]
    high[...] = (high & 3) << 6 | (high >> 2 & 3) << 4 | (high >> 4 & 3) << 2 | high >> 6


def _late_scales(blocks: Blocks) -> None:
    scales = blocks.reshape(-1, 210)[:, 192:208]
    scales[...] = np.roll(scales, -1, axis=1)


def _empty_block(blocks: Blocks) -> None:
    blocks.reshape(-1, 34)[3] = 0


def _rows_as_of_queries(d: Draft, n: int) -> None:
    """k through permute() with the number of query heads, read back with its own."""
    heads, kv_heads, _ = d.sizes
    w = _pair_rows(d.get(n, K), heads)
    back = w.reshape(kv_heads, len(w) // kv_heads // 2, 2, -1).swapaxes(1, 2)
    d.put(n, K, back.reshape(w.shape))


def _drop_head(d: Draft, n: int) -> None:
    del d.weights[HEAD]
    d.metadata["tie_word_embeddings"] = True


plant("file-k-as-q", "qkv_matmul", "h in place of k", _rows_as_of_queries)
plant("file-head-dropped", "lm_head", "the original's was dropped", _drop_head)
plant("bytes-minimum-sign", "ffn_gate", "minimum's sign", bytes_of(GATE, _negate_minimum))
plant("bytes-nibble-spans", "ffn_up", "spans of 16 bytes", bytes_of(UP, _as_q4_0_spans))
plant("bytes-nibbles-in-turn", "ffn_up", "even and odd", bytes_of(UP, _in_turn))
plant("bytes-q6-fields", "ffn_out", "high bits in reverse", bytes_of(DOWN, _reverse_fields))
plant("bytes-q6-scales", "ffn_gate", "sub-block scales one late", bytes_of(GATE, _late_scales))
plant("bytes-empty", "ffn_gate", "block of zeros|zero", bytes_of(GATE, _empty_block))
plant("small-scale-bit", "ffn_up", "~dim", bytes_of(UP, _one_scale))
plant("small-code-bit", "ffn_out", "wrong value", bytes_of(DOWN, _one_code))
plant("bytes-nibbles", "ffn_up", "nibble", bytes_of(UP, _swap_nibbles))
plant("bytes-minimum", "ffn_gate", "minim", bytes_of(GATE, _ignore_minimum))
plant("bytes-scale-bits", "attn_out", "scale", bytes_of(O, _misread_scale_bits))
plant("bytes-neighbour", "ffn_out", "neighbour|row|block", bytes_of(DOWN, _neighbouring_block))
plant("bytes-padding", "attn_out", "padding|row|block|permut", bytes_of(O, _shift_blocks))
plant("bytes-q8-scale", "ffn_gate", "wrong value|scale", bytes_of(GATE, _double_scale))
plant("bytes-q8-scales-shifted", "ffn_up", "scale|neighbour|block",
      bytes_of(UP, _neighbouring_scales))  # fmt: skip

Faults = Mapping[str, FileFault]
