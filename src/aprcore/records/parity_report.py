"""What the gate found, as plain records, and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from aprcore.engines.engine import Engine
from aprcore.judging.compare import Comparison
from aprcore.judging.layouts import Layout
from aprcore.judging.logits import NEAR_TIE_GAP
from aprcore.judging.verdict import FLOAT32_BOUND
from aprcore.network.stages import StageKey
from aprcore.records.parity import StageFault, StageParity
from aprcore.records.report_json import figures_to_json, json_ready, picked

GATE = "apr-cpu-vs-gpu-output-parity-v1"

# The other project's gate; backends that differ by rounding alone agree to 0.9999999.
COSINE_BOUND = 0.99

# A decoding step computes what the last row of a full pass computes, in float32 sums of another
# order: 1e-7 to 2e-6 apart on models of every architecture. One wrong row in the cache shows as
# 1e-2 and more.
CACHE_BOUND = 1e-5


@dataclass(frozen=True, slots=True)
class ParityHeader:
    """What is being run.

    Attributes:
        model: The model's file.
        prompt: The text, unless ids were given.
        tokens: Ids of the prompt.
        steps: Decoding steps to come after the prompt's.
        cpu, tested: Both sides.
    """

    model: str
    prompt: str | None
    tokens: tuple[int, ...]
    steps: int
    cpu: Engine = field(repr=False)
    tested: Engine = field(repr=False)


@dataclass(frozen=True, slots=True)
class StepParity:
    """Both sides' logits after one step.

    Attributes:
        step: 0 for the pass over the prompt, then one decoded token each.
        position: Position of the last token that was run.
        token: That token.
        cosine, relative_l2, max_abs_diff: The tested side against the CPU, where both are finite.
        argmax_cpu, argmax_tested: What either would say next.
        gap: As `aprcore.judging.logits.LogitsComparison.gap`.
        near_tie: The two differ, by too little to tell them apart.
        cpu_s, tested_s: Time of the step.
        fault: Why the step is rejected; nothing if it passes.
        nonfinite_cpu, nonfinite_tested: NaN and infinities among either side's logits.
    """

    step: int
    position: int
    token: int
    cosine: float
    relative_l2: float
    max_abs_diff: float
    argmax_cpu: int
    argmax_tested: int
    gap: float
    near_tie: bool
    cpu_s: float
    tested_s: float
    fault: str = ""
    nonfinite_cpu: int = 0
    nonfinite_tested: int = 0

    @property
    def passed(self) -> bool:
        """Whether both sides say the same."""
        return not self.fault

    @property
    def explained(self) -> bool:
        """Whether float32 explains the difference; the gate passes a thousand times as much."""
        return self.relative_l2 <= FLOAT32_BOUND


@dataclass(frozen=True, slots=True)
class CacheParity:
    """Decoding against one full pass over the same tokens, on one side.

    Attributes:
        side: The side's backend.
        num_tokens: Tokens of the full pass.
        relative_l2: The last step's logits against the full pass's.
        fault: Why it is rejected; nothing if it passes.
        first: Where the two part.
    """

    side: str
    num_tokens: int
    relative_l2: float
    fault: str = ""
    first: StageFault | None = None

    @property
    def passed(self) -> bool:
        """Whether the cache gives what a full pass gives."""
        return not self.fault


@dataclass(frozen=True, slots=True)
class ParityReport:
    """A finished run.

    Attributes:
        header: What was run.
        steps: As far as the first that was rejected.
        caches: Both sides, unless a step was rejected.
        first: The first stage that differs, if anything was rejected and a stage can be named.
        elapsed_s: Time in all.
        stages: Every stage of every step, if they were asked for.
    """

    header: ParityHeader
    steps: tuple[StepParity, ...]
    caches: tuple[CacheParity, ...]
    first: StageFault | None
    elapsed_s: float
    stages: tuple[StageParity, ...] = ()

    @property
    def diverges(self) -> bool:
        """Whether the gate rejects."""
        return bool(self.reason)

    @property
    def reason(self) -> str:
        """Why the gate rejects, in one sentence; nothing if it does not."""
        faults = [step.fault for step in self.steps] + [cache.fault for cache in self.caches]
        faults = [fault for fault in faults if fault]
        if not faults:
            return ""
        return faults[0] if self.first is None else f"{faults[0]}; {self.first.describe()}"


ParityEvent = ParityHeader | StageParity | StepParity | CacheParity | ParityReport


# In JSON the tested side is the GPU.
_STEP_NAMES = {
    "argmax_tested": "argmax_gpu", "tested_s": "gpu_s", "nonfinite_tested": "nonfinite_gpu",
}  # fmt: skip


def to_json(report: ParityReport) -> dict[str, Any]:
    """The report as JSON of schema `GATE`; non-finite numbers are words."""
    header = report.header
    cleaned: dict[str, Any] = json_ready({
        "schema": GATE,
        **picked(header, "model", "prompt", "tokens"),
        "cpu": _engine(header.cpu),
        "gpu": _engine(header.tested),
        "bounds": {
            "cosine": COSINE_BOUND, "near_tie_gap": NEAR_TIE_GAP, "cache_relative_l2": CACHE_BOUND,
        },
        "steps": [
            {_STEP_NAMES.get(name, name): value for name, value in asdict(step).items()}
            | {"passed": step.passed, "explained": step.explained}
            for step in report.steps
        ],
        "prefill_vs_decode": [
            picked(cache, "side", "num_tokens", "relative_l2", "fault", "passed")
            for cache in report.caches
        ],
        "stages": [_stage(stage) for stage in report.stages],
        "first_difference": None if report.first is None else _fault(report.first),
        **picked(report, "diverges", "reason", "elapsed_s"),
    })  # fmt: skip
    return cleaned


def _engine(engine: Engine) -> dict[str, Any]:
    return {"backend": engine.backend.name, "device": engine.device, "driver": engine.driver}


def _fault(fault: StageFault) -> dict[str, Any]:
    found = _figures(fault.step, fault.key, fault.comparison, fault.layout)
    return found | picked(fault, "kernel", "reason")


def _stage(stage: StageParity) -> dict[str, Any]:
    kernel = stage.tested.kernel
    assert stage.comparison is not None and stage.layout is not None
    return _figures(stage.step, stage.key, stage.comparison, stage.layout) | {
        "kernel_relative_l2": None if kernel is None else kernel.relative_l2,
        "kernel_explained": None if kernel is None else kernel.passed,
        "verdict": stage.verdict.value,
        **picked(stage, "reason", "fault"),
        "cpu_s": stage.trusted.elapsed_s,
        "gpu_s": stage.tested.elapsed_s,
    }


def _figures(step: int, key: StageKey, found: Comparison, layout: Layout) -> dict[str, Any]:
    key_fields = picked(key, "layer", "stage", "path")
    return {"step": step, **key_fields, **figures_to_json(found, layout)}
