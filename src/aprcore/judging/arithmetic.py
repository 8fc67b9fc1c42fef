"""Which arithmetic explains a dump: f32, f64, half precision, or activations rounded to 8 bits.

An engine that rounds its activations to Q8_K before every product looks wrong everywhere when it is
judged as float32. So the stages of one layer are replayed under
each arithmetic, and the one that explains most of them is taken; of equals the least noisy.
An engine that computes in float64 and rounds on dump shows where values are added: float32 would
round their sum alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from aprcore.engines.estimate import Profile
from aprcore.ground.precision import ARITHMETICS, FLOAT32, Arithmetic, arithmetic_of_dtype
from aprcore.judging.layouts import alternatives, layout_of
from aprcore.judging.noise import assess
from aprcore.judging.replay import Floats, RecordedSide
from aprcore.network.graph import Graph
from aprcore.network.stages import StageKey
from aprcore.network.weights import Weight


def detect_arithmetic(
    graph: Graph,
    weights: Mapping[str, Weight],
    tokens: Sequence[int] | None,
    num_tokens: int,
    keys: Iterable[StageKey],
    read: Callable[[StageKey], Floats | None],
    dtype: str | None = None,
) -> tuple[Arithmetic, int, int]:
    """Find the arithmetic of an engine's dump.

    Args:
        graph, weights: The model that the engine ran.
        tokens: Token ids, if known.
        num_tokens: T.
        keys: Stages that the dump holds; those of its first complete layer are replayed.
        read: Fetches a tensor of the dump in canonical layout.
        dtype: The type of the dump's values, if it says so.

    Returns:
        The arithmetic, how many stages it explains, and how many were replayed.
    """
    stages = _one_layer(graph, keys)
    # An engine of the dump's own type is the likelier one, and lets less pass than one that only
    # dumps in it, whose every recorded input is off.
    own = arithmetic_of_dtype(dtype)
    is_coarse = own.stored.digits < FLOAT32.digits
    likely = sorted(ARITHMETICS.values(), key=lambda a: is_coarse and a is not own)
    candidates = [arithmetic.dumped_as(dtype) for arithmetic in likely]
    best = (candidates[0], -1, 0)
    for arithmetic in candidates:
        side = RecordedSide(
            graph, weights, tokens, num_tokens, Profile(arithmetic, weights_rounded=False),
            read=read,
        )  # fmt: skip
        outcomes = [explained for key in stages if (explained := _explained(side, key)) is not None]
        if sum(outcomes) > best[1]:
            best = (arithmetic, sum(outcomes), len(outcomes))
        if best[1] == best[2] > 0:
            break  # nothing explains more than all of them
    return best


def _one_layer(graph: Graph, keys: Iterable[StageKey]) -> list[StageKey]:
    """The stages of the layer of which most are recorded, the first of equals; all have inputs."""
    layers: dict[int, list[StageKey]] = {}
    for key in keys:
        if key.layer is not None and graph.inputs(key):
            layers.setdefault(key.layer, []).append(key)
    return max(layers.values(), key=len, default=[])


def _explained(side: RecordedSide, key: StageKey) -> bool | None:
    """Whether rounding explains a stage, in any layout; None where that cannot be judged."""
    observed = side.tensor(key)
    expected = side.expect(key)
    if observed is None or expected is None or not np.isfinite(observed).all():
        return None
    if not np.isfinite(expected.estimate.value).all():
        return None
    flat = observed.reshape(-1)
    if flat.size != expected.estimate.value.size:
        return None
    layout = layout_of(key, side.sizes(), flat.size)
    if assess(flat, expected.estimate, layout).explained:
        return True
    return any(
        assess(other, expected.estimate, layout).explained
        for _, other in alternatives(
            side.graph.operation(key), flat, layout, num_kv_heads=side.sizes()["K"]
        )
    )
