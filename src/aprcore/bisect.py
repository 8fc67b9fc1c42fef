"""The whole run: two sides, stage by stage, into a `Report`.

The screen and the headless commands are both driven by `bisect`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from aprcore.budget import NO_BUDGETS, Budgets, run_dtype, settle
from aprcore.plan import Plan
from aprcore.report import Report, RunHeader, StageReport
from aprcore.sides import open_sides
from aprcore.stage_judge import StageJudge

# How many of the largest differences a report keeps; the screen shows up to as many.
TOP_K = 200


@dataclass(frozen=True, slots=True)
class Request:
    """What to run and what to hold it against.

    Attributes:
        model: A .apr or .gguf file or a Hugging Face directory.
        oracle: The reference: a directory of stage files, or one .safetensors, .npz or .pt file.
        trace: Another engine's dump, judged in place of a trace of `model`.
        prompt: Text to run; default: the tokens that the oracle recorded.
        tokens: Token ids to run, instead of a prompt.
        plan: Stages and layers; default: those of the oracle, or all.
        threads: Threads of the CPU path; default: one per processor.
        arithmetic: Precision that the engine behind `trace` computes in; default: what its sidecar
            says, else the one that explains it.
        names: A TOML file that says what a dump in one file calls the stages.
        reference_weights: The float model that a quantised one was made of.
        budgets: How large an error of its own is tolerated at a stage.
        strict: Whether an error beyond its budget fails even where rounding explains it.
        cumulative_only: Compare both sides and leave the model and kernel judgments out; about
            three times faster.
        top_k: How many of the largest differences to keep per stage.
    """

    model: Path | None = None
    oracle: Path | None = None
    trace: Path | None = None
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    plan: Plan | None = None
    threads: int | None = None
    arithmetic: str | None = None
    names: Path | None = None
    reference_weights: Path | None = None
    budgets: Budgets = NO_BUDGETS
    strict: bool = False
    cumulative_only: bool = False
    top_k: int = TOP_K


def bisect(request: Request) -> Iterator[RunHeader | StageReport | Report]:
    """Run a request and stream what it finds.

    A tensor is compared as it is produced and then dropped. Closing the generator ends the run.

    Yields:
        One `RunHeader`, a `StageReport` per stage in the order of computation, then the `Report`.

    Raises:
        AprError: The arguments or a file are unusable.
    """
    started = time.perf_counter()
    with open_sides(request) as sides:
        request.budgets.check(sides.header.num_layers)
        dtype = run_dtype(sides.header)
        yield sides.header
        judge = StageJudge(sides, request.top_k)
        rows = set(sides.header.keys)
        results = []
        lap = time.perf_counter()
        for key, tensor in sides.tensors():
            if key not in rows:
                assert tensor is not None
                judge.record(key, tensor)
                continue
            result = judge.judge(key, tensor)
            result = settle(result, request.budgets.find(key, dtype), strict=request.strict)
            now = time.perf_counter()
            result, lap = replace(result, elapsed_s=now - lap), now
            results.append(result)
            yield result
    yield Report(sides.header, tuple(results), time.perf_counter() - started)


def run(request: Request) -> Report:
    """Run a request to its end."""
    *_, report = bisect(request)
    assert isinstance(report, Report)
    return report
