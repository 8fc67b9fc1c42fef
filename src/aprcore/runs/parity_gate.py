"""The gate: whether another backend says the same as the CPU, step by step.

Both sides run the prompt and then decode, always on the token that the CPU chooses, so that one
different choice does not make everything after it incomparable. The bounds are
those of docs/formats.md, "JSON of the commands".
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.plan import DEFAULT_PROMPT
from aprcore.engines.decode import Decoder, prompt_tokens
from aprcore.engines.engine import Engine, open_engine
from aprcore.ground.errors import PlanError
from aprcore.judging.compare import compare
from aprcore.judging.logits import compare_logits
from aprcore.judging.verdict import FLOAT32_BOUND
from aprcore.records.parity import StageFault, StageParity
from aprcore.records.parity_report import (
    CACHE_BOUND,
    COSINE_BOUND,
    CacheParity,
    ParityEvent,
    ParityHeader,
    ParityReport,
    StepParity,
)
from aprcore.runs.parity_steps import compare_stages, find_cache_fault, find_fault

if TYPE_CHECKING:
    from aprcore.models.model import Model

Floats = NDArray[np.floating[Any]]

DEFAULT_STEPS, MOST_STEPS = 3, 16


@dataclass(frozen=True, slots=True)
class ParityRequest:
    """What to run on both sides.

    Attributes:
        model: A model, as for the explorer.
        prompt: Text to begin with; default: `DEFAULT_PROMPT`.
        tokens: Token ids to begin with, instead of a prompt.
        steps: Decoding steps after the prompt, 1 to `MOST_STEPS`.
        against: The backend under test, one of `aprcore.engines.engine.ENGINES`.
        device: The name or index of its device; None for the best.
        threads: Threads of the CPU path; None for one per processor.
        strict: Reject what float32 does not explain as well, though the gate lets it pass.
        stages: Compare every stage of every step, and reject where a kernel is wrong. Takes
            several times as long.
    """

    model: Path
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    steps: int = DEFAULT_STEPS
    against: str = "opencl"
    device: str | None = None
    threads: int | None = None
    strict: bool = False
    stages: bool = False


def check_steps(steps: int) -> int:
    """The number of steps as given.

    Raises:
        PlanError: It is not one that the gate runs.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise PlanError(f"--steps {steps} is out of range", hint=f"choose 1 to {MOST_STEPS}")
    return steps


def compare_step(
    tested: Floats, cpu: Floats, *, step: int, position: int, token: int,
    tested_s: float = 0.0, cpu_s: float = 0.0, strict: bool = False,
) -> StepParity:  # fmt: skip
    """Hold one step's logits against the CPU's, [V] each.

    `strict` rejects a relative L2 beyond `FLOAT32_BOUND` as well.
    """
    found = compare(tested, cpu)
    logits = compare_logits(tested, cpu)
    fault = ""
    if found.nonfinite_a or found.nonfinite_b:
        sides = f"{found.nonfinite_a} of the tested side's, {found.nonfinite_b} of the CPU's"
        fault = f"logits are NaN or infinite: {sides}"
    elif not found.cosine >= COSINE_BOUND:
        fault = f"cosine {found.cosine:.7f} of the logits is below {COSINE_BOUND}"
    elif strict and found.relative_l2 > FLOAT32_BOUND:
        fault = f"relative L2 {found.relative_l2:.3g} of the logits exceeds {FLOAT32_BOUND:g}"
    elif not (logits.agree or logits.near_tie):
        fault = (
            f"chooses token {logits.argmax_a}, the CPU {logits.argmax_b},"
            f" at a relative gap of {logits.gap:.3g}"
        )
    return StepParity(
        step, position, token, found.cosine, found.relative_l2, found.max_abs_diff,
        logits.argmax_b, logits.argmax_a, logits.gap, logits.near_tie, cpu_s, tested_s,
        f"step {step}: {fault}" if fault else "", found.nonfinite_b, found.nonfinite_a,
    )  # fmt: skip


def check_parity(
    request: ParityRequest, cpu: Engine | None = None, tested: Engine | None = None
) -> Iterator[ParityEvent]:
    """Run both sides and stream what is found.

    Args:
        request: What to run.
        cpu, tested: Open engines to use in place of those that the request names.

    Yields:
        One `ParityHeader`, a `StepParity` per step until one is rejected, after a `StageParity` per
        stage if those are asked for, a `CacheParity` per side if no step was rejected, then the
        `ParityReport`.

    Raises:
        AprError: The arguments, the model or the device are unusable.
    """
    from aprcore.models.model import open_model

    check_steps(request.steps)
    with ExitStack() as stack:
        model = stack.enter_context(open_model(request.model))
        prompt = DEFAULT_PROMPT if request.prompt is None else request.prompt
        tokens = prompt_tokens(model, prompt, request.tokens)
        if cpu is None:
            cpu = stack.enter_context(open_engine("numpy", threads=request.threads))
        if tested is None:
            opened = open_engine(request.against, device=request.device, threads=request.threads)
            tested = stack.enter_context(opened)
        header = ParityHeader(
            model.path.name, prompt if request.tokens is None else None, tokens, request.steps,
            cpu, tested,
        )  # fmt: skip
        yield header
        yield from _Gate(model, header, request).run()


class _Gate:
    """One run of the gate, with what has to be remembered to look back."""

    def __init__(self, model: Model, header: ParityHeader, request: ParityRequest) -> None:
        self._header = header
        self._request = request
        self._cpu = Decoder(model.graph, model.weights, header.cpu)
        self._tested = Decoder(model.graph, model.weights, header.tested)
        self._steps: list[StepParity] = []
        self._stages: list[StageParity] = []
        self._caches: list[CacheParity] = []
        self._first: StageFault | None = None
        # Logits of each step, by side.
        self._logits: dict[Decoder, list[Floats]] = {self._cpu: [], self._tested: []}

    def run(self) -> Iterator[ParityEvent]:
        """Every event after the header."""
        started = time.perf_counter()
        fed: tuple[int, ...] = self._header.tokens
        for step in range(self._header.steps + 1):
            yield from self._step(step, fed)
            if not self._steps[-1].passed:
                break
            fed = (self._steps[-1].argmax_cpu,)
        else:
            for decoder in (self._cpu, self._tested):
                self._caches.append(self._hold_against_full_pass(decoder))
                yield self._caches[-1]
            self._first = next((c.first for c in self._caches if not c.passed), None)
        yield ParityReport(
            self._header, tuple(self._steps), tuple(self._caches), self._first,
            time.perf_counter() - started, tuple(self._stages),
        )  # fmt: skip

    def _step(self, step: int, tokens: Sequence[int]) -> Iterator[StageParity | StepParity]:
        before = self._cpu.copy(), self._tested.copy()
        times = []
        for decoder, logits in self._logits.items():
            started = time.perf_counter()
            logits.append(decoder.feed(tokens).logits)
            times.append(time.perf_counter() - started)
        ours, theirs = (self._logits[decoder][-1] for decoder in (self._cpu, self._tested))
        position = len(self._cpu.tokens) - 1
        result = compare_step(
            theirs, ours, step=step, position=position, token=tokens[-1],
            cpu_s=times[0], tested_s=times[1], strict=self._request.strict,
        )  # fmt: skip
        if self._request.stages:
            first = len(self._stages)
            for stage in compare_stages(*before, tokens, step):
                self._stages.append(stage)
                yield stage
            wrong = any(stage.fault for stage in self._stages[first:])
            if result.passed and wrong:
                fault = f"step {step}: a kernel is wrong, though the logits pass"
                result = replace(result, fault=fault)
        if not result.passed:
            self._first = find_fault(*before, tokens, step)
        self._steps.append(result)
        yield result

    def _hold_against_full_pass(self, decoder: Decoder) -> CacheParity:
        """Whether the last step's logits are those of a full pass over the same tokens."""
        error = self._distance(decoder, len(self._header.tokens) + self._header.steps)
        side, count = decoder.engine.backend.name, len(decoder.tokens)
        if error <= CACHE_BOUND:
            return CacheParity(side, count, error)
        fault = (
            f"{side}: decoding gives other logits than one pass over the same {count} tokens:"
            f" relative L2 {error:.3g} where {CACHE_BOUND:g} is allowed"
        )
        return CacheParity(side, count, error, fault, self._find_cache_fault(decoder))

    def _distance(self, decoder: Decoder, num_tokens: int) -> float:
        """Relative L2 of a step's logits against those of a full pass over so many tokens."""
        full = decoder.fresh().feed(decoder.tokens[:num_tokens]).logits
        step = num_tokens - len(self._header.tokens)
        found = compare(self._logits[decoder][step], full)
        return float("inf") if found.nonfinite_a or found.nonfinite_b else found.relative_l2

    def _find_cache_fault(self, decoder: Decoder) -> StageFault | None:
        """Where decoding first parts from the full pass; runs the steps again one by one."""
        again = decoder.fresh()
        again.feed(self._header.tokens)
        for step in range(1, self._header.steps + 1):
            history, token = again.tokens, decoder.tokens[len(again.tokens)]
            if not self._distance(decoder, len(history) + 1) <= CACHE_BOUND:
                return find_cache_fault(again, [token], history, step)
            again.feed([token])
        return None
