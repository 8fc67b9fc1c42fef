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
from aprcore.causes.projections import Part, parts_of, picker
from aprcore.causes.scene import Float64, Scene
from aprcore.network.operations import EMBEDDING, HEAD, Embed, Head, Linear
from aprcore.network.weights import Weight, read_all

# Rows of a matrix that are looked at.
SAMPLED_ROWS = 16
# Wrong rows whose blocks are held against their neighbours', the most wrong first.
MOST_ROWS = 4
# The cosine of logits by another matrix with those by the embedding is less.
MOST_ALIKE = 0.5

Finding = tuple[str, str]
"""What is odd, and the weights it is odd in."""


def find_evidence(scene: Scene, experiment: Experiment) -> Iterator[Finding]:
    """What is odd about the weights of a stage whose model judgment failed."""
    if not scene.in_file:
        return
    if isinstance(scene.operation, Head) and _is_another_head(scene):
        told = "the original's was dropped (tie_word_embeddings)"
        yield f"lm_head is the embedding in this file, which has none of its own: {told}", ""
    if isinstance(scene.operation, Linear | Head):
        for part in parts_of(scene):
            for found in (*_copies(part), *_zeros(part), *_blocks(part)):
                yield f"{part.short_name} {found}", part.short_name
    elif isinstance(scene.operation, Embed):
        yield from _token_rows(scene, experiment)
    else:
        yield from _vectors(scene)


def _is_another_head(scene: Scene) -> bool:
    """Whether the logits have nothing in common with those of the embedding."""
    plain, observed = scene.plain.value.reshape(-1), scene.observed.reshape(-1)
    norms = float(np.linalg.norm(plain) * np.linalg.norm(observed))
    alike = abs(float(plain @ observed)) / norms if norms > 0 else 1.0
    return scene.site.find(HEAD) is None and alike < MOST_ALIKE


def _row_errors(part: Part) -> tuple[Float64, Float64]:
    """The error energy behind each row of a weight, and what rounding predicts."""
    plain = part.scene.plain
    error = np.square(part.scene.observed.reshape(plain.value.shape) - plain.value)
    return error.sum(axis=0), plain.variance.sum(axis=0)


def _sample(part: Part) -> NDArray[np.int64]:
    """Rows whose outputs are wrong, spread over them."""
    error, predicted = _row_errors(part)
    wrong = np.flatnonzero(error > 10 * predicted)
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
        yield f"weight's input {_places('column', dead)} zero in this file"


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
    for row, block in np.argwhere(~found.any(axis=2))[:1]:
        yield f"has a block of zeros in this file (row {rows[row]}, block {block})"
    yield from _foreign_blocks(part)


def _foreign_blocks(part: Part) -> Iterator[str]:
    """A block of a wrong row that is stored twice, next to where it belongs."""
    error, predicted = _row_errors(part)
    with np.errstate(divide="ignore", invalid="ignore"):  # a dead row has no noise at all
        worst = np.argsort(-error / predicted)[:MOST_ROWS]
    for row in worst.tolist():
        rows = np.arange(max(0, row - 1), min(part.weight.shape[0], row + 2))
        blocks = raw_blocks(part.weight, rows)
        if blocks is None:
            return
        seen: dict[bytes, tuple[int, int]] = {}
        for number, block in np.ndindex(*blocks.shape[:2]):
            stored = blocks[number, block].tobytes()
            place = int(rows[number]), block
            if (
                stored in seen
                and blocks[number, block].any()
                and row in (place[0], seen[stored][0])
            ):
                first = seen[stored]
                yield (
                    f"has one block twice, in the neighbouring places (row {first[0]}, block"
                    f" {first[1]}) and (row {place[0]}, block {place[1]})"
                )
                return
            seen[stored] = place


def _places(name: str, places: NDArray[np.int64]) -> str:
    """Indices and their verb: column 7 is, columns 3 to 9 are."""
    if places.size == 1:
        return f"{name} {places[0]} is"
    return f"{name}s {places[0]} to {places[-1]} are"


def _token_rows(scene: Scene, experiment: Experiment) -> Iterator[Finding]:
    table = scene.site.weight(EMBEDDING)
    dead = [int(t) for t in np.unique(scene.site.tokens)
            if not table.read(int(t), int(t) + 1).any()]  # fmt: skip
    if dead and experiment.plain_fails:
        yield f"embedding rows of tokens {dead} are zero in this file", ""


def _vectors(scene: Scene) -> Iterator[Finding]:
    """Norm weights and biases: zero in places, or the very same as another layer's."""
    for name, *_ in scene.operation.weights:
        weight = scene.site.find(name)
        if weight is None or len(weight.shape) != 1:
            continue
        own = read_all(weight)
        short = name.removesuffix(".weight").rpartition(".")[2] if "norm" in name else name
        kind = "weight" if name.endswith("weight") else "bias"
        dead = np.flatnonzero(own == 0)
        if dead.size:
            yield f"{kind} of {short}: {_places('dim', dead)} zero in this file", ""
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
