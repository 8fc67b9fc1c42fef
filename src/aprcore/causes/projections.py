"""What goes wrong with products by a weight: q, k and v, the other projections and the head.

Weights are large and the alternatives many, so each is tried on a few output columns first, those
that are most wrong; what already fails there is dropped. q, k and v are judged apart: one of them
may be wrong alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from aprcore.causes.caps import capped
from aprcore.causes.experiment import Experiment, Outcome, part_scene
from aprcore.causes.scene import Float64, Scene
from aprcore.engines.reference import rounded
from aprcore.judging.compare import compare
from aprcore.network.operations import EMBEDDING, HEAD, Head, K, Linear, Module, Q, V
from aprcore.network.weights import Weight, read_all, row_chunks

Indices = NDArray[np.int64]
Pick = Callable[[Indices], NDArray[np.float32]]
"""Rows of a weight by their numbers: [n] -> [n, C]."""

_HEAD = Module(HEAD.removesuffix(".weight"), "V", "E")
# Output columns and tokens tried first; half of the columns are the most wrong ones.
SAMPLED_COLUMNS = 16
SAMPLED_TOKENS = 48
# How far the sample may lie outside the prediction: a single value's own limit, with room.
SAMPLE_LIMIT = 100.0


@dataclass(frozen=True)
class Part:
    """One weight's share of a linear stage.

    Attributes:
        scene: The stage, cut to this weight's columns.
        module: What it is called.
        weight: [out, C].
        bias: Added to the product, [out]; None where there is none.
        x: The input as the engine reads it, [T, C].
        experiment: For holding outputs against what was observed.
    """

    scene: Scene
    module: Module
    weight: Weight
    bias: Float64 | None
    x: Float64
    experiment: Experiment

    @property
    def short_name(self) -> str:
        """The module's last name: q_proj."""
        return self.module.path.rpartition(".")[2]

    @cached_property
    def sample(self) -> Sample:
        """What to try first."""
        return _draw_sample(self)

    @property
    def head_dim(self) -> int | None:
        """D where the rows are heads."""
        return self.scene.config.head_dim if self.module in (Q, K, V) else None


@dataclass(frozen=True, slots=True)
class Variant:
    """Another product.

    Attributes:
        name: What it does otherwise, with `{}` for the weight's short name.
        advice: What to look at.
        pick: The rows of the weight; None: as they are.
        x: The input; None: as it is.
        bias: What is added; None: as it is.
        is_fallback: As in `Entry`.
    """

    name: str
    advice: str
    pick: Pick | None = None
    x: Float64 | None = None
    bias: Float64 | None = None
    is_fallback: bool = False


Variants = Callable[[Part], Iterator[Variant]]


def parts_of(scene: Scene) -> Iterator[Part]:
    """The weights of a linear stage whose share of the output is wrong; none of another stage."""
    own = scene.operation
    if not isinstance(own, Linear | Head):
        return
    modules = own.modules if isinstance(own, Linear) else (_HEAD,)
    x = scene.inputs[0][-1:] if isinstance(own, Head) else scene.inputs[0]
    first = 0
    for module in modules:
        weight = scene.site.find(module.weight) or scene.site.weight(EMBEDDING)
        width = weight.shape[0]
        cut = scene if len(modules) == 1 else part_scene(scene, first, first + width)
        first += width
        stored = scene.site.find(module.bias) if getattr(own, "takes_bias", False) else None
        bias = None if stored is None else read_all(stored).astype(np.float64)
        experiment = Experiment(cut)
        if experiment.plain_fails:
            read = rounded(x, scene.profile.arithmetic.rounding_of(weight))
            yield Part(cut, module, weight, bias, read, experiment)


def try_variant(part: Part, variant: Variant) -> Outcome | None:
    """Hold a product against the output, on a sample first; None if it is the plain one."""
    sample = part.sample
    value = _product(part, variant, sample.columns, sample.tokens)
    if value is None:
        return None
    where = np.ix_(sample.tokens, sample.columns)
    plain, shape = part.scene.plain.value, part.scene.plain.value.shape
    observed, expected = part.scene.observed.reshape(shape)[where], plain[where]
    variance = part.experiment.variance(sample.columns)[sample.tokens]
    error = np.square(observed - value)[sample.mask].sum()
    energies = [float(np.square(y).mean()) for y in (value, expected)]
    gain = max(1.0, energies[0] / energies[1]) if energies[1] > 0 else 1.0
    if error > SAMPLE_LIMIT * gain * variance[sample.mask].sum() or not np.isfinite(value).all():
        if (np.square(value - expected) <= 4 * variance).all():
            return None
        found = compare(observed.reshape(-1), value.reshape(-1))
        return Outcome(found.relative_l2, found.cosine, False, float("inf"))
    tokens = np.arange(shape[0])
    whole = [_product(part, variant, np.arange(start, stop), tokens)
             for start, stop in row_chunks(part.weight)]  # fmt: skip
    product = np.concatenate([y for y in whole if y is not None], axis=1)
    return part.experiment.hold(product, is_solved=variant.is_fallback)


@dataclass(frozen=True, slots=True)
class Sample:
    """Columns and tokens to try first, and which of their values are wrong."""

    columns: Indices
    tokens: Indices
    mask: NDArray[np.bool_]


def _draw_sample(part: Part) -> Sample:
    plain = part.scene.plain.value
    error = np.square(part.scene.observed.reshape(plain.shape) - plain)
    region = part.experiment.region
    mask = np.ones(plain.shape, bool) if region is None else region.mask.reshape(plain.shape)
    worst = np.argsort(-np.where(mask, error, 0).sum(axis=0), kind="stable")
    within = worst[: max(1, int(mask.any(axis=0).sum()))]
    spread = within[np.linspace(0, within.size - 1, SAMPLED_COLUMNS // 2).astype(np.int64)]
    columns = np.unique(np.concatenate([worst[: SAMPLED_COLUMNS // 2], spread]))
    wrong = np.flatnonzero(mask.any(axis=1))
    tokens = np.unique(wrong[np.linspace(0, wrong.size - 1, SAMPLED_TOKENS).astype(np.int64)])
    return Sample(columns, tokens, mask[np.ix_(tokens, columns)])


def _product(part: Part, variant: Variant, rows: Indices, tokens: Indices) -> Float64 | None:
    pick = variant.pick or picker(part.weight)
    weight = pick(rows).astype(np.float64)
    x = part.x if variant.x is None else variant.x
    if weight.shape[1] != x.shape[1]:
        return None
    value = x[tokens] @ weight.T
    bias = part.bias if variant.bias is None else variant.bias
    if bias is not None:
        value += bias[rows]
    return capped(part.scene, value) if isinstance(part.scene.operation, Head) else value


def order_note(scene: Scene, name: str) -> str:
    """What another layer's weight says of the order of all layers, if it says anything."""
    here, count = scene.key.layer, scene.config.num_layers
    inside, _, rest = name.removeprefix("model.layers.").partition(".")
    if here is None or not rest or not inside.isdigit() or int(inside) == here:
        return ""
    by_name = sorted(range(count), key=str)
    is_other = by_name[here] == int(inside) or by_name[int(inside)] == here
    return " (layers in the order of their names: 0, 1, 10, ...)" if is_other else ""


def picker(weight: Weight) -> Pick:
    """Rows of a weight by number."""
    return in_runs(weight.read)


def in_runs(read: Callable[[int, int], NDArray[np.float32]]) -> Pick:
    """Rows by number from a function that reads runs of them."""

    def pick(rows: Indices) -> NDArray[np.float32]:
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        runs = np.split(rows, breaks)
        return np.concatenate([read(int(run[0]), int(run[-1]) + 1) for run in runs])

    return pick
