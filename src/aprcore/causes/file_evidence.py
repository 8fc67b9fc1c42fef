"""What a model file shows of itself: weights that are zero, or copies of others.

What a conversion lost cannot be computed again, so these causes rest on the file and not on an
alternative output: the stage fails, and one of its weights cannot be what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from aprcore.causes.dequantisation import raw_blocks
from aprcore.causes.experiment import Experiment
from aprcore.causes.projections import MODULES, Part, parts_of, picker
from aprcore.causes.scene import Scene
from aprcore.stages import BY_NAME
from aprcore.weights import Weight, read_all

# Rows of a matrix that are looked at.
SAMPLED_ROWS = 16
# Wrong rows whose blocks are held against their neighbours'.
MOST_ROWS = 64

Finding = tuple[str, str]
"""What is odd, and the weights it is odd in."""


def find_evidence(scene: Scene, experiment: Experiment) -> Iterator[Finding]:
    """What is odd about the weights of a stage whose model judgment failed."""
    if not scene.in_file:
        return
    if scene.key.stage in MODULES:
        for part in parts_of(scene):
            for found in (*_copies(part), *_zeros(part), *_blocks(part)):
                yield f"{part.short_name} {found}", part.short_name
    elif scene.key.stage == "embedding":
        yield from _token_rows(scene, experiment)
    else:
        yield from _vectors(scene)


def _sample(part: Part) -> NDArray[np.int64]:
    """Rows whose outputs are wrong, spread over them."""
    plain = part.scene.plain
    error = np.square(part.scene.observed.reshape(plain.value.shape) - plain.value).sum(axis=0)
    wrong = np.flatnonzero(error > 10 * plain.variance.sum(axis=0))
    if not wrong.size:
        wrong = np.argsort(-error)[:SAMPLED_ROWS]
    return np.unique(wrong[np.linspace(0, wrong.size - 1, SAMPLED_ROWS).astype(np.int64)])


def _copies(part: Part) -> Iterator[str]:
    """Another weight of the file with the very same rows."""
    rows = _sample(part)
    own = picker(part.weight)(rows)
    if not own.any():
        return
    for name, weight in part.scene.site.weights.items():
        if weight.shape == part.weight.shape and name != part.weight.name and np.array_equal(
            picker(weight)(rows), own
        ):  # fmt: skip
            yield f"is a copy of {name} in this file (weights of another layer or tied)"


def _zeros(part: Part) -> Iterator[str]:
    """Columns of the weight that are zero in every row looked at."""
    rows = _sample(part)
    own = picker(part.weight)(rows)
    dead = np.flatnonzero(~own.any(axis=0))
    if rows.size >= SAMPLED_ROWS // 2 and 0 < dead.size < own.shape[1] and part.x[:, dead].any():
        yield f"weight's input columns {dead[0]} to {dead[-1]} are zero in this file"


def _blocks(part: Part) -> Iterator[str]:
    """Stored blocks without a minimum or with half of their scales' bits, or copied."""
    rows = _sample(part)
    found = raw_blocks(part.weight, rows)
    if found is None:
        return
    blocks = found.reshape(-1, found.shape[-1])
    if part.weight.dtype in ("Q4_K", "Q5_K", "Q4_1", "Q5_1") and not blocks[:, 2:4].any():
        yield "has blocks whose minimum is zero throughout: it was ignored in the conversion"
    if part.weight.dtype in ("Q4_K", "Q5_K"):
        for start, what in ((4, "scales"), (8, "minima")):
            if not (blocks[:, start : start + 4] & 0xC0).any():
                yield f"has blocks whose last four {what} are below 16: their scale bits were lost"
    yield from _foreign_blocks(part)


def _foreign_blocks(part: Part) -> Iterator[str]:
    plain = part.scene.plain
    error = np.square(part.scene.observed.reshape(plain.value.shape) - plain.value).sum(axis=0)
    worst = np.argsort(-error / plain.variance.sum(axis=0))[:MOST_ROWS]
    count = part.weight.shape[0]
    for row in worst[:4].tolist():
        for step in (-1, 1):
            if not 0 <= row + step < count:
                continue
            pair = raw_blocks(part.weight, np.array([row, row + step]))
            if pair is None:
                return
            same = np.flatnonzero((pair[0] == pair[1]).all(axis=1) & pair[0].any(axis=1))
            if same.size:
                yield f"block {same[0]} of row {row} is that of the neighbouring row {row + step}"
                return


def _token_rows(scene: Scene, experiment: Experiment) -> Iterator[Finding]:
    table = scene.site.weight("model.embed_tokens.weight")
    dead = [int(t) for t in np.unique(scene.site.tokens)
            if not table.read(int(t), int(t) + 1).any()]  # fmt: skip
    if dead and experiment.plain_fails:
        yield f"embedding rows of tokens {dead} are zero in this file", ""


def _vectors(scene: Scene) -> Iterator[Finding]:
    """Norm weights and biases: zero in places, or the very same as another layer's."""
    stage = BY_NAME[scene.key.stage]
    for name in (*stage.weights, *stage.optional):
        weight = scene.site.find(name)
        if weight is None or len(weight.shape) != 1:
            continue
        own = read_all(weight)
        short = name.removesuffix(".weight").rpartition(".")[2] if "norm" in name else name
        kind = "weight" if name.endswith("weight") else "bias"
        dead = np.flatnonzero(own == 0)
        if dead.size:
            yield f"{kind} of {short} is zero in dims {dead[0]} to {dead[-1]} of this file", ""
        elif np.unique(own).size == 1:
            yield f"norm weight of {short} is {own[0]:g} throughout in this file", ""
        yield from ((f"{kind} of {short} is a copy of {other} in this file", "")
                    for other in _same_vectors(scene, weight))  # fmt: skip


def _same_vectors(scene: Scene, weight: Weight) -> Iterator[str]:
    own = read_all(weight)
    if np.unique(own).size < 2:
        return
    for name, other in scene.site.weights.items():
        same = other.shape == weight.shape and name != weight.name
        if same and np.array_equal(read_all(other), own):
            yield name
