"""A second side of a run, followed stage by stage: a device beside the CPU, or another dump.

The run against the oracle does not depend on it: where a device fails, the CPU carries on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.engine import open_engine
from aprcore.ground.errors import BackendError
from aprcore.judging.compare import Comparison, compare
from aprcore.judging.layouts import layout_of, zero_masked
from aprcore.judging.verdict import cumulative_bound
from aprcore.network.stages import StageKey
from aprcore.records.parity import SideJudgment, StageParity
from aprcore.records.report import DeviceOpened, PathRejected, StageReport
from aprcore.runs.fallback import RejectedError
from aprcore.runs.pair_judge import KernelJudge, PairJudge, side_of
from aprcore.runs.parity_gate import compare_step
from aprcore.runs.parity_steps import timed
from aprcore.runs.request import Request
from aprcore.runs.sides import Sides
from aprcore.runs.stage_judge import StageJudge

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class FirstSide:
    """What the run itself knows of a stage that it is through with.

    Attributes:
        key: The stage.
        tensor: The tensor under test; None where that side lacks it.
        oracle: The oracle's, in canonical layout, if there is one.
        report: What was found; None for a stage that nobody asked about.
        budget: The largest own error that the user tolerates, if stated.
        elapsed_s: Seconds to compute or read the tensor.
    """

    key: StageKey
    tensor: Floats | None
    oracle: Floats | None
    report: StageReport | None
    budget: float | None
    elapsed_s: float


class SecondSide(Protocol):
    """Follows a run.

    Attributes:
        parity: What was found so far.
        device: What it runs on, once that is open.
        rejected: Why it was given up, if it was.
    """

    parity: list[StageParity]
    device: DeviceOpened | None
    rejected: PathRejected | None

    def open(self) -> Iterator[DeviceOpened | PathRejected]:
        """Get ready."""
        ...

    def follow(self, first: FirstSide) -> Iterator[StageParity | PathRejected]:
        """The stage that the first side is through with."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...

    def finish(self) -> None:
        """Close; to be called after the last stage.

        Raises:
            RejectedError: The gate rejects a device that is required.
        """
        ...


def second_side(request: Request, sides: Sides) -> SecondSide | None:
    """The side that a request asks for beside the first, not yet open."""
    if sides.other is not None:
        return DumpSide(sides, sides.other, request.top_k)
    return DeviceSide(request, sides) if request.uses_device else None


class DeviceSide:
    """The same pass on an OpenCL device, in step with the CPU's."""

    def __init__(self, request: Request, sides: Sides) -> None:
        """Begin without a device."""
        self.parity: list[StageParity] = []
        self.device: DeviceOpened | None = None
        self.rejected: PathRejected | None = None
        self._request = request
        self._sides = sides
        recorded, _ = replace(sides, oracle=None).recorded()
        self._kernels = None if recorded is None else KernelJudge(recorded)
        self._pairs = PairJudge(sides.sizes, sides.graph, top_k=request.top_k)
        self._stack = ExitStack()
        self._stream: Iterator[tuple[tuple[StageKey, Floats | None], float]] = iter(())

    def open(self) -> Iterator[DeviceOpened | PathRejected]:
        """Open the device.

        Raises:
            RejectedError: It is required and cannot be opened.
        """
        try:
            opened = open_engine("opencl", device=self._request.device)
            engine = self._stack.enter_context(opened)
        except BackendError as error:
            yield self._give_up(str(error), None)
            return
        self._stream = timed(self._sides.tensors(engine.backend))
        self.device = DeviceOpened(engine.label, engine.driver)
        yield self.device

    def follow(self, first: FirstSide) -> Iterator[StageParity | PathRejected]:
        """Compute the stage and hold it against the CPU's.

        Raises:
            RejectedError: The device is required and fails.
        """
        if self.rejected is not None:
            return
        try:
            (made, tested), elapsed_s = next(self._stream)
        except BackendError as error:
            yield self._give_up(str(error), first.key)
            return
        assert made == first.key, f"the device made {made} where {first.key} was expected"
        if tested is None or first.tensor is None:  # not computed on either side
            return
        if first.report is None:
            if self._kernels is not None:
                self._kernels.record(first.key, tested)
            self._pairs.note(first.key, tested, first.tensor)
            return
        judged = SideJudgment()
        if self._kernels is not None:
            layout = layout_of(first.key, self._sides.sizes, tested.size)
            judged = self._kernels.judge(first.key, tested, layout, first.budget)
        oracle = against_oracle(self._sides, first, tested)
        stage = self._pairs.judge(
            first.key, tested, first.tensor,
            replace(judged, oracle=oracle, elapsed_s=elapsed_s),
            side_of(first.report, elapsed_s=first.elapsed_s),
        )  # fmt: skip
        self.parity.append(stage)
        yield stage
        if first.key == self._sides.graph.logits:
            yield from self._pass_gate(tested.reshape(-1), first.tensor.reshape(-1))

    def _pass_gate(self, tested: Floats, cpu: Floats) -> Iterator[PathRejected]:
        """Hold the logits to the gate's rule; a required device is refused in the end."""
        tokens = self._sides.header.tokens
        assert tokens is not None
        found = compare_step(tested, cpu, step=0, position=len(tokens) - 1, token=tokens[-1])
        if found.passed:
            return
        stages = [stage for stage in self.parity if stage.fault]
        stages += [stage for stage in self.parity if stage.differs]
        key, reason = self._sides.graph.logits, found.fault
        if stages:
            key = stages[0].key
            reason = f"{found.fault}; {key}: {stages[0].fault or stages[0].reason}"
        self.rejected = PathRejected(reason, key, by_gate=True)
        if not self._request.require_gpu:
            yield self.rejected

    def _give_up(self, reason: str, key: StageKey | None) -> PathRejected:
        self.rejected = PathRejected(reason, key)
        self.close()
        if self._request.require_gpu:
            raise _refusal(self.rejected)
        return self.rejected

    def close(self) -> None:
        """Close the device."""
        self._stream = iter(())
        # A device that has vanished cannot be closed either, and the reason is known.
        with suppress(BackendError):
            self._stack.close()

    def finish(self) -> None:
        """Close the device and say whether it may be missed; see `SecondSide`."""
        self.close()
        if self.rejected is not None and self._request.require_gpu:
            raise _refusal(self.rejected)


def _refusal(rejected: PathRejected) -> RejectedError:
    return RejectedError(f"opencl path rejected: {rejected.line_reason}")


class DumpSide:
    """Another dump, which the trace is held against."""

    def __init__(self, sides: Sides, other: Sides, top_k: int) -> None:
        """Begin before the first stage.

        Args:
            sides: The run.
            other: The other dump, as if it were under test.
            top_k: How many of the largest differences to keep.
        """
        assert sides.trace is not None and other.trace is not None
        self.parity: list[StageParity] = []
        self.device: DeviceOpened | None = None
        self.rejected: PathRejected | None = None
        self._sides = sides
        self._dump = other.trace
        self._judge = StageJudge(other, top_k=0)
        types = {x.sidecar.dtype or "float32" for x in (sides.trace, other.trace)}
        types |= {x.arithmetic.name.upper() for x in (sides, other)}
        self._pairs = PairJudge(
            sides.sizes, sides.graph,
            bound=cumulative_bound(types), top_k=top_k, permuted=True,
        )  # fmt: skip

    def open(self) -> Iterator[DeviceOpened | PathRejected]:
        """Nothing: the files are open."""
        return iter(())

    def follow(self, first: FirstSide) -> Iterator[StageParity | PathRejected]:
        """Read the stage and hold the trace against it."""
        assert first.report is not None, "a trace hands out nothing that nobody asked about"
        started = time.perf_counter()
        dumped = self._dump.read(first.key) if first.key in self._dump else None
        elapsed_s = time.perf_counter() - started
        judged = self._judge.explain(self._judge.judge(first.key, dumped))
        report = replace(judged, budget=first.budget)
        trusted, _ = self._judge.tensors
        side = side_of(report, elapsed_s=elapsed_s)
        if trusted is not None:
            side = replace(side, oracle=against_oracle(self._sides, first, trusted))
        stage = self._pairs.judge(
            first.key, first.tensor, trusted, side_of(first.report, elapsed_s=first.elapsed_s), side
        )
        self.parity.append(stage)
        yield stage

    def close(self) -> None:
        """Nothing: whoever opened the files closes them."""

    def finish(self) -> None:
        """Nothing: there is no gate between dumps."""


def against_oracle(sides: Sides, first: FirstSide, tensor: Floats) -> Comparison | None:
    """A second side's tensor against the oracle's, where the two can be compared."""
    if first.oracle is None or first.oracle.size != tensor.size:
        return None
    layout = layout_of(first.key, sides.sizes, tensor.size)
    pair = (tensor.reshape(-1), first.oracle.reshape(-1))
    a, b = (zero_masked(sides.graph.operation(first.key), x, layout) for x in pair)
    return compare(a, b)
