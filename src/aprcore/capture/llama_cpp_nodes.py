"""What llama.cpp computes in a pass, under names that tell all of it apart.

`cb()` in llama.cpp's graph names a tensor; the scheduler's callback shows it once it is computed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aprcore.capture.ggml import VIEWS, Ggml, Node
from aprcore.dumps.tensor_folder import Piece, TensorFolderWriter
from aprcore.ground.errors import TraceError

# What `cb()` calls a tensor. ggml calls the others node_12, or by their source: "Qcur-0 (view)".
_NAMED = re.compile(r"(?!node_|leaf_)([A-Za-z_][A-Za-z0-9_.]*?)(?:-(\d+))?", re.ASCII)
# What attention reads of the cache.
_CACHE = re.compile(r"cache_[kv]_l\d+ \(view\)", re.ASCII)
_OUTPUT_WEIGHT = re.compile(r"blk\.(\d+)\.attn_output\.weight", re.ASCII)
_V_ROTATION = "attn_inp_v_rot"
_PADDING = 3  # the axis of kq and its softmax along the cache, whose length is padded


class _Seen(NamedTuple):
    """A tensor of one name in one graph: its operation, and what it held."""

    op: str
    piece: Piece


class NodeWatch:
    """The callback of the scheduler: takes down every tensor that llama.cpp names.

    Attributes:
        active: Whether the pass is the one to capture.
        failure: What went wrong inside the callback, where it cannot be raised.
    """

    def __init__(
        self, ggml: Ggml, writer: TensorFolderWriter, progress: Callable[[int], None] | None
    ) -> None:  # fmt: skip
        self.active = False
        self.failure: BaseException | None = None
        self._ggml = ggml
        self._writer = writer
        self._progress = progress
        self._first: str | None = None
        # A graph per chunk of tokens; in each, what was seen of a name, in turn.
        self._graphs: list[dict[str, list[_Seen]]] = []
        self._count = 0

    def __call__(self, address: int, ask: bool, user_data: int | None) -> bool:
        """Whether a tensor is wanted (`ask`), or: take it down, and go on."""
        if not self.active or self.failure is not None:
            return False
        try:
            node = self._ggml.node(address)
            if ask:
                return self._begin(node)
            self._take(node)
        except BaseException as error:  # ctypes would print it and go on
            self.failure = error
            return False
        return True

    def _begin(self, node: Node) -> bool:
        if self._first in (None, node.name):
            self._first = node.name
            self._graphs.append(defaultdict(list))
        return bool(
            _NAMED.fullmatch(node.name) or _CACHE.fullmatch(node.name) or self._projects(node)
        )

    def _projects(self, node: Node) -> str | None:
        """The layer whose attention output a product projects."""
        if node.op != "MUL_MAT":
            return None
        match = _OUTPUT_WEIGHT.fullmatch(self._ggml.node(node.sources[0]).name)
        return None if match is None else match[1]

    def _take(self, node: Node) -> None:
        layer = self._projects(node)
        if layer is not None:
            self._take_rotated(layer, self._ggml.node(node.sources[1]))
        if _NAMED.fullmatch(node.name) or _CACHE.fullmatch(node.name):
            self._keep(node.name, node.op, self._ggml.read(node))

    def _take_rotated(self, layer: str, read: Node) -> None:
        """What the projection reads, where that is a tensor without a name: values turned back."""
        made = self._ggml.behind_views(read)
        names = [self._ggml.node(source).name for source in made.sources]
        seen = self._graphs[-1].pop(f"kqv_out-{layer}", None)
        if made.op != "MUL_MAT" or _V_ROTATION not in names or seen is None:
            if seen is not None:
                self._graphs[-1][f"kqv_out-{layer}"] = seen
            return
        self._graphs[-1][f"kqv_out_rotated-{layer}"] = seen
        self._keep(f"kqv_out-{layer}", made.op, self._ggml.read(read))

    def _keep(self, name: str, op: str, values: NDArray[Any]) -> None:
        self._graphs[-1][name].append(_Seen(op, self._writer.hold(values)))
        self._count += 1
        if self._progress is not None:
            self._progress(self._count)

    def finish(self, num_tokens: int, ubatch: int) -> None:
        """Write what was seen, chunks joined over tokens.

        Raises:
            TraceError: The graphs are not one for each chunk.
        """
        chunks = [min(ubatch, num_tokens - start) for start in range(0, num_tokens, ubatch)]
        if len(self._graphs) != len(chunks):
            raise TraceError(
                f"llama.cpp computed {len(self._graphs)} graphs for {len(chunks)} chunks of tokens",
                hint="it cuts this model's batches in a way of its own; leave --ubatch out",
            )  # fmt: skip
        for name in self._graphs[-1]:
            turns = [graph.get(name, []) for graph in self._graphs]
            for told, pieces in _told_apart(name, turns):
                self._write(told, pieces, chunks)

    def _write(self, name: str, pieces: Sequence[Piece], chunks: Sequence[int]) -> None:
        if len(pieces) == 1 or _CACHE.fullmatch(name):
            last = pieces[-1]
            self._writer.write(name, [last._replace(shape=_without_ones(last.shape))])
            return
        axis = _token_axis(name, [piece.shape for piece in pieces], chunks)
        if axis is None:
            return  # no tensor over tokens: a mask, a table
        widest = max(piece.shape[_PADDING] for piece in pieces)
        parts = [self._padded(piece, widest) for piece in pieces if piece.shape[axis]]
        lead = 4 - len(_without_ones(_joined(parts, axis)))
        parts = [piece._replace(shape=piece.shape[lead:]) for piece in parts]
        self._writer.write(name, parts, axis - lead)

    def _padded(self, piece: Piece, width: int) -> Piece:
        """A piece of scores with zeros up to a cache that has grown since."""
        if piece.shape[_PADDING] == width:
            return piece
        values = self._writer.read(piece)
        missing = width - piece.shape[_PADDING]
        return self._writer.hold(np.pad(values, [(0, 0)] * _PADDING + [(0, missing)]))


def _told_apart(
    name: str, graphs: Sequence[Sequence[_Seen]]
) -> Iterator[tuple[str, Sequence[Piece]]]:
    """The tensors of one name, each under a name of its own, with its piece of every graph.

    Raises:
        TraceError: One graph has more of them than another.
    """
    ops = [seen.op for seen in graphs[-1]]
    if any([seen.op for seen in graph] != ops for graph in graphs):
        raise TraceError(f"llama.cpp's {name!r} is made otherwise from chunk to chunk",
                         hint="leave --ubatch out")  # fmt: skip
    kept = [i for i, op in enumerate(ops) if op not in VIEWS or i in (0, len(ops) - 1)]
    match = _NAMED.fullmatch(name)
    given = set()
    for i in reversed(kept):
        told = name
        if match is not None and i != kept[-1]:
            base, layer = match.groups()
            made = "pre" if i == kept[0] else "bias" if ops[i] == "ADD" else ops[i].lower()
            told = f"{base}_{made}" + ("" if layer is None else f"-{layer}")
        if told not in given:
            given.add(told)
            yield told, [graph[i].piece for graph in graphs]


def _token_axis(
    name: str, shapes: Sequence[tuple[int, ...]], chunks: Sequence[int]
) -> int | None:  # fmt: skip
    """The axis that tokens are on, of four; None if there is none.

    The last layer keeps only the tokens whose logits are wanted: none but in the last chunk.
    """
    outputs = [*(0 for _ in chunks[:-1]), 1]
    heads_first = re.match(r"kqv?(?!_out|_merged|_wo)(_|-|$)", name) is not None
    sizes = {axis: [shape[axis] for shape in shapes] for axis in (1, 2)}
    fitting = [a for a in (1, 2) if sizes[a] in (list(chunks), outputs)]
    if heads_first or fitting == [2] or all(shape[1] <= 1 for shape in shapes):
        return 2 if 2 in fitting else None
    return fitting[0] if fitting else None


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without leading ones, of two axes at least."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _joined(pieces: Sequence[Piece], axis: int) -> tuple[int, ...]:
    shape = list(pieces[0].shape)
    shape[axis] = sum(piece.shape[axis] for piece in pieces)
    return tuple(shape)
