"""What a way of naming tensors gets from its dialect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from toys import judge

from aprcore.dumps.open import open_dump
from aprcore.network.stages import StageKey
from tiny import opened, trace_model, write_model


def test_a_dump_is_read_and_judged(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.apr")
    tensors = trace_model(model)
    names = {"input": "attn_norm", "mixed": "attention", "out": "attn_out"}
    stored = {
        f"L{key.layer}:{theirs}": tensors[key]
        for theirs, ours in names.items() for key in tensors if key.stage == ours
    }  # fmt: skip
    np.savez(tmp_path / "dump.npz", tokens=np.array([5, 0, 39, 7, 7]), **stored)
    with opened(model) as held:
        dump = open_dump(tmp_path / "dump.npz", graph=held.graph)
    assert dump.ignored == ()
    assert set(dump.keys()) == {key for key in tensors if key.stage in names.values()}
    report = judge(model, tmp_path / "dump.npz")
    stage = next(s for s in report.stages if s.key == StageKey(1, "attn_out"))
    assert stage.kernel is not None and stage.kernel.passed
