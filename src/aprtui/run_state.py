"""What is known of a run so far: the events of the engine, gathered for the screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aprcore.network.stages import StageKey
from aprtui.measures import BASIS, Measure, measures_of, view_of

if TYPE_CHECKING:
    from aprcore.judging.verdict import Verdict
    from aprcore.records.parity import StageParity
    from aprcore.records.report import (
        CauseSought,
        DeviceOpened,
        LogitsReport,
        PathRejected,
        Report,
        RunEvent,
        RunHeader,
        StageReport,
    )


@dataclass(eq=False)
class RunState:
    """A run as seen from outside. Only the screen's message handlers change it.

    Attributes:
        header: What will be judged; None until the files are open.
        reports: Stages judged so far, in the order of computation.
        report: The finished run.
        previous: The run that finished before this one was started.
        number: How many runs were opened.
        error: What ended the run early.
        keys_by_layer: Every tensor, by its layer (None: the whole model), in order.
        divergences: Stages that diverge, in the order of computation.
        parity: Stages of the second side so far: a device against the CPU, or one dump against
            another.
        parity_faults: Those of them that diverge, in the order of computation.
        views: The same in the form of `reports`, per measure of a second side.
        sought: The stage whose cause is being looked for; its report so far is among `reports`.
        device: What the second side runs on, once it is open.
        rejected: Why the device's path was given up, if it was.
    """

    header: RunHeader | None = None
    reports: dict[StageKey, StageReport] = field(default_factory=dict)
    report: Report | None = None
    previous: Report | None = None
    number: int = 0
    error: Exception | None = None
    keys_by_layer: dict[int | None, tuple[StageKey, ...]] = field(default_factory=dict)
    divergences: list[StageKey] = field(default_factory=list)
    parity: dict[StageKey, StageParity] = field(default_factory=dict)
    parity_faults: list[StageKey] = field(default_factory=list)
    views: dict[Measure, dict[StageKey, StageReport]] = field(default_factory=dict)
    sought: CauseSought | None = None
    device: DeviceOpened | None = None
    rejected: PathRejected | None = None

    def take(self, event: RunEvent) -> None:
        """The engine has found something out."""
        # Loaded with the event at the latest: the first screen is painted without.
        from aprcore.records import report as records

        match event:
            case records.RunHeader():
                self.open(event)
            case records.CauseSought():
                self.sought = event
                self.add(event.stage)
            case records.StageReport():
                self.sought = None
                self.add(event)
            case records.DeviceOpened():
                self.device = event
            case records.PathRejected():
                self.rejected = event
            case records.Report():
                self.report = event
            case _:
                self.add_parity(event)

    def open(self, header: RunHeader) -> None:
        """The files are open and every row is known; what a run before this one said is over."""
        if self.report is not None:
            self.previous = self.report
        self.number += 1
        self.header, self.report, self.error = header, None, None
        self.reports.clear()
        self.divergences.clear()
        self.parity.clear()
        self.parity_faults.clear()
        self.views = {measure: {} for measure in BASIS}
        self.device = self.rejected = self.sought = None
        grouped: dict[int | None, list[StageKey]] = {}
        for key in header.keys:
            grouped.setdefault(key.layer, []).append(key)
        self.keys_by_layer = {layer: tuple(keys) for layer, keys in grouped.items()}

    def add(self, report: StageReport) -> None:
        """A stage has been judged; one that fails once more when its cause is found."""
        self.reports[report.key] = report
        if report.is_divergence and report.key not in self.divergences[-1:]:
            self.divergences.append(report.key)

    def add_parity(self, parity: StageParity) -> None:
        """A stage of the second side has been judged."""
        self.parity[parity.key] = parity
        for measure, reports in self.views.items():
            reports[parity.key] = view_of(parity, measure)
        if parity.verdict.is_divergence:
            self.parity_faults.append(parity.key)

    def reports_of(self, measure: Measure | None) -> Mapping[StageKey, StageReport]:
        """What is known of each stage, seen by a measure."""
        return self.reports if measure not in BASIS else self.views.get(measure, {})

    def faults_of(self, measure: Measure) -> list[StageKey]:
        """Stages that diverge, seen by a measure, in the order of computation."""
        return self.parity_faults if measure in BASIS else self.divergences

    def title_of(self, measure: Measure) -> str:
        """What the screen calls a measure."""
        tested, trusted = self.side_names
        if measure is Measure.PARITY:
            return f"{trusted} vs {tested}"
        return f"{tested} kernel" if measure is Measure.TESTED else f"{measure.value} judgment"

    def is_sought(self, key: StageKey) -> bool:
        """Whether the cause of a stage is being looked for."""
        return self.is_running and self.sought is not None and self.sought.stage.key == key

    @property
    def has_second_side(self) -> bool:
        """Whether two sides are held against each other stage by stage."""
        return self.header is not None and self.header.tested is not None

    @property
    def side_names(self) -> tuple[str, str]:
        """What the tested and the trusted side are called in a column."""
        is_device = self.header is not None and self.header.backend is not None
        return ("GPU", "CPU") if is_device else ("trace", "other")

    @property
    def keys(self) -> tuple[StageKey, ...]:
        """Every tensor of the run, in the order of computation."""
        return () if self.header is None else self.header.keys

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a tensor."""
        return tuple(layer for layer in self.keys_by_layer if layer is not None)

    @property
    def is_running(self) -> bool:
        """Whether more is to come."""
        return self.report is None and self.error is None

    @property
    def has_oracle(self) -> bool:
        """Whether there is something to hold the trace against."""
        return self.header is not None and self.header.oracle is not None

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The judgments that this run makes, the one to begin with first."""
        return measures_of(self.header)

    @property
    def is_judged(self) -> bool:
        """Whether stages are judged on their own inputs."""
        return self.header is not None and self.header.judged

    @property
    def first_divergence(self) -> StageReport | None:
        """The first diverging stage in the order of computation."""
        return self.reports[self.divergences[0]] if self.divergences else None

    @property
    def latest(self) -> StageKey | None:
        """The stage judged last."""
        return next(reversed(self.reports), None)

    @property
    def counts(self) -> Mapping[Verdict, int]:
        """How many stages got each verdict so far, in the order in which they first came."""
        counts: dict[Verdict, int] = {}
        for report in self.reports.values():
            if report.verdict is not None:
                counts[report.verdict] = counts.get(report.verdict, 0) + 1
        return counts

    @property
    def logits(self) -> LogitsReport | None:
        """What the head says, once it is judged."""
        found = (report.logits for report in reversed(self.reports.values()) if report.logits)
        return next(found, None)

    @property
    def exit_code(self) -> int:
        """0 nothing wrong found, 1 a divergence was found (so far), 2 the run failed."""
        if self.error is not None:
            return 2
        if self.report is not None:
            return int(self.report.diverges())
        return int(bool(self.divergences or self.parity_faults))
