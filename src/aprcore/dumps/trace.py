"""Recording a trace: run a model and write the chosen stage tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.plan import Plan
from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.writer import TraceWriter
from aprcore.engines.forward import needed_keys, trace
from aprcore.engines.numpy import NumpyBackend
from aprcore.ground.errors import PlanError
from aprcore.network.stages import StageKey

if TYPE_CHECKING:
    from aprcore.engines.decode import StepTraced
    from aprcore.models.model import Model

Progress = Callable[[StageKey], None]


def package_versions(*names: str) -> dict[str, str]:
    """Versions of installed packages, for a sidecar; those that are absent are left out."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def trace_sidecar(model: Model, tokens: Sequence[int], prompt: str | None) -> Sidecar:
    """What a trace of `model` on the CPU path says of itself."""
    return Sidecar(
        tokens=tuple(tokens),
        prompt=prompt,
        positions=tuple(range(len(tokens))),
        model={
            "file": model.path.name,
            "sha256": model.sha256,
            "size_bytes": sum(file.size_bytes for file in model.files),
            "architecture": model.config.architecture,
            "num_layers": model.config.num_layers,
        },
        backend="numpy",
        device="cpu",
        arithmetic="f32",
        dtype="float32",
        attention="eager",
        versions=package_versions("aprtui", "numpy"),
    )


def record_trace(
    model: Model,
    tokens: Sequence[int],
    *,
    prompt: str | None = None,
    plan: Plan | None = None,
    directory: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[int, NDArray[np.float32]]:
    """Run a full pass; write the tensors of `plan` to `directory` if one is given.

    The arithmetic is the same whether or not anything is written.

    Args:
        model: An open model.
        tokens: Token ids, [T], within the vocabulary.
        prompt: The text they came from, for the sidecar.
        plan: What to write.
        directory: Where to.
        threads: Threads; None for one per processor.
        progress: Called with every stage that was computed and is wanted.

    Returns:
        The number of tensors written, and the logits of the last token, [V].

    Raises:
        PlanError: The plan selects no stage of this model.
        TraceError: The directory cannot be written.
    """
    plan = Plan() if plan is None else plan
    kept = [key for key in needed_keys(model.graph, plan.wants) if plan.wants(key)]
    if directory is not None and not kept:
        raise PlanError(f"the plan selects no stage of {model.path.name}")
    logits = np.empty(0, dtype=np.float32)
    writer = None if directory is None else TraceWriter(
        directory, trace_sidecar(model, tokens, prompt)
    )  # fmt: skip

    def run(write: Callable[[StageKey, NDArray[Any]], None] | None) -> None:
        nonlocal logits
        backend = NumpyBackend(threads)
        last = model.graph.logits
        wanted = {*kept, last} if write is not None else {last}
        stream = trace(model.graph, model.weights, backend, tokens, wanted.__contains__)
        for key, values in stream:
            if key == last:
                logits = values
            if write is not None and plan.wants(key):
                write(key, values)
            if progress is not None:
                progress(key)

    if writer is None:
        run(None)
        return 0, logits
    with writer:
        run(writer.write)
    return len(kept), logits


def write_step(directory: Path, model: Model, step: StepTraced, prompt: str | None) -> int:
    """Write the stages of one decoding step, and return how many.

    The sidecar's `positions` begin where `history` ends: both together are the whole text.

    Raises:
        TraceError: The directory cannot be written.
    """
    first = len(step.history)
    engine = step.engine
    backend_packages = ("pyopencl",) if engine.backend.name == "opencl" else ()
    sidecar = replace(
        trace_sidecar(model, step.tokens, prompt),
        history=step.history,
        positions=tuple(range(first, first + len(step.tokens))),
        backend=engine.backend.name,
        device=engine.device,
        driver=engine.driver,
        versions=package_versions("aprtui", "numpy", *backend_packages),
    )
    with TraceWriter(directory, sidecar) as writer:
        for key, values in step.stages.items():
            writer.write(key, values)
    return len(step.stages)
