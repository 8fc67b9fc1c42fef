"""What a sweep runs: one frozen record per case, with an identity that follows from its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from aprcore.dumps.plan import Plan, parse_layers, parse_stages
from aprcore.records.environment import format_command
from aprcore.runs.budget import NO_BUDGETS, Budgets
from aprcore.runs.request import Request
from aprcore.sweep.files import fetch

# Enters every id: a release that may judge otherwise finds no results of an older one.
CASE_SCHEMA = "aprtui-sweep-case-v1"

# What cases are told apart by, in the order of the table's columns.
AXES = ("model", "trace", "oracle", "prompt", "backend", "layers")

BACKENDS = ("numpy", "opencl")
# In place of a backend, where another engine's dump is judged.
DUMP = "dump"
# In place of a prompt, where the tokens are those that the oracle or the dump recorded.
RECORDED = "recorded"
ABSENT = "-"

# Enough of an id to tell apart the cases of any sweep that a person reads.
SHORT_ID = 8


@dataclass(frozen=True, slots=True)
class Source:
    """A file or directory of a case.

    Attributes:
        name: What the table calls it.
        location: A path or a URL.
        mark: Its fingerprint; None if it could not be seen when the sweep was planned.
    """

    name: str
    location: str
    mark: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a case runs on: text, or token ids, or neither for what the oracle recorded."""

    name: str = RECORDED
    text: str | None = None
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class CaseSettings:
    """What is the same for all cases of one table; see `aprcore.runs.request.Request`.

    Attributes:
        budget_options, tolerances: Where `budgets` come from, as on the command line.
        timeout_s: How long a case may take. No part of its id: a verdict holds whatever the limit
            was.
    """

    stages: str | None = None
    device: str | None = None
    arithmetic: str | None = None
    names: Source | None = None
    reference_weights: Source | None = None
    budgets: Budgets = NO_BUDGETS
    budget_options: tuple[str, ...] = ()
    tolerances: str | None = None
    strict: bool = False
    cumulative_only: bool = False
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One bisect of a sweep.

    Attributes:
        model: The model; None where two dumps are compared.
        trace: Another engine's dump, judged in place of a trace of the model.
        oracle: The reference; None for the kernel judgment alone.
        prompt: What is run.
        backend: One of `BACKENDS`, or `DUMP` for a trace.
        layers: As on the command line; None for the oracle's.
        settings: The rest.
        id: A digest of all that determines the result, the files' sizes and times included.
    """

    model: Source | None
    trace: Source | None
    oracle: Source | None
    prompt: Prompt
    backend: str
    layers: str | None
    settings: CaseSettings
    id: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps(self._determinants(), sort_keys=True)
        object.__setattr__(self, "id", hashlib.sha256(text.encode()).hexdigest()[:32])

    def _determinants(self) -> list[object]:
        settings = self.settings
        sources = [None if s is None else (s.location, s.mark) for s in self._slots]
        return [
            CASE_SCHEMA, sources,
            self.prompt.text, self.prompt.tokens, self.backend, self.layers, settings.stages,
            self.device, settings.arithmetic, asdict(settings.budgets), settings.strict,
            settings.cumulative_only,
        ]  # fmt: skip

    @property
    def device(self) -> str | None:
        """The device, where one is used: a table's setting is for its other backends too."""
        return self.settings.device if self.backend == "opencl" else None

    @property
    def short_id(self) -> str:
        """The id as the table shows it."""
        return self.id[:SHORT_ID]

    @property
    def axes(self) -> Mapping[str, str]:
        """The case's name on every axis."""
        named = (ABSENT if s is None else s.name for s in (self.model, self.trace, self.oracle))
        return dict(zip(AXES, (*named, self.prompt.name, self.backend, self.layers or ABSENT)))

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every file and directory that it reads."""
        return tuple(source for source in self._slots if source is not None)

    @property
    def _slots(self) -> tuple[Source | None, ...]:
        settings = self.settings
        return (
            self.model, self.trace, self.oracle, settings.names, settings.reference_weights
        )  # fmt: skip

    def command(self) -> str:
        """The command line that runs this case alone, for a shell."""
        words = ["aprtui", "bisect"]
        if self.model is not None:
            words.append(self.model.location)
        settings, prompt = self.settings, self.prompt
        sources = {
            "--oracle": self.oracle, "--trace": self.trace, "--names": settings.names,
            "--reference-weights": settings.reference_weights,
        }  # fmt: skip
        for option, source in sources.items():
            if source is not None:
                words += [option, source.location]
        values = {
            "--prompt": prompt.text,
            "--tokens": None if prompt.tokens is None else ",".join(map(str, prompt.tokens)),
            "--layers": self.layers,
            "--stages": settings.stages,
            "--device": self.device,
            "--arithmetic": settings.arithmetic,
            "--tolerances": settings.tolerances,
        }
        for option, value in values.items():
            if value is not None:
                words += [option, value]
        for budget in settings.budget_options:
            words += ["--budget", budget]
        flags = {
            "--gpu": self.backend == "opencl",
            "--strict": settings.strict,
            "--cumulative-only": settings.cumulative_only,
        }
        words += [flag for flag, is_set in flags.items() if is_set]
        return format_command(words)


def make_request(case: Case, cache: Path, threads: int) -> Request:
    """The run of a case, with what is behind a URL copied into `cache`.

    Raises:
        AprError: A file cannot be had, or is not what it was when the sweep was planned.
    """

    def local(source: Source | None, *, is_model: bool = False) -> Path | None:
        if source is None:
            return None
        return fetch(source.location, source.mark, cache, is_model=is_model)

    settings = case.settings
    plan = None
    if case.layers is not None or settings.stages is not None:
        plan = Plan(parse_stages(settings.stages or "all"), parse_layers(case.layers or "all"))
    return Request(
        model=local(case.model, is_model=True),
        oracle=local(case.oracle),
        trace=local(case.trace),
        prompt=case.prompt.text,
        tokens=case.prompt.tokens,
        plan=plan,
        threads=threads,
        arithmetic=settings.arithmetic,
        names=local(settings.names),
        reference_weights=local(settings.reference_weights),
        budgets=settings.budgets,
        strict=settings.strict,
        cumulative_only=settings.cumulative_only,
        # Not `require_gpu`: that would raise where the gate finds what a sweep is looking for. A
        # fallback is told from the device's result in `aprcore.sweep.results`.
        gpu=case.backend == "opencl",
        device=case.device,
    )
