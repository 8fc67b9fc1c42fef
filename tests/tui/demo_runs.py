"""Runs of the demo's models for tests of the screen, with the same figures on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.writer import TraceWriter
from aprcore.engines.reference import ReferenceBackend
from aprcore.models.model import open_model
from aprcore.network.backend import Site
from aprcore.network.stages import StageKey, resolve_shape
from aprcore.runs.request import Request
from aprtui.demo import demo_path, load_faults
from conftest import PROMPT

# Layer 2's activation, of those that a pass computes one after the other.
ODD_CALL = 2
TOKENS = (259, 261, 221, 18, 11, 18, 31, 18, 11, 18, 29)


class OddBackend(ReferenceBackend):
    """Computes one activation in a way that no catalogue of mistakes has."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def activation(self, x: Any, kind: str) -> Any:
        y = super().activation(x, kind)
        is_odd = self._calls == ODD_CALL
        self._calls += 1
        return y * (1 + 0.3 * np.sin(np.arange(y.shape[1]))) if is_odd else y


def bring(name: str, source: Path) -> Path:
    """A link in the working directory: the screen shows paths."""
    Path(name).symlink_to(source)
    return Path(name)


def dump(model: Path, backend: ReferenceBackend, *left_out: str) -> Path:
    """Stage files of an engine that rounds each float64 stage to float32.

    What numpy's float32 products give depends on the processor.
    """
    folder = Path("engine-dump")
    assert not folder.is_symlink(), "it would be written through, into the demo"
    sidecar = Sidecar(
        tokens=TOKENS, prompt=PROMPT, dtype="float32", arithmetic="f32", backend="made-up"
    )
    made: dict[StageKey, Any] = {}
    with open_model(model) as opened, TraceWriter(folder, sidecar) as writer:
        config, graph = opened.config, opened.graph
        for key in graph.keys:
            stage = graph.stage(key)
            inputs = [made[source] for source in graph.inputs(key)]
            if stage.last_token:
                inputs = [x[-1:] for x in inputs]
            positions = np.arange(len(TOKENS))
            site = Site(config, np.array(TOKENS), positions, key.layer, opened.weights)
            assert stage.operation is not None
            x = stage.operation(backend, site, *inputs).astype(np.float32)
            made[key] = x.astype(np.float64)
            if key.stage not in left_out:
                shape = resolve_shape(stage.shape, config.sizes(len(TOKENS)))
                writer.write(key, x.reshape(shape))
    return folder


def model_run(fault: str) -> Request:
    """A demo model that is wrong, or quantised, against the oracle."""
    model = bring(f"{fault}.apr", load_faults()[fault].model)
    oracle = bring("hf-stages", demo_path() / "oracle")
    return Request(model=model, trace=dump(model, ReferenceBackend()), oracle=oracle)


def kernel_run(fault: str, *, oracle: bool = True) -> Request:
    """The dump of a wrong engine over the sound model."""
    found = load_faults()[fault]
    assert found.trace is not None
    stages = bring("hf-stages", demo_path() / "oracle") if oracle else None
    model = bring("sound.apr", found.model)
    return Request(model=model, trace=bring("engine-dump", found.trace), oracle=stages)


def odd_run() -> Request:
    """A wrong engine whose mistake is in no catalogue."""
    model = bring("sound.apr", demo_path() / "sound.apr")
    oracle = bring("hf-stages", demo_path() / "oracle")
    return Request(model=model, trace=dump(model, OddBackend()), oracle=oracle)


def fused_run() -> Request:
    """An engine whose fused attention does not dump what is in between, and no oracle."""
    model = bring("sound.apr", demo_path() / "sound.apr")
    return Request(
        model=model, trace=dump(model, ReferenceBackend(), "attn_scores", "attn_softmax")
    )


ODD_STAGE = StageKey(2, "ffn_silu")
