"""The device's path, and the CPU that takes over from it, never silently.

Every rejection says so in one line: docs/contracts/parity.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np

from aprcore.engines.decode import Decoder, PassOutcome, StepSource, nothing
from aprcore.engines.engine import Engine, open_engine
from aprcore.ground.errors import BackendError
from aprcore.network.stages import Wants
from aprcore.records.parity_report import GATE
from aprcore.runs.parity_gate import DEFAULT_STEPS, compare_step
from aprcore.runs.parity_steps import find_fault

if TYPE_CHECKING:
    from aprcore.models.model import Model

Reject = Callable[[str], None]
"""Told why a device's path is given up; may raise instead of letting the CPU carry on."""


class RejectedError(BackendError):
    """The device's path was rejected, and the CPU may not take over."""


def rejection_line(backend: str, reason: str) -> str:
    """The line that every rejection prints."""
    return f"[{GATE}] {backend} path rejected, attempting fallback: {reason}"


@contextmanager
def open_decoder(
    model: Model, *, use_gpu: bool, device: str | None, threads: int | None, reject: Reject
) -> Iterator[StepSource]:
    """A decoder on the CPU, or on a device as long as it does what the CPU does.

    Args:
        model: An open model.
        use_gpu: Whether to try an OpenCL device; if not, no platform is looked for.
        device: Its name or index; None for the best.
        threads: Threads of the CPU path; None for one per processor.
        reject: Called once if the device's path is given up, with the reason.
    """
    with ExitStack() as stack:
        cpu = stack.enter_context(open_engine("numpy", threads=threads))
        trusted = Decoder(model.graph, model.weights, cpu)
        if not use_gpu:
            yield trusted
            return
        try:
            engine = stack.enter_context(open_engine("opencl", device=device))
        except BackendError as error:
            reject(str(error))
            yield trusted
            return
        tested = Decoder(model.graph, model.weights, engine)
        yield GuardedDecoder(trusted, tested, reject)


class GuardedDecoder:
    """A device's decoder that has to agree with the CPU's in its first steps.

    Both run the prompt and the first decoding steps, on the CPU's choice of tokens; then the device
    goes on alone. If it disagrees, or fails at any time, or its logits are not finite, the CPU goes
    on from that very step.
    """

    def __init__(
        self, trusted: Decoder, tested: Decoder, reject: Reject, steps: int = DEFAULT_STEPS
    ) -> None:
        """Begin with two decoders of one model that were fed nothing.

        Args:
            trusted: The CPU's.
            tested: The device's.
            reject: Called once if the device is given up, with the reason.
            steps: Decoding steps to hold against the CPU after the prompt.
        """
        self._trusted = trusted
        self._tested: Decoder | None = tested
        self._reject = reject
        self._steps = steps
        self._step = 0
        self._fed: tuple[int, ...] = ()

    @property
    def engine(self) -> Engine:
        """What ran the last tokens."""
        return (self._trusted if self._tested is None else self._tested).engine

    def feed(self, tokens: Sequence[int], wants: Wants = nothing) -> PassOutcome:
        """Run the next tokens; see `Decoder.feed`.

        While both sides run, the logits are the CPU's, and the stages are the device's.
        """
        outcome: PassOutcome | str | None = None
        if self._tested is not None:
            outcome = self._try_device(self._tested, tokens, wants)
            if isinstance(outcome, str):
                self._give_up(outcome)
        if not isinstance(outcome, PassOutcome):
            outcome = self._trusted.feed(tokens, wants)
        self._fed += tuple(tokens)
        self._step += 1
        return outcome

    def _try_device(
        self, tested: Decoder, tokens: Sequence[int], wants: Wants
    ) -> PassOutcome | str:
        """What the device gives, or why it is to be given up."""
        try:
            if self._step > self._steps:
                return _if_finite(tested.feed(tokens, wants), self._step)
            before = self._trusted.copy(), tested.copy()
            theirs = tested.feed(tokens, wants)
            ours = self._trusted.feed(tokens)
            found = compare_step(
                theirs.logits, ours.logits, step=self._step,
                position=len(self._fed) + len(tokens) - 1, token=tokens[-1],
            )  # fmt: skip
            if found.passed:
                return PassOutcome(ours.logits, theirs.stages)
            self._trusted = before[0].copy()
            fault = find_fault(*before, tokens, self._step)
        except BackendError as error:
            return str(error)
        return found.fault if fault is None else f"{found.fault}; {fault.describe()}"

    def _give_up(self, reason: str) -> None:
        """Bring the CPU to where the device was before this step."""
        self._tested = None
        self._reject(reason)
        missed = self._fed[len(self._trusted.tokens) :]
        if missed:
            self._trusted.feed(missed)


def _if_finite(outcome: PassOutcome, step: int) -> PassOutcome | str:
    """A step of a device that goes alone, or why it cannot be used: NaN chooses no token."""
    lost = int(np.count_nonzero(~np.isfinite(outcome.logits)))
    if not lost:
        return outcome
    return f"step {step}: logits are NaN or infinite: {lost} of {outcome.logits.size}"
