"""Causes by experiment: what llama.cpp's options, caches and fused kernels get wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from aprcore.network.rope import RopeScaling
from cause_passes import (
    CONFIG,
    Floats,
    Pass,
    T,
    plain_frequencies,
    run,
    told,
    turned,
    with_rope,
    yarn_frequencies,
)

PLACES = np.arange(T)
CONFIGS = {
    "plain": CONFIG,
    "yarn": with_rope(scaling=RopeScaling("yarn", 4.0, 4096)),
    "llama3": with_rope(scaling=RopeScaling("llama3", 8.0, 64)),
}
YARN_FACTOR = 0.1 * np.log(4) + 1

Fault = tuple[str, str, Callable[[Pass], Floats], str]


def q_turned(
    frequencies: Floats, positions: Floats = PLACES, factor: float = 1.0
) -> Callable[[Pass], Floats]:
    return lambda p: turned(p.part("q"), frequencies, positions, factor)


ROPE: list[Fault] = [
    ("plain", "q_post_rope", q_turned(plain_frequencies(), PLACES + 37),
     "RoPE positions off by +37"),
    ("plain", "q_post_rope", q_turned(plain_frequencies(), PLACES - 1200),
     "RoPE positions off by -1200"),
    ("plain", "q_post_rope", q_turned(plain_frequencies(), np.minimum(PLACES, 9)),
     "RoPE positions held at 9"),
    ("plain", "q_post_rope", q_turned(plain_frequencies() / 4), "RoPE positions divided by 4"),
    ("plain", "q_post_rope", q_turned(plain_frequencies() * 0.3),
     "RoPE positions divided by 3.33333"),
    ("plain", "q_post_rope", q_turned(yarn_frequencies(4, 64), factor=YARN_FACTOR),
     "RoPE scaling added: yarn by 4 from 64"),
    ("plain", "q_post_rope", q_turned(yarn_frequencies(4, 64)),
     "RoPE scaling added: yarn by 4 from 64, with an attention factor of 1"),
    ("yarn", "q_post_rope", q_turned(plain_frequencies()), "RoPE scaling (yarn) missing"),
    ("yarn", "q_post_rope", q_turned(yarn_frequencies(4, 4096), factor=1.3),
     "RoPE scaling with an attention factor of 1.3 in place of 1.1386"),
    ("yarn", "q_post_rope", q_turned(yarn_frequencies(4, 4096, fast=4), factor=YARN_FACTOR),
     "RoPE scaling with beta_fast 4 in place of 32"),
    ("yarn", "q_post_rope", q_turned(yarn_frequencies(4, 4096, slow=0.5), factor=YARN_FACTOR),
     "RoPE scaling with beta_slow 0.5 in place of 1"),
    ("yarn", "q_post_rope", q_turned(yarn_frequencies(4, 512), factor=YARN_FACTOR),
     "RoPE scaling with original_max_position_embeddings 512 in place of 4096"),
    ("yarn", "q_post_rope", q_turned(yarn_frequencies(8, 4096), factor=0.1 * np.log(8) + 1),
     "RoPE scaling with factor 8 in place of 4"),
    ("llama3", "q_post_rope", q_turned(plain_frequencies() / 8), "as if it were linear"),
]  # fmt: skip


@cache
def sound(model: str) -> Pass:
    return run(CONFIGS[model])


@pytest.mark.parametrize(
    ("model", "stage", "fault", "cause"), ROPE,
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_engines_fault_is_named(
    model: str, stage: str, fault: Callable[[Pass], Floats], cause: str
) -> None:
    found = told(sound(model), stage, fault(sound(model)))
    names = [c.name for c in found.named]
    assert names == [cause] or (len(names) == 1 and cause in names[0]), (names, found.causes[:3])
