"""Several sequences in one dump: which there are, and where the tokens of each lie.

Engines run a batch with an axis of its own, filled up with padding on the left or right, or one
sequence after the other along the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.tensor_files import TOKEN_NAMES, StoredIntegers
from aprcore.ground.errors import FormatError

# What else holds the ids: what the embedding is given, and llama.cpp's input.
_IDS = (*TOKEN_NAMES, "embed_tokens.input", "embed_tokens.input.0", "embed.hook_in",
        "inp_tokens")  # fmt: skip
_MASKS = ("attention_mask", "padding_mask")
_LENGTHS = ("seq_lens",)
_STARTS = ("cu_seqlens", "query_start_loc")
_POSITIONS = ("positions", "position_ids", "cache_position")
_HISTORY = ("history",)  # ids of the tokens before a decoding step
_KNOWN = (*_IDS, *_MASKS, *_LENGTHS, *_STARTS, *_POSITIONS, *_HISTORY)


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of a dump.

    Attributes:
        bounds: Of each sequence the first of its tokens on the token axis, and the one after the
            last: padding is outside.
        tokens: Their ids, if the dump has them.
        has_axis: Whether the sequences have an axis of their own, the first.
    """

    bounds: tuple[tuple[int, int], ...]
    tokens: tuple[tuple[int, ...], ...] | None
    has_axis: bool


def unused_integers(integers: Mapping[str, StoredIntegers]) -> list[str]:
    """Names of arrays that say nothing that is asked for here."""
    return [name for name in integers if not _ends_in(name, _KNOWN)]


def _ends_in(name: str, words: tuple[str, ...]) -> bool:
    return name in words or name.endswith(tuple(f".{word}" for word in words))


def find_integers(
    integers: Mapping[str, StoredIntegers], words: tuple[str, ...]
) -> NDArray[Any] | None:
    """The first array that one of these names ends in, as a word of its own."""
    for word in words:
        for name, stored in integers.items():
            if _ends_in(name, (word,)):
                return stored.read()
    return None


def find_step(
    integers: Mapping[str, StoredIntegers],
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Positions of the tokens of one sequence, and the tokens before them; None: not in the dump.

    Positions of several sequences, or with gaps, are those of no decoding step.
    """
    found = []
    for words in (_POSITIONS, _HISTORY):
        array = find_integers(integers, words)
        flat = None if array is None or array.size != max(array.shape, default=0) else (
            array.reshape(-1)
        )  # fmt: skip
        found.append(None if flat is None else tuple(int(x) for x in flat))
    positions, history = found
    if positions and positions != tuple(range(positions[0], positions[0] + len(positions))):
        positions = None
    return positions, history


def find_batch(integers: Mapping[str, StoredIntegers], pad: int | None, path: Path) -> Batch | None:
    """The sequences that the ids of a dump are of; None where it has no ids.

    Args:
        integers: Its arrays of integers.
        pad: The id that a row is filled up with, where no mask says what is padding.
        path: The dump, for errors.

    Raises:
        FormatError: The token ids are no such thing.
    """
    ids = find_integers(integers, _IDS)
    if ids is None:
        return None
    if ids.size == 0 or int(ids.min()) < 0:
        raise FormatError("its token ids are not non-negative integers", where=path)
    ids = ids.reshape(-1, ids.shape[-1]) if ids.ndim > 1 else ids.reshape(1, -1)
    if len(ids) == 1:
        bounds = _packed(integers, ids.size)
        tokens = tuple(tuple(ids[0, start:stop].tolist()) for start, stop in bounds)
        return Batch(bounds, tokens, has_axis=False)
    mask = find_integers(integers, _MASKS)
    if mask is None or mask.shape != ids.shape:
        mask = np.ones(ids.shape, bool) if pad is None else _unpadded(ids, pad)
    bounds = tuple(_extent(row != 0) for row in mask)
    tokens = tuple(tuple(row[start:stop].tolist()) for row, (start, stop) in zip(ids, bounds))
    return Batch(bounds, tokens, has_axis=True)


def _packed(
    integers: Mapping[str, StoredIntegers], count: int
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    """Where sequences begin and end that lie one after the other."""
    starts = find_integers(integers, _STARTS)
    lengths = find_integers(integers, _LENGTHS)
    if starts is None and lengths is not None:
        starts = np.concatenate([[0], np.cumsum(lengths.reshape(-1))])
    if starts is None or starts.size < 2 or int(starts.reshape(-1)[-1]) != count:
        return ((0, count),)
    return tuple(pairwise(map(int, starts.reshape(-1))))


def _unpadded(ids: NDArray[Any], pad: int) -> NDArray[np.bool_]:
    """Where the ids of each row are no padding: what is at either end, and not between."""
    is_token = ids != pad
    from_left = np.maximum.accumulate(is_token, axis=1)
    from_right = np.maximum.accumulate(is_token[:, ::-1], axis=1)[:, ::-1]
    return from_left & from_right


def _extent(is_token: NDArray[np.bool_]) -> tuple[int, int]:
    held = np.flatnonzero(is_token)
    return (int(held[0]), int(held[-1]) + 1) if held.size else (0, is_token.size)
