"""The JSON of a report: plain values, with `schema`. Source: docs/report.schema.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from aprcore.judging.compare import Comparison, Statistics
from aprcore.judging.layouts import Layout
from aprcore.judging.verdict import Judgment
from aprcore.records.parity import SideJudgment, StageParity
from aprcore.records.report import LogitsReport, Report, Side, StageReport

REPORT_SCHEMA = "aprtui-report-v1"


def to_json(report: Report, *, top_k: int = 10, strict: bool = False) -> dict[str, Any]:
    """A report as JSON-ready values, with `schema`; non-finite numbers become strings."""
    header = report.header
    first = report.first_divergence
    parity = {stage.key: stage for stage in report.parity}
    data = {
        "schema": REPORT_SCHEMA,
        "summary": report.summary(),
        "diverges": report.diverges(strict=strict),
        "first_divergence": None if first is None else first.key.path,
        "counts": {verdict.value: n for verdict, n in report.counts.items()},
        **picked(header, "model", "architecture"),
        "trace": dataclasses.asdict(header.trace),
        "oracle": None if header.oracle is None else dataclasses.asdict(header.oracle),
        **picked(header, "backend", "prompt", "tokens", "token_texts", "num_layers"),
        "bound_relative_l2": header.bound,
        "notes": header.notes,
        "elapsed_s": report.elapsed_s,
        "stages": [
            stage_to_json(stage, top_k=top_k, parity=parity.get(stage.key))
            for stage in report.stages
        ],
    }
    if header.tested is not None and header.trusted is not None:
        data["parity"] = _parity_of_run(report, header.tested, header.trusted)
    cleaned: dict[str, Any] = json_ready(data)
    return cleaned


def format_json(data: Mapping[str, Any]) -> str:
    """A report as text: a line for each stage, which is what is compared and searched.

    Args:
        data: As `to_json` gives it, perhaps with more.
    """
    fields = []
    for name, value in data.items():
        if name == "stages":
            lines = ",\n  ".join(json.dumps(stage, allow_nan=False) for stage in value)
            text = f"[\n  {lines}\n ]" if value else "[]"
        else:
            text = json.dumps(value, allow_nan=False)
        fields.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}"


def stage_to_json(
    stage: StageReport, *, top_k: int = 10, parity: StageParity | None = None
) -> dict[str, Any]:
    """One stage as JSON-ready values, with what holding two sides against each other shows."""
    data: dict[str, Any] = {
        **picked(stage.key, "path", "layer", "stage"),
        "shape": None if stage.layout is None else stage.layout.shape,
        "verdict": None if stage.verdict is None else stage.verdict.value,
        **picked(stage, "reason", "blamed"),
        "budget_relative_l2": stage.budget,
        "passes_at_relative_l2": stage.passes_at,
        **picked(stage, "accepted", "elapsed_s"),
    }
    if stage.comparison is not None and stage.layout is not None:
        data["cumulative"] = _comparison(stage.comparison, stage.layout, top_k)
    for name, judgment in (("kernel", stage.kernel), ("model", stage.model)):
        data[name] = None if judgment is None else _judgment(judgment)
    if stage.quantisation is not None:
        data["quantisation"] = picked(
            stage.quantisation, "true_relative_l2", "predicted_relative_l2", "ratio",
            "remaining_relative_l2",
        )  # fmt: skip
    for name, statistics in (("trace", stage.trace), ("oracle", stage.oracle)):
        if statistics is not None:
            data[name] = _statistics(statistics)
    if stage.explanation is not None:
        data["causes"] = [dataclasses.asdict(cause) for cause in stage.explanation.causes]
        data["symptom"] = stage.explanation.symptom
    if stage.logits is not None:
        data["logits"] = _logits(stage.logits)
    if parity is not None:
        data["parity"] = _parity(parity, top_k)
    cleaned: dict[str, Any] = json_ready(data)
    return cleaned


def json_ready(value: Any) -> Any:
    """`value` with tuples as lists and non-finite numbers as "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return value


def picked(record: Any, *names: str) -> dict[str, Any]:
    """Some attributes of a record, by their names."""
    return {name: getattr(record, name) for name in names}


def figures_to_json(found: Comparison, layout: Layout, *more: str) -> dict[str, Any]:
    """What every comparison says of itself, and `more` of its attributes."""
    names = ("count", "finite_count", "cosine", "relative_l2", *more, "max_abs_diff")
    position = _position(layout, found.max_index)
    return picked(found, *names) | {"max_abs_diff_position": position}


def _parity_of_run(report: Report, tested: Side, trusted: Side) -> dict[str, Any]:
    first, rejected, device = report.first_parity_fault, report.rejected, report.device
    return {
        "summary": report.parity_summary(),
        "tested": dataclasses.asdict(tested),
        "trusted": dataclasses.asdict(trusted),
        "device": None if device is None else dataclasses.asdict(device),
        "first_fault": None if first is None else first.key.path,
        "rejected": None
        if rejected is None
        else {
            "reason": rejected.line_reason,
            "path": None if rejected.key is None else rejected.key.path,
            "by_gate": rejected.by_gate,
        },
    }


def _parity(stage: StageParity, top_k: int) -> dict[str, Any]:
    found = None
    if stage.comparison is not None and stage.layout is not None:
        found = _comparison(stage.comparison, stage.layout, top_k, ("tested", "trusted"))
        found["unequal_nonfinite"] = stage.comparison.unequal_nonfinite
    return {
        "verdict": stage.verdict.value,
        **picked(stage, "reason", "differs"),
        "bound_relative_l2": stage.bound,
        "comparison": found,
        "tested": _side_judgment(stage.tested),
        "trusted": _side_judgment(stage.trusted),
    }


def _side_judgment(side: SideJudgment) -> dict[str, Any]:
    oracle = None if side.oracle is None else picked(side.oracle, "cosine", "relative_l2")
    return {
        "kernel": None if side.kernel is None else _judgment(side.kernel),
        "fault": side.fault,
        "cumulative": oracle,
        "elapsed_s": side.elapsed_s,
    }


def _comparison(
    comparison: Comparison, layout: Layout, top_k: int,
    sides: tuple[str, str] = ("trace", "oracle"),
) -> dict[str, Any]:  # fmt: skip
    a, b = sides
    return {
        **figures_to_json(comparison, layout, "nmse"),
        "max_abs_diff_index": comparison.max_index,
        f"rms_{a}": comparison.rms_a,
        f"rms_{b}": comparison.rms_b,
        "rms_diff": comparison.rms_diff,
        f"nonfinite_{a}": comparison.nonfinite_a,
        f"nonfinite_{b}": comparison.nonfinite_b,
        "top_diffs": [
            {"index": d.index, "position": _position(layout, d.index), a: d.a, b: d.b,
             "abs_diff": d.abs_diff}
            for _, d in zip(range(top_k), comparison.top)
        ],
    }  # fmt: skip


def _judgment(judgment: Judgment) -> dict[str, Any]:
    worst = judgment.assessment.worst
    return {
        **picked(judgment, "passed", "relative_l2", "cosine"),
        "bound_relative_l2": judgment.bound,
        "noise_ratio": judgment.assessment.ratio,
        "predicted_relative_l2": judgment.assessment.floor,
        "worst_part": {"name": worst.name, "ratio": worst.ratio, "allowed": worst.factor},
        "span": [key.path for key in judgment.span],
        "recomputed": [key.path for key in judgment.recomputed],
    }


def _position(layout: Layout, index: int) -> dict[str, int] | None:
    return None if index < 0 else dict(zip(layout.axes, layout.position(index)))


def _statistics(statistics: Statistics) -> dict[str, Any]:
    names = {"minimum": "min", "maximum": "max", "nans": "nan", "infinities": "inf"}
    figures = dataclasses.asdict(statistics)
    return {names.get(name, name): figure for name, figure in figures.items()}


def _logits(logits: LogitsReport) -> dict[str, Any]:
    found = logits.comparison

    def tokens(ids: tuple[int, ...], values: tuple[float, ...]) -> list[dict[str, Any]]:
        return [{"id": i, "text": logits.texts.get(i), "logit": v} for i, v in zip(ids, values)]

    return {
        "argmax_trace": found.argmax_a,
        "argmax_oracle": found.argmax_b,
        "agree": found.agree,
        "top_trace": tokens(found.top_a, found.values_a),
        "top_oracle": tokens(found.top_b, found.values_b),
        "kl_oracle_trace": found.kl,
        **picked(found, "gap", "near_tie"),
    }
