"""What the walks have in common: small models in files, dumps of them, and judging those."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.network.stages import StageKey
from aprcore.records.report import Report, StageReport
from aprcore.runs.bisect import bisect
from aprcore.runs.request import Request
from tiny import NUM_LAYERS, SIZES, Float32, edited, trace_model, write_stages

CONFIG = {
    "hidden_size": SIZES["E"], "intermediate_size": SIZES["F"], "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": SIZES["H"], "num_key_value_heads": SIZES["K"], "head_dim": SIZES["D"],
    "vocab_size": SIZES["V"], "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip


def write_huggingface(
    path: Path, weights: Mapping[str, Float32], config: Mapping[str, Any],
    stored: Mapping[str, tuple[str, NDArray[np.uint8]]] | None = None,
) -> Path:  # fmt: skip
    """A model directory; some weights `stored` as a type and its bytes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}), "utf-8")
    header: dict[str, Any] = {}
    data = b""
    for name, values in weights.items():
        dtype, raw = (stored or {}).get(name, ("F32", values))
        start, data = len(data), data + raw.tobytes()
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def judge(model: Path, trace: Path | None = None, oracle: Path | None = None) -> Report:
    *_, report = bisect(Request(model=model, trace=trace, oracle=oracle, tokens=None))
    assert isinstance(report, Report)
    return report


def judge_fault(
    tmp_path: Path, model: Path, key: StageKey, change: Callable[[Float32], NDArray[Any]]
) -> StageReport:
    """What is said of a stage that an engine computes otherwise; nothing before it is wrong."""
    dump = write_stages(tmp_path / "faulty", edited(trace_model(model), key, change))
    found = judge(model, dump).first_divergence
    assert found is not None and found.key == key, found
    return found
