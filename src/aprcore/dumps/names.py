"""Which tensors of one file are which stages: our own names, and those of other engines.

A dialect says where a stored name belongs (a layer and a short name) and which short names make a
stage. Knowing another engine's names is adding a dialect.

What transformers and llama.cpp call a stage's tensor is said where the stage is, in
`aprcore.network.architectures`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aprcore.network.graph import Graph, known_stages, parse_path
from aprcore.network.stages import MOST_LAYERS, Reading, Row, Scope, StageKey

Place = tuple[int | None, str]  # the layer, and the name within it


class Rule(NamedTuple):
    """A stage, and the short names of the tensors that make it, side by side on the last axis.

    For `Reading.SCORES` the second name is that of the queries: it tells D.
    """

    stage: str
    sources: tuple[str, ...]
    reading: Reading = Reading.PLAIN


class Recipe(NamedTuple):
    """The stored names behind one stage's tensor; see `Rule`."""

    names: tuple[str, ...]
    reading: Reading = Reading.PLAIN


@dataclass(frozen=True, slots=True)
class Dialect:
    """A way of naming tensors.

    Attributes:
        parse: The place of a stored name, or None if it is not of this dialect.
        rules: What makes a stage; the first that applies counts.
    """

    parse: Callable[[str], Place | None]
    rules: Sequence[Rule]


def resolve(
    names: Sequence[str], dialects: Iterable[Dialect]
) -> tuple[dict[StageKey, Recipe], tuple[str, ...]]:
    """The recipe of every stage that the names make, and the names that make none.

    Where two dialects know a stage or a name, the earlier one counts.
    """
    recipes: dict[StageKey, Recipe] = {}
    known: set[str] = set()
    for dialect in dialects:
        found: dict[Place, str] = {}
        for name in names:
            place = None if name in known else dialect.parse(name)
            if place is not None:
                found.setdefault(place, name)
        for layer in dict.fromkeys(layer for layer, _ in found):
            for rule in dialect.rules:
                key = _key(layer, rule.stage)
                held = [found[layer, name] for name in rule.sources if (layer, name) in found]
                if key is None or not held:
                    continue
                if key not in recipes and len(held) == len(rule.sources):
                    recipes[key] = Recipe(tuple(held), rule.reading)
                if key in recipes:  # another name for what is there already is no stranger
                    known.update(held)
    return recipes, tuple(name for name in names if name not in known)


def _key(layer: int | None, stage: str) -> StageKey | None:
    """The key of a stage found in a layer, or None where it cannot live there."""
    match known_stages()[stage].scope:
        case Scope.MODEL:
            return StageKey(None, stage) if layer is None else None
        case Scope.FIRST_LAYER:
            return StageKey(0, stage) if not layer else None
        case Scope.LAYER:
            return None if layer is None or layer >= MOST_LAYERS else StageKey(layer, stage)


def known_dialects(names: Iterable[str], graph: Graph) -> tuple[Dialect, ...]:
    """Every dialect, the one to trust most first.

    Args:
        names: The stored names; llama.cpp's change their meaning between its versions.
        graph: The stages of the model, each with what other engines call it.
    """
    rows = [*graph.layer(0).values(), *graph.layer(None).values()]
    llama_cpp = _llama_cpp_parser(rows)
    present = {place[1] for name in names if (place := llama_cpp(name)) is not None}
    return (
        Dialect(_parse_own, [Rule(stage, (stage,)) for stage in known_stages()]),
        Dialect(_huggingface_parser(rows), list(_huggingface_rules(rows))),
        Dialect(llama_cpp, list(_llama_cpp_rules(rows, present))),
    )


def _parse_own(name: str) -> Place | None:
    key = parse_path(name.removesuffix(".bin"))
    return None if key is None else (key.layer, key.stage)


_WRAPPERS = r"(?:(?:base_model|model|module|_orig_mod)\.)*"
_LAYER_MODULE = re.compile(rf"{_WRAPPERS}layers\.(\d{{1,9}})(?:\.(.+))?", re.ASCII)


def _huggingface_parser(rows: Iterable[Row]) -> Callable[[str], Place | None]:
    """A module's name, with or without ".output", ".output.0", ".input" or the like at its end."""
    shown = {name for row in rows if row.stage.scope is not Scope.LAYER
             for names in row.stage.shown for name in names}  # fmt: skip
    modules = "|".join(sorted(re.escape(name.removesuffix(".input")) for name in shown))
    whole = re.compile(rf"{_WRAPPERS}((?:{modules})(?:\..*)?)", re.ASCII)

    def parse(name: str) -> Place | None:
        if match := _LAYER_MODULE.fullmatch(name):
            return int(match[1]), _port(match[2] or "")
        if match := whole.fullmatch(name):
            return None, _port(match[1])
        return None

    return parse


def _port(module: str) -> str:
    """A module's name without its first output's suffix; inputs and later outputs keep one."""
    words = module.split(".") if module else []
    index = int(words.pop()) if words and re.fullmatch(r"\d{1,9}", words[-1], re.ASCII) else 0
    if words and words[-1] in ("output", "outputs", "out"):
        words.pop()
    elif words and words[-1] in ("input", "inputs", "in"):
        words[-1] = "input"
    return ".".join([*words, str(index)] if index else words)


def _huggingface_rules(rows: Iterable[Row]) -> Iterator[Rule]:
    """The later stage first: a projection's output is what comes after its bias, if it has one."""
    claimed: set[tuple[str, ...]] = set()
    rules = []
    for row in reversed(list(rows)):
        shown = [names for names in row.stage.shown if names not in claimed]
        claimed.update(shown)
        rules.append([Rule(row.stage.name, names) for names in shown])
    for group in reversed(rules):
        yield from group


_LLAMA_CPP_LAYER = re.compile(r"([A-Za-z_]+)-(\d{1,9})", re.ASCII)


def _llama_cpp_parser(rows: Iterable[Row]) -> Callable[[str], Place | None]:
    whole = {name for row in rows if row.stage.scope is not Scope.LAYER
             for node in row.stage.nodes for name in node.names}  # fmt: skip

    def parse(name: str) -> Place | None:
        if name in whole:
            return None, name
        match = _LLAMA_CPP_LAYER.fullmatch(name)
        return None if match is None else (int(match[2]), match[1])

    return parse


def _llama_cpp_rules(rows: Iterable[Row], present: Collection[str]) -> Iterator[Rule]:
    """What `cb()` calls the tensors of a layer.

    Qcur, Kcur and Vcur name several tensors in turn; a file holds one of each name, the last, which
    is after RoPE. So there is no joined projection, and Vcur alone makes no stage.
    """
    for row in rows:
        for node in row.stage.nodes:
            is_there = not node.beside or any(name in present for name in node.beside)
            if is_there and not any(name in present for name in node.without):
                yield Rule(row.stage.name, node.names, node.reading)


def mapped_dialect(mapping: Mapping[str, Sequence[Sequence[str]]]) -> Dialect:
    """The dialect of a user's table: for each stage the patterns that make it, in alternatives.

    A pattern is a stored name in which `{layer}` stands for the layer's number.
    """
    rules = [Rule(stage, tuple(p)) for stage, choices in mapping.items() for p in choices]
    patterns = {
        pattern: re.compile(
            re.escape(pattern).replace(re.escape("{layer}"), r"(\d{1,9})"), re.ASCII
        )
        for rule in rules
        for pattern in rule.sources
    }

    def parse(name: str) -> Place | None:
        for pattern, expression in patterns.items():
            if match := expression.fullmatch(name):
                return (int(match[1]) if match.groups() else None), pattern
        return None

    return Dialect(parse, rules)
