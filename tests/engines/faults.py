"""What the real llama.cpp can be made to do wrong by its own parameters, and where that shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EPSILON = "llama.attention.layer_norm_rms_epsilon"


@dataclass(frozen=True)
class PlantedFault:
    """A fault, and what a judge that knows the sound model has to say of it.

    Attributes:
        request: Arguments of `LlamaCppRequest` that plant it.
        stages: The stages that fail, in every layer that they are in.
        cause: What the reason names; empty where no alternative operation is this fault.
        others: Stages that may fail as well, since what they are given has another shape.
        shifts_positions: Whether the sidecar is made to say that positions begin at 0.
    """

    request: Mapping[str, Any]
    stages: frozenset[str]
    cause: str = ""
    others: frozenset[str] = frozenset()
    shifts_positions: bool = False


def _parameters(**values: float) -> dict[str, Any]:
    return {"parameters": values}


_ROTATED = frozenset({"q_post_rope", "k_post_rope"})
_NORMS = frozenset({"attn_norm", "ffn_norm", "final_norm"})

# Of stories260k: 8 heads of 8, 4 kv heads, theta 10000, eps 1e-5.
FAULTS: Mapping[str, PlantedFault] = {
    "rope-base": PlantedFault(_parameters(rope_freq_base=50000.0), _ROTATED, "50000"),
    "rope-scale": PlantedFault(
        _parameters(rope_freq_scale=0.5), _ROTATED, "positions divided by 2"
    ),
    "yarn": PlantedFault(
        _parameters(rope_scaling_type=2, rope_freq_scale=0.25, yarn_ext_factor=1.0,
                    yarn_orig_ctx=16),
        _ROTATED,
    ),
    "yarn-magnitude": PlantedFault(_parameters(yarn_attn_factor=1.1), _ROTATED, "factor of 1.1"),
    "eps": PlantedFault({"overrides": {EPSILON: 1e-3}}, _NORMS, "eps 0.001"),
    "head-count": PlantedFault(
        {"overrides": {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
                       "llama.rope.dimension_count": 16}},
        _ROTATED,
        others=frozenset({"attn_scores", "attn_softmax", "attention"}),
    ),
    "positions": PlantedFault({"first_position": 3}, _ROTATED, "position", shifts_positions=True),
    "noncausal": PlantedFault(_parameters(attention_type=1), frozenset({"attn_softmax"}), "mask"),
}  # fmt: skip
