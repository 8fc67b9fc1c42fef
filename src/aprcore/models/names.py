"""Tensors as files hold them -> weights under canonical names, in canonical order.

Files differ in names (Hugging Face's or GGUF's), in fusing q, k and v, and in the order of q and k
rows. All of it is undone by views that are read lazily like the tensors themselves.

Source: FORMATS.md, "Tensor names" and "GGUF"; llama.cpp's `convert_hf_to_gguf.py` for the order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aprcore.formats.storage import StoredTensor
from aprcore.ground.errors import WeightError, Where
from aprcore.network.config import ModelConfig
from aprcore.network.graph import K, Q, V
from aprcore.network.weights import Float32, Weight, row_values
from aprcore.quant.types import Bytes

ROPE_DIVISORS = "rope_freqs.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_GGUF_MODEL = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAME = re.compile(r"blk\.(\d{1,9})\.([a-z_]+)\.(weight|bias)", re.ASCII)
_FUSED_NAME = re.compile(r"(model\.layers\.\d{1,9}\.)self_attn\.qkv_proj\.(weight|bias)", re.ASCII)
# A leftover of old checkpoints; the frequencies follow from the configuration.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Some rows of a weight, as a weight: one of the matrices in a fused `qkv_proj`.

    Attributes:
        name: The canonical name.
        inner: The fused weight.
        first_row: Where the rows begin in it.
        num_rows: How many there are.
    """

    name: str
    inner: StoredTensor
    first_row: int
    num_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, row-major."""
        return (self.num_rows, *self.inner.shape[1:])

    @property
    def dtype(self) -> str:
        """The stored type."""
        return self.inner.dtype

    def read(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        """See `Weight.read`."""
        return self.inner.read(*self._inner_rows(start, stop), out)

    def read_raw(self, start: int, stop: int) -> Bytes:
        """See `StoredTensor.read_raw`."""
        return self.inner.read_raw(*self._inner_rows(start, stop))

    def step_squares(self, start: int, stop: int) -> tuple[Float32, int]:
        """See `Weight.step_squares`."""
        return self.inner.step_squares(*self._inner_rows(start, stop))

    def _inner_rows(self, start: int, stop: int) -> tuple[int, int]:
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows {start} to {stop} of {self.name!r}, which has {self.num_rows}")
        return self.first_row + start, self.first_row + stop


@dataclass(frozen=True, slots=True)
class SplitHalves:
    """q or k rows stored for RoPE on adjacent pairs, presented in split-half order.

    Converting to GGUF, llama.cpp stores row `i + s·D/2` of a head (s is 0 or 1) as row `2i + s`,
    so that the pair of dimensions i and i + D/2 becomes adjacent. This is the way back.

    Attributes:
        name: The canonical name.
        inner: The stored weight, bias or per-head norm.
        head_dim: D; the rows are whole heads.
    """

    name: str
    inner: StoredTensor | RowSlice
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, row-major."""
        return self.inner.shape

    @property
    def dtype(self) -> str:
        """The stored type."""
        return self.inner.dtype

    def stored_rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """The stored rows of rows `start` to `stop`, int64 [stop - start]."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {self.name!r}, which has {self.shape[0]}")
        head, within = np.divmod(np.arange(start, stop), self.head_dim)
        half, pair = np.divmod(within, self.head_dim // 2)
        rows: NDArray[np.int64] = head * self.head_dim + 2 * pair + half
        return rows

    def read(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        """See `Weight.read`. A piece of one half is every other row of twice as many."""
        rows = self.stored_rows(start, stop)
        shape = (stop - start, *self.shape[1:])
        count = (stop - start) * row_values(self)
        values = np.empty(count, np.float32) if out is None else out.reshape(-1)[:count]
        values = values.reshape(shape)
        if count:
            first = int(rows.min())
            np.take(self.inner.read(first, int(rows.max()) + 1), rows - first, axis=0, out=values,
                    mode="clip")  # fmt: skip  # the other modes copy `out` first
        return values

    def read_raw(self, start: int, stop: int) -> Bytes:
        """See `StoredTensor.read_raw`."""
        rows = self.stored_rows(start, stop)
        if not rows.size:
            return np.empty(0, np.uint8)
        first, last = int(rows.min()), int(rows.max()) + 1
        raw = self.inner.read_raw(first, last).reshape(last - first, -1)
        return raw[rows - first].reshape(-1)

    def step_squares(self, start: int, stop: int) -> tuple[Float32, int]:
        """See `Weight.step_squares`; the groups of a row move with it."""
        rows = self.stored_rows(start, stop)
        if not rows.size:
            return self.inner.step_squares(0, 0)
        first = int(rows.min())
        squares, group = self.inner.step_squares(first, int(rows.max()) + 1)
        return squares[rows - first], group


def is_gguf_name(name: str) -> bool:
    """Whether a tensor's name is one of GGUF's."""
    return name in _GGUF_MODEL or _GGUF_NAME.fullmatch(name) is not None


def canonical_name(name: str) -> str:
    """The Hugging Face name of a tensor; a name that is not GGUF's is returned as it is."""
    if name in _GGUF_MODEL:
        return _GGUF_MODEL[name]
    match = _GGUF_NAME.fullmatch(name)
    if match is None or match[2] not in _GGUF_LAYER:
        return name
    return f"model.layers.{int(match[1])}.{_GGUF_LAYER[match[2]]}.{match[3]}"


def rename_tensors(tensors: Mapping[str, StoredTensor], where: Where) -> dict[str, StoredTensor]:
    """Tensors under canonical names, without those that carry nothing.

    Raises:
        WeightError: Two tensors have the same canonical name.
    """
    renamed: dict[str, StoredTensor] = {}
    for stored, tensor in tensors.items():
        if stored.endswith(_IGNORED_SUFFIX):
            continue
        name = canonical_name(stored)
        if name in renamed:
            raise WeightError(f"{name} is stored twice, once as {stored!r}", where=where)
        renamed[name] = dataclasses.replace(tensor, name=name) if name != stored else tensor
    return renamed


def split_fused(
    tensors: Mapping[str, StoredTensor], config: ModelConfig, where: Where
) -> dict[str, StoredTensor | RowSlice]:
    """Every fused `qkv_proj` as the three weights it holds: q's rows, then k's, then v's.

    Raises:
        WeightError: Its rows are not (H + 2K)·D, or a part is stored on its own as well.
    """
    weights: dict[str, StoredTensor | RowSlice] = {}
    for name, tensor in tensors.items():
        match = _FUSED_NAME.fullmatch(name)
        if match is None:
            _add(weights, name, tensor, where)
            continue
        expected = config.qkv_columns("v")[1]
        if not tensor.shape or tensor.shape[0] != expected:
            raise WeightError(f"{name} has shape {list(tensor.shape)}, expected {expected} rows",
                              where=where)  # fmt: skip
        for part, module in (("q", Q), ("k", K), ("v", V)):
            start, stop = config.qkv_columns(part)
            single = f"{match[1]}{module}.{match[2]}"
            _add(weights, single, RowSlice(single, tensor, start, stop - start), where)
    return weights


def _add(
    weights: dict[str, StoredTensor | RowSlice],
    name: str,
    weight: StoredTensor | RowSlice,
    where: Where,
) -> None:
    if name in weights:
        raise WeightError(f"{name} is stored twice, once within qkv_proj", where=where)
    weights[name] = weight


_ROTATED_NAME = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_(proj|norm)\.(weight|bias)")


def split_halves(
    weights: Mapping[str, StoredTensor | RowSlice], head_dim: int
) -> dict[str, Weight]:
    """Weights whose q and k rows are for adjacent pairs, with those rows in split-half order.

    A norm of q or k scales the same dimensions, so it is stored in the same order.
    """
    return {
        name: SplitHalves(name, weight, head_dim) if _ROTATED_NAME.fullmatch(name) else weight
        for name, weight in weights.items()
    }
