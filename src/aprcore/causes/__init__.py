"""Why a stage fails, by experiment: a catalogue of alternative operations over the same inputs.

Each row of the catalogue is a thing that goes wrong in engines or in model files, as a small
operation. It is run in float64 on the inputs of the stage that failed; the one whose output is the
observed one, to within rounding, is the cause. Adding one is adding an `Entry` to a family's
`ENTRIES`, or a `Variant` for products by a weight.
"""

from __future__ import annotations

from collections import Counter

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
from aprcore.causes.projections import Part, Variants, parts_of
from aprcore.causes.records import CauseTried, Explanation
from aprcore.causes.scene import Entry, Scene, factors
from aprcore.causes.search import (
    Origins,
    origins_of,
    settle,
    try_arithmetics,
    try_entries,
    try_evidence,
    try_projections,
    try_span,
)
from aprcore.causes.symptom import describe_symptom
from aprcore.ground.parallel import single_threaded_blas
from aprcore.judging.layouts import Layout
from aprcore.judging.replay import Expectation, Floats, RecordedSide
from aprcore.network.stages import StageKey

__all__ = ["CauseSearch", "CauseTried", "Explanation", "explain", "explain_nonfinite"]

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
    """Try the whole catalogue on a stage that failed.

    Args:
        side: The side whose output is unexplained: its inputs, and what else it recorded.
        key: The stage.
        observed: Its output in canonical layout, finite.
        expected: What the plain operation gives.
        layout: Names the axes of the output.
        in_file: Whether the model's judgment failed: the model file is then under test.
    """
    found = CauseSearch().explain(side, key, observed, expected, layout, in_file=in_file)
    assert found is not None, "nothing limits this search"
    return found


class CauseSearch:
    """The search for the causes of a run: what explained a stage is tried first in other layers.

    Attributes:
        searched: Stages for which the whole catalogue was tried.
    """

    def __init__(self, most: int | None = None) -> None:
        """Try the whole catalogue for at most so many stages; None for every one.

        A stage of one name that has no known cause takes a quarter of them, and no more: others
        may have one.
        """
        self.searched = 0
        self._most = most
        # What explained the stages of a name, by what is under test.
        self._known: dict[tuple[str, bool], Origins] = {}
        # How many stages of a name were searched in vain.
        self._in_vain: Counter[tuple[str, bool]] = Counter()

    def explain(
        self, side: RecordedSide, key: StageKey, observed: Floats, expected: Expectation,
        layout: Layout, *, in_file: bool,
    ) -> Explanation | None:  # fmt: skip
        """As the function of this name, with what explained the same stage elsewhere first.

        Returns:
            None where that does not explain it, and as many stages have been searched as may be.
        """
        scene = _scene(side, key, observed, expected, layout, in_file=in_file)
        if scene is None:
            return Explanation((), None, 0)
        with single_threaded_blas():
            experiment, parts = Experiment(scene), list(parts_of(scene))
            kind = key.stage, in_file
            known = self._known.get(kind)
            if known is not None:
                again = self._try_again(side, experiment, expected, parts, known)
                if again is not None:
                    return again
            if self._most is not None and (
                self.searched >= self._most or self._in_vain[kind] >= max(1, self._most // 4)
            ):
                return None
            self.searched += 1
            tried = [
                *try_entries(experiment, CATALOGUE),
                *try_projections(parts, PRODUCTS),
                *try_arithmetics(experiment),
                *try_evidence(scene, experiment),
                *try_span(side, experiment, expected, CATALOGUE),
            ]
            causes = tuple(settle(experiment, tried))
            named = any(cause.explains for cause in causes)
            symptom = None if named else describe_symptom(experiment)
        origins = origins_of(tried, causes)
        if origins is not None:
            self._known[kind] = origins
        self._in_vain[kind] += not named
        if symptom is not None and expected.recomputed:
            missing = ", ".join(source.stage for source in expected.recomputed)
            symptom += f"; the judgment spans {missing} too: dump them to narrow it"
        return Explanation(causes, symptom, len(tried))

    @staticmethod
    def _try_again(
        side: RecordedSide, experiment: Experiment, expected: Expectation, parts: list[Part],
        known: Origins,
    ) -> Explanation | None:  # fmt: skip
        """What explained a stage of this name before, if it explains all that is wrong in this."""
        entries = [entry for entry in CATALOGUE if entry in known.entries]
        tried = [
            *try_entries(experiment, entries),
            *try_projections(parts, [v for v in PRODUCTS if v in known.variants]),
            *(try_arithmetics(experiment) if known.is_arithmetic else ()),
            *try_span(side, experiment, expected, entries if known.is_span else ()),
        ]
        causes = tuple(settle(experiment, tried))
        if origins_of(tried, causes) != known:
            return None
        explained = {part for t in tried if t.outcome.explains for part in [t.part]}
        if "" not in explained and {part.short_name for part in parts} - explained:
            return None
        return Explanation(causes, None, len(tried))


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
