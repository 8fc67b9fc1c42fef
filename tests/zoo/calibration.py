"""Measure the predicted noise floor on sound weights and models: `python -m tests.zoo.calibration`.

Writes the tables of docs/noise-floor.md (between its markers) and docs/noise-floor.svg.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.arithmetic import EXACT
from aprcore.engines.estimate import Estimate, Profile
from aprcore.engines.prediction import PredictionBackend
from aprcore.judging.layouts import Layout
from aprcore.judging.noise import Assessment, allowed_ratio, assess
from aprcore.quant.encode import ENCODERS, encode
from aprcore.quant.steps import step_squares
from aprcore.quant.types import Bytes, Float32, dequantize

from .chart import Mark, draw
from .corpus import sound_pairs
from .grounds import Farm, quiet
from .run import outcomes

DOCS = Path(__file__).parents[2] / "docs"
FORMATS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K")
PADDED = ("Q4_K", "Q6_K", "F16", "BF16")  # rows of any length
SEEDS = range(4)
SHAPE = (384, 512)  # of the random weights
TOKENS = (1, 7, 33)
LINEAR_INPUTS = {"qkv": "attn_norm", "o": "attention", "gate": "ffn_norm", "up": "ffn_norm",
                 "down": "ffn_swigl"}  # fmt: skip


@dataclass(frozen=True)
class StoredRows:
    """A matrix in its stored type."""

    dtype: str
    raw: Bytes
    shape: tuple[int, int]
    name: str = ""

    def read(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        rows = self._values[start:stop]
        if out is None:
            return rows.copy()
        target = out.reshape(-1)[: rows.size].reshape(rows.shape)
        target[...] = rows
        return target

    def step_squares(self, start: int, stop: int) -> tuple[Float32, int]:
        squares, group = self._steps
        return squares[start:stop], group

    @cached_property
    def _values(self) -> Float32:
        values = np.empty(self.shape[0] * self.shape[1], np.float32)
        dequantize(self.dtype, self.raw, values, row_length=self.shape[1])
        return values.reshape(self.shape)

    @cached_property
    def _steps(self) -> tuple[Float32, int]:
        count = self.shape[0] * self.shape[1]
        return step_squares(self.dtype, self.raw, count, row_length=self.shape[1])


def store(dtype: str, weights: Float32) -> StoredRows:
    """Quantise with the project's own encoders, else with gguf-py."""
    weights = np.ascontiguousarray(weights, np.float32)
    if dtype in ENCODERS:
        data = encode(dtype, weights)[0]
    else:
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        data = quantize(weights, GGMLQuantizationType[dtype])
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    return StoredRows(dtype, raw, weights.shape)


@dataclass(frozen=True)
class Measured:
    """One product with stored weights against the same with the float ones.

    Attributes:
        dtype: The stored type.
        source: Where weights and inputs come from.
        assessment: As the judge has it.
        row_ratios: Measured over predicted of every output row, over all tokens.
        row_dofs: The worth of each in independent errors.
    """

    dtype: str
    source: str
    assessment: Assessment
    row_ratios: NDArray[np.float64]
    row_dofs: float


def measure(dtype: str, source: str, weights: Float32, x: NDArray[np.float64]) -> Measured:
    """y = W x with W stored, against W as it was."""
    stored = store(dtype, weights)
    backend = PredictionBackend([(None, Profile(EXACT, weights_rounded=True))])
    estimate = backend.linear(Estimate(x, np.zeros_like(x)), [stored])
    observed = x @ weights.astype(np.float64).T
    layout = Layout(observed.shape, observed.shape, ("token", "dim"))
    error, predicted = np.square(observed - estimate.value), estimate.variance
    dofs = min(float(len(x)), estimate.token_dof or math.inf)
    return Measured(
        dtype, source, assess(observed, estimate, layout),
        error.sum(axis=0) / predicted.sum(axis=0), dofs,
    )  # fmt: skip


def random_products(dtype: str) -> Iterator[Measured]:
    """Gaussian weights with Gaussian inputs, and with two channels that dwarf the others."""
    for seed in SEEDS:
        draw_from = np.random.default_rng(seed)
        weights = (draw_from.standard_normal(SHAPE) / math.sqrt(SHAPE[1])).astype(np.float32)
        for tokens in TOKENS:
            x = draw_from.standard_normal((tokens, SHAPE[1]))
            yield measure(dtype, "Gaussian", weights, x)
            x = x.copy()
            x[:, [7, 130]] *= 60
            yield measure(dtype, "outlier", weights, x)


def trained_products(dtype: str, farm: Farm) -> Iterator[Measured]:
    """The trained models' own weights on their own inputs."""
    for ground, tokens in (("demo", 11), ("stories260k", 9)):
        if farm.missing(ground) is not None:
            continue
        oracle = farm.oracle(ground, "float32", tokens)
        for name, weights in farm.draft(ground, "F32").weights.items():
            part = name.rpartition("_proj.weight")[0].rpartition(".")[2]
            if not name.endswith("_proj.weight"):
                continue
            stage = LINEAR_INPUTS["qkv" if part in "qkv" else part]
            if dtype not in PADDED and weights.shape[1] % 32:
                continue
            key = next(k for k in oracle.keys() if k.stage == stage and f".{k.layer}." in name)
            x = oracle.read(key).reshape(-1, weights.shape[1]).astype(np.float64)
            yield measure(dtype, ground, weights, x)


def product_table(results: Sequence[Measured]) -> str:
    """Whole-tensor ratios and the worst part, by type and source."""
    lines = [
        "| type | weights and inputs | products | measured/predicted, whole tensor | median "
        "| worst part over its factor |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for result in results:
        groups[result.dtype, result.source].append(result)
    for (dtype, source), found in groups.items():
        ratios = [m.assessment.ratio for m in found]
        parts = [m.assessment.worst.ratio / m.assessment.worst.factor for m in found]
        lines.append(
            f"| {dtype} | {source} | {len(found)} | {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {statistics.median(ratios):.2f} | {max(parts):.2f} |"
        )
    return "\n".join(lines)


@dataclass
class StageRatios:
    """What sound runs reached at one stage."""

    ratios: list[float]
    parts: list[float]


def stage_tables(farm: Farm) -> tuple[str, str, list[str]]:
    """Kernel ratios by stage, model ratios by oracle type and stored type, and any FAIL."""
    kernel: dict[str, StageRatios] = defaultdict(lambda: StageRatios([], []))
    model: dict[tuple[str, str], StageRatios] = defaultdict(lambda: StageRatios([], []))
    alarms = []
    for outcome in outcomes(sound_pairs(), farm):
        case = outcome.case
        for stage in outcome.report.stages:
            pairs = (
                (stage.kernel, kernel[f"{stage.key.stage}"]),
                (stage.model, model[case.weights, case.oracle]),
            )
            for judgment, into in pairs:
                if judgment is None:
                    continue
                found = judgment.assessment
                into.ratios.append(found.ratio)
                into.parts.append(found.worst.ratio / found.worst.factor)
                if not found.explained:
                    alarms.append(f"{case.name} {stage.key.path}")
    return _ratio_table("stage", kernel), _ratio_table("weights, oracle", model), alarms


def _ratio_table(title: str, rows: Mapping[object, StageRatios]) -> str:
    lines = [
        f"| {title} | judged | measured/predicted, median | largest | worst part over its factor |",
        "|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        if found.ratios:
            text = name if isinstance(name, str) else ", ".join(name)  # type: ignore[arg-type]
            lines.append(
                f"| {text} | {len(found.ratios)} | {statistics.median(found.ratios):.2f} "
                f"| {max(found.ratios):.2f} | {max(found.parts):.2f} |"
            )
    return "\n".join(lines)


def local_fault() -> str:
    """The last 8 of 896 rows zeroed, of one Q4_0 product: what the whole tensor hides."""
    draw_from = np.random.default_rng(0)
    weights = (draw_from.standard_normal((896, 896)) / math.sqrt(896)).astype(np.float32)
    x = draw_from.standard_normal((7, 896))
    sound = measure("Q4_0", "", weights, x)
    stored = store("Q4_0", weights)
    backend = PredictionBackend([(None, Profile(EXACT, weights_rounded=True))])
    estimate = backend.linear(Estimate(x, np.zeros_like(x)), [stored])
    observed = x @ weights.astype(np.float64).T
    estimate.value[:, -8:] = 0
    layout = Layout(observed.shape, observed.shape, ("token", "dim"))
    wrong = assess(observed, estimate, layout)
    rows = np.square(observed - estimate.value).sum(0) / estimate.variance.sum(0)
    return (
        f"On a Q4_0 product of 896 by 896 with seven Gaussian tokens the whole tensor's ratio is "
        f"{sound.assessment.ratio:.2f} when sound and {wrong.ratio:.1f} with the last 8 rows "
        f"zeroed; the worst single row {sound.row_ratios.max():.1f} and {rows.max():.0f}. A row of "
        f"seven tokens may reach {float(allowed_ratio(sound.row_dofs)):.1f}."
    )


def marks(results: Sequence[Measured]) -> list[Mark]:
    """Points of the plot: whole tensors by type, and the worst rows by their degrees of freedom."""
    found = [Mark("type", m.dtype, m.assessment.ratio, m.source) for m in results]
    by_dof: dict[float, list[float]] = defaultdict(list)
    for m in results:
        by_dof[round(m.row_dofs, 1)] += m.row_ratios.tolist()
    for dof, ratios in by_dof.items():
        ranked = sorted(ratios)
        step = max(1, len(ranked) // 12)
        found += [Mark("row", dof, ratio, "") for ratio in {*ranked[::step], *ranked[-3:]}]
    found += [
        Mark("whole", float(np.prod(SHAPE[0]) * m.row_dofs), m.assessment.ratio, "")
        for m in results
        if m.source == "Gaussian"
    ]
    return found


def write_between(text: str, name: str, body: str) -> str:
    """`text` with what lies between the markers of `name` replaced."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(start)
    if not rest:
        raise SystemExit(f"docs/noise-floor.md has no marker {start}")
    return f"{before}{start}\n{body}\n{end}{rest.partition(end)[2]}"


def main() -> int:
    """Measure and write; 1 if a sound part exceeds its factor."""
    quiet()
    with tempfile.TemporaryDirectory(prefix="aprtui-calibration-") as folder:
        farm = Farm(Path(folder))
        results = []
        for dtype in FORMATS:
            results += [*random_products(dtype), *trained_products(dtype, farm)]
        kernel, model, alarms = stage_tables(farm)
    page = DOCS / "noise-floor.md"
    text = page.read_text("utf-8")
    bodies = {"products": product_table(results), "stages": kernel, "models": model,
              "local": local_fault()}  # fmt: skip
    for name, body in bodies.items():
        text = write_between(text, name, body)
    page.write_text(text, "utf-8")
    (DOCS / "noise-floor.svg").write_text(draw(marks(results), FORMATS), "utf-8")
    alarms += [f"{m.dtype} {m.source}" for m in results if not m.assessment.explained]
    print("\n".join(bodies.values()))
    for alarm in alarms:
        print(f"a sound part exceeds its factor: {alarm}", file=sys.stderr)
    return int(bool(alarms))


if __name__ == "__main__":
    sys.exit(main())
