"""The figures of the zoo, from the outcomes of its cases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .trial import Outcome

MOST_UNDETECTABLE = 0.05
LEAST_CAUSES = 0.90
MOST_NAMED = 1.3
LEAST_SEVERAL = 0.95


@dataclass(frozen=True)
class Figure:
    """A line of the table.

    Attributes:
        name: What was counted.
        measured: The figure.
        bound: What it is held to.
        met: Whether it holds; None where nothing is asked.
        today: The same by the first cumulative cosine under 0.999.
        misses: The cases that count against it.
    """

    name: str
    measured: str
    bound: str
    met: bool | None
    today: str = ""
    misses: tuple[str, ...] = ()


def figures(outcomes: Sequence[Outcome]) -> list[Figure]:
    """Every figure of the table."""
    single = [o for o in outcomes if len(o.case.faults) == 1]
    several = [o for o in outcomes if len(o.case.faults) > 1]
    sound = [o for o in outcomes if not o.case.faults]
    seen = [o for o in single if o.first_planted is not None]
    return [
        *_blame(single, seen),
        _alarms([*single, *several]),
        *_causes(seen),
        _sound(sound),
        _several(several),
    ]


def _blame(single: Sequence[Outcome], seen: Sequence[Outcome]) -> list[Figure]:
    hits = [o for o in seen if o.is_hit]
    apart = [o for o in seen if o.told_apart is not None]
    right = [o for o in apart if o.told_apart]
    unseen = [o for o in single if o.first_planted is None]
    today = sum(o.blamed_today == o.first_planted.key for o in seen if o.first_planted)
    return [
        Figure("first to blame is the planted stage", _share(len(hits), len(seen)), "100%",
               len(hits) == len(seen), _share(today, len(seen)),
               _miss(o for o in seen if not o.is_hit)),
        Figure("undetectable faults", _share(len(unseen), len(single)), "<= 5%",
               len(unseen) <= MOST_UNDETECTABLE * len(single),
               misses=tuple(f"{o.case.name}: {o.largest_sigma:.2g} sigma" for o in unseen)),
        Figure("of these a third local", _share(sum(o.case.is_local for o in single), len(single)),
               ">= 33%", 3 * sum(o.case.is_local for o in single) >= len(single)),
        Figure("kernel and model told apart", _share(len(right), len(apart)), "100%",
               len(right) == len(apart), misses=_miss(o for o in apart if not o.told_apart)),
    ]  # fmt: skip


def _alarms(faulty: Sequence[Outcome]) -> Figure:
    wrong = [o for o in faulty if o.false_alarms]
    count = sum(len(o.false_alarms) for o in wrong)
    today = sum(
        o.blamed_today is not None and o.blamed_today not in {p.key for p in o.planted}
        for o in faulty
    )
    stages = sum(len(o.report.stages) for o in faulty)
    return Figure(
        "FAIL where nothing was planted", f"{count} of {stages} stages", "0", count == 0,
        f"{today} of {len(faulty)} runs", _miss(wrong),
    )  # fmt: skip


def _causes(seen: Sequence[Outcome]) -> list[Figure]:
    known = [o for o in seen if o.named is not None and o.is_hit]
    explained = [o for o in known if o.expects_cause]
    others = [o for o in known if not o.expects_cause]
    shown = [o for o in others if o.symptom_hit]
    if not explained:
        return [Figure("planted cause among the named", "n/a", ">= 90%", None)]
    hits = [o for o in explained if o.cause_hit]
    named = sum(len(o.named or ()) for o in known) / len(known)
    misses = tuple(f"{o.case.name}: {_said(o)}" for o in explained if not o.cause_hit)
    return [
        Figure("planted cause among the named", _share(len(hits), len(explained)), ">= 90%",
               len(hits) >= LEAST_CAUSES * len(explained), misses=misses),
        Figure("causes named, on average", f"{named:.2f}", "<= 1.3", named <= MOST_NAMED),
        Figure("in no catalogue: the symptom says what", _share(len(shown), len(others)), "", None,
               misses=tuple(f"{o.case.name}: {_said(o)}" for o in others if not o.symptom_hit)),
    ]  # fmt: skip


def _said(o: Outcome) -> str:
    first = o.report.first_divergence
    explanation = None if first is None else first.explanation
    return explanation.summary() if explanation is not None else "nothing"


def _sound(sound: Sequence[Outcome]) -> Figure:
    wrong = [o for o in sound if o.failing]
    today = sum(o.blamed_today is not None for o in sound)
    return Figure("sound pairs with a FAIL", _share(len(wrong), len(sound)), "0", not wrong,
                  _share(today, len(sound)), _miss(wrong))  # fmt: skip


def _several(several: Sequence[Outcome]) -> Figure:
    found = [o for o in several if o.found_faults >= o.detectable_faults]
    return Figure(
        "two and three faults, all found", _share(len(found), len(several)), ">= 95%",
        len(found) >= LEAST_SEVERAL * len(several), "at most one",
        _miss(o for o in several if not o.found_faults >= o.detectable_faults),
    )  # fmt: skip


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "none run"


def _miss(outcomes: Iterable[Outcome]) -> tuple[str, ...]:
    return tuple(describe(o) for o in outcomes)


def describe(outcome: Outcome) -> str:
    """A case that went wrong, in a line."""
    planted = ", ".join(
        f"{p.key.path} ({p.kind}, {p.sigma:.3g} sigma)" for p in outcome.planted[:3]
    )
    said = "; ".join(f"{s.key.path} {s.reason}" for s in outcome.failing[:3]) or "nothing to blame"
    return f"{outcome.case.name}: planted {planted or 'nothing'}; the judge: {said}"


def to_text(lines: Sequence[Figure]) -> str:
    """The table, and what counts against it."""
    rows = [("figure", "measured", "bound", "", "cosine < 0.999")]
    for f in lines:
        verdict = "" if f.met is None else ("ok" if f.met else "MISSED")
        rows.append((f.name, f.measured, f.bound, verdict, f.today))
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths)).rstrip() for row in rows]
    for f in lines:
        if f.misses:
            text += ["", f"{f.name}:", *(f"  {miss}" for miss in f.misses)]
    return "\n".join(text)


def to_json(lines: Sequence[Figure], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The table and every case, JSON-ready."""
    from aprcore.records.report_json import json_ready

    data = {
        "schema": "aprtui-zoo-v1",
        "figures": [vars(f) for f in lines],
        "cases": [_case_to_json(o) for o in outcomes],
    }
    ready: dict[str, Any] = json_ready(data)
    return ready


def _case_to_json(o: Outcome) -> dict[str, Any]:
    return {
        "name": o.case.name,
        "is_local": o.case.is_local,
        "planted": [
            {"path": p.key.path, "fault": p.fault, "kind": p.kind, "sigma": p.sigma}
            for p in o.planted
        ],
        "blamed": [
            {"path": s.key.path, "verdict": s.verdict and s.verdict.value, "by": s.blamed,
             "reason": s.reason}
            for s in o.failing
        ],
        "named": o.named,
        "today": None if o.blamed_today is None else o.blamed_today.path,
        "elapsed_s": o.elapsed_s,
    }  # fmt: skip
