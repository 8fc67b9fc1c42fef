"""The real llama.cpp is never accused: caches, flash attention, chunks, steps, types of weights."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from runs import capture, divergences, judge, judged, tokens_of

from aprcore.records.report import Report

# Attention without flash shows scores and softmax.
STAGES = {
    "embedding", "attn_norm", "qkv_matmul", "q_post_rope", "k_post_rope", "attention", "attn_out",
    "post_attn_residual", "ffn_norm", "ffn_gate", "ffn_up", "ffn_swigl", "ffn_out",
    "post_ffn_residual", "final_norm", "lm_head",
}  # fmt: skip


class Case(NamedTuple):
    model: str
    kv_type: str
    flash: bool = False
    settings: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        flash = "-flash" if self.flash else ""
        return f"{self.model}-{self.kv_type}{flash}" + "".join(f"-{k}{v}" for k, v in self.settings)


PASSES = ((), (("ubatch", 4),), (("step", 2),))
CASES = [
    *(Case(*case) for case in product(
        ("stories", "stories-Q8_0", "demo"), ("f32", "f16", "bf16"), (False, True), PASSES)),
    # A quantised cache takes flash attention, and heads of whole blocks.
    *(Case(*case) for case in product(
        ("blocks", "blocks-Q8_0"), ("q8_0", "q4_0"), (True,), PASSES)),
    *(Case(f"blocks-{kind}", kv_type) for kind, kv_type in product(
        ("F16", "Q8_0", "Q4_1", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS"), ("f32", "f16"))),
    *(Case(f"blocks-{kind}", "q8_0", True) for kind in ("F16", "Q4_K", "Q6_K", "IQ4_XS")),
]  # fmt: skip


def _judged_case(models: dict[str, Path], folder: Path, case: Case) -> Report:
    settings: dict[str, Any] = dict(case.settings)
    dump = capture(models[case.model], tokens_of(case.model), folder / "dump",
                   kv_type=case.kv_type, flash_attention=case.flash, **settings)  # fmt: skip
    return judge(models[case.model], dump)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_accused(models: dict[str, Path], tmp_path: Path, case: Case) -> None:
    assert divergences(_judged_case(models, tmp_path, case)) == {}


@pytest.mark.parametrize(
    "case",
    [
        Case("stories", "f16"),
        Case("stories-Q8_0", "f16", True),
        Case("stories", "f16", False, (("step", 2),)),
        Case("blocks-Q4_K", "q8_0", True),
    ],
    ids=str,
)
def test_every_stage_is_judged(models: dict[str, Path], tmp_path: Path, case: Case) -> None:
    """Among them those that follow on the last row of the last layer, which alone is kept."""
    scores = set() if case.flash else {"attn_scores", "attn_softmax"}
    assert judged(_judged_case(models, tmp_path, case)) >= STAGES | scores


def test_a_long_prompt_is_not_accused(models: dict[str, Path], tmp_path: Path) -> None:
    """Angles that are made one from the other drift by then, and the cache has grown twice."""
    tokens = tuple(1 + (i * 37) % 500 for i in range(300))
    dump = capture(models["stories"], tokens, tmp_path / "dump", kv_type="f16", ubatch=128)
    assert divergences(judge(models["stories"], dump)) == {}
