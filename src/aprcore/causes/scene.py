"""What an alternative operation may look at, and what an entry of the catalogue is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.base import Int64, Site
from aprcore.engines.estimate import Estimate, Profile
from aprcore.engines.reference import ReferenceBackend
from aprcore.judging.layouts import Layout
from aprcore.judging.noise import allowed_ratio
from aprcore.network.config import ModelConfig
from aprcore.network.graph import BY_NAME, StageKey

Floats = NDArray[np.floating[Any]]
Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]

REFERENCE = ReferenceBackend()


@dataclass(frozen=True)
class Scene:
    """A stage that failed: what it was given, what came out and what should have.

    Attributes:
        key: The stage.
        site: Its configuration, weights, tokens and positions.
        inputs: Its inputs in argument order, float64, every token: [T, C] or [H, T, S].
        observed: What came out, in the shape of `plain.value`.
        plain: What should have come out, with the variance that rounding explains.
        layout: Names the axes of the output.
        in_file: Whether the model is under test (its weights and configuration, against the
            oracle) and not an engine: then `observed` is right and `plain` is wrong.
        profile: What the observed side rounds.
        recorded: Fetches another tensor of the observed side, or None.
        features: What the stages of the observed side have.
    """

    key: StageKey
    site: Site
    inputs: tuple[Float64, ...]
    observed: Float64
    plain: Estimate
    layout: Layout
    in_file: bool
    profile: Profile
    recorded: Callable[[StageKey], Floats | None]
    features: frozenset[str]

    @cached_property
    def wrong(self) -> Bools:
        """Where the output is further from `plain` than rounding explains, in `plain`'s shape."""
        error = np.square(self.observed.reshape(self.plain.value.shape) - self.plain.value)
        return np.asarray(error > allowed_ratio(1.0) * self.plain.variance)

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

    def tensor(self, stage: str, layer: int | None = None) -> Float64 | None:
        """A recorded tensor of this layer (or of `layer`) in float64, or None."""
        where = self.key.layer if layer is None else layer
        found = self.recorded(StageKey(where, stage))
        if found is None or not np.isfinite(found).all():
            return None
        return np.asarray(found, dtype=np.float64)

    def run(
        self, *, inputs: tuple[Float64, ...] | None = None, site: Site | None = None,
        backend: Any = REFERENCE,
    ) -> Float64:  # fmt: skip
        """The stage's own operation with something changed."""
        stage = BY_NAME[self.key.stage]
        arguments = self.inputs if inputs is None else inputs
        if stage.last_token:
            arguments = tuple(x[-1:] for x in arguments)
        assert stage.operation is not None
        result: Float64 = stage.operation(backend, self.site if site is None else site, *arguments)
        return result

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

        def recorded(key: StageKey) -> Floats | None:
            found = self.recorded(key)
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
            recorded=recorded,
        )  # fmt: skip


Trial = tuple[str, Float64]
"""What an alternative does, put in place of `{}` in its entry's name, and its output."""

Outputs = Callable[[Scene], Iterable[Trial]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the catalogue.

    Attributes:
        name: What the alternative does otherwise; `{}` takes what was solved for.
        stages: Where it applies; empty for every stage.
        outputs: Runs it: one output per variant, none where it does not apply.
        advice: What to look at when an engine is under test.
        in_file: Its name when the model file is under test; None: it cannot be the file.
        file_advice: What to look at then.
        is_fallback: Whether it is named only when no other cause explains: it has a free
            parameter, or says less.
        in_engine: Whether an engine can do it.
        is_causal: Whether a token's output depends on that token and earlier ones alone.
    """

    name: str
    stages: frozenset[str]
    outputs: Outputs
    advice: str
    in_file: str | None = None
    file_advice: str = ""
    is_fallback: bool = False
    in_engine: bool = True
    is_causal: bool = True

    def title(self, scene: Scene) -> str | None:
        """Its name for what is under test; None if it is not for that."""
        if scene.in_file:
            return self.in_file
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


def stages(*names: str) -> frozenset[str]:
    """Names of stages, checked against the table."""
    for name in names:
        assert name in BY_NAME, name
    return frozenset(names)


ROTATED = stages("q_post_rope", "k_post_rope")
NORMS = stages("attn_norm", "ffn_norm", "final_norm")
RESIDUALS = stages("post_attn_residual", "post_ffn_residual")
LINEAR = stages("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")
EVERY: frozenset[str] = frozenset()
