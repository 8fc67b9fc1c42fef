"""Which stages and layers to keep, and where they go: the arguments of a trace.

Everything here is checked before a model is opened, so that a typing error fails at once.
How they are written: docs/formats.md, "Stages on the command line".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from aprcore.ground.errors import PlanError
from aprcore.network.graph import find_stage, known_stages
from aprcore.network.stages import StageKey

DEFAULT_PROMPT = "What is 2+2?"

# No id or layer has more; Python itself refuses to convert more than 4300.
MOST_DIGITS = 18


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice of tensors.

    Attributes:
        stages: Stage names, or None for all.
        layers: Layers, or None for all; whole-model stages are not bound by it.
    """

    stages: tuple[str, ...] | None = None
    layers: range | None = None

    def wants(self, key: StageKey) -> bool:
        """Whether the plan keeps this tensor."""
        if self.stages is not None and key.stage not in self.stages:
            return False
        return key.layer is None or self.layers is None or key.layer in self.layers


def parse_stages(text: str) -> tuple[str, ...]:
    """A comma-separated list of stage names, or "all", in any case.

    Duplicates are kept, in order.

    Raises:
        PlanError: An item is empty or names no stage.
    """
    if text.strip().lower() == "all":
        return tuple(known_stages())
    names = []
    for item in text.split(","):
        if not item.strip():
            raise PlanError(
                f"empty stage name in {text!r}", hint=f"stages are all, {', '.join(known_stages())}"
            )
        names.append(find_stage(item).name)
    return tuple(names)


def parse_layers(text: str) -> range | None:
    """A half-open range START..END, or "all" (None).

    Raises:
        PlanError: The text is not such a range, or END is not greater than START.
    """
    if text.strip().lower() == "all":
        return None
    match = re.fullmatch(r"\s*(\d+)\s*\.\.\s*(\d+)\s*", text, re.ASCII)
    if not match or max(map(len, match.groups())) > MOST_DIGITS:
        raise PlanError(
            f"cannot read the layer range {text!r}",
            hint="write START..END, END exclusive, such as 0..4",
        )
    start, end = int(match[1]), int(match[2])
    if end <= start:
        raise PlanError(
            f"the layer range {text!r} is empty: END ({end}) must be greater than START ({start})"
        )
    return range(start, end)


def check_layers(layers: range | None, num_layers: int) -> None:
    """Hold a range of layers against a model; an END beyond the last layer means the last.

    Raises:
        PlanError: It holds no layer of the model.
    """
    if layers is not None and layers.start >= num_layers:
        raise PlanError(
            f"layers {layers.start}..{layers.stop} were asked for and the model has {num_layers}",
            hint=f"layers are 0..{num_layers}",
        )


def parse_tokens(text: str) -> tuple[int, ...]:
    """Comma-separated token ids, with or without brackets.

    Raises:
        PlanError: The list is empty or an item is no non-negative integer.
    """
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    items = [item.strip() for item in inner.split(",")]
    for item in items:
        if not (item.isascii() and item.isdigit() and len(item) <= MOST_DIGITS):
            raise PlanError(
                f"{item!r} in --tokens {text!r} is not a token id",
                hint="write ids separated by commas, such as 3838,374,220",
            )
    return tuple(int(item) for item in items)


def check_prompt(prompt: str) -> str:
    """A prompt as given.

    Raises:
        PlanError: It is empty; what a tokenizer adds of its own is no input.
    """
    if not prompt:
        raise PlanError("the prompt is empty", hint="give some text, or ids with --tokens")
    return prompt


def default_trace_directory(model: Path) -> Path:
    """`<model-stem>-trace` beside the model."""
    resolved = model.resolve()
    return resolved.parent / f"{resolved.stem if resolved.is_file() else resolved.name}-trace"
