"""Why a stage fails, by experiment: a catalogue of alternative operations over the same inputs.

Each row of the catalogue is a thing that goes wrong in engines or in model files, as a small
operation. It is run in float64 on the inputs of the stage that failed; the one whose output is the
observed one, to within rounding, is the cause. Adding one is adding an `Entry` to a family's
`ENTRIES`, or a `Variant` for products by a weight.
"""

from __future__ import annotations

import numpy as np

from aprcore.causes import (
    activations,
    attention,
    biases,
    buffers,
    caches,
    caps,
    dequantisation,
    embedding_head,
    fused_attention,
    masks,
    norms,
    precision,
    residual,
    rope,
    rope_schedules,
    rounded_activations,
    weight_variants,
)
from aprcore.causes.experiment import Experiment
from aprcore.causes.overflow import explain_nonfinite
from aprcore.causes.projections import Variants
from aprcore.causes.records import CauseTried, Explanation
from aprcore.causes.scene import Entry, Scene, factors
from aprcore.causes.search import (
    settle,
    try_arithmetics,
    try_entries,
    try_evidence,
    try_projections,
    try_span,
)
from aprcore.causes.symptom import describe_symptom
from aprcore.judging.layouts import Layout
from aprcore.judging.replay import Expectation, Floats, RecordedSide
from aprcore.network.stages import StageKey

__all__ = ["CauseTried", "Explanation", "explain", "explain_nonfinite"]

CATALOGUE: tuple[Entry, ...] = (
    *rope.ENTRIES,
    *rope_schedules.ENTRIES,
    *attention.ENTRIES,
    *caches.ENTRIES,
    *fused_attention.ENTRIES,
    *masks.ENTRIES,
    *caps.ENTRIES,
    *norms.ENTRIES,
    *activations.ENTRIES,
    *residual.ENTRIES,
    *embedding_head.ENTRIES,
    *biases.ENTRIES,
    *dequantisation.ENTRIES,
    *buffers.ENTRIES,
)
PRODUCTS: tuple[Variants, ...] = (
    *weight_variants.VARIANTS,
    dequantisation.decoders,
    precision.rounded_inputs,
    rounded_activations.variants,
)


def explain(
    side: RecordedSide, key: StageKey, observed: Floats, expected: Expectation, layout: Layout,
    *, in_file: bool,
) -> Explanation:  # fmt: skip
    """Try the catalogue on a stage that failed.

    Args:
        side: The side whose output is unexplained: its inputs, and what else it recorded.
        key: The stage.
        observed: Its output in canonical layout, finite.
        expected: What the plain operation gives.
        layout: Names the axes of the output.
        in_file: Whether the model's judgment failed: the model file is then under test.
    """
    scene = _scene(side, key, observed, expected, layout, in_file=in_file)
    if scene is None:
        return Explanation((), None, 0)
    experiment = Experiment(scene)
    tried = [
        *try_entries(experiment, CATALOGUE),
        *try_projections(scene, PRODUCTS),
        *try_arithmetics(experiment),
        *try_evidence(scene, experiment),
        *try_span(side, experiment, expected, CATALOGUE),
    ]
    causes = tuple(settle(experiment, tried))
    named = any(cause.explains for cause in causes)
    symptom = None if named else describe_symptom(experiment)
    if symptom is not None and expected.recomputed:
        missing = ", ".join(source.stage for source in expected.recomputed)
        symptom += f"; the judgment spans {missing} too: dump them to narrow it"
    return Explanation(causes, symptom, len(tried))


def _scene(
    side: RecordedSide, key: StageKey, observed: Floats, expected: Expectation, layout: Layout,
    *, in_file: bool,
) -> Scene | None:  # fmt: skip
    inputs = side.inputs(key)
    if inputs is None or not np.isfinite(observed).all():
        return None
    site, profile = side.site(key), side.profile(key)
    values = [x.estimate.value for x in inputs]
    return Scene(
        key=key,
        site=site,
        inputs=tuple(factors(side.graph.operation(key), profile.arithmetic, site.config, values)),
        observed=np.asarray(observed, dtype=np.float64),
        plain=expected.estimate.whole(),
        layout=layout,
        in_file=in_file,
        profile=profile,
        arithmetic=lambda other: side.profile(other).arithmetic,
        recorded=side.peek,
        unmasked=side.unmasked,
        graph=side.graph,
    )
