"""What a run found: plain frozen records, streamed stage by stage, and their JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from aprcore.causes.records import Explanation
from aprcore.compare import Comparison, LogitsComparison, Statistics
from aprcore.judge import Judgment, Verdict
from aprcore.layouts import Layout
from aprcore.parity.records import SideJudgment, StageParity
from aprcore.reference_weights import Quantisation
from aprcore.stages import StageKey

REPORT_SCHEMA = "aprtui-report-v1"


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison, for people and for the report.

    Attributes:
        path: The model, directory or file.
        label: What it is in a few words: "float32 .apr, numpy", "HF float16".
        dtype: Type of its activations, if known.
    """

    path: str
    label: str
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class RunHeader:
    """What will be judged, known before the first stage is computed.

    Attributes:
        trace: The side under test.
        oracle: The reference, or None when there is none (statistics only).
        model: File name of the model, if there is one.
        architecture: Its architecture.
        num_layers: Layers of the model, or of the directories.
        prompt: The text, if known.
        tokens: Token ids, if known.
        token_texts: Text of each token, where a tokenizer is at hand.
        keys: Every tensor that will be reported, in the order of computation.
        bound: The largest cumulative relative L2 that passes.
        backend: What computes the trace: "numpy", or None for a dump.
        judged: Whether stages are replayed for the model and kernel judgments.
        notes: Sentences that the user should read.
        tested, trusted: The two sides that are held against each other stage by stage, where that
            is asked for: a device and the CPU, or a dump and another one. The tested side's label
            does not say which device before `DeviceOpened`.
    """

    trace: Side
    oracle: Side | None
    model: str | None
    architecture: str | None
    num_layers: int
    prompt: str | None
    tokens: tuple[int, ...] | None
    token_texts: tuple[str, ...] | None
    keys: tuple[StageKey, ...]
    bound: float
    backend: str | None
    judged: bool = False
    notes: tuple[str, ...] = ()
    tested: Side | None = None
    trusted: Side | None = None


@dataclass(frozen=True, slots=True)
class DeviceOpened:
    """The device that the tested side runs on is open; its kernels are built as they are needed.

    Attributes:
        label: What computes, and on what: the driver's text, which may hold anything.
        driver: The version of its driver.
    """

    label: str
    driver: str | None


@dataclass(frozen=True, slots=True)
class PathRejected:
    """The device's path is given up: no more of it comes, and the CPU carries on.

    Attributes:
        line_reason: Why, for the line that every rejection prints.
        key: The stage at which it failed, or the first that the gate blames; None if the device
            could not be opened.
        by_gate: Whether it ran to its end and says something else than the CPU.
    """

    line_reason: str
    key: StageKey | None = None
    by_gate: bool = False


@dataclass(frozen=True, slots=True)
class LogitsReport:
    """`lm_head` in words: both sides' best tokens with their text.

    Attributes:
        comparison: The figures.
        texts: Text of every token id named in the comparison, where a tokenizer is at hand.
    """

    comparison: LogitsComparison
    texts: dict[int, str]


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage, judged.

    Attributes:
        key: Which tensor.
        layout: Its canonical shape; None if neither side has it.
        verdict: None when there is nothing to judge against.
        reason: One sentence that says why.
        comparison: Trace against oracle, where both have it.
        trace, oracle: Statistics of a side that stands alone (no oracle, or missing on one side).
        logits: For `lm_head` with both sides.
        kernel: The stage on the trace's own inputs, where that can be judged.
        model: The stage on the oracle's inputs, where that can be judged.
        explanation: Why it fails, for a FAIL by the kernel or model judgment.
        quantisation: What quantised weights really do here, where the float weights are at hand.
        budget: The largest own error that the user tolerates here, if stated.
        passes_at: For a stage that fails: the smallest budget under which it would pass.
        elapsed_s: Seconds to compute or read, and compare, this stage.
        permuted: Other layouts in which sides were read, each with its side ("heads before tokens
            in the trace"), joined by "; "; empty where both were as they should be.
    """

    key: StageKey
    layout: Layout | None
    verdict: Verdict | None
    reason: str
    comparison: Comparison | None = None
    trace: Statistics | None = None
    oracle: Statistics | None = None
    logits: LogitsReport | None = None
    kernel: Judgment | None = None
    model: Judgment | None = None
    explanation: Explanation | None = None
    quantisation: Quantisation | None = None
    budget: float | None = None
    passes_at: float | None = None
    elapsed_s: float = 0.0
    permuted: str = ""

    @property
    def blamed(self) -> str | None:
        """The judgment that a FAIL rests on: "kernel", "model", else "cumulative"."""
        if self.verdict is not Verdict.FAIL:
            return None
        judged = [(n, j) for n, j in (("kernel", self.kernel), ("model", self.model)) if j]
        failed = [name for name, judgment in judged if not judgment.passed]
        if failed:
            return failed[0]
        if judged and self.budget is not None:  # both pass: beyond the user's budget
            return max(judged, key=lambda found: found[1].relative_l2)[0]
        return "cumulative"


@dataclass(frozen=True, slots=True)
class Report:
    """A finished run.

    Attributes:
        header: What was judged.
        stages: Every stage, in the order of computation.
        elapsed_s: Time in all.
        parity: The stages that both of two sides have, or should have.
        device: What the tested side ran on, if it was opened.
        rejected: Why the device's path was given up, if it was.
    """

    header: RunHeader
    stages: tuple[StageReport, ...]
    elapsed_s: float
    parity: tuple[StageParity, ...] = ()
    device: DeviceOpened | None = None
    rejected: PathRejected | None = None

    @property
    def first_divergence(self) -> StageReport | None:
        """The first diverging stage in the order of computation."""
        return next((s for s in self.stages if s.verdict and s.verdict.is_divergence), None)

    @property
    def first_parity_fault(self) -> StageParity | None:
        """The first stage that diverges between the tested and the trusted side."""
        return next((s for s in self.parity if s.verdict.is_divergence), None)

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many stages got each verdict, in the order of `Verdict`; absent ones left out."""
        found = [stage.verdict for stage in self.stages]
        return {verdict: found.count(verdict) for verdict in Verdict if verdict in found}

    def diverges(self, *, strict: bool = False) -> bool:
        """Whether the run ends with exit code 1; `strict` counts missing stages too.

        A device that could not be used at all is none: then the CPU's verdict counts.
        """
        if self.first_divergence is not None or self.first_parity_fault is not None:
            return True
        if self.rejected is not None and self.rejected.by_gate:
            return True
        is_missing = any(stage.verdict is Verdict.MISSING for stage in self.parity)
        return strict and (is_missing or Verdict.MISSING in self.counts)

    def summary(self) -> str:
        """The finding in one sentence."""
        found = self._summary_of_first_side()
        return found if self.header.tested is None else f"{found}; {self.parity_summary()}"

    def parity_summary(self) -> str:
        """What the tested side, held against the trusted one, comes to; in a clause."""
        sides = "GPU against CPU" if self.header.backend is not None else "against the other dump"
        first, rejected = self.first_parity_fault, self.rejected
        if first is not None:
            found = f"first fault at {first.key} {first.verdict.value}: {first.reason}"
        elif rejected is not None:
            found = f"rejected: {rejected.line_reason}"
        else:
            compared = [s.comparison for s in self.parity if s.comparison is not None]
            worst = max((c.relative_l2 for c in compared), default=0.0)
            found = f"no fault in {len(compared)} stages, relative L2 {worst:.2g} at most"
            missing = len(self.parity) - len(compared)
            found += f" ({missing} MISSING)" if missing else ""
        return f"{sides}: {found}"

    def _summary_of_first_side(self) -> str:
        first = self.first_divergence
        counts = ", ".join(f"{n} {verdict.value}" for verdict, n in self.counts.items())
        if first is not None:
            assert first.verdict is not None
            return f"first divergence: {first.key} {first.verdict.value}: {first.reason} ({counts})"
        if self.header.oracle is None:
            kernels = sum(stage.kernel is not None for stage in self.stages)
            if kernels:
                return f"the kernel judgment finds nothing wrong in {kernels} stages; without an"\
                    " oracle the model's weights are taken on trust"  # fmt: skip
            return f"{len(self.stages)} stages traced; no oracle to hold them against"
        return f"no divergence in {len(self.stages)} stages ({counts})"


RunEvent = RunHeader | DeviceOpened | StageReport | StageParity | PathRejected | Report
"""What a run streams, in that order: see `aprcore.bisect.bisect`."""


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
        "model": header.model,
        "architecture": header.architecture,
        "trace": _side(header.trace),
        "oracle": None if header.oracle is None else _side(header.oracle),
        "backend": header.backend,
        "prompt": header.prompt,
        "tokens": header.tokens,
        "token_texts": header.token_texts,
        "num_layers": header.num_layers,
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


def stage_to_json(
    stage: StageReport, *, top_k: int = 10, parity: StageParity | None = None
) -> dict[str, Any]:
    """One stage as JSON-ready values, with what holding two sides against each other shows."""
    data: dict[str, Any] = {
        "path": stage.key.path,
        "layer": stage.key.layer,
        "stage": stage.key.stage,
        "shape": None if stage.layout is None else stage.layout.shape,
        "verdict": None if stage.verdict is None else stage.verdict.value,
        "reason": stage.reason,
        "blamed": stage.blamed,
        "budget_relative_l2": stage.budget,
        "passes_at_relative_l2": stage.passes_at,
        "elapsed_s": stage.elapsed_s,
    }
    if stage.comparison is not None and stage.layout is not None:
        data["cumulative"] = _comparison(stage.comparison, stage.layout, top_k)
    for name, judgment in (("kernel", stage.kernel), ("model", stage.model)):
        data[name] = None if judgment is None else _judgment(judgment)
    if stage.quantisation is not None:
        data["quantisation"] = {
            "true_relative_l2": stage.quantisation.true_relative_l2,
            "predicted_relative_l2": stage.quantisation.predicted_relative_l2,
            "ratio": stage.quantisation.ratio,
            "remaining_relative_l2": stage.quantisation.remaining_relative_l2,
        }
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


def _side(side: Side) -> dict[str, Any]:
    return {"path": side.path, "label": side.label, "dtype": side.dtype}


def _parity_of_run(report: Report, tested: Side, trusted: Side) -> dict[str, Any]:
    first, rejected, device = report.first_parity_fault, report.rejected, report.device
    return {
        "summary": report.parity_summary(),
        "tested": _side(tested),
        "trusted": _side(trusted),
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
        "reason": stage.reason,
        "differs": stage.differs,
        "bound_relative_l2": stage.bound,
        "comparison": found,
        "tested": _side_judgment(stage.tested),
        "trusted": _side_judgment(stage.trusted),
    }


def _side_judgment(side: SideJudgment) -> dict[str, Any]:
    oracle = None
    if side.oracle is not None:
        oracle = {"cosine": side.oracle.cosine, "relative_l2": side.oracle.relative_l2}
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
        "count": comparison.count,
        "finite_count": comparison.finite_count,
        "cosine": comparison.cosine,
        "relative_l2": comparison.relative_l2,
        "nmse": comparison.nmse,
        "max_abs_diff": comparison.max_abs_diff,
        "max_abs_diff_index": comparison.max_index,
        "max_abs_diff_position": _position(layout, comparison.max_index),
        f"rms_{a}": comparison.rms_a,
        f"rms_{b}": comparison.rms_b,
        "rms_diff": comparison.rms_diff,
        f"nonfinite_{a}": comparison.nonfinite_a,
        f"nonfinite_{b}": comparison.nonfinite_b,
        "top_diffs": [
            {
                "index": d.index,
                "position": _position(layout, d.index),
                a: d.a,
                b: d.b,
                "abs_diff": d.abs_diff,
            }
            for d in _first(comparison.top, top_k)
        ],
    }


def _judgment(judgment: Judgment) -> dict[str, Any]:
    worst = judgment.assessment.worst
    return {
        "passed": judgment.passed,
        "relative_l2": judgment.relative_l2,
        "cosine": judgment.cosine,
        "bound_relative_l2": judgment.bound,
        "noise_ratio": judgment.assessment.ratio,
        "predicted_relative_l2": judgment.assessment.floor,
        "worst_part": {"name": worst.name, "ratio": worst.ratio, "allowed": worst.factor},
        "span": [key.path for key in judgment.span],
        "recomputed": [key.path for key in judgment.recomputed],
    }


def _first(items: Iterable[Any], count: int) -> list[Any]:
    return [item for _, item in zip(range(count), items)]


def _position(layout: Layout, index: int) -> dict[str, int] | None:
    return None if index < 0 else dict(zip(layout.axes, layout.position(index)))


def _statistics(statistics: Statistics) -> dict[str, Any]:
    return {
        "count": statistics.count,
        "mean": statistics.mean,
        "std": statistics.std,
        "min": statistics.minimum,
        "max": statistics.maximum,
        "rms": statistics.rms,
        "zeros": statistics.zeros,
        "nan": statistics.nans,
        "inf": statistics.infinities,
    }


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
        "gap": found.gap,
        "near_tie": found.near_tie,
    }
