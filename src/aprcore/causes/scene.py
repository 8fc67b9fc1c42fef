"""What an alternative operation may look at, and what an entry of the catalogue is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.arithmetic import Arithmetic
from aprcore.engines.estimate import Estimate, Profile
from aprcore.engines.reference import ReferenceBackend, rounded
from aprcore.judging.layouts import Layout
from aprcore.judging.noise import allowed_ratio
from aprcore.network.backend import Int64, Site
from aprcore.network.config import ModelConfig
from aprcore.network.graph import Graph
from aprcore.network.operations import AddBias, Operation, Scores, Values
from aprcore.network.stages import StageKey

Floats = NDArray[np.floating[Any]]
Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]

REFERENCE = ReferenceBackend()  # for what reads no factor that an engine rounds
ORIGINAL = " in the original model"  # what is wrong is what the file says, or lacks


@dataclass(frozen=True)
class Scene:
    """A stage that failed: what it was given, what came out and what should have.

    Attributes:
        key: The stage.
        site: Its configuration, weights, tokens and positions.
        inputs: Its inputs in argument order, float64, every token: [T, C] or [H, T, S]. Queries,
            keys, attention weights and values are rounded as the engine reads them.
        observed: What came out, in the shape of `plain.value`.
        plain: What should have come out, with the variance that rounding explains.
        layout: Names the axes of the output.
        in_file: Whether the model is under test (its weights and configuration, against the
            oracle) and not an engine: then `observed` is right and `plain` is wrong.
        profile: What the observed side rounds.
        arithmetic: What the engine computes another stage in.
        recorded: Fetches another tensor of the observed side, or None.
        unmasked: The same with what a mask hides as it was dumped.
        graph: What the observed side's stages read.
    """

    key: StageKey
    site: Site
    inputs: tuple[Float64, ...]
    observed: Float64
    plain: Estimate
    layout: Layout
    in_file: bool
    profile: Profile
    arithmetic: Callable[[StageKey], Arithmetic]
    recorded: Callable[[StageKey], Floats | None]
    unmasked: Callable[[StageKey], Floats | None]
    graph: Graph

    @property
    def operation(self) -> Any:
        """What makes the stage; an entry knows its type from the kinds that it applies to."""
        return self.graph.operation(self.key)

    @cached_property
    def wrong(self) -> Bools:
        """Where the output is further from `plain` than rounding explains, in `plain`'s shape."""
        error = np.square(self.observed.reshape(self.plain.value.shape) - self.plain.value)
        return np.asarray(error > allowed_ratio(1.0) * self.plain.variance)

    @property
    def is_observed(self) -> bool:
        """Whether its output is known; it is not inside a span, whose end alone is."""
        return self.observed is not self.plain.value

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.site.config

    @property
    def positions(self) -> Int64:
        """Positions of the tokens, [T]."""
        return self.site.positions

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.site.positions.size)

    def source(self, *arguments: int) -> StageKey:
        """What the stage reads as this argument, what that reads as the next one, and so on."""
        key = self.key
        for number in arguments:
            key = self.graph.inputs(key)[number]
        return key

    def tensor(self, key: StageKey) -> Float64 | None:
        """A recorded tensor in float64, or None."""
        found = self.recorded(key)
        if found is None or not np.isfinite(found).all():
            return None
        return np.asarray(found, dtype=np.float64)

    def unbiased(self, argument: int) -> Float64 | None:
        """An argument as it was before its bias, if that is recorded."""
        if isinstance(self.graph.operation(self.source(argument)), AddBias):
            return self.tensor(self.source(argument, 0))
        return None

    def around(self) -> Iterator[tuple[StageKey, Float64]]:
        """Every other recorded tensor of this layer."""
        for row in self.graph.layer(self.key.layer).values():
            tensor = None if row.key == self.key else self.tensor(row.key)
            if tensor is not None:
                yield row.key, tensor

    def run(
        self, *inputs: Float64, operation: Operation | None = None, site: Site | None = None
    ) -> Float64:
        """The stage's own operation with something changed."""
        arguments = inputs or self.inputs
        if self.graph.stage(self.key).last_token:
            arguments = tuple(x[-1:] for x in arguments)
        result: Float64 = (operation or self.operation)(self.backend, site or self.site, *arguments)
        return result

    @cached_property
    def backend(self) -> ReferenceBackend:
        """Operations whose factors and angles are those of the stage's engine."""
        return ReferenceBackend(self.profile.arithmetic)

    def backend_of(self, key: StageKey) -> ReferenceBackend:
        """As `backend`, of another stage."""
        return ReferenceBackend(self.arithmetic(key))

    def factors_of(self, key: StageKey) -> list[Float64] | None:
        """The recorded inputs of another stage as the engine reads them; None without them."""
        inputs = [self.tensor(source) for source in self.graph.inputs(key)]
        found = [x for x in inputs if x is not None]
        if len(found) < len(inputs):
            return None
        operation, arithmetic = self.graph.operation(key), self.arithmetic(key)
        return factors(operation, arithmetic, self.site.config, found)

    @property
    def first_wrong_token(self) -> int:
        """The first token of the output that rounding does not explain; 0 where none has one."""
        axes = self.layout.axes
        if "token" not in axes:
            return 0
        axis = axes.index("token")
        wrong = self.wrong.reshape(self.layout.factors)
        along = wrong.any(axis=tuple(a for a in range(wrong.ndim) if a != axis))
        return int(np.argmax(along))

    def prefix(self, count: int) -> Scene:
        """The same of the first tokens alone, which in causal attention see nothing of the rest."""
        axis = self.layout.axes.index("token")
        tokens = slice(0, count)

        def cut(x: NDArray[Any]) -> NDArray[Any]:
            return x[:, tokens, tokens] if x.ndim == 3 else x[tokens]

        def cut_off(read: Callable[[StageKey], Floats | None], key: StageKey) -> Floats | None:
            found = read(key)
            return None if found is None else cut(found)

        plain, shape = self.plain, self.plain.value.shape
        factors = list(self.layout.factors)
        factors[axis] = count
        if len(shape) == 3:
            factors[2] = count
        value = cut(plain.value)
        return replace(
            self,
            site=replace(self.site, tokens=self.site.tokens[tokens],
                         positions=self.site.positions[tokens]),
            inputs=tuple(cut(x) for x in self.inputs),
            observed=cut(self.observed.reshape(shape)),
            plain=replace(plain, value=value, variance=cut(plain.variance)),
            layout=self.layout._replace(shape=value.shape, factors=tuple(factors)),
            recorded=partial(cut_off, self.recorded),
            unmasked=partial(cut_off, self.unmasked),
        )  # fmt: skip


def factors(
    operation: Operation | None,
    arithmetic: Arithmetic,
    config: ModelConfig,
    inputs: Sequence[Float64],
) -> list[Float64]:
    """Inputs of attention as an engine reads them; those of other operations as they are.

    What is rounded before a product by a weight depends on that weight's type: see `Part`.
    """
    first, second = arithmetic.activation_rounding, arithmetic.cache_rounding
    match operation:
        case Scores():
            q, k = inputs
            return [rounded(q, first, config.head_dim), rounded(k, second, config.head_dim)]
        case Values():
            softmax, qkv = inputs
            start, stop = config.qkv_columns("v")
            joined = qkv.copy()
            joined[:, start:stop] = rounded(qkv[:, start:stop], second, config.head_dim)
            return [rounded(softmax, first), joined]
    return list(inputs)


Trial = tuple[str, Float64]
"""What an alternative does, put in place of `{}` in its entry's name, and its output."""

Outputs = Callable[[Scene], Iterable[Trial]]
Kinds = tuple[type[Operation], ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the catalogue.

    Attributes:
        name: What the alternative does otherwise; `{}` takes what was solved for.
        kinds: The operations that it applies to; empty for every one.
        outputs: Runs it: one output per variant, none where it does not apply.
        advice: What to look at when an engine is under test.
        in_file: Its name when the model file is under test, or what follows `name` then; None: it
            cannot be the file.
        file_advice: What to look at then.
        is_fallback: Whether it is named only when no other cause explains: it has a free
            parameter, or says less.
        in_engine: Whether an engine can do it.
        is_causal: Whether a token's output depends on that token and earlier ones alone.
    """

    name: str
    kinds: Kinds
    outputs: Outputs
    advice: str
    in_file: str | None = None
    file_advice: str = ""
    is_fallback: bool = False
    in_engine: bool = True
    is_causal: bool = True

    def title(self, scene: Scene) -> str | None:
        """Its name for what is under test; None if it is not for that, or not for the stage."""
        if self.kinds and not isinstance(scene.operation, self.kinds):
            return None
        if scene.in_file:
            return self.name + ORIGINAL if self.in_file is ORIGINAL else self.in_file
        return self.name if self.in_engine else None

    def advice_for(self, scene: Scene) -> str:
        """What to look at."""
        return (self.file_advice or self.advice) if scene.in_file else self.advice


def single(output: Callable[[Scene], Float64 | None]) -> Outputs:
    """An alternative without variants."""

    def outputs(scene: Scene) -> Iterator[Trial]:
        value = output(scene)
        if value is not None:
            yield "", value

    return outputs
