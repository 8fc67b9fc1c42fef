"""ggml's tensors, read through ctypes while llama.cpp computes: name, operation, sizes, values.

Source: `struct ggml_tensor` in `ggml.h`, and `ggml_backend_tensor_get` in `ggml-backend.h`. The
library has no functions for sizes and strides, so the record itself is read, and what there are
functions for is held against it first.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.errors import TraceError
from aprcore.ground.precision import BFLOAT16

_ABORT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
# Operations that show the values of another tensor in another shape.
VIEWS = frozenset({"RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE"})


@cache
def _plain_types() -> dict[int, np.dtype[Any]]:
    """Numbers of `enum ggml_type` whose values numpy reads as they are."""
    return {
        0: np.dtype(np.float32), 1: np.dtype(np.float16), 30: BFLOAT16.dtype,
        28: np.dtype(np.float64), 26: np.dtype(np.int32), 27: np.dtype(np.int64),
    }  # fmt: skip


class _Record(ctypes.Structure):
    """`struct ggml_tensor`, as far as its name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


@dataclass(frozen=True, slots=True)
class Node:
    """A tensor of llama.cpp's graph, valid while the graph is computed.

    Attributes:
        address: Where its record is.
        name: What `cb()` called it, or what ggml makes of its source's name.
        op: The operation that makes it: "MUL_MAT".
        shape: Its four sizes, row-major: the reverse of ggml's.
        sources: Addresses of the tensors that the operation reads.
    """

    address: int
    name: str
    op: str
    shape: tuple[int, ...]
    sources: tuple[int, ...]


class Ggml:
    """The functions of a ggml library that look at tensors.

    Args:
        library: The loaded library with ggml's functions.
        version: What to call it in errors.
    """

    def __init__(self, library: ctypes.CDLL, version: str) -> None:
        self._version = version
        self._checked = False
        pointer = [ctypes.c_void_p]
        self._functions = {
            name: _function(library, name, arguments, result)
            for name, arguments, result in (
                ("ggml_set_abort_callback", pointer, ctypes.c_void_p),
                ("ggml_get_name", pointer, ctypes.c_char_p),
                ("ggml_nelements", pointer, ctypes.c_int64),
                ("ggml_nbytes", pointer, ctypes.c_size_t),
                ("ggml_op_name", [ctypes.c_int], ctypes.c_char_p),
                ("ggml_type_name", [ctypes.c_int], ctypes.c_char_p),
                ("ggml_type_size", [ctypes.c_int], ctypes.c_size_t),
                ("ggml_blck_size", [ctypes.c_int], ctypes.c_int64),
                ("ggml_backend_tensor_get",
                 [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None),
            )
        }  # fmt: skip

    @contextmanager
    def on_abort(self, last_words: Callable[[str], None]) -> Iterator[None]:
        """Have a function called when ggml is about to end the process, with what it says."""

        def told(message: bytes) -> None:
            place, _, what = message.decode("utf-8", "replace").partition(": ")
            last_words(f"{place.rpartition('/')[2]}: {what}")

        callback = _ABORT_CALLBACK(told)
        self._functions["ggml_set_abort_callback"](ctypes.cast(callback, ctypes.c_void_p))
        try:
            yield
        finally:
            self._functions["ggml_set_abort_callback"](None)

    def node(self, address: int) -> Node:
        """What a tensor is.

        Raises:
            TraceError: The library's records are laid out otherwise.
        """
        record = _Record.from_address(address)
        if not self._checked:
            self._check(address, record)
            self._checked = True
        op = self._functions["ggml_op_name"](record.op).decode()
        return Node(
            address, record.name.decode("utf-8", "replace"), op, tuple(record.ne[::-1]),
            tuple(source for source in record.src if source),
        )  # fmt: skip

    def behind_views(self, node: Node) -> Node:
        """The tensor whose values a reshaped or otherwise viewed one shows."""
        while node.op in VIEWS and node.sources:
            node = self.node(node.sources[0])
        return node

    def read(self, node: Node) -> NDArray[Any]:
        """The values in four axes, row-major, read by their strides; blocks are expanded.

        Raises:
            TraceError: They are of a type that is not known.
        """
        record = _Record.from_address(node.address)
        kind, shape = record.type, node.shape
        strides = tuple(record.nb[::-1])
        stored = self._fetch(node.address)
        plain = _plain_types().get(kind)
        if plain is not None:
            if 0 in shape:
                return np.empty(shape, plain)
            return np.ndarray(shape, plain, stored, strides=strides).copy()
        return self._expand(kind, shape, strides, stored, node.name)

    def _expand(
        self, kind: int, shape: tuple[int, ...], strides: tuple[int, ...],
        stored: NDArray[np.uint8], name: str,
    ) -> NDArray[np.float32]:  # fmt: skip
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        blocks = shape[-1] // self._functions["ggml_blck_size"](kind)
        row_bytes = blocks * self._functions["ggml_type_size"](kind)
        try:
            known = GGMLQuantizationType(kind)
            rows = np.ndarray(
                (*shape[:-1], row_bytes), np.uint8, stored, strides=(*strides[:-1], 1)
            )
            values = dequantize(np.ascontiguousarray(rows).reshape(-1, row_bytes), known)
        except (ValueError, NotImplementedError) as error:
            word = self._functions["ggml_type_name"](kind).decode()
            raise TraceError(f"tensor {name!r} is of type {word}, which cannot be read") from error
        return values.astype(np.float32, copy=False).reshape(shape)

    def _fetch(self, address: int) -> NDArray[np.uint8]:
        size = self._functions["ggml_nbytes"](address)
        stored = np.empty(size, np.uint8)
        self._functions["ggml_backend_tensor_get"](address, stored.ctypes.data, 0, size)
        return stored

    def _check(self, address: int, record: _Record) -> None:
        same = (
            math.prod(record.ne) == self._functions["ggml_nelements"](address)
            and record.name == self._functions["ggml_get_name"](address)
        )  # fmt: skip
        if not same:
            raise TraceError(
                f"the tensors of {self._version} are laid out in a way that is not known",
                hint="install the version that the `engines` extra names",
            )


def _function(library: ctypes.CDLL, name: str, arguments: Any, result: Any) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, result
    return function
