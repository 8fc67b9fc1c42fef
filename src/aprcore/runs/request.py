"""What a user asks to run. Light, so that the screen can hold one before the engine is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aprcore.dumps.plan import Plan
    from aprcore.runs.budget import Budgets

# What a saved run is called: see `aprcore.records.saved_run`.
SUFFIX = ".aprx"

# How many of the largest differences a report keeps; the screen shows up to as many.
TOP_K = 200
# A failing stage of a large model takes about a second to search.
SEARCHED = 16


@dataclass(frozen=True, slots=True)
class Request:
    """What to run and what to hold it against.

    Attributes:
        saved: A run that was saved; nothing is run then, and nothing else is named.
        model: A .apr or .gguf file or a Hugging Face directory.
        oracle: The reference: a directory of stage files, or one .safetensors, .npz or .pt file.
        trace: Another engine's dump, judged in place of a trace of `model`.
        prompt: Text to run; default: the tokens that the oracle recorded.
        tokens: Token ids to run, instead of a prompt.
        plan: Stages and layers; default: those of the oracle, or all.
        threads: Threads of the CPU path; default: one per processor.
        arithmetic: What the engine behind `trace` computes in, in the words of
            `aprcore.engines.arithmetic.stated_arithmetic`; what neither it nor the sidecar says is
            found out. "auto": find out all of it.
        engine: A name in `aprcore.engines.arithmetic.ENGINES`, whose arithmetic is known.
        names: A TOML file that says what a dump in one file calls the stages.
        shards: The dumps of all ranks of a tensor-parallel engine, in order, joined to one; `trace`
            is then the first of them.
        row: Which sequence of a batch, where a dump holds several.
        reference_weights: The float model that a quantised one was made of.
        budgets: How large an error of its own is tolerated at a stage.
        strict: Whether an error beyond its budget fails even where rounding explains it.
        cumulative_only: Compare both sides and leave the model and kernel judgments out; about
            three times faster.
        causes: For how many stages the whole catalogue of causes is tried; None: for every one.
            What explained a stage is tried on the same stage of other layers all the same. A
            quarter of them may be spent in vain on stages of one name.
        top_k: How many of the largest differences to keep per stage.
        gpu: Whether `model` runs on an OpenCL device as well, held against the CPU stage by stage.
        require_gpu: Whether the run ends where the CPU would carry on without the device.
        device: The name or index of the device; None for the best.
        against: A second dump, to hold `trace` against stage by stage.
        notes: What the user should read of how it came to be.
    """

    model: Path | None = None
    oracle: Path | None = None
    trace: Path | None = None
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    plan: Plan | None = None
    threads: int | None = None
    arithmetic: str | None = None
    engine: str | None = None
    names: Path | None = None
    shards: tuple[Path, ...] = ()
    row: int | None = None
    reference_weights: Path | None = None
    budgets: Budgets | None = None
    strict: bool = False
    cumulative_only: bool = False
    causes: int | None = SEARCHED
    top_k: int = TOP_K
    saved: Path | None = None
    gpu: bool = False
    require_gpu: bool = False
    device: str | None = None
    against: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def uses_device(self) -> bool:
        """Whether anything asks for an OpenCL device."""
        return self.gpu or self.require_gpu or self.device is not None


def is_saved_run(path: Path) -> bool:
    """Whether a path is meant to be a saved run."""
    return path.suffix == SUFFIX
