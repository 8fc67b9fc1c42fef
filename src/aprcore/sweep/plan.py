"""CASES.toml: axes whose every combination is a case.

```toml
[defaults]                         # for every table below that does not say otherwise
stages = "all"

[[matrix]]
models = ["q4.gguf", { path = "s3://bucket/q8.gguf", name = "q8" }]
oracles = ["stages/{prompt}"]      # {model} and {prompt} stand for their names
prompts = [{ name = "sum", text = "What is 2+2?" }, [3838, 374, 220]]
backends = ["numpy", "opencl"]
layers = ["0..4", "all"]

[[case]]                           # one alone
model = "other.apr"
oracle = "other-stages"
```

Everything is checked before a file is opened. Relative paths start at the file's own folder.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from aprcore.dumps.plan import parse_layers, parse_stages
from aprcore.engines.arithmetic import stated_arithmetic
from aprcore.ground.errors import PlanError
from aprcore.ground.fields import convert, read_toml
from aprcore.ground.home import expand_user
from aprcore.runs.budget import parse_budgets
from aprcore.sweep.cases import BACKENDS, DUMP, Case, CaseSettings, Prompt, Source
from aprcore.sweep.files import base_name, fingerprint, is_url

# A slip of the pen in a matrix should not fill the memory.
MOST_CASES = 100_000

Parsed = TypeVar("Parsed")

_some = msgspec.Meta(min_length=1)
Words = Annotated[str, _some]
Tokens = Annotated[tuple[Annotated[int, msgspec.Meta(ge=0)], ...], _some]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=sys.float_info.max)]


class Named(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An entry of an axis that is a table: its name, and the oracle that is its own."""

    name: Words | None = None
    oracle: Words | None = None


class NamedModel(Named):
    """An entry of `models`."""

    path: Words


class NamedPrompt(Named):
    """An entry of `prompts`: one of the two."""

    text: Words | None = None
    tokens: Tokens | None = None


class Options(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What any table may say, and [defaults] for all of them."""

    stages: Words | None = None
    device: Words | None = None
    arithmetic: Words | None = None
    names: Words | None = None
    reference_weights: Words | None = None
    tolerances: Words | None = None
    budgets: tuple[Words, ...] = ()
    strict: bool = False
    cumulative_only: bool = False
    timeout: Seconds | None = None


class Single(Options):
    """A [[case]]."""

    model: Words | NamedModel | None = None
    trace: Words | None = None
    oracle: Words | None = None
    prompt: Words | Tokens | NamedPrompt | None = None
    tokens: Tokens | None = None
    backend: Words | None = None
    layers: Words | None = None


class Matrix(Options):
    """A [[matrix]]: the values of every axis, where it has any."""

    models: Annotated[tuple[Words | NamedModel, ...], _some] | None = None
    traces: Annotated[tuple[Words, ...], _some] | None = None
    oracles: Annotated[tuple[Words, ...], _some] | None = None
    prompts: Annotated[tuple[Words | Tokens | NamedPrompt, ...], _some] | None = None
    backends: Annotated[tuple[Words, ...], _some] | None = None
    layers: Annotated[tuple[Words, ...], _some] | None = None


class CasesFile(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file; its tables are checked one by one, after the defaults were put in."""

    defaults: dict[str, Any] = {}
    matrix: list[dict[str, Any]] = []
    case: list[dict[str, Any]] = []


# An axis and what a [[case]] calls it.
_PLURALS = {"model": "models", "trace": "traces", "oracle": "oracles", "prompt": "prompts",
            "tokens": "prompts", "backend": "backends", "layers": "layers"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sweep:
    """The job list.

    Attributes:
        path: The file it was read from.
        cases: Every case once, in the order of the file.
        repeated: How many more cases the file asks for that are the same as one of these.
    """

    path: Path
    cases: tuple[Case, ...]
    repeated: int = 0

    @property
    def unseen(self) -> tuple[str, ...]:
        """Locations of which nothing can be seen from here."""
        sources = (source for case in self.cases for source in case.sources)
        return tuple(dict.fromkeys(s.location for s in sources if s.mark is None))


def read_sweep(path: Path, *, timeout_s: float | None = None) -> Sweep:
    """The cases of a file, with the fingerprints of what they read.

    Args:
        path: The file.
        timeout_s: How long each case may take, whatever the file says; None for what it says.

    Raises:
        FormatError: The file cannot be read or is not TOML.
        PlanError: A key is unknown or malformed, or there is no case, or far too many.
        UnsupportedError: It has a URL, and fsspec is not installed.
    """
    held = convert(read_toml(path), CasesFile, path, error=PlanError)
    convert(held.defaults, Options, path, prefix="defaults: ", error=PlanError)
    cases: list[Case] = []
    for number, table in enumerate(held.matrix, 1):
        cases += _Table(path, f"matrix {number}", held.defaults | table).expand(len(cases))
    for number, table in enumerate(held.case, 1):
        name = f"case {number}"
        single = convert(table, Single, path, prefix=f"{name}: ", error=PlanError)
        if single.prompt is not None and single.tokens is not None:
            raise PlanError(f"{name}: 'prompt' and 'tokens' contradict each other", where=path,
                            hint="leave one out")  # fmt: skip
        # A matrix with one value on every axis.
        wide = {_PLURALS.get(key, key): [value] if key in _PLURALS else value
                for key, value in table.items()}  # fmt: skip
        cases += _Table(path, name, held.defaults | wide).expand(len(cases))
    if not cases:
        raise PlanError("has no case", where=path, hint="write a [[matrix]] with models")
    return _finish(path, cases, timeout_s)


class _Table:
    """One [[matrix]], whose values are put together."""

    def __init__(self, path: Path, name: str, table: Mapping[str, Any]) -> None:
        self._path = path
        self._name = name
        self._held = convert(table, Matrix, path, prefix=f"{name}: ", error=PlanError)

    def expand(self, before: int) -> list[Case]:
        """Every combination of the axes, the last one running fastest.

        Args:
            before: How many cases the file has before it.

        Raises:
            PlanError: The values contradict each other, or there are too many.
        """
        held = self._held
        models = [self._model(entry) for entry in held.models or ()]
        prompts = [self._prompt(entry) for entry in held.prompts or ()]
        settings = self._settings()
        self._check_axes({oracle for _, oracle in models}, {oracle for _, oracle in prompts})
        axes: tuple[Sequence[Any], ...] = (
            models or [(None, None)], held.traces or [None], held.oracles or [None],
            prompts or [(Prompt(), None)], held.backends or [BACKENDS[0]], held.layers or [None],
        )  # fmt: skip
        if before + math.prod(map(len, axes)) > MOST_CASES:
            raise self._fault(f"makes more than {MOST_CASES} cases", "split the file")
        return [
            Case(
                model=model,
                trace=self._fill(trace, model, prompt),
                oracle=self._fill(of_prompt or of_model or oracle, model, prompt),
                prompt=prompt,
                backend=backend if trace is None else DUMP,
                layers=layers,
                settings=settings,
            )
            for (model, of_model), trace, oracle, (prompt, of_prompt), backend, layers
            in itertools.product(*axes)
        ]  # fmt: skip

    def _check_axes(self, of_models: set[str | None], of_prompts: set[str | None]) -> None:
        """Hold the axes, and the oracles that models and prompts name, against each other."""
        held = self._held
        if held.models is None and held.traces is None:
            raise self._fault("names no model and no trace", "give 'models', or 'traces'")
        if held.traces is not None and held.backends is not None:
            raise self._fault("'backends' run a model, and 'traces' were run already",
                              "leave one out, or split the table")  # fmt: skip
        owners = {"oracles": held.oracles is not None, "models": any(of_models),
                  "prompts": any(of_prompts)}  # fmt: skip
        named = [repr(axis) for axis, is_owner in owners.items() if is_owner]
        if len(named) > 1:
            raise self._fault(f"{' and '.join(named)} both name oracles", "let one of them do so")
        if held.device is not None and "opencl" not in (held.backends or ()):
            raise self._fault("'device' is for the backend opencl", 'add backends = ["opencl"]')
        for backend in held.backends or ():
            if backend not in BACKENDS:
                raise self._fault(f"'backends' has {backend!r}",
                                  f"expected {' or '.join(BACKENDS)}")  # fmt: skip
        for layers in held.layers or ():
            self._parse("layers", parse_layers, layers)

    def _fault(self, what: str, hint: str | None = None) -> PlanError:
        return PlanError(f"{self._name}: {what}", where=self._path, hint=hint)

    def _parse(self, key: str, parse: Callable[..., Parsed], *values: Any) -> Parsed:
        """What `parse` makes of a value, with the key in its complaint."""
        try:
            return parse(*values)
        except PlanError as error:
            raise self._fault(f"{key!r}: {error.what}", error.hint) from None

    def _model(self, entry: str | NamedModel) -> tuple[Source, str | None]:
        """A model, and the oracle that is its own."""
        named = NamedModel(path=entry) if isinstance(entry, str) else entry
        source = self._locate(named.path)
        return replace(source, name=named.name or source.name), named.oracle

    def _prompt(self, entry: str | tuple[int, ...] | NamedPrompt) -> tuple[Prompt, str | None]:
        """A prompt, and the oracle that is its own."""
        if isinstance(entry, str):
            entry = NamedPrompt(text=entry)
        elif isinstance(entry, tuple):
            entry = NamedPrompt(tokens=entry)
        if (entry.text is None) == (entry.tokens is None):
            raise self._fault("'prompts' has a table without one of 'text' and 'tokens'")
        name = entry.name or entry.text or ",".join(map(str, entry.tokens or ()))
        return Prompt(name, entry.text, entry.tokens), entry.oracle

    def _settings(self) -> CaseSettings:
        held = self._held
        if held.stages is not None:
            self._parse("stages", parse_stages, held.stages)
        if held.arithmetic is not None:
            self._parse("arithmetic", stated_arithmetic, held.arithmetic)
        file = None if held.tolerances is None else Path(self._locate(held.tolerances).location)
        weights = held.reference_weights
        return CaseSettings(
            stages=held.stages,
            device=held.device,
            arithmetic=held.arithmetic,
            names=None if held.names is None else self._locate(held.names),
            reference_weights=None if weights is None else self._locate(weights),
            budgets=self._parse("budgets", parse_budgets, held.budgets, file),
            budget_options=held.budgets,
            tolerances=None if file is None else str(file),
            strict=held.strict,
            cumulative_only=held.cumulative_only,
            timeout_s=held.timeout,
        )

    def _fill(self, text: str | None, model: Source | None, prompt: Prompt) -> Source | None:
        """A trace or an oracle, with the placeholders of its text filled in."""
        if text is None:
            return None
        if "{model}" in text and model is None:
            raise self._fault(f"{text!r} has {{model}}, and there is no model")
        filled = text if model is None else text.replace("{model}", model.name)
        return self._locate(filled.replace("{prompt}", prompt.name))

    def _locate(self, text: str) -> Source:
        if is_url(text):
            return Source(base_name(text), text)
        if "\0" in text:
            raise self._fault(f"{text!r} is no path")
        located = self._path.absolute().parent / expand_user(text)
        return Source(base_name(text), str(located))


def _finish(path: Path, cases: Sequence[Case], timeout_s: float | None) -> Sweep:
    """The cases with names that tell them apart, with fingerprints, their limit, and each once."""
    marks: dict[tuple[str, bool], str | None] = {}
    names: dict[str, dict[str, str]] = {
        axis: _distinct_names([s for case in cases if (s := getattr(case, axis)) is not None])
        for axis in ("model", "trace", "oracle")
    }

    def finish(source: Source | None, axis: str | None = None) -> Source | None:
        if source is None:
            return None
        key = (source.location, axis == "model")
        if key not in marks:
            marks[key] = fingerprint(source.location, is_model=axis == "model")
        name = source.name if axis is None else names[axis].get(source.location, source.name)
        return replace(source, name=name, mark=marks[key])

    prompts = _distinct_prompts([case.prompt for case in cases])
    found: dict[str, Case] = {}
    for case in cases:
        settings = replace(
            case.settings,
            names=finish(case.settings.names),
            reference_weights=finish(case.settings.reference_weights),
            timeout_s=case.settings.timeout_s if timeout_s is None else timeout_s,
        )
        finished = Case(
            finish(case.model, "model"), finish(case.trace, "trace"),
            finish(case.oracle, "oracle"), prompts[case.prompt], case.backend, case.layers,
            settings,
        )  # fmt: skip
        found.setdefault(finished.id, finished)
    return Sweep(path, tuple(found.values()), len(cases) - len(found))


def _distinct_names(sources: Iterable[Source]) -> dict[str, str]:
    """A longer name for each location whose name another one has too: its last two components."""
    held = {source.location: source.name for source in sources}
    counts = Counter(held.values())
    longer = {}
    for location, name in held.items():
        if counts[name] > 1:
            parts = location.rstrip("/").split("/")
            longer[location] = "/".join(parts[-2:])
    if len(set(longer.values())) < len(longer):
        return {location: location for location in longer}
    return longer


def _distinct_prompts(prompts: Iterable[Prompt]) -> dict[Prompt, Prompt]:
    """Each prompt with a name that no other one has: two tables may have given one name twice."""
    used: Counter[str] = Counter()
    named = {}
    for prompt in dict.fromkeys(prompts):
        used[prompt.name] += 1
        count = used[prompt.name]
        named[prompt] = prompt if count == 1 else replace(prompt, name=f"{prompt.name} #{count}")
    return named
