"""Why a stage fails, by experiment: a catalogue of alternative operations over the same inputs.

Each row of the catalogue is a thing that goes wrong in engines or in model files, as a small
operation. It is run in float64 on the inputs of the stage that failed; the one whose output is the
observed one, to within rounding, is the cause. Adding one is adding an `Entry` to a family's
`ENTRIES`, or a `Variant` for products by a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aprcore.causes import (
    activations,
    attention,
    biases,
    embedding_head,
    norms,
    residual,
    rope,
)
from aprcore.causes.experiment import Experiment, Outcome
from aprcore.causes.projections import MODULES, parts_of, try_variant
from aprcore.causes.records import CauseTried, Explanation
from aprcore.causes.scene import Entry, Scene
from aprcore.causes.symptom import describe_symptom
from aprcore.causes.weight_variants import VARIANTS
from aprcore.layouts import Layout
from aprcore.replay import Expectation, Floats, RecordedSide
from aprcore.stages import StageKey

__all__ = ["CauseTried", "Explanation", "explain"]

CATALOGUE: tuple[Entry, ...] = (
    *rope.ENTRIES,
    *attention.ENTRIES,
    *norms.ENTRIES,
    *activations.ENTRIES,
    *residual.ENTRIES,
    *embedding_head.ENTRIES,
    *biases.ENTRIES,
)

# Causes that do not explain are listed up to this many, the nearest first.
LISTED = 8


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
    tried = [*_try_entries(experiment), *_try_projections(scene)]
    causes = tuple(_settle(experiment, tried))
    named = any(cause.explains for cause in causes)
    symptom = None if named else describe_symptom(experiment)
    return Explanation(causes, symptom, len(tried))


def _scene(
    side: RecordedSide, key: StageKey, observed: Floats, expected: Expectation, layout: Layout,
    *, in_file: bool,
) -> Scene | None:  # fmt: skip
    inputs = side.inputs(key)
    if inputs is None or not np.isfinite(observed).all():
        return None
    return Scene(
        key=key,
        site=side.site(key),
        inputs=tuple(x.estimate.value for x in inputs),
        observed=np.asarray(observed, dtype=np.float64),
        plain=expected.estimate,
        layout=layout,
        in_file=in_file,
        profile=side.profile,
        recorded=side.peek,
        features=side.features,
    )


@dataclass(frozen=True, slots=True)
class _Tried:
    """An alternative and how it fared; `part` is the weight it belongs to."""

    name: str
    advice: str
    outcome: Outcome
    is_fallback: bool
    part: str = ""


def _try_entries(experiment: Experiment) -> Iterator[_Tried]:
    scene = experiment.scene
    for entry in CATALOGUE:
        title = entry.title(scene)
        if title is None or (entry.stages and scene.key.stage not in entry.stages):
            continue
        for name, value in entry.outputs(scene):
            outcome = experiment.hold(value)
            if outcome is not None:
                advice = entry.advice_for(scene)
                yield _Tried(title.format(name), advice, outcome, entry.is_fallback)


def _try_projections(scene: Scene) -> Iterator[_Tried]:
    if scene.key.stage not in MODULES:
        return
    for part in parts_of(scene):
        for variants in VARIANTS:
            for variant in variants(part):
                outcome = try_variant(part, variant)
                if outcome is not None:
                    name, advice = (
                        text.format(part.short_name) for text in (variant.name, variant.advice)
                    )
                    yield _Tried(name, advice, outcome, variant.is_fallback, part.short_name)


def _settle(experiment: Experiment, tried: list[_Tried]) -> Iterator[CauseTried]:
    """The causes, best first: those that explain, as few as the evidence allows, then the rest."""
    explaining = [t for t in tried if t.outcome.explains]
    whole = [t for t in explaining if not t.part]
    named: list[_Tried] = []
    parts = [""] if whole else sorted({t.part for t in explaining})
    for part in parts:
        named += _best(experiment, [t for t in explaining if t.part == part])
    names: set[str] = set()
    for t in (*named, *_others(tried, named)):
        region = t.outcome.region
        name = t.name if region is None else f"{t.name}, in {region.name} only"
        if name not in names:
            names.add(name)
            figures = t.outcome.relative_l2, t.outcome.cosine
            yield CauseTried(name, t.advice, *figures, any(t is n for n in named))


def _best(experiment: Experiment, explaining: list[_Tried]) -> list[_Tried]:
    """Those that explain as well as any other."""
    sure = [t for t in explaining if not t.is_fallback] or explaining
    ranked = sorted(sure, key=lambda t: t.outcome.misfit)
    best = ranked[0].outcome.misfit if ranked else 0.0
    return [t for t in ranked if not experiment.tells_apart(best, t.outcome.misfit)]


def _others(tried: list[_Tried], named: list[_Tried]) -> list[_Tried]:
    rest = [t for t in tried if not any(t is n for n in named)]
    return sorted(rest, key=lambda t: t.outcome.relative_l2)[:LISTED]
