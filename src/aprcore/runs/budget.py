"""Budgets: how large an error of its own a user tolerates at a stage.

A budget is the largest relative L2 of a stage's *own* error: that of its kernel and its model
judgment, whichever is worse, or the cumulative error where neither can be made. It does two things:

- a FAIL whose own error is within the budget is accepted: the user has said that this much is fine;
- with `--strict`, an own error beyond the budget is a FAIL even where rounding explains it. Without
  `--strict` the reason says so and the verdict stays.

What no tolerance can mend (NONFINITE, SHAPE, a NaN on either side) is not a budget's business.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import msgspec

from aprcore.ground.errors import PlanError, Where
from aprcore.ground.fields import convert, read_toml
from aprcore.judging.verdict import Judgment, Verdict
from aprcore.models.names import GgufNames
from aprcore.network.architectures import COMPUTED
from aprcore.network.graph import Graph, known_stages, outline
from aprcore.network.stages import ALIASES, Scope, StageKey
from aprcore.records.report import RunHeader, StageReport

# Keys of a tolerance file: the coarsest type of both sides' activations, or any.
DTYPES = ("bfloat16", "float16", "float32")
ANY_DTYPE = "any"
Tolerance = Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]

_PATTERN = re.compile(r"(?:layer-?(\d{1,9}|\*)[./])?([a-z_]+|\*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Budget:
    """One line of a user's tolerances.

    Attributes:
        stages: The stages it is for, or None for all.
        layer: The layer it is for, or None for all.
        relative_l2: The largest own error that it allows.
        dtype: The type of activations it is for, or None for any.
        module: The module that `stages` were named by, if they were.
    """

    stages: tuple[str, ...] | None
    layer: int | None
    relative_l2: float
    dtype: str | None = None
    module: str | None = None

    def covers(self, key: StageKey, dtype: str) -> bool:
        """Whether it is for this stage of a run in this type."""
        return (
            (self.stages is None or key.stage in self.stages)
            and (self.layer is None or self.layer == key.layer)
            and (self.dtype is None or self.dtype == dtype)
        )

    @property
    def precedence(self) -> tuple[bool, bool, bool]:
        """The more it says, the more it counts: its stage, then its layer, then its type."""
        return self.stages is not None, self.layer is not None, self.dtype is not None


class _Tolerances(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of a tolerance file: `DTYPES` and `ANY_DTYPE`."""

    bfloat16: Tolerance | None = None
    float16: Tolerance | None = None
    float32: Tolerance | None = None
    any: Tolerance | None = None


class _ToleranceFile(msgspec.Struct, forbid_unknown_fields=True):
    """A tolerance file; what is in its stages' tables is checked by name."""

    default: _Tolerances = _Tolerances()
    stage: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Budgets:
    """All budgets of a run. Of equally specific ones the last counts.

    Attributes:
        options: Those of the command line; where one of them fits, the file is not asked.
        file: Those of a tolerance file.
    """

    options: tuple[Budget, ...] = ()
    file: tuple[Budget, ...] = ()

    def find(self, key: StageKey, dtype: str) -> float | None:
        """The budget of a stage, if the user gave one."""
        for lines in (self.options, self.file):
            fitting = [line for line in reversed(lines) if line.covers(key, dtype)]
            if fitting:
                return max(fitting, key=lambda line: line.precedence).relative_l2
        return None

    def resolved(self, graph: Graph) -> Budgets:
        """The budgets for the stages of one run: modules mean what they make there.

        Raises:
            PlanError: One is for a layer that the model does not have.
        """
        for line in (*self.options, *self.file):
            if line.layer is not None and line.layer >= graph.num_layers:
                raise PlanError(f"a budget is for layer {line.layer}, but the layers are"
                                f" 0 to {graph.num_layers - 1}")  # fmt: skip
        if all(line.module is None for line in (*self.options, *self.file)):
            return self
        made = modules_of(graph)

        def resolve(lines: Iterable[Budget]) -> tuple[Budget, ...]:
            return tuple(
                line if line.module is None else replace(line, stages=made.get(line.module, ()))
                for line in lines
            )

        return Budgets(resolve(self.options), resolve(self.file))


NO_BUDGETS = Budgets()


def parse_budgets(options: Iterable[str], file: Path | None = None) -> Budgets:
    """The budgets of a tolerance file and of `--budget` options, which count more.

    Raises:
        PlanError: One is malformed or names no stage.
        FormatError: The file cannot be read or is not TOML.
    """
    lines = [] if file is None else _read_tolerances(file)
    return Budgets(tuple(map(_parse_option, options)), tuple(lines))


def _parse_option(text: str) -> Budget:
    pattern, found, value = text.partition("=")
    try:
        number = float(value) if found else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise PlanError(f"cannot read the budget {text!r}",
                        hint="write STAGE=TOLERANCE, such as layer3.ffn_out=1e-3")  # fmt: skip
    stages, layer, module = _parse_pattern(pattern.strip(), None)
    return Budget(stages, layer, number, None, module)


def modules_of(graph: Graph) -> Mapping[str, tuple[str, ...]]:
    """Stages by the last name of what makes them: a module of transformers, a weight, a node.

    q, k and v are one stage, and with a bias two.
    """
    gguf = GgufNames(graph)
    found: dict[str, dict[str, None]] = {}
    for row in (*graph.layer(0).values(), *graph.layer(None).values()):
        operation = row.stage.operation
        uses = () if operation is None else operation.weights
        prefix = "model.layers.0." if row.stage.scope is Scope.LAYER else ""
        stored = [prefix + use.name for use in uses if use.needed]
        names = [name.rpartition(".")[0] for name in (*stored, *map(gguf.stored, stored))]
        names += [name for shown in row.stage.shown for name in shown]
        names += [name for node in row.stage.nodes for name in node.names]
        for name in names:
            short = name.rpartition(".")[2]
            if short not in ("", "input", "1", row.stage.name):
                found.setdefault(short, {})[row.stage.name] = None
    return {name: tuple(stages) for name, stages in found.items()}


@cache
def known_modules() -> Mapping[str, tuple[str, ...]]:
    """Those of every architecture: whether a name means anything at all."""
    found: dict[str, tuple[str, ...]] = {}
    for architecture in COMPUTED:
        for name, stages in modules_of(outline(1, known_stages(), architecture)).items():
            found[name] = tuple(dict.fromkeys((*found.get(name, ()), *stages)))
    return found


def _parse_pattern(
    text: str, where: Where
) -> tuple[tuple[str, ...] | None, int | None, str | None]:
    """Stages, layer and module of "ffn_out", "layer3.down_proj", "layer-3/ffn_out", "*".

    Raises:
        PlanError: It is no such pattern, or names no stage.
    """
    match = _PATTERN.fullmatch(text.lower())
    hint = f"write a stage, layerN.STAGE or *; stages are {', '.join(known_stages())}"
    if match is None:
        raise PlanError(f"{text!r} names no stage", where=where, hint=hint)
    layer = None if match[1] in (None, "*") else int(match[1])
    if match[2] == "*":
        return None, layer, None
    name = ALIASES.get(match[2], match[2])
    module = None if name in known_stages() else name
    stages = (name,) if module is None else known_modules().get(name, ())
    if not stages:
        raise PlanError(f"unknown stage {match[2]!r}", where=where, hint=hint)
    scope = known_stages()[stages[0]].scope
    if match[1] is not None and scope is Scope.MODEL:
        raise PlanError(f"{text!r}: {stages[0]} is in no layer", where=where)
    if layer and scope is Scope.FIRST_LAYER:
        raise PlanError(f"{text!r}: {stages[0]} is in layer 0 only", where=where)
    return stages, layer, module


def _read_tolerances(path: Path) -> list[Budget]:
    """A file with tables `[default]` and `[stage.NAME]`, each with a number per dtype.

    NAME is a stage or, in quotes, any pattern that `--budget` takes; `[default]` is `*`.

    Raises:
        PlanError: It has anything else, or names no stage.
    """
    held = convert(read_toml(path), _ToleranceFile, path, error=PlanError)
    lines = _budgets((None, None, None), held.default)
    for pattern, table in held.stage.items():
        prefix = f"stage.{pattern}."
        tolerances = convert(table, _Tolerances, path, prefix=prefix, error=PlanError)
        lines += _budgets(_parse_pattern(pattern, path), tolerances)
    return lines


def _budgets(
    target: tuple[tuple[str, ...] | None, int | None, str | None], tolerances: _Tolerances
) -> list[Budget]:
    stages, layer, module = target
    return [
        Budget(stages, layer, value, None if dtype == ANY_DTYPE else dtype, module)
        for dtype, value in msgspec.structs.asdict(tolerances).items() if value is not None
    ]  # fmt: skip


def run_dtype(header: RunHeader) -> str:
    """The coarsest type of activations on either side: what tolerances go by."""
    sides = (header.trace, header.oracle)
    present = {side.dtype for side in sides if side is not None}
    return next((dtype for dtype in DTYPES if dtype in present), DTYPES[-1])


def own_error(stage: StageReport, *, strict: bool = False) -> float | None:
    """The relative L2 that a budget must allow for a stage to pass; None if none can.

    Args:
        stage: The stage.
        strict: Whether errors that rounding explains count too. Otherwise those of the failed
            judgments, where there are any.
    """
    found = stage.comparison
    if found is not None and (found.nonfinite_a or found.nonfinite_b):
        return None
    judged = [j for j in (stage.kernel, stage.model) if j is not None]
    failed: list[Judgment] = [] if strict else [j for j in judged if not j.passed]
    errors = [judgment.relative_l2 for judgment in failed or judged]
    if not errors and found is not None:
        errors = [found.relative_l2]
    worst = max(errors, default=math.inf)
    return worst if math.isfinite(worst) else None


def settle(stage: StageReport, budget: float | None, *, strict: bool = False) -> StageReport:
    """A judged stage under the user's budget, and at which budget it would pass if it fails."""
    settled = (None, Verdict.MISSING, Verdict.UNJUDGED, Verdict.NONFINITE, Verdict.SHAPE)
    if stage.verdict in settled:
        return stage
    failed = stage.verdict is Verdict.FAIL
    error = own_error(stage, strict=strict or not failed)
    if error is None:
        return stage
    if failed:
        if budget is not None and error <= budget:
            reason = f"within your budget: {error:.3g} <= {budget:g} ({stage.reason})"
            return replace(
                stage, verdict=Verdict.NOISE, reason=reason, budget=budget, accepted=True
            )
        return replace(stage, budget=budget, passes_at=error)
    if budget is None:
        return stage
    if error <= budget:
        return replace(stage, budget=budget)
    beyond = f"noise beyond the budget: relative L2 {error:.3g} > {budget:g}"
    if strict:
        return replace(stage, verdict=Verdict.FAIL, reason=beyond, budget=budget, passes_at=error)
    return replace(stage, reason=f"{stage.reason}; {beyond}", budget=budget)
