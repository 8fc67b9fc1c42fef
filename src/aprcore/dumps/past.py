"""Keys and values of the tokens before a decoding step, where a dump shows its engine's cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.sidecar import Sidecar
from aprcore.engines.arithmetic import QUANTISED_CACHES
from aprcore.network.backend import KeyValueCache
from aprcore.network.config import ModelConfig
from aprcore.quant.roundings import hadamard

Float64 = NDArray[np.float64]

# As llama.cpp names what attention reads of its cache.
_CACHE_VIEW = re.compile(r"cache_([kv])_l(\d{1,9}) \(view\)", re.ASCII)


def read_past(
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], NDArray[np.float32]],
    sidecar: Sidecar,
    config: ModelConfig,
    num_past: int,
) -> KeyValueCache:
    """The rows [num_past, K·D] of every layer that a dump shows.

    llama.cpp pads its cache, keeps values transposed where attention is not one kernel, and turns
    heads of whole 64s in a quantised cache; they are turned back here.

    Args:
        shapes: Shapes of the stored tensors by name.
        read: Reads one of them.
        sidecar: What the dump says of itself.
        config: The model's configuration.
        num_past: Tokens that were run before.
    """
    cache = KeyValueCache(num_past)
    heads, dim = config.num_kv_heads, config.head_dim
    stated = sidecar.arithmetic if isinstance(sidecar.arithmetic, Mapping) else {}
    is_turned = stated.get("kv_cache") in QUANTISED_CACHES and dim % 64 == 0
    for name, shape in shapes.items():
        match = _CACHE_VIEW.fullmatch(name)
        if match is None or len(shape) != 3:
            continue
        if shape[1:] == (heads, dim) and shape[0] >= num_past:
            rows = read(name)[:num_past]
        elif shape[:2] == (dim, heads) and shape[2] >= num_past:
            rows = read(name).transpose(2, 1, 0)[:num_past]
        else:
            continue
        values = np.ascontiguousarray(rows, dtype=np.float64)
        if is_turned:
            size = 64 if match[1] == "v" else dim & -dim
            values = hadamard(values.reshape(-1, size))
        cache.held[int(match[2]), match[1]] = values.reshape(num_past, heads * dim)
    return cache
