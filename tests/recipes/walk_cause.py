"""What a cause gets from its entry."""

from __future__ import annotations

from pathlib import Path

from toys import judge_fault

from aprcore.network.stages import StageKey
from tiny import trace_model, write_model


def test_it_is_tried_and_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.apr")
    tensors = trace_model(model)
    x, y = tensors[StageKey(0, "post_ffn_residual")], tensors[StageKey(1, "attn_out")]
    found = judge_fault(tmp_path, model, StageKey(1, "post_attn_residual"), lambda _: x + y**3)
    assert found.explanation is not None
    (cause,) = found.explanation.named
    assert (cause.name, cause.advice) == ("block's output cubed", "where it is cubed")
    assert "block's output cubed" in found.reason
