"""What goes wrong with the cap on scores and logits, which become cap · tanh(x / cap)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from aprcore.causes.scene import ORIGINAL, REFERENCE, Entry, Float64, Scene, Trial
from aprcore.causes.solving import best_factor, minimise, round_number
from aprcore.network.operations import Head, Scores

CAPPED = (Scores, Head)
# The caps of published models come first; others are solved for.
USUAL_CAPS = (30.0, 50.0, 20.0, 15.0, 10.0, 100.0)
# Values that a cap is solved for from: the largest ones tell most.
SOLVED_VALUES = 512
# Nearer than this to its cap, rounding has taken from a value what it was before.
CAP_FREE = 0.9
# A rounder cap is taken for the solved one up to this many times its misfit.
FITS_AS_WELL = 2.0


def uncapped(scene: Scene) -> Float64:
    """The stage without its cap."""
    if scene.operation.cap is None:
        return scene.plain.value
    return scene.run(operation=scene.operation.altered(cap=None))


def capped(scene: Scene, x: Float64) -> Float64:
    """The stage's own cap on something else."""
    cap = scene.operation.cap
    return x if cap is None else REFERENCE.soft_cap(x, cap)


def factor_before_cap(scene: Scene, plain: Float64) -> float | None:
    """The factor on `plain`, without its cap, that gives what was observed."""
    cap, observed, x = scene.operation.cap, scene.observed.reshape(-1), plain.reshape(-1)
    if cap is None:
        return best_factor(observed, x)
    free = np.abs(observed) < CAP_FREE * cap
    return best_factor(cap * np.arctanh(observed[free] / cap), x[free])


def _other_caps(scene: Scene) -> Iterator[Trial]:
    own, plain = scene.operation.cap, uncapped(scene)
    place = ""
    if own is not None:
        place = f" in place of {own:g}"
        yield f"no soft cap{place}", plain
        yield f"soft cap of {own:g} applied twice", REFERENCE.soft_cap(scene.plain.value, own)
        yield f"hard cap at ±{own:g}", np.clip(plain, -own, own)
        yield "soft cap that is not multiplied back", scene.plain.value / own
        yield "soft cap of what is not divided before", own * np.tanh(plain)
        if isinstance(scene.operation, Scores):
            scale = scene.operation.scale
            yield "soft cap before the scale", scale * REFERENCE.soft_cap(plain / scale, own)
    for cap in USUAL_CAPS:
        if cap != own:
            yield f"soft cap of {cap:g}{place}", REFERENCE.soft_cap(plain, cap)


def _solved_cap(scene: Scene) -> Iterator[Trial]:
    plain, observed = uncapped(scene), scene.observed.reshape(-1)
    largest = np.argsort(-np.abs(plain.reshape(-1)))[:SOLVED_VALUES]
    x, y = plain.reshape(-1)[largest], observed[largest]
    top = float(np.abs(y).max(initial=0.0))
    if not top or float(np.abs(x).max()) <= top:  # a cap makes values smaller
        return

    def misfit(log_cap: float) -> float:
        return float(np.square(REFERENCE.soft_cap(x, float(np.exp(log_cap))) - y).sum())

    grid = np.linspace(np.log(top), np.log(1e3 * top), 60)
    cap = float(np.exp(minimise(misfit, grid)))
    least = misfit(math.log(cap))
    # An oracle of a half type shows a cap to three digits: a round one that fits is meant.
    rounded = (round_number(cap, tolerance) for tolerance in (1e-2, 1e-3, 1e-4))
    cap = next((c for c in rounded if misfit(math.log(c)) <= FITS_AS_WELL * least), cap)
    yield f"{cap:g}", REFERENCE.soft_cap(plain, cap)


_ADVICE = "the soft cap: which of scores and logits have one, and its value"
_FILE = "attn_logit_softcapping and final_logit_softcapping of the original config"

ENTRIES = (
    Entry("{}", CAPPED, _other_caps, _ADVICE, ORIGINAL, _FILE),
    Entry("soft cap of {}", CAPPED, _solved_cap, _ADVICE, ORIGINAL, _FILE, is_fallback=True),
)  # fmt: skip
