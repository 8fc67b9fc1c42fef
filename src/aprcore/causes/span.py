"""Causes inside a span: stages that were not dumped, and are judged as one with a later stage.

One stage of the span at a time is replaced by an alternative, and the rest is run as it should be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from aprcore.causes.experiment import Experiment
from aprcore.causes.scene import Entry, Float64, Scene, factors
from aprcore.judging.layouts import layout_of
from aprcore.judging.replay import Expectation, RecordedSide
from aprcore.network.stages import StageKey

# Spans are run whole for every alternative; beyond so many tokens that takes too long.
LONGEST = 256

SpanTrial = tuple[str, str, Float64, Entry]
"""A cause, what to look at, the span's output, and the row of the catalogue."""


def span_outputs(
    side: RecordedSide, experiment: Experiment, expected: Expectation, catalogue: Iterable[Entry]
) -> Iterator[SpanTrial]:
    """The output of a span with one of its inner stages replaced by each alternative."""
    scene = experiment.scene
    if scene.num_tokens > LONGEST:
        return
    entries = [entry for entry in catalogue if entry.kinds and not entry.is_fallback]
    for key in expected.recomputed:
        inner = _inner_scene(side, scene, key)
        if inner is None:
            continue
        for entry in entries:
            title = entry.title(inner)
            if title is None:
                continue
            for name, value in entry.outputs(inner):
                output = _run_on(side, scene.key, key, value)
                if output is not None:
                    cause = f"{key.stage}: {title.format(name)}"
                    yield cause, entry.advice_for(inner), output, entry


def _inner_scene(side: RecordedSide, scene: Scene, key: StageKey) -> Scene | None:
    """A stage inside a span; its output is not known, so it is taken to be right."""
    inputs, expected = side.inputs(key), side.expect(key)
    if inputs is None or expected is None:
        return None
    plain, profile = expected.estimate.whole(), side.profile(key)
    values = [x.estimate.value for x in inputs]
    return replace(
        scene,
        key=key,
        site=side.site(key),
        inputs=tuple(factors(side.graph.operation(key), profile.arithmetic, scene.config, values)),
        profile=profile,
        observed=plain.value,
        plain=plain,
        layout=layout_of(key, side.sizes(), plain.value.size),
        recorded=_recorded_or_replayed(side),
    )


def _recorded_or_replayed(side: RecordedSide) -> Callable[[StageKey], Float64 | None]:
    def fetch(key: StageKey) -> Float64 | None:
        found = side.peek(key)
        if found is not None:
            return found.astype("float64")
        expected = side.expect(key)
        return None if expected is None else expected.estimate.value

    return fetch


def _run_on(side: RecordedSide, last: StageKey, key: StageKey, value: Float64) -> Float64 | None:
    """What the last stage of a span gives when an inner one gives this."""
    expected = side.with_tensor(key, value).expect(last)
    return None if expected is None else expected.estimate.value
