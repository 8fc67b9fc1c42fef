"""Which tensors of a dump are which stages: our own names, and those of other engines.

A dialect says where a stored name belongs (a layer and a short name) and which short names make a
stage. Knowing another engine's names is adding a dialect.

What transformers, llama.cpp, vLLM and TransformerLens call a stage's tensor is said where the stage
is, in `aprcore.network.architectures`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

from aprcore.network.graph import Graph, known_stages, parse_path
from aprcore.network.operations import HEAD, Softmax
from aprcore.network.stages import MOST_LAYERS, Node, Reading, Row, Scope, StageKey

Place = tuple[int | None, str]  # the layer, and the name within it


class Rule(NamedTuple):
    """A stage, and the short names of the tensors that make it, side by side on the last axis.

    A name may be a term as `parse_term` reads it: a part of a tensor's columns, or a sum. For
    `Reading.SCORES` the second name is that of the queries: it tells D.

    Attributes:
        ahead: How many layers later the tensors are found.
    """

    stage: str
    sources: tuple[str, ...]
    reading: Reading = Reading.PLAIN
    ahead: int = 0


class Columns(NamedTuple):
    """A part of the last axis.

    Attributes:
        start: The first column; None for 0.
        stop: The column after the last; None for the width.
        parts: Into how many equal parts the axis is cut, in which `start` and `stop` count then;
            None: they count columns.
    """

    start: int | None
    stop: int | None
    parts: int | None = None

    def resolve(self, width: int) -> slice | None:
        """The columns of an axis of this width; None where it has no such part."""
        unit, rest = (1, 0) if self.parts is None else divmod(width, self.parts)
        start = 0 if self.start is None else self.start * unit
        stop = width if self.stop is None else self.stop * unit
        return None if rest or not 0 <= start < stop <= width else slice(start, stop)


class Operand(NamedTuple):
    """A stored tensor, or a part of its columns."""

    name: str
    columns: Columns | None = None


Term = tuple[Operand, ...]
"""Tensors that are added up."""

SUM = " + "
_PART = re.compile(r"(.*?)\[(?:(\d{0,9}):(\d{0,9})|(\d{1,9})/(\d{1,9}))\]", re.ASCII | re.DOTALL)


@cache
def parse_term(text: str) -> Term:
    """What stands for tensors in rules and maps: "a", "a[0/2]", "a[64:96]", "a + b"."""
    return tuple(map(_parse_operand, text.split(SUM)))


def _parse_operand(text: str) -> Operand:
    match = _PART.fullmatch(text)
    if match is None:
        return Operand(text)
    name, start, stop, part, parts = match.groups()
    if part is not None:
        return Operand(name, Columns(int(part), int(part) + 1, int(parts)))
    return Operand(name, Columns(int(start) if start else None, int(stop) if stop else None))


@dataclass(frozen=True, slots=True)
class Recipe:
    """The tensors behind one stage's, under their stored names; see `Rule`."""

    terms: tuple[Term, ...]
    reading: Reading = Reading.PLAIN

    @property
    def names(self) -> tuple[str, ...]:
        """The stored names, in order."""
        return tuple(dict.fromkeys(operand.name for term in self.terms for operand in term))


@dataclass(frozen=True, slots=True)
class Dialect:
    """A way of naming tensors.

    Attributes:
        parse: The place of a stored name, or None if it is not of this dialect.
        rules: What makes a stage; the first that applies counts.
        is_internal: Whether a stored name is known to be no stage, and worth no word.
        innermost_first: Whether a shape of four axes that ends in one begins with the innermost, as
            ggml counts them.
    """

    parse: Callable[[str], Place | None]
    rules: Sequence[Rule]
    is_internal: Callable[[str], bool] = lambda name: False
    innermost_first: bool = False


Fits = Callable[[StageKey, Recipe], bool]


def resolve(
    names: Sequence[str], dialects: Iterable[Dialect], fits: Fits | None = None
) -> tuple[dict[StageKey, Recipe], tuple[str, ...]]:
    """The recipe of every stage that the names make, and the names that make none.

    Where two dialects know a stage or a name, the earlier one counts.

    Args:
        names: The stored names.
        dialects: What they may mean.
        fits: Whether the tensors have the shapes that a recipe needs; None: they have.
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
                known.update(_apply(rule, layer, found, recipes, fits))
        known.update(name for name in names if name not in known and dialect.is_internal(name))
    return recipes, tuple(name for name in names if name not in known)


def _apply(
    rule: Rule, layer: int | None, found: Mapping[Place, str], recipes: dict[StageKey, Recipe],
    fits: Fits | None,
) -> set[str]:  # fmt: skip
    """Add the recipe that a rule makes of a layer's names; the names that are strangers no more."""
    terms = [parse_term(source) for source in rule.sources]
    wanted = dict.fromkeys(operand.name for term in terms for operand in term)
    held = {name: found[layer, name] for name in wanted if (layer, name) in found}
    if rule.ahead and layer is None:
        return set()
    key = _key(layer if layer is None else layer - rule.ahead, rule.stage)
    if key is None or not held:
        return set()
    if key not in recipes and len(held) == len(wanted):
        stored = tuple(tuple(x._replace(name=held[x.name]) for x in term) for term in terms)
        recipe = Recipe(stored, rule.reading)
        if fits is None or fits(key, recipe):
            recipes[key] = recipe
    # Another name for what is there already is no stranger.
    return {*held.values()} if key in recipes else set()


def _key(layer: int | None, stage: str) -> StageKey | None:
    """The key of a stage found in a layer, or None where it cannot live there."""
    match known_stages()[stage].scope:
        case Scope.MODEL:
            return StageKey(None, stage) if layer is None else None
        case Scope.FIRST_LAYER:
            return StageKey(0, stage) if not layer else None
        case Scope.LAYER:
            known = layer is not None and 0 <= layer < MOST_LAYERS
            return StageKey(layer, stage) if known else None


def known_dialects(names: Iterable[str], graph: Graph) -> tuple[Dialect, ...]:
    """Every dialect, the one to trust most first.

    Args:
        names: The stored names; engines change their meaning between versions.
        graph: The stages of the model, each with what other engines call it.
    """
    stored = list(names)
    rows = [*graph.layer(0).values(), *graph.layer(None).values()]
    num_layers = _count_layers(stored)
    modules = _module_parser(rows, num_layers)
    return (
        Dialect(_parse_beside_modules if num_layers else _parse_own,
                [Rule(stage, (stage,)) for stage in known_stages()]),
        _llama_cpp(stored, rows),
        Dialect(_parse_hook, list(_alternatives((row.stage.name, row.stage.hooks) for row in rows)),
                _is_lens_internal),
        _hidden_states(stored, graph),
        Dialect(modules, list(_module_rules(rows, _short_names(stored, modules))),
                _is_module_internal),
    )  # fmt: skip


def _short_names(
    names: Iterable[str], parse: Callable[[str], Place | None]
) -> Collection[str]:  # fmt: skip
    return {place[1] for name in names if (place := parse(name)) is not None}


def _parse_own(name: str) -> Place | None:
    key = parse_path(name.removesuffix(".bin"))
    return None if key is None else (key.layer, key.stage)


_HEAD_MODULE = HEAD.removesuffix(".weight")


def _parse_beside_modules(name: str) -> Place | None:
    """As `_parse_own` where others are called by their modules: the head is then one of them.

    Its stage is what the model gives, which is not what the module gives where logits are capped.
    """
    return None if name == _HEAD_MODULE else _parse_own(name)


_WRAPPERS = r"(?:(?:base_model|model|module|transformer|_orig_mod)\.)*"
_LAYER_MODULE = re.compile(rf"{_WRAPPERS}layers\.(\d{{1,9}})(?:\.(.+))?", re.ASCII)


def _count_layers(names: Iterable[str]) -> int:
    """One more than the highest layer that modules are named by."""
    found = (_LAYER_MODULE.fullmatch(name) for name in names)
    return 1 + max((int(match[1]) for match in found if match is not None), default=-1)


# The last norm is shown the stream behind the layers, as the next layer would be.
_BEHIND_LAYERS = {"norm.1": "input_layernorm.1", "norm.input": "norm.input"}


def _module_parser(rows: Iterable[Row], num_layers: int = 0) -> Callable[[str], Place | None]:
    """A module's name, with or without ".output", ".output.0", ".input" or the like at its end."""
    shown = {name for row in rows if row.stage.scope is not Scope.LAYER
             for names in (*row.stage.shown, *(node.names for node in row.stage.fused))
             for name in names}  # fmt: skip
    modules = "|".join(sorted(re.escape(name.removesuffix(".input")) for name in shown))
    whole = re.compile(rf"{_WRAPPERS}((?:{modules})(?:\..*)?)", re.ASCII)

    def parse(name: str) -> Place | None:
        if match := _LAYER_MODULE.fullmatch(name):
            return int(match[1]), _port(match[2] or "")
        if match := whole.fullmatch(name):
            module = _port(match[1])
            if num_layers and module in _BEHIND_LAYERS:
                return num_layers, _BEHIND_LAYERS[module]
            return None, module
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


_HIDDEN_STATES = re.compile(r"(?:.*\.)?(hidden_states|attentions)\.(\d{1,9})", re.ASCII)
# The tuple alone, saved as it is.
_STATE = re.compile(r"()(\d{1,9})", re.ASCII)


def _hidden_states(names: Sequence[str], graph: Graph) -> Dialect:
    """What transformers returns with output_hidden_states and output_attentions.

    The first of the hidden states is the embedding, each other one what a layer gives; but the last
    has been through the final norm.
    """
    pattern = _STATE if _is_bare_tuple(names, graph) else _HIDDEN_STATES
    found = [pattern.fullmatch(name) for name in names]
    count = max((int(m[2]) for m in found if m is not None and m[1] != "attentions"), default=0)
    # Without a model the graph knows no more layers than another dump has shown.
    last = max(graph.num_layers, count) if graph.num_layers > 1 or count <= 1 else count
    end = next(iter(graph.readers(graph.stream(None))), None)
    softmax = graph.of_kind(0, Softmax)

    def parse(name: str) -> Place | None:
        match = pattern.fullmatch(name)
        if match is None:
            return None
        number = int(match[2])
        if match[1] == "attentions":
            return number, "attentions"
        if number in (0, last):
            return None, "last" if number else "first"
        return number - 1, "hidden_states"

    rules = [
        Rule(graph.embedding.stage, ("first",)),
        Rule(graph.stream(1).stage, ("hidden_states",)),
    ]
    rules += [Rule(key.stage, ("last",)) for key in (end,) if key is not None]
    rules += [Rule(key.stage, ("attentions",)) for key in softmax]
    return Dialect(parse, rules)


def _is_bare_tuple(names: Sequence[str], graph: Graph) -> bool:
    """Whether the names are the numbers of a tuple with one hidden state more than layers."""
    numbers = {name for name in names if _STATE.fullmatch(name)}
    least = graph.num_layers + 1 if graph.num_layers > 1 else 3
    return numbers == {str(number) for number in range(max(least, len(numbers)))}


# What modules are given is mostly what others gave, and shown there; weights are no activations.
_MODULE_INTERNAL = re.compile(
    r"(?:.*\.)?(?:input(?:\.\d+)?|(?:kwargs|parameters|forward_batch_info)\..+|attention_mask"
    r"|(?:position_embeddings|rotary_emb)(?:\..*)?|causal_mask|norm\.1|model|\w*\.?output.*)|",
    re.ASCII,
)


def _is_module_internal(name: str) -> bool:
    return _MODULE_INTERNAL.fullmatch(name) is not None


def _module_rules(rows: Iterable[Row], present: Collection[str]) -> Iterator[Rule]:
    """What vLLM and SGLang show differently, where they are told by it; then transformers' own."""
    rows = list(rows)
    fused = [rule for row in rows for rule in _node_rules(row, row.stage.fused, present)]
    yield from fused
    yield from _alternatives(((row.stage.name, row.stage.shown) for row in rows),
                             {rule.sources for rule in fused})  # fmt: skip


def _alternatives(
    rows: Iterable[tuple[str, tuple[tuple[str, ...], ...]]],
    claimed: Collection[tuple[str, ...]] = (),
) -> Iterator[Rule]:
    """The later stage first: a projection's output is what comes after its bias, if it has one.

    Args:
        rows: Stages, each with the names of it in alternatives.
        claimed: Names that are of other stages.
    """
    claimed = set(claimed)
    rules = []
    for stage, alternatives in reversed(list(rows)):
        shown = [names for names in alternatives if names not in claimed]
        claimed.update(shown)
        rules.append([Rule(stage, names) for names in shown])
    for group in reversed(rules):
        yield from group


def _node_rules(row: Row, nodes: Iterable[Node], present: Collection[str]) -> Iterator[Rule]:
    for node in nodes:
        is_there = not node.beside or any(name in present for name in node.beside)
        if is_there and not any(name in present for name in node.without):
            yield Rule(row.stage.name, node.names, node.reading, node.ahead)


_LENS_LAYER = re.compile(rf"{_WRAPPERS}blocks\.(\d{{1,9}})\.(.+)", re.ASCII)
_LENS_WHOLE = re.compile(
    rf"{_WRAPPERS}((?:hook_embed|embed|ln_final|unembed|hook_unembed)(?:\.hook_\w+)?)", re.ASCII
)
_LENS_INTERNAL = re.compile(r"(?:.*\.)?(?:hook_\w+)", re.ASCII)


def _parse_hook(name: str) -> Place | None:
    """A hook point of TransformerLens."""
    if match := _LENS_LAYER.fullmatch(name):
        return int(match[1]), match[2]
    if match := _LENS_WHOLE.fullmatch(name):
        return None, match[1]
    return None


def _is_lens_internal(name: str) -> bool:
    return _LENS_INTERNAL.fullmatch(name) is not None


_LLAMA_CPP_LAYER = re.compile(r"([A-Za-z_]+)-(\d{1,9})", re.ASCII)
# Unweighted norms, what a name is called on the way, views of the cache, nodes without a name, and
# what a graph is given.
_LLAMA_CPP_INTERNAL = re.compile(
    r"(?:norm(?:_pre)?|[QKV]cur(?:_\w+)?|[qkv](?:_\w+)?|kqv?(?:_\w+)?|fattn\w*|sinks?)(?:-\d+)?"
    r"|(?:node|leaf|inp|cache|attn_inp|result)_.*"
    r"|.* \((?:view|reshaped|permuted|copy|cont|transposed).*\)(?:-\d+)?",
    re.ASCII,
)  # fmt: skip


def _llama_cpp(names: Sequence[str], rows: Sequence[Row]) -> Dialect:
    """What `cb()` calls the tensors of a layer.

    Qcur, Kcur and Vcur name several tensors in turn; a file that holds one of each name has the
    last, which is after RoPE. Then there is no joined projection, and Vcur alone makes no stage.
    """
    whole = {name for row in rows if row.stage.scope is not Scope.LAYER
             for node in row.stage.nodes for name in node.names}  # fmt: skip

    def parse(name: str) -> Place | None:
        if name in whole:
            return None, name
        match = _LLAMA_CPP_LAYER.fullmatch(name)
        return None if match is None else (int(match[2]), match[1])

    present = _short_names(names, parse)
    rules = [rule for row in rows for rule in _node_rules(row, row.stage.nodes, present)]
    theirs = {name for rule in rules for name in rule.sources}
    is_llama_cpp = bool(theirs & set(present))
    return Dialect(
        parse,
        rules,
        lambda name: is_llama_cpp and bool(_LLAMA_CPP_INTERNAL.fullmatch(name)),
        innermost_first=is_llama_cpp,
    )


_LAYER_FIELD = re.compile(r"\\\{layer(?:(\\\+|\\-|\+|-)(\d{1,9}))?\\\}", re.ASCII)


def mapped_dialect(
    mapping: Mapping[str, Sequence[Sequence[str]]], ignored: Sequence[str] = ()
) -> Dialect:
    """The dialect of a user's table.

    A pattern is a stored name in which `{layer}` stands for the layer's number, `{layer+1}` for the
    one after it; or a term of them, see `parse_term`.

    Args:
        mapping: For each stage the patterns that make it, in alternatives.
        ignored: Names that are no stage; `*` stands for anything.
    """
    rules = [Rule(stage, tuple(p)) for stage, choices in mapping.items() for p in choices]
    patterns = {
        operand.name: _compile_pattern(operand.name)
        for rule in rules for source in rule.sources for operand in parse_term(source)
    }  # fmt: skip

    def parse(name: str) -> Place | None:
        for pattern, (expression, offset) in patterns.items():
            if match := expression.fullmatch(name):
                return (int(match[1]) - offset if match.groups() else None), pattern
        return None

    def is_internal(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in ignored)

    return Dialect(parse, rules, is_internal)


def _compile_pattern(pattern: str) -> tuple[re.Pattern[str], int]:
    """What matches a pattern, and how many layers later its tensors are found."""
    escaped = re.escape(pattern)
    field = _LAYER_FIELD.search(escaped)
    offset = int(field[2]) if field is not None and field[2] else 0
    if field is not None and field[1] and "-" in field[1]:
        offset = -offset
    number = _LAYER_FIELD.sub(lambda match: r"(\d{1,9})", escaped, count=1)
    return re.compile(number, re.ASCII | re.DOTALL), offset
