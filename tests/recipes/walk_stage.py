"""What a conditional stage gets from a few lines in its architecture's module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from toys import judge, judge_fault

from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from tiny import SIZES, draw_weights, opened, trace_model, write_model, write_stages

KEY, OUT = StageKey(1, "attn_sub_norm"), StageKey(1, "attn_out")
METADATA = {"architecture": "llama"}


def write(path: Path, has_norm: bool) -> Path:
    also = ("attn_sub_norm",) if has_norm else ()
    changed = draw_weights(has_bias=False, architecture="llama", also=also)
    return write_model(path, has_bias=False, changed=changed)


def test_it_is_there_where_its_weight_is(tmp_path: Path) -> None:
    with_norm, without = (write(tmp_path / f"{n}.apr", bool(n)) for n in (1, 0))
    with opened(with_norm) as a, opened(without) as b:
        assert KEY in a.graph and KEY not in b.graph
        assert set(a.graph.keys) - set(b.graph.keys) == {StageKey(i, KEY.stage) for i in range(3)}
    tensors = trace_model(with_norm)
    y = tensors[OUT]
    rms = np.sqrt(np.square(y).mean(axis=1, keepdims=True) + 1e-6)
    gain = draw_weights(has_bias=False, also=(KEY.stage,))["model.layers.1.attn_sub_norm.weight"]
    assert gain.shape == (SIZES["E"],)
    np.testing.assert_allclose(tensors[KEY], y / rms * gain, rtol=1e-4)
    dump = write_stages(tmp_path / "dump", tensors)
    assert set(judge(with_norm, dump).counts) <= {Verdict.PASS}
    fault = judge_fault(tmp_path, with_norm, KEY, lambda x: y * gain)
    assert fault.blamed == "kernel"
