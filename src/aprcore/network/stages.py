"""What a tensor of a pass is, and what an architecture writes its stages with.

Shapes are spelled as in docs/formats.md: T tokens, H heads, K kv heads, D head dim, E hidden, F
ffn, V vocab, k experts per token. "T,H·D" is two axes on disk, of which the second is a head and a
dimension within it. S is the number of positions attended to: T in a full pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aprcore.network.config import ModelConfig
    from aprcore.network.operations import Operation


# No model is as deep; what names a higher layer names no stage.
MOST_LAYERS = 1_000_000


class Scope(Enum):
    """Where a stage's file lives."""

    FIRST_LAYER = "first layer"
    LAYER = "layer"
    MODEL = "model"


class StageKey(NamedTuple):
    """One tensor of a pass: a stage, and its layer unless it belongs to the whole model."""

    layer: int | None
    stage: str

    @property
    def path(self) -> str:
        """The tensor's path inside a directory, without `.bin`: "layer-0/attn_norm"."""
        return self.stage if self.layer is None else f"layer-{self.layer}/{self.stage}"

    def __str__(self) -> str:
        return self.stage if self.layer is None else f"layer {self.layer} · {self.stage}"


class Reading(Enum):
    """What must be done to the values that llama.cpp calls so before they are a stage's."""

    PLAIN = "as they are"
    PADDED = "positions beyond the tokens cut off"
    SCORES = "positions cut off, and divided by sqrt(D)"


class Node(NamedTuple):
    """What an engine calls a stage's tensor, or the tensors that make it side by side.

    Attributes:
        names: As the engine names them: llama.cpp's `cb()`, a module, a hook. "a[0/2]" is the first
            of two equal parts of a's columns, "a + b" a sum; "" is the output of the whole layer.
        reading: What must be done to the values.
        beside: Of this stage only in a dump that has one of these names as well: names change
            their meaning from version to version.
        without: Not of this stage in such a dump.
        ahead: How many layers later the engine shows it.
    """

    names: tuple[str, ...]
    reading: Reading = Reading.PLAIN
    beside: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Stage:
    """What one tensor of a pass is.

    Attributes:
        name: As spelled on disk.
        scope: Where it lives.
        shape: Its canonical shape in symbols.
        operation: What makes it; None for a stage that dumps of other engines contain but no
            supported architecture computes.
        title: What it is, for people.
        shown: Where transformers shows it, in alternatives: a module of the layer (or of the
            model), whose output it is, or "MODULE.input"; several side by side make one stage.
        nodes: The same of llama.cpp.
        fused: The same of the modules of vLLM and SGLang, where they differ from transformers'.
        hooks: The same of TransformerLens, in alternatives.
        conditional: Whether only some models of the architecture have it.
        last_token: Whether it reads only the last token's row of its inputs.
    """

    name: str
    scope: Scope
    shape: str
    operation: Operation | None
    title: str
    shown: tuple[tuple[str, ...], ...] = ()
    nodes: tuple[Node, ...] = ()
    fused: tuple[Node, ...] = ()
    hooks: tuple[tuple[str, ...], ...] = ()
    conditional: bool = False
    last_token: bool = False


class Row(NamedTuple):
    """A stage at its place: its key, and the tensors that it reads in argument order."""

    key: StageKey
    stage: Stage
    inputs: tuple[StageKey, ...]


@dataclass
class Builder:
    """What an architecture writes a layer with: each call adds a tensor and gives its key.

    Attributes:
        config: The configuration.
        layer: The layer, or None for the stages before and after the layers.
        input: The residual stream that the layer is given.
        also: Conditional stages that are there whether the model has them or not.
        rows: What was added so far.
    """

    config: ModelConfig
    layer: int | None
    input: StageKey | None = None
    also: Collection[str] = ()
    rows: list[Row] = field(default_factory=list)

    def add(self, stage: Stage, *inputs: StageKey) -> StageKey:
        """Add a tensor that reads these."""
        layer = {Scope.FIRST_LAYER: 0, Scope.LAYER: self.layer, Scope.MODEL: None}[stage.scope]
        key = StageKey(layer, stage.name)
        self.rows.append(Row(key, stage, inputs))
        return key

    def has(self, stage: Stage, in_model: bool | None = None) -> bool:
        """Whether a conditional stage is there: the model has it, or a dump that is read.

        Args:
            stage: The stage.
            in_model: Whether the model has it; None: where the file has its weights.
        """
        if in_model is None:
            in_model = stage.name in self.config.found
        return in_model or stage.name in self.also


# Spellings that other engines use for a stage; accepted wherever a stage is read or named.
ALIASES: Mapping[str, str] = {"layer_output": "post_ffn_residual"}


@cache
def split_axes(shape: str) -> tuple[tuple[str, ...], ...]:
    """The factors of each axis: "T,(H+2K)·D" -> (("T",), ("(H+2K)", "D"))."""
    return tuple(tuple(axis.split("·")) for axis in shape.split(","))


def resolve_shape(shape: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A symbolic shape in numbers, one per axis on disk.

    Raises:
        KeyError: `sizes` lacks a letter that the shape uses.
    """
    return tuple(_product(factors, sizes) for factors in split_axes(shape))


def resolve_factors(shape: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A symbolic shape in numbers with heads and dimensions apart: "T,H·D" -> (T, H, D)."""
    return tuple(_size(symbol, sizes) for axis in split_axes(shape) for symbol in axis)


AXIS_NAMES = {"T": "token", "S": "position", "H": "head", "K": "head", "(H+2K)": "head",
              "D": "dim", "E": "dim", "F": "dim", "V": "token id", "k": "expert"}  # fmt: skip


@cache
def axis_names(shape: str) -> tuple[str, ...]:
    """What the factors of a shape count: "T,H·D" -> ("token", "head", "dim")."""
    return tuple(AXIS_NAMES[symbol] for axis in split_axes(shape) for symbol in axis)


def _product(factors: Sequence[str], sizes: Mapping[str, int]) -> int:
    product = 1
    for symbol in factors:
        product *= _size(symbol, sizes)
    return product


def _size(symbol: str, sizes: Mapping[str, int]) -> int:
    if symbol == "(H+2K)":
        return sizes["H"] + 2 * sizes["K"]
    return sizes[symbol]


Wants = Callable[[StageKey], bool]
