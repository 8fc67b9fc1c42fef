"""What goes wrong with precision: sums carried too coarsely, values rounded on the way.

The order of an engine's sums is not known, so its rounding cannot be reproduced value by value.
What can be said is that the error is of the size and spread that a coarser arithmetic predicts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aprcore.causes.experiment import DECISIVE_NATS, Experiment, Outcome
from aprcore.causes.projections import Part, Pick, Variant, picker
from aprcore.causes.scene import Float64, Scene
from aprcore.causes.solving import best_factor
from aprcore.engines.arithmetic import Arithmetic
from aprcore.engines.estimate import Estimate, Profile
from aprcore.engines.prediction import PredictionBackend
from aprcore.ground.precision import BFLOAT16, FLOAT16, FLOAT32, FloatType
from aprcore.judging.noise import allowed_ratio, assess
from aprcore.judging.replay import run_stage
from aprcore.network.weights import Weight

ADVICE = "the types that this kernel stores and accumulates in: sums belong in float32"
ARITHMETICS = (
    ("result rounded to float16", Arithmetic("", FLOAT16, FLOAT32)),
    ("accumulation in float16", Arithmetic("", FLOAT32, FLOAT16)),
    ("result rounded to bfloat16", Arithmetic("", BFLOAT16, FLOAT32)),
    ("accumulation in bfloat16", Arithmetic("", FLOAT32, BFLOAT16)),
)
# A coarser arithmetic predicts an upper estimate of its error: blocked sums do better, but an
# error far below has another origin. In energy.
SMALLEST_SHARE = 1e-3
# A constant factor is no rounding: as much of the error's energy may be along the output.
LARGEST_ALONG = 0.5
# Fewer values than these show no spread.
FEWEST_VALUES = 8
_TINY = float(np.finfo(np.float64).tiny)


def coarser_arithmetics(experiment: Experiment) -> Iterator[tuple[str, Outcome]]:
    """The first coarser arithmetic whose roundoff the error is."""
    scene, region = experiment.scene, experiment.region
    plain, observed = scene.plain.value, scene.observed.reshape(scene.plain.value.shape)
    mask = np.ones(plain.shape, bool) if region is None else region.mask.reshape(plain.shape)
    if scene.in_file or mask.sum() < FEWEST_VALUES or _is_scaled(observed[mask], plain[mask]):
        return
    if any(_is_scaled(*pair) for pair in _wrong_slices(scene)):
        return
    own = scene.profile.arithmetic
    for name, arithmetic in ARITHMETICS:
        stored, accumulated = arithmetic.stored, arithmetic.accumulated
        if stored.digits >= own.stored.digits and accumulated.digits >= own.accumulated.digits:
            continue
        if stored is not FLOAT32 and (stored.round(observed[mask]) != observed[mask]).any():
            continue
        coarse = _estimate(experiment, arithmetic)
        if coarse is None:
            continue
        made = mask & (coarse.variance > 0)  # what a mask hides is no sum
        if stored is FLOAT32 and not _follows(observed[made] - plain[made], coarse.variance[made],
                                              plain[made]):  # fmt: skip
            continue
        variance = np.where(mask, coarse.variance, scene.plain.variance)
        estimate = Estimate(plain, variance, scene.plain.token_dof)
        error = np.square(observed - plain)[mask].sum()
        if assess(observed, estimate, scene.layout).explained and (
            error > SMALLEST_SHARE * coarse.variance[mask].sum()
        ):
            figures = experiment.figures(plain)
            yield name, Outcome(*figures, True, experiment.misfit(plain), region)
            return


def _follows(error: Float64, variance: Float64, value: Float64) -> bool:
    """Whether errors are spread as roundings of sums are, and not as something else of that size.

    Held against errors that are a share of each value, and against errors of one size: Gaussian
    likelihoods, each at its best scale.
    """
    energy = np.square(error)

    def likelihood(shape: Float64) -> float:
        shape = np.maximum(shape, 1e-6 * float(shape.mean()) + _TINY)
        scale = float((energy / shape).mean())
        return -0.5 * (energy.size * float(np.log(scale + _TINY)) + float(np.log(shape).sum()))

    others = max(likelihood(np.square(value)), likelihood(np.ones_like(value)))
    return likelihood(variance) - others > DECISIVE_NATS


def _wrong_slices(scene: Scene) -> Iterator[tuple[Float64, Float64]]:
    """Output and expectation of each token and head that is wrong as a whole."""
    shape, axes = scene.layout.factors, scene.layout.axes
    observed, plain = scene.observed.reshape(shape), scene.plain.value.reshape(shape)
    variance = scene.plain.variance.reshape(shape)
    for axis in (a for a, name in enumerate(axes) if name in ("token", "head")):
        for index in range(shape[axis]):
            o, p, v = (x.take(index, axis=axis).reshape(-1) for x in (observed, plain, variance))
            wrong = np.square(o - p).sum() > allowed_ratio(float(o.size)) * v.sum()
            if wrong and o.size >= FEWEST_VALUES:
                yield o, p


def _is_scaled(observed: Float64, plain: Float64) -> bool:
    """Whether much of an error is a constant factor, which rounding is not."""
    factor = best_factor(observed, plain)
    if factor is None:
        return True
    along = (factor - 1) ** 2 * float(np.square(plain).sum())
    return along > LARGEST_ALONG * float(np.square(observed - plain).sum())


def _estimate(experiment: Experiment, arithmetic: Arithmetic) -> Estimate | None:
    scene = experiment.scene
    backend = PredictionBackend([(None, Profile(arithmetic, scene.profile.weights_rounded))])
    inputs = [Estimate(x, np.broadcast_to(0.0, x.shape)) for x in scene.inputs]
    return run_stage(backend, scene.site, scene.graph, scene.key, inputs)


def rounded_inputs(part: Part) -> Iterator[Variant]:
    """The input of a product, or the weight, rounded before it: these can be reproduced."""
    advice = "what the kernel rounds before the product"
    if part.scene.in_file:
        return
    for block, name in ((32, "Q8_0, 32 values a block"), (256, "Q8_K, 256 values a block"),
                        (64, "64 values a block"), (128, "128 values a block"),
                        (part.x.shape[1], "a scale for each token")):  # fmt: skip
        for half_scale in (False, True):
            x = _in_8_bits(part.x, block, half_scale=half_scale)
            yield Variant(f"{{}} activations rounded to 8 bits ({name})", advice, x=x)
    for half in (FLOAT16, BFLOAT16):
        name, x = half.name, half.round(part.x)
        yield Variant(f"{{}} activations rounded to {name}", advice, x=x)
        if part.weight.dtype not in ("F16", "BF16"):
            rows = _rounded_rows(part.weight, half)
            yield Variant(f"{{}} weight rounded to {name}", advice, rows)
            yield Variant(f"{{}} activations and weight rounded to {name}", advice, rows, x)


def _rounded_rows(weight: Weight, half: FloatType) -> Pick:
    plain = picker(weight)
    return lambda rows: half.round(plain(rows).astype(np.float64)).astype(np.float32)


def _in_8_bits(x: Float64, block: int, *, half_scale: bool) -> Float64:
    """Rounded to -127..127 steps of each block's largest magnitude."""
    rows, columns = x.shape
    padded = np.zeros((rows, -(-columns // block) * block))
    padded[:, :columns] = x
    blocks = padded.reshape(rows, -1, block)
    step = np.abs(blocks).max(axis=2, keepdims=True) / 127
    codes = np.round(blocks / np.where(step > 0, step, 1.0))
    if half_scale:
        step = FLOAT16.round(step)
    return np.asarray((codes * step).reshape(rows, -1)[:, :columns])
