"""A sound pass of a model with heads of a usual shape, and what is said of one of its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.causes import Explanation, explain
from aprcore.engines.arithmetic import arithmetic_of_dtype
from aprcore.engines.numpy import NumpyBackend
from aprcore.judging.layouts import layout_of, zero_masked
from aprcore.judging.noise import assess
from aprcore.judging.replay import RecordedSide
from aprcore.network.backend import Site
from aprcore.network.config import ModelConfig
from aprcore.network.graph import Graph
from aprcore.network.rope import Rope
from aprcore.network.stages import StageKey, resolve_shape
from tiny import ArrayWeight

Floats = NDArray[Any]

H, K, D, E, F, V, LAYERS = 4, 2, 16, 48, 40, 60, 3
LAYER = 1  # the one that is spoilt
T = 24
TOKENS = np.random.default_rng(3).integers(0, V, T)

CONFIG = ModelConfig("llama", E, LAYERS, H, K, D, F, V, 1e-6, Rope(1e4, D), tied_head=True)


class ExactWeight(ArrayWeight):
    """A weight that was not rounded when it was stored."""

    def step_squares(self, start: int, stop: int) -> tuple[Floats, int]:
        return np.zeros((stop - start, 1), np.float32), self.values[0].size


@dataclass(frozen=True)
class Pass:
    """Every tensor of a pass, and the weights it was made with."""

    graph: Graph
    weights: dict[str, ArrayWeight]
    tensors: dict[StageKey, Floats]

    def at(self, stage: str, layer: int | None = LAYER) -> Floats:
        return self.tensors[StageKey(layer, stage)].astype(np.float64)

    def weight(self, name: str, layer: int | None = LAYER) -> Floats:
        whole = name if layer is None else f"model.layers.{layer}.{name}"
        return self.weights[whole].values.astype(np.float64)

    def part(self, name: str, layer: int = LAYER) -> Floats:
        """q, k or v before the rotation, [T, heads, D]."""
        start = {"q": 0, "k": H, "v": H + K}[name]
        stop = {"q": H, "k": H + K, "v": H + 2 * K}[name]
        return self.at("qkv_matmul", layer).reshape(T, H + 2 * K, -1)[:, start:stop]

    def queries(self) -> Floats:
        """After the rotation, [T, H, D]."""
        return self.at("q_post_rope").reshape(T, H, -1)

    def keys(self, layer: int = LAYER) -> Floats:
        """After the rotation, [T, K, D]."""
        return self.at("k_post_rope", layer).reshape(T, K, -1)


def run(config: ModelConfig = CONFIG, *, tables: Iterable[str] = ()) -> Pass:
    """A sound pass; `tables` are weights that a model need not have, and this one has."""
    graph, generator = Graph(config), np.random.default_rng(5)
    weights: dict[str, ArrayWeight] = {}
    tensors: dict[StageKey, Floats] = {}
    for key in graph.keys:
        operation = graph.operation(key)
        assert operation is not None
        for use in operation.weights:
            if use.needed or use.name in tables:
                layer = "" if use.name.startswith(("model.", "lm_head")) else (
                    f"model.layers.{key.layer}."
                )  # fmt: skip
                drawn = generator.standard_normal(resolve_shape(use.shape, config.sizes(T)))
                drawn = 1 + 0.2 * drawn if drawn.ndim == 1 else drawn / drawn.shape[1] ** 0.5
                weights.setdefault(
                    layer + use.name, ExactWeight(layer + use.name, drawn.astype(np.float32))
                )
        inputs = [tensors[source] for source in graph.inputs(key)]
        if graph.stage(key).last_token:
            inputs = [x[-1:] for x in inputs]
        site = Site(config, TOKENS, np.arange(T), key.layer, weights)
        tensors[key] = operation(NumpyBackend(), site, *inputs)
    return Pass(graph, weights, tensors)


def told(
    sound: Pass, stage: str, observed: Floats, *, layer: int | None = LAYER,
    in_file: bool = False, undumped: tuple[str, ...] = (), dtype: Any = np.float32,
) -> Explanation:  # fmt: skip
    """What `explain` says of an output, of an engine that does not dump some stages."""
    key = StageKey(layer, stage)
    tensors = {k: x for k, x in sound.tensors.items() if k.stage not in undumped}
    engine = arithmetic_of_dtype("float32" if dtype is np.float32 else "float16")
    side = RecordedSide(
        sound.graph, sound.weights, TOKENS.tolist(), T, engine, read=tensors.get
    )  # fmt: skip
    expected = side.expect(key)
    assert expected is not None
    flat = np.asarray(observed, dtype=dtype).astype(np.float32).reshape(-1)
    layout = layout_of(key, side.sizes(), flat.size)
    flat = zero_masked(sound.graph.operation(key), flat, layout)
    assert not assess(flat, expected.estimate, layout).explained, "the fault does not show"
    return explain(side, key, flat, expected, layout, in_file=in_file)


def with_rope(**fields: Any) -> ModelConfig:
    """The model with another RoPE."""
    return replace(CONFIG, rope=replace(CONFIG.rope, **fields))


# Operations as engines have them, apart from those of aprcore.


def turned(x: Floats, frequencies: Floats, positions: Floats, factor: float = 1.0) -> Floats:
    """RoPE of x [T, N, D], pair by pair."""
    out = np.empty_like(x)
    half = x.shape[2] // 2
    for i, frequency in enumerate(frequencies):
        cos, sin = np.cos(positions * frequency)[:, None], np.sin(positions * frequency)[:, None]
        out[:, :, i] = factor * (x[:, :, i] * cos - x[:, :, half + i] * sin)
        out[:, :, half + i] = factor * (x[:, :, half + i] * cos + x[:, :, i] * sin)
    return out


def plain_frequencies(theta: float = 1e4, dim: int = D) -> Floats:
    return np.asarray([theta ** (-2 * i / dim) for i in range(dim // 2)])


def yarn_frequencies(
    factor: float, length: int, fast: float = 32.0, slow: float = 1.0, theta: float = 1e4
) -> Floats:
    """As llama.cpp has them: a ramp over the dimensions between two numbers of turns."""

    def corrected(turns: float) -> float:
        return D * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(theta))

    low = max(0.0, np.floor(corrected(fast)))
    high = min(D - 1.0, np.ceil(corrected(slow)))
    found = []
    for i, plain in enumerate(plain_frequencies(theta)):
        ramp = 1 - min(1.0, max(0.0, (i - low) / max(0.001, high - low)))
        found.append(plain / factor * (1 - ramp) + plain * ramp)
    return np.asarray(found)


def products(q: Floats, k: Floats, scale: float = D**-0.5, kv_of: Any = None) -> Floats:
    """q·k of all positions, [H, T, T]."""
    kv_of = kv_of or (lambda head: head // (H // K))
    return np.stack([q[:, h] @ k[:, kv_of(h)].T * scale for h in range(q.shape[1])])


def softmax(x: Floats, sees: Floats | None = None) -> Floats:
    x = np.where(np.tri(T, dtype=bool) if sees is None else sees, x, -np.inf)
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def weighted(weights: Floats, v: Floats, kv_of: Any = None) -> Floats:
    kv_of = kv_of or (lambda head: head // (H // K))
    return np.stack([weights[h] @ v[:, kv_of(h)] for h in range(H)], axis=1)


def rms(x: Floats) -> Floats:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
