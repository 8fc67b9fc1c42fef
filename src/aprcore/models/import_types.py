"""Which type each tensor of a new file has: what was asked for, and what is left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from aprcore.formats.apr import dtype_id
from aprcore.formats.storage import StoredTensor
from aprcore.ground.errors import AprError
from aprcore.network.operations import EMBEDDING, HEAD
from aprcore.network.weights import Weight
from aprcore.quant.quantise import QUANTISED
from aprcore.quant.types import FORMATS, BlockLayout, Bytes, rows_have_bytes

DTYPES = ("keep", "f32", "f16", "bf16")
QUANTIZED = tuple(dtype.lower() for dtype in QUANTISED)


@runtime_checkable
class RawRows(Protocol):
    """A weight that can give the stored bytes of its rows."""

    def read_raw(self, start: int, stop: int) -> Bytes:
        """See `StoredTensor.read_raw`."""
        ...


@dataclass(frozen=True, slots=True)
class ImportTypes:
    """The types that a new file should hold.

    Attributes:
        dtype: One of `DTYPES`; "keep" keeps each tensor's stored type.
        quantize: One of `QUANTIZED` for the matrices, whatever `dtype` says of the others. A tensor
            that is to stay float and is not is widened to float32 where `dtype` is "keep".
        quantize_embeddings: Whether `quantize` goes for embedding and head, too.
    """

    dtype: str = "keep"
    quantize: str | None = None
    quantize_embeddings: bool = False

    def check(self) -> None:
        """Refuse names that are not in the lists.

        Raises:
            AprError: One of these.
        """
        if self.dtype not in DTYPES:
            raise AprError(f"unknown type {self.dtype!r}", where="--dtype",
                           hint=f"types are {', '.join(DTYPES)}")  # fmt: skip
        if self.quantize is not None and self.quantize not in QUANTIZED:
            raise AprError(f"unknown type {self.quantize!r}", where="--quantize",
                           hint=f"types are {', '.join(QUANTIZED)}")  # fmt: skip
        if self.quantize_embeddings and self.quantize is None:
            raise AprError("there is no type to quantise to", where="--quantize-embeddings",
                           hint="name it with --quantize")  # fmt: skip

    def choose(self, weight: Weight) -> tuple[str, str]:
        """The new type of a tensor, and why if it is not the one that was asked for."""
        stored = weight.dtype
        if self.quantize is not None:
            dtype = self.quantize.upper()
            reason = _reason_to_spare(weight, dtype, self.quantize_embeddings)
            if not reason:
                return dtype, ""
            if self.dtype == "keep":
                return stored if stored in ("F32", "F16", "BF16") else "F32", reason
            return self.dtype.upper(), reason
        if self.dtype != "keep":
            return self.dtype.upper(), ""
        if dtype_id(stored) is None:
            return "F32", f".apr has no type for {stored}"
        if not can_copy(weight):
            return "F32", f"rows of {stored} cannot be taken apart"
        return stored, ""


KEEP_ALL = ImportTypes()


def _reason_to_spare(weight: Weight, dtype: str, with_embeddings: bool) -> str:
    """Why a tensor is not quantised; empty if it is.

    Vectors are what quantising would hurt most and save least, as in llama.cpp. The errors of
    embedding and head are the ones that every token sees.
    """
    if len(weight.shape) < 2:
        return "vectors stay float"
    if weight.name in (EMBEDDING, HEAD) and not with_embeddings:
        return "embedding and head stay float"
    row = FORMATS[dtype]
    if row.layout is BlockLayout.ROWS and weight.shape[-1] % row.block_values:
        return f"rows of {weight.shape[-1]} are not whole blocks"
    return ""


def can_copy(weight: Weight) -> bool:
    """Whether the stored bytes of `weight` can be taken as they are."""
    if weight.dtype not in FORMATS:
        return False
    if not rows_have_bytes(weight.dtype, weight.shape):
        return isinstance(weight, StoredTensor)
    return isinstance(weight, RawRows)
