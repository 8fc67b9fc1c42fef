"""RoPE schedules against transformers, and against the formula in extended precision."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aprcore.ground.errors import ConfigError
from aprcore.ground.fields import Fields
from aprcore.network.dialects import declare_huggingface
from aprcore.network.rope import Rope, RopeScaling
from aprcore.network.rope_dialects import rope_from_gguf, rope_from_json

# transformers computes frequencies in float32: a power, a division and for scaled kinds a few
# products more, each rounded to 2^-24; the argument of the power (up to ln theta = 13) is itself
# rounded, which costs 13 units in the result.
FLOAT32_TOLERANCE = 16 * 2.0**-24

BASE = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1,
    "intermediate_size": 8, "vocab_size": 8, "max_position_embeddings": 4096,
}  # fmt: skip

VARIANTS = {
    "absent": {},
    "old theta": {"rope_theta": 500000.0},
    "new default": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "old linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "new linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 7e4, "factor": 2.5}},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 1024,
        },
    },
    "llama3, original from the context": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e5, "factor": 8.0,
                            "low_freq_factor": 1.0, "high_freq_factor": 2.0},
    },
    "yarn": {
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                         "original_max_position_embeddings": 1024},
    },
    "yarn, original from the context": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn, stated factor": {
        "rope_scaling": {"type": "yarn", "factor": 8.0, "attention_factor": 1.25,
                         "beta_fast": 16, "beta_slow": 2,
                         "original_max_position_embeddings": 512},
    },
    "yarn, mscale": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "mscale": 1.0,
                            "mscale_all_dim": 0.7, "truncate": False,
                            "original_max_position_embeddings": 256},
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_frequencies_are_those_of_transformers(variant: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = {**BASE, **VARIANTS[variant]}
    rope = declare_huggingface(values, "config.json").config.rope
    theirs = LlamaRotaryEmbedding(LlamaConfig(**values))
    np.testing.assert_allclose(
        rope.inverse_frequencies(), theirs.inv_freq.numpy(), rtol=FLOAT32_TOLERANCE
    )
    assert rope.attention_factor() == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_variants_differ_from_each_other() -> None:
    """Else the comparison above would pass with scaling ignored on both sides."""
    schedules = {
        tuple(declare_huggingface({**BASE, **v}, None).config.rope.inverse_frequencies())
        for v in VARIANTS.values()
    }
    assert len(schedules) == len(VARIANTS)


@pytest.mark.parametrize("theta", [10000.0, 1e6, 123456.789])
def test_plain_schedule_is_exact(theta: float) -> None:
    from decimal import Decimal, getcontext

    getcontext().prec = 50
    dim = 128
    exact = [Decimal(theta) ** (-Decimal(i) / Decimal(dim)) for i in range(0, dim, 2)]
    ours = Rope(theta, dim).inverse_frequencies()
    errors = [abs(Decimal(float(f)) / e - 1) for f, e in zip(ours, exact, strict=True)]
    # One rounding of the exponent (times ln theta < 14) and one of the power.
    assert max(errors) < Decimal(16 * 2.0**-53)


def test_llama3_limits_in_extended_precision() -> None:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    from decimal import Decimal, getcontext

    getcontext().prec = 50
    scaling = RopeScaling("llama3", 8.0, 1024, 1.0, 4.0)
    ours = Rope(10000.0, 64, None, scaling).inverse_frequencies()
    two_pi = 2 * Decimal("3.14159265358979323846264338327950288419716939937510")
    kinds = set()
    for index, frequency in enumerate(ours):
        plain = Decimal(10000) ** (-Decimal(2 * index) / Decimal(64))
        wavelength = two_pi / plain
        if wavelength > 1024:
            kind, exact = "long", plain / 8
        elif wavelength < 256:
            kind, exact = "short", plain
        else:
            smooth = (1024 / wavelength - 1) / 3
            kind, exact = "between", (1 - smooth) * plain / 8 + smooth * plain
        kinds.add(kind)
        assert abs(Decimal(float(frequency)) / exact - 1) < Decimal(64 * 2.0**-53)
    assert kinds == {"long", "short", "between"}


def test_yarn_magnitude() -> None:
    scaling = RopeScaling("yarn", 4.0, 1024)
    assert Rope(1e4, 8, None, scaling).attention_factor() == pytest.approx(0.1 * math.log(4) + 1)


def test_divisors_divide() -> None:
    plain = Rope(1e4, 8).inverse_frequencies()
    divided = Rope(1e4, 8, divisors=(1.0, 2.0, 4.0, 8.0)).inverse_frequencies()
    np.testing.assert_array_equal(divided, plain / [1, 2, 4, 8])


@pytest.mark.parametrize("scaling", [
    {"beta_fast": -1}, {"beta_slow": -2.5}, {"beta_fast": 1e-320}, {"beta_slow": 1e-310},
    {"factor": 1e-310}, {"mscale": 1e308, "mscale_all_dim": 1.0, "factor": 1e300},
    {"mscale": 1.0, "mscale_all_dim": -10 / math.log(4.0), "factor": 4.0},
])  # fmt: skip
def test_numbers_that_give_no_frequencies_are_refused(scaling: dict[str, float]) -> None:
    """Each may be, and together they overflow: in the first rotation, long after reading."""
    whole = {"rope_scaling": {"type": "yarn", "factor": 2.0,
                              "original_max_position_embeddings": 32, **scaling}}  # fmt: skip
    with pytest.raises(ConfigError, match="rope_scaling give no frequencies"):
        rope_from_json(Fields(whole, "config.json"), 8, 64)
    if "factor" not in scaling:
        keys = {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
        keys |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
        with pytest.raises(ConfigError):
            rope_from_gguf(Fields(keys, "m.gguf"), "llama", 8, 64)
