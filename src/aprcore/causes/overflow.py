"""Why NaN or infinity appears: numbers too large for the type that an engine computes with.

There is no output to hold alternatives against, only the places where it is not finite: a cause
explains them if it overflows in just those tokens and heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from aprcore.causes.records import CauseTried, Explanation
from aprcore.judging.replay import Floats, RecordedSide
from aprcore.network.backend import Site
from aprcore.network.operations import Norm, Operation, Softmax
from aprcore.network.stages import StageKey
from aprcore.network.weights import Weight, row_chunks

Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]

LARGEST = {"float16": 65504.0, "bfloat16 or float32": 3.4028235e38}


def explain_nonfinite(side: RecordedSide, key: StageKey, observed: Floats) -> Explanation | None:
    """Try what can overflow in a stage whose inputs are finite; None if it cannot be replayed."""
    inputs, expected = side.inputs(key), side.expect(key)
    if inputs is None or expected is None or expected.estimate.value.size != observed.size:
        return None
    value = expected.estimate.value
    found = ~np.isfinite(observed.reshape(value.shape))
    operation = side.graph.operation(key)
    causes = []
    tried = [
        *_weights_lost(operation, side.site(key), value),
        *_overflows(operation, [x.estimate.value for x in inputs], value),
    ]
    for name, advice, places in tried:
        if not places.any():
            continue
        agreement = float((found & places).sum() / (found | places).sum())
        # The figures of a set of places: how far from equal, and how alike.
        explains = bool((found == places).all())
        causes.append(CauseTried(name, advice, 1 - agreement, agreement, explains, "", True))
    causes.sort(key=lambda cause: cause.relative_l2)
    named = any(cause.explains for cause in causes)
    return Explanation(tuple(causes), None if named else _symptom(found), len(causes))


def _weights_lost(
    operation: Operation | None, site: Site, value: Float64
) -> Iterator[tuple[str, str, Bools]]:
    """Weights of the file that are not finite: any engine gives NaN or infinity there."""
    places = ~np.isfinite(value)
    if operation is None or not places.any():
        return
    for use in operation.weights:
        weight = site.find(use.name)
        rows = [] if weight is None else _lost_rows(weight)
        if rows:
            listed = ", ".join(map(str, rows[:3])) + (", ..." if len(rows) > 3 else "")
            what = "value" if len(use.shape.split(",")) == 1 else "row"
            yield (
                f"{use.name} is not finite in this file ({what} {listed})",
                "the conversion of this weight: infinity or NaN is stored",
                places,
            )


def _lost_rows(weight: Weight) -> list[int]:
    lost: list[int] = []
    for start, stop in row_chunks(weight):
        rows = weight.read(start, stop).reshape(stop - start, -1)
        lost += [start + int(n) for n in np.flatnonzero(~np.isfinite(rows).all(axis=1))]
    return lost


def _overflows(
    operation: Operation | None, inputs: list[Float64], value: Float64
) -> Iterator[tuple[str, str, Bools]]:
    """What overflows, and where that leaves NaN or infinity."""
    for dtype, largest in LARGEST.items():
        yield (
            f"overflow of {dtype} in the result",
            "the type of this stage's output: its values do not fit",
            np.isfinite(value) & (np.abs(value) > largest),
        )
        if isinstance(operation, Softmax):
            seen = operation.mask.allowed(*value.shape[1:])
            powers = np.where(seen, np.minimum(inputs[0], 700.0), -np.inf)
            each = np.exp(powers) > largest
            name = f"softmax without the maximum's subtraction (exp overflows {dtype})"
            advice = "subtract the row's maximum before exp"
            yield name, advice, each
            yield name, advice, np.broadcast_to(each.any(axis=2, keepdims=True), value.shape)
            yield name, advice, each.any(axis=2, keepdims=True) & seen
        if isinstance(operation, Norm):
            total = np.square(inputs[0]).sum(axis=1, keepdims=True) > largest
            yield (
                f"overflow of {dtype} in the norm's sum of squares",
                "sum the squares in float32, or scale the row first",
                np.broadcast_to(total, value.shape),
            )


def _symptom(found: Bools) -> str:
    rows = found.any(axis=-1)
    return f"{int(found.sum())} values in {int(rows.sum())} of {rows.size} rows are not finite"
