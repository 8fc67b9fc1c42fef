"""What a run found: plain frozen records, streamed stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

from aprcore.causes.records import Explanation
from aprcore.judging.compare import Comparison, Statistics
from aprcore.judging.layouts import Layout
from aprcore.judging.logits import LogitsComparison
from aprcore.judging.quantisation import Quantisation
from aprcore.judging.verdict import Judgment, Verdict
from aprcore.network.stages import StageKey
from aprcore.records.parity import StageParity


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
        accepted: Whether it would fail but for the user's budget.
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
    accepted: bool = False
    elapsed_s: float = 0.0
    permuted: str = ""

    @property
    def is_divergence(self) -> bool:
        """Whether it makes the run end with exit code 1."""
        return self.verdict is not None and self.verdict.is_divergence

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
class CauseSought:
    """A stage fails, and its cause is being looked for; its `StageReport` follows.

    Attributes:
        stage: What is known of it already: all but its explanation.
        searched: For how many stages the whole catalogue has been tried before.
        most: For how many it will be; None: for every one that needs it.
    """

    stage: StageReport
    searched: int
    most: int | None

    def progress(self) -> str:
        """Which search this is in a clause."""
        of = "" if self.most is None else f" of at most {self.most}"
        return f"search {self.searched + 1}{of}" if self.may_search else "among the known ones"

    @property
    def may_search(self) -> bool:
        """Whether the whole catalogue may be tried for it."""
        return self.most is None or self.searched < self.most


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
        return next((stage for stage in self.stages if stage.is_divergence), None)

    @property
    def first_parity_fault(self) -> StageParity | None:
        """The first stage that diverges between the tested and the trusted side."""
        return next((s for s in self.parity if s.verdict.is_divergence), None)

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many stages got each verdict, in the order of `Verdict`; absent ones left out."""
        found = [stage.verdict for stage in self.stages]
        return {verdict: found.count(verdict) for verdict in Verdict if verdict in found}

    @property
    def unjudged(self) -> tuple[StageReport, ...]:
        """The stages that should have been judged and could not be."""
        return tuple(stage for stage in self.stages if stage.verdict is Verdict.UNJUDGED)

    @property
    def is_mostly_unjudged(self) -> bool:
        """Whether of more stages than not nothing is known, so that the run has found nothing."""
        present = sum(stage.verdict is not Verdict.MISSING for stage in self.stages)
        return 2 * len(self.unjudged) > present

    @property
    def unjudged_text(self) -> str:
        """How many stages could not be judged, and why the first of them."""
        found = self.unjudged
        text = f"{len(found)} of {len(self.stages)} stages could not be judged"
        return f"{text} ({found[0].key}: {found[0].reason})" if found else text

    def diverges(self, *, strict: bool = False) -> bool:
        """Whether the run ends with exit code 1.

        `strict` counts stages that are missing or could not be judged too; most of them that could
        not be judged count in any case.

        A device that could not be used at all is none: then the CPU's verdict counts.
        """
        if self.first_divergence is not None or self.first_parity_fault is not None:
            return True
        if self.rejected is not None and self.rejected.by_gate:
            return True
        if self.is_mostly_unjudged:
            return True
        is_missing = any(stage.verdict is Verdict.MISSING for stage in self.parity)
        is_open = is_missing or not {Verdict.MISSING, Verdict.UNJUDGED}.isdisjoint(self.counts)
        return strict and is_open

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
        if self.is_mostly_unjudged:
            return f"{self.unjudged_text}: this run says little ({counts})"
        if self.header.oracle is None:
            kernels = sum(stage.kernel is not None for stage in self.stages)
            if kernels:
                rest = f"; {self.unjudged_text}" if self.unjudged else ""
                return f"the kernel judgment finds nothing wrong in {kernels} stages{rest}; "\
                    "without an oracle the model's weights are taken on trust"  # fmt: skip
            return f"{len(self.stages)} stages traced; no oracle to hold them against"
        return f"no divergence in {len(self.stages)} stages ({counts})"


RunEvent = (
    RunHeader | DeviceOpened | CauseSought | StageReport | StageParity | PathRejected | Report
)
"""What a run streams, in that order: see `aprcore.runs.bisect.bisect`."""
