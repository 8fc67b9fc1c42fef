"""What a user asks to run. Light, so that the screen can hold one before the engine is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aprcore.plan import Plan

if TYPE_CHECKING:
    from aprcore.budget import Budgets

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
    budgets: Budgets | None = None
    strict: bool = False
    cumulative_only: bool = False
    top_k: int = TOP_K
