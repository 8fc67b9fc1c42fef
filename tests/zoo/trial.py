"""One case of the corpus, from planting to the figures."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.writer import TraceWriter
from aprcore.network.config import ModelConfig
from aprcore.network.graph import computation_order
from aprcore.network.stages import StageKey
from aprcore.records.report import Report, StageReport
from aprcore.runs.bisect import run
from aprcore.runs.request import Request

from . import converters, kernels
from .engine import Engine, Tensor, Wrong, run_on, visible, window_of
from .grounds import Farm

DETECTABLE_SIGMA = 6.0
COSINE_OF_TODAY = 0.999
EVERYWHERE = -1  # a fault in all layers
FUSED = ("attn_scores", "attn_softmax")  # what an engine with one attention kernel never has
# What the modules of an engine with fused kernels do not show, and what its hidden states do not.
MODULES = (*FUSED, "attn_norm", "q_post_rope", "k_post_rope", "post_attn_residual", "ffn_gate",
           "ffn_up", "ffn_silu", "final_norm")  # fmt: skip
STATES = (*MODULES, "qkv_matmul", "qkv_bias", "attention", "attn_out", "ffn_norm", "ffn_swigl",
          "ffn_out", "attn_post_norm", "ffn_post_norm")  # fmt: skip
# Where in such a dump what is not shown comes out.
SHOWN_BY = {
    "attn_scores": "attention", "attn_softmax": "attention", "q_post_rope": "attention",
    "k_post_rope": "attention", "attn_norm": "qkv_matmul", "post_attn_residual": "ffn_norm",
    "ffn_gate": "ffn_swigl", "ffn_up": "ffn_swigl", "ffn_silu": "ffn_swigl",
}  # fmt: skip
HIDDEN = {"fused": FUSED, "modules": MODULES, "states": STATES}


@dataclass(frozen=True)
class Case:
    """A model, how it is stored, what it is held against, and what is wrong with it.

    Attributes:
        faults: Names of faults with their layers; empty for a sound case.
        ground: A key of `GROUNDS`.
        weights: The stored type.
        oracle: The oracle's type; "none" for no oracle.
        num_tokens: T.
        engine: Habits of the zoo's engine if its dump is judged, with "?" where its sidecar does
            not state them; "" for aprcore's own trace.
        layout: How the dump departs from the canonical layout; "" for not at all; "fused" for one
            without scores and softmax, "modules" and "states" for the others of `HIDDEN`.
    """

    faults: tuple[tuple[str, int], ...]
    ground: str
    weights: str = "F32"
    oracle: str = "float32"
    num_tokens: int = 7
    engine: str = ""
    layout: str = ""

    @property
    def name(self) -> str:
        planted = (
            "+".join(
                f"{name}@{'all' if layer == EVERYWHERE else layer}" for name, layer in self.faults
            )
            or "sound"
        )
        extra = "/".join(filter(None, (self.engine, self.layout)))
        where = f"{self.ground}/{self.weights}/{self.oracle}/T{self.num_tokens}"
        return f"{planted} {where}{f'/{extra}' if extra else ''}"

    @property
    def is_local(self) -> bool:
        """Whether the fault is confined to a part of its stage."""
        return all(n in LOCAL_FAULTS or n.startswith(("local-", "small-")) for n, _ in self.faults)


LOCAL_FAULTS = frozenset({
    "file-rows-zero", "file-row-zero", "file-columns-zero", "file-head-zero",
    "file-kv-heads-swapped", "file-row-negated", "file-block-scaled", "file-embedding-row",
    "file-head-rows", "file-norm-tail", "file-bias-tail", "bytes-neighbour", "bytes-q8-scale",
    "last-columns-missing", "last-columns-up", "tile-missing", "block-empty", "bytes-empty",
    "cache-stale-keys",
})  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """One stage that a fault spoils.

    Attributes:
        key: Which.
        fault: The fault's name.
        kind: "kernel" or "model".
        sigma: What the fault changes in a row, over the sound spread of that row, at its largest.
        causes: Words of which a named cause should have one; words after "~" are for the symptom,
            where the mistake is in no catalogue.
    """

    key: StageKey
    fault: str
    kind: str
    sigma: float
    causes: tuple[str, ...]

    @property
    def detectable(self) -> bool:
        return self.sigma > DETECTABLE_SIGMA


@dataclass(frozen=True)
class Outcome:
    """What the judge said of a case, beside the truth.

    Attributes:
        case: The case.
        planted: What is wrong, in the order of computation.
        report: The judge's.
        elapsed_s: Of the judge alone.
    """

    case: Case
    planted: tuple[Planted, ...]
    report: Report
    elapsed_s: float

    @property
    def first_planted(self) -> Planted | None:
        """The first planted stage that can be seen."""
        return next((p for p in self.planted if p.detectable), None)

    @property
    def largest_sigma(self) -> float:
        """What the faults change at most; 0 where no stage uses what is wrong."""
        return max((p.sigma for p in self.planted), default=0.0)

    @property
    def failing(self) -> tuple[StageReport, ...]:
        """Stages that the judge blames."""
        return tuple(s for s in self.report.stages if s.verdict and s.verdict.is_divergence)

    @property
    def is_hit(self) -> bool:
        """Whether the first blamed stage is the first planted one."""
        first, wanted = self.report.first_divergence, self.first_planted
        return wanted is not None and first is not None and first.key == wanted.key

    @property
    def false_alarms(self) -> tuple[StageReport, ...]:
        """Blamed stages where nothing was planted."""
        truth = {p.key for p in self.planted}
        return tuple(s for s in self.failing if s.key not in truth)

    @property
    def told_apart(self) -> bool | None:
        """Whether the first fault found is put on the right side; None if it was not found."""
        wanted = self.first_planted
        first = self.report.first_divergence
        if wanted is None or first is None or first.key != wanted.key:
            return None
        return (first.blamed or "kernel") == wanted.kind  # NONFINITE is the trace's own

    @property
    def found_faults(self) -> frozenset[str]:
        """Names of the faults of which a stage is blamed."""
        failing = {s.key for s in self.failing}
        return frozenset(p.fault for p in self.planted if p.key in failing)

    @property
    def detectable_faults(self) -> frozenset[str]:
        return frozenset(p.fault for p in self.planted if p.detectable)

    @property
    def named(self) -> tuple[str, ...] | None:
        """Causes named for the first blamed stage; None where none were looked for."""
        first = self.report.first_divergence
        explanation = None if first is None else getattr(first, "explanation", None)
        if explanation is None:
            return None
        return tuple(_cause_text(cause) for cause in explanation.named)

    @property
    def cause_hit(self) -> bool:
        """Whether a named cause is one of those expected."""
        first = self.report.first_divergence
        return any(word in name.lower() for name in self.named or () for word in self._words(first))

    @property
    def expects_cause(self) -> bool:
        """Whether the first fault is one that a catalogue can hold."""
        return any(not w.startswith("~") for w in self._words(self.report.first_divergence))

    @property
    def symptom_hit(self) -> bool:
        """Whether the symptom, or a named cause, says what is to be seen of the fault."""
        first = self.report.first_divergence
        explanation = None if first is None else first.explanation
        said = "" if explanation is None else explanation.summary().lower()
        return any(word.removeprefix("~") in said for word in self._words(first))

    def _words(self, stage: StageReport | None) -> set[str]:
        return {w for p in self.planted if stage and p.key == stage.key for w in p.causes}

    @property
    def blamed_today(self) -> StageKey | None:
        """The stage that a cumulative cosine under 0.999 would blame."""
        for stage in self.report.stages:
            found = stage.comparison
            if found is not None and not found.cosine >= COSINE_OF_TODAY:
                return stage.key
        return None


def _cause_text(cause: Any) -> str:
    """A named cause as words, whatever the record calls them."""
    if isinstance(cause, str):
        return cause
    fields = ("name", "family", "title", "sentence", "text", "cause")
    return " ".join(str(getattr(cause, f)) for f in fields if hasattr(cause, f)) or str(cause)


def attempt(case: Case, farm: Farm, directory: Path) -> Outcome:
    """Plant the faults of a case, judge it, and measure what was planted."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        return _attempt(case, farm, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _attempt(case: Case, farm: Farm, directory: Path) -> Outcome:
    tokens = farm.tokens(case.ground, case.num_tokens)
    oracle = None
    if case.oracle != "none":
        oracle = farm.oracle(case.ground, case.oracle, len(tokens)).path
    path, by_file = _write_model(case, farm, tokens, directory)
    by_kernel = [(n, layer) for n, layer in case.faults if n in kernels.FAULTS]
    planted: list[Planted] = []
    dump = None
    if by_kernel or case.engine:
        engine = farm.engine(case.ground, path, case.engine.rstrip("?") or "f32")
        dump = directory / "dump"
        planted += _run_engine(case, engine, tokens, by_kernel, dump)
    if by_file:
        planted += _measure_file(case, farm, path, tokens, by_file)
    started = time.perf_counter()
    report = run(Request(model=path, oracle=oracle, trace=dump, tokens=tokens))
    elapsed_s = time.perf_counter() - started
    planted.sort(key=lambda p: computation_order(p.key))
    return Outcome(case, tuple(planted), report, elapsed_s)


def _write_model(
    case: Case, farm: Farm, tokens: tuple[int, ...], directory: Path
) -> tuple[Path, list[tuple[str, int]]]:
    """The model file, and the faults that are in it."""
    by_file = [(n, layer) for n, layer in case.faults if n in converters.FAULTS]
    if not by_file:
        return farm.sound_file(case.ground, case.weights), by_file
    draft = farm.draft(case.ground, case.weights, tokens)
    for name, layer in by_file:
        converters.FAULTS[name].spoil(draft, layer)
    return draft.write(directory / "wrong.apr"), by_file


def _run_engine(
    case: Case, engine: Engine, tokens: tuple[int, ...], faults: list[tuple[str, int]], dump: Path
) -> list[Planted]:
    """A dump of the engine with faults planted, and what they did."""
    wrongs: dict[StageKey, Wrong] = {}
    origin: dict[StageKey, str] = {}
    for name, layer in faults:
        places = product(kernels.FAULTS[name].stages.items(), layers_of(layer, engine.config))
        for (stage, wrong), number in places:
            key = key_of(stage, number)
            wrongs[key], origin[key] = wrong, name
    with torch.inference_mode():
        made = engine.run(tokens, wrongs)
    sidecar = Sidecar(
        tokens=tokens,
        backend="zoo",
        arithmetic=None if case.engine.endswith("?") else engine.habits.told,
        dtype=None if case.engine.endswith("?") else _word(engine.habits.stored),
    )
    with TraceWriter(dump, sidecar) as writer:
        for key, tensor in made.items():
            if key.stage in HIDDEN.get(case.layout, ()):
                continue
            writer.write(key, _laid_out(key, tensor, case.layout, engine).numpy())
    found = []
    for key, effect in engine.effects.items():
        sigma = largest_effect(effect.wrong - effect.sound, effect.sound - effect.exact)
        name = origin[key]
        words = kernels.FAULTS[name].causes
        if key.stage in HIDDEN.get(case.layout, ()):  # it shows in what comes out
            key = StageKey(key.layer, SHOWN_BY[key.stage])
        found.append(Planted(key, name, "kernel", sigma, words))
    return found


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _laid_out(key: StageKey, x: Tensor, layout: str, engine: Engine) -> Tensor:
    """A tensor as engines of another habit dump it."""
    if layout == "heads-first" and key.stage in ("q_post_rope", "k_post_rope", "attention"):
        return x.reshape(x.shape[0], -1, engine.config.head_dim).transpose(0, 1).contiguous()
    if layout == "masked" and key.stage == "attn_scores":
        return x.masked_fill(~seen_by(engine, key, x.shape[1]), -torch.inf)
    if layout == "pairs" and key.stage in ("q_post_rope", "k_post_rope"):
        heads = x.reshape(x.shape[0], -1, 2, engine.config.head_dim // 2)
        return heads.transpose(2, 3).reshape(x.shape)
    return x


def _measure_file(
    case: Case, farm: Farm, path: Path, tokens: tuple[int, ...], faults: list[tuple[str, int]]
) -> list[Planted]:
    """What a wrong file changes in the stages that read it, on the oracle's tensors in float64."""
    oracle = farm.oracle(case.ground, case.oracle, len(tokens))
    sound = farm.sound_engine(case.ground, case.weights).exactly()
    wrong = farm.engine(case.ground, path).exactly()
    sizes = sound.config.sizes(len(tokens))

    def read(key: StageKey) -> Tensor:
        from aprcore.judging.layouts import layout_of

        x = oracle.read(key)
        return torch.from_numpy(x.reshape(layout_of(key, sizes, x.size).shape)).double()

    found = []
    with torch.inference_mode():
        for name, layer in faults:
            fault = converters.FAULTS[name]
            layers = range(sound.config.num_layers) if fault.everywhere else (layer,)
            for key in dict.fromkeys(key_of(s, n) for n in layers for s in fault.stages):
                if key not in oracle:  # no biases to spoil
                    continue
                right, spoilt = (run_on(e, key, tokens, read) for e in (sound, wrong))
                if key.stage == "attn_scores":  # of what the wrong file hides nobody reads it
                    seen = seen_by(wrong, key, len(tokens))
                    right, spoilt = right * seen, spoilt * seen
                if torch.equal(right, spoilt):  # this model's stage does not use what is wrong
                    continue
                sigma = largest_effect(spoilt - right, read(key).reshape(right.shape) - right)
                found.append(Planted(key, name, "model", sigma, fault.causes))
    return found


def seen_by(engine: Engine, key: StageKey, num_tokens: int) -> Tensor:
    """What the queries of a layer see, [T, T]."""
    config = engine.config
    return visible(num_tokens, window_of(config, key.layer), is_causal=config.is_causal)


def layers_of(layer: int, config: ModelConfig) -> Sequence[int]:
    """The layers that a fault is in."""
    return range(config.num_layers) if layer == EVERYWHERE else (layer,)


def key_of(stage: str, layer: int) -> StageKey:
    """The key of a planted stage."""
    if stage in ("final_norm", "lm_head"):
        return StageKey(None, stage)
    return StageKey(0 if stage == "embedding" else layer, stage)


def largest_effect(change: Tensor, spread: Tensor) -> float:
    """What a fault does to a row, in sigma, at its largest.

    A row is what one token, or one head of a token, has. Root mean squares both: of the values that
    the fault changes, and of the sound spread of the whole row. So one wrong value counts for what
    it is, and a change of many is not judged by its extreme.
    """
    rows = change.reshape(-1, change.shape[-1]).double()
    if not torch.isfinite(rows).all():
        return math.inf
    sigma = spread.reshape(rows.shape).double().square().mean(dim=1).sqrt()
    touched = (rows != 0).sum(dim=1)
    effect = (rows.square().sum(dim=1) / touched.clamp(min=1)).sqrt()
    ratio = torch.where(touched > 0, effect / sigma, 0.0)
    return float(ratio.max())
