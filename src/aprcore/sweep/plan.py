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
from typing import Any

from aprcore.dumps.plan import parse_layers, parse_stages
from aprcore.ground.errors import PlanError
from aprcore.ground.fields import read_toml
from aprcore.ground.home import expand_user
from aprcore.ground.precision import ARITHMETICS
from aprcore.runs.budget import parse_budgets
from aprcore.sweep.cases import BACKENDS, DUMP, Case, Prompt, Settings, Source
from aprcore.sweep.files import base_name, fingerprint, is_url

# A slip of the pen in a matrix should not fill the memory.
MOST_CASES = 100_000

_LISTS = ("models", "traces", "oracles", "prompts", "backends", "layers")
_SINGLES = ("model", "trace", "oracle", "prompt", "tokens", "backend", "layers")
_SETTINGS = (
    "stages", "device", "arithmetic", "names", "reference_weights", "tolerances", "budgets",
    "strict", "cumulative_only", "timeout",
)  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class _Choice:
    """One entry of `models` or `prompts`, with the oracle that is its own."""

    value: Source | Prompt | None
    oracle: str | None = None


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
    data = read_toml(path)
    for key in data.keys() - {"defaults", "matrix", "case"}:
        raise PlanError(f"unknown key {key!r}", where=path,
                        hint="expected [defaults], [[matrix]] and [[case]]")  # fmt: skip
    defaults = data.get("defaults", {})
    if not isinstance(defaults, dict):
        raise PlanError("'defaults' is no table", where=path, hint="write [defaults]")
    _check_keys(path, "defaults", defaults, _SETTINGS)
    cases: list[Case] = []
    for kind, keys in (("matrix", _LISTS), ("case", _SINGLES)):
        tables = data.get(kind, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise PlanError(f"{kind!r} is no list of tables", where=path, hint=f"write [[{kind}]]")
        for number, table in enumerate(tables, 1):
            name = f"{kind} {number}"
            _check_keys(path, name, table, (*keys, *_SETTINGS))
            if "prompt" in table and "tokens" in table:
                raise PlanError(f"{name}: 'prompt' and 'tokens' contradict each other", where=path,
                                hint="leave one out")  # fmt: skip
            reader = _Table(path, name, defaults | (table if kind == "matrix" else _widen(table)))
            cases += reader.expand(MOST_CASES - len(cases))
    if not cases:
        raise PlanError("has no case", where=path, hint="write a [[matrix]] with models")
    return _finish(path, cases, timeout_s)


def _widen(table: Mapping[str, Any]) -> dict[str, Any]:
    """A [[case]] as a matrix with one value on every axis."""
    plural = {"model": "models", "trace": "traces", "oracle": "oracles", "prompt": "prompts",
              "tokens": "prompts", "backend": "backends", "layers": "layers"}  # fmt: skip
    wide = {key: value for key, value in table.items() if key not in plural}
    return wide | {plural[key]: [value] for key, value in table.items() if key in plural}


def _check_keys(path: Path, name: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    known = tuple(known)
    for key in table:
        if key not in known:
            raise PlanError(f"{name}: unknown key {key!r}", where=path,
                            hint=f"expected {', '.join(known)}")  # fmt: skip


class _Table:
    """One [[matrix]], checked key by key."""

    def __init__(self, path: Path, name: str, table: Mapping[str, Any]) -> None:
        self._path = path
        self._name = name
        self._table = table

    def expand(self, room: int) -> list[Case]:
        """Every combination of the axes, the last one running fastest.

        Raises:
            PlanError: A key is malformed, or there are more than `room`.
        """
        models = self._axis("models", self._model)
        traces = self._axis("traces", self._text)
        oracles = self._axis("oracles", self._text)
        prompts = self._axis("prompts", self._prompt)
        backends = self._axis("backends", self._backend)
        layers = self._axis("layers", self._layers)
        settings = self._settings()
        self._check_axes(models, traces, oracles, prompts, backends, settings)
        axes = (models, traces, oracles, prompts, backends, layers)
        if math.prod(map(len, axes)) > room:
            raise self._fault(f"makes more than {MOST_CASES} cases", "split the file")
        cases = []
        for model, trace, oracle, prompt, backend, span in itertools.product(*axes):
            held = prompt.value if prompt is not None else Prompt()
            assert isinstance(held, Prompt)
            source = None if model is None else model.value
            assert source is None or isinstance(source, Source)
            own = next((c.oracle for c in (prompt, model) if c is not None and c.oracle), oracle)
            cases.append(Case(
                model=source,
                trace=self._source(trace, source, held),
                oracle=self._source(own, source, held),
                prompt=held,
                backend=DUMP if trace is not None else backend or BACKENDS[0],
                layers=span,
                settings=settings,
            ))  # fmt: skip
        return cases

    def _check_axes(
        self, models: Sequence[_Choice | None], traces: Sequence[str | None],
        oracles: Sequence[str | None], prompts: Sequence[_Choice | None],
        backends: Sequence[str | None], settings: Settings,
    ) -> None:  # fmt: skip
        """Hold the axes against each other."""
        if models == [None] and traces == [None]:
            raise self._fault("names no model and no trace", "give 'models', or 'traces'")
        if traces != [None] and backends != [None]:
            raise self._fault("'backends' run a model, and 'traces' were run already",
                              "leave one out, or split the table")  # fmt: skip
        owners = [name for name, own in (
            ("oracles", oracles != [None]),
            ("models", any(choice is not None and choice.oracle for choice in models)),
            ("prompts", any(choice is not None and choice.oracle for choice in prompts)),
        ) if own]  # fmt: skip
        if len(owners) > 1:
            raise self._fault(f"{' and '.join(map(repr, owners))} both name oracles",
                              "let one of them do so")  # fmt: skip
        if settings.device is not None and "opencl" not in backends:
            raise self._fault("'device' is for the backend opencl",
                              'add backends = ["opencl"]')  # fmt: skip

    def _axis(self, key: str, read: Callable[[str, Any], Any]) -> list[Any]:
        """The values of one axis; without the key, the one value None."""
        values = self._table.get(key)
        if values is None:
            return [None]
        if not isinstance(values, list) or not values:
            raise self._fault(f"{key!r} is {values!r}, not a list of values"[:200])
        return [read(key, value) for value in values]

    def _fault(self, what: str, hint: str | None = None) -> PlanError:
        return PlanError(f"{self._name}: {what}", where=self._path, hint=hint)

    def _text(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise self._fault(f"{key!r} has {value!r}, not a text")
        return value

    def _optional(self, key: str) -> str | None:
        return None if key not in self._table else self._text(key, self._table[key])

    def _flag(self, key: str) -> bool:
        value = self._table.get(key, False)
        if not isinstance(value, bool):
            raise self._fault(f"{key!r} is {value!r}, not true or false")
        return value

    def _seconds(self, key: str) -> float | None:
        value = self._table.get(key)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= sys.float_info.max:
            raise self._fault(f"{key!r} is {value!r}, not a positive number of seconds"[:200])
        return float(value)

    def _entry(self, key: str, value: Any, known: Sequence[str]) -> dict[str, Any]:
        """A table on an axis, its keys checked."""
        _check_keys(self._path, f"{self._name}: {key!r}", value, known)
        for text in ("name", "oracle", "path", "text"):
            if text in value:
                self._text(f"{key}.{text}", value[text])
        return dict(value)

    def _model(self, key: str, value: Any) -> _Choice:
        if isinstance(value, dict):
            entry = self._entry(key, value, ("path", "name", "oracle"))
            if "path" not in entry:
                raise self._fault(f"{key!r} has a table without 'path'")
        else:
            entry = {"path": self._text(key, value)}
        source = self._locate(entry["path"])
        return _Choice(replace(source, name=entry.get("name", source.name)), entry.get("oracle"))

    def _prompt(self, key: str, value: Any) -> _Choice:
        match value:
            case dict():
                entry = self._entry(key, value, ("text", "tokens", "name", "oracle"))
                if ("text" in entry) == ("tokens" in entry):
                    raise self._fault(f"{key!r} has a table without one of 'text' and 'tokens'")
            case list():
                entry = {"tokens": value}
            case _:
                entry = {"text": self._text(key, value)}
        text = entry.get("text")
        tokens = None if text is not None else self._tokens(key, entry["tokens"])
        name = text if tokens is None else ",".join(map(str, tokens))
        assert name is not None
        return _Choice(Prompt(entry.get("name", name), text, tokens), entry.get("oracle"))

    def _tokens(self, key: str, value: Any) -> tuple[int, ...]:
        is_ids = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
        if not is_ids or not value:
            raise self._fault(f"{key!r} has {value!r}, not a list of token ids"[:200])
        return tuple(value)

    def _backend(self, key: str, value: Any) -> str:
        if value not in BACKENDS:
            raise self._fault(f"{key!r} has {value!r}", f"expected {' or '.join(BACKENDS)}")
        return str(value)

    def _layers(self, key: str, value: Any) -> str:
        text = self._text(key, value)
        self._parsed(key, lambda: parse_layers(text))
        return text

    def _parsed(self, key: str, parse: Callable[[], Any]) -> Any:
        """What `parse` makes of a value, with the key in its complaint."""
        try:
            return parse()
        except PlanError as error:
            raise self._fault(f"{key!r}: {error.what}", error.hint) from None

    def _settings(self) -> Settings:
        stages, arithmetic = self._optional("stages"), self._optional("arithmetic")
        if stages is not None:
            self._parsed("stages", lambda: parse_stages(stages))
        if arithmetic is not None and arithmetic not in ARITHMETICS:
            raise self._fault(f"'arithmetic' is {arithmetic!r}",
                              f"expected {', '.join(ARITHMETICS)}")  # fmt: skip
        options = self._table.get("budgets", [])
        if not isinstance(options, list):
            raise self._fault(f"'budgets' is {options!r}, not a list of texts")
        options = tuple(self._text("budgets", option) for option in options)
        file = self._optional("tolerances")
        tolerances = None if file is None else self._locate(file).location
        names, weights = self._optional("names"), self._optional("reference_weights")
        return Settings(
            stages=stages,
            device=self._optional("device"),
            arithmetic=arithmetic,
            names=None if names is None else self._locate(names),
            reference_weights=None if weights is None else self._locate(weights),
            budgets=self._parsed("budgets", lambda: parse_budgets(
                options, None if tolerances is None else Path(tolerances))),
            budget_options=options,
            tolerances=tolerances,
            strict=self._flag("strict"),
            cumulative_only=self._flag("cumulative_only"),
            timeout_s=self._seconds("timeout"),
        )  # fmt: skip

    def _source(self, text: str | None, model: Source | None, prompt: Prompt) -> Source | None:
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


def _distinct_names(sources: Sequence[Source]) -> dict[str, str]:
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


def _distinct_prompts(prompts: Sequence[Prompt]) -> dict[Prompt, Prompt]:
    """Each prompt with a name that no other one has: two tables may have given one name twice."""
    used: Counter[str] = Counter()
    named = {}
    for prompt in dict.fromkeys(prompts):
        used[prompt.name] += 1
        count = used[prompt.name]
        named[prompt] = prompt if count == 1 else replace(prompt, name=f"{prompt.name} #{count}")
    return named
