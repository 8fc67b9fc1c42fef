"""RoPE parameters out of Hugging Face's keys (which `.apr` shares) and GGUF's.

Source: transformers 5.23, `modeling_rope_utils`; GGUF's specification and llama.cpp's
`rope_yarn`.
"""

from __future__ import annotations

import math

from aprcore.ground.errors import ConfigError
from aprcore.ground.fields import Fields
from aprcore.network.rope import SCALING_KINDS, Rope, RopeScaling

DEFAULT_THETA = 10000.0


def rope_from_json(fields: Fields, head_dim: int, context: int) -> Rope:
    """RoPE from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old).

    Args:
        fields: The whole metadata.
        head_dim: D.
        context: `max_position_embeddings`, 0 if unknown.

    Raises:
        ConfigError: A value is malformed or the kind of scaling is not supported.
    """
    # transformers prefers `rope_scaling` where a file has both.
    nested = fields.object("rope_scaling") or fields.object("rope_parameters")
    nested = nested or Fields({}, fields.where, "rope_parameters.")
    if any(isinstance(value, dict) for value in nested.values.values()):
        raise ConfigError(f"{nested.prefix[:-1]} differs by layer type, which is not supported",
                          where=fields.where)  # fmt: skip
    for holder in (nested, fields):
        rotary = holder.optional_number(("partial_rotary_factor",))
        if rotary not in (None, 1.0):
            raise ConfigError(
                f"{holder.prefix}partial_rotary_factor is {rotary:g}: rotating a part of each "
                "head is not supported", where=fields.where,
            )  # fmt: skip
    # A base of 1 or less has no wavelengths to speak of, and yarn divides by its logarithm.
    theta = nested.optional_number(("rope_theta",), above=1.0)
    if theta is None:
        theta = fields.number(("rope_theta",), DEFAULT_THETA, above=1.0)
    kind = nested.text(("rope_type", "type")) or "default"
    scaling = _scaling_from_json(fields, nested, kind, context)
    return _checked(Rope(theta, head_dim, context or None, scaling), nested)


def _checked(rope: Rope, fields: Fields) -> Rope:
    """A schedule whose numbers give frequencies.

    Raises:
        ConfigError: They do not: each is a number that may be, and together they overflow.
    """
    try:
        numbers = [1.0 / rope.scaling.factor, rope.attention_factor()]
        if rope.scaling.kind == "yarn":
            numbers += rope.ramp_limits()
        sound = all(map(math.isfinite, numbers))
    except (ArithmeticError, ValueError):
        sound = False
    if not sound:
        name = fields.prefix.rstrip(".") or "RoPE"
        raise ConfigError(f"the numbers of {name} give no frequencies ({rope.scaling.kind})",
                          where=fields.where)  # fmt: skip
    return rope


def _scaling_from_json(fields: Fields, nested: Fields, kind: str, context: int) -> RopeScaling:
    if kind not in SCALING_KINDS:
        raise _unsupported(nested, kind)
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind, nested.number(("factor",)))
    original = (
        fields.optional_size(("original_max_position_embeddings",))
        or nested.optional_size(("original_max_position_embeddings",))
        or context
    )
    if not original:
        raise nested.missing(("original_max_position_embeddings",))
    if kind == "llama3":
        low, high = nested.number(("low_freq_factor",)), nested.number(("high_freq_factor",))
        if low >= high:
            raise nested.fault("low_freq_factor", low, f"below high_freq_factor, {high:g}")
        return RopeScaling(kind, nested.number(("factor",)), original, low, high)
    truncate = nested.boolean("truncate")
    return RopeScaling(
        kind,
        nested.number(("factor",), context / original if context else None),
        original,
        # transformers reads 0 as "not given" here.
        beta_fast=nested.optional_number(("beta_fast",), above=-math.inf) or 32.0,
        beta_slow=nested.optional_number(("beta_slow",), above=-math.inf) or 1.0,
        attention_factor=nested.optional_number(("attention_factor",)),
        mscale=nested.optional_number(("mscale",), above=-math.inf),
        mscale_all_dim=nested.optional_number(("mscale_all_dim",), above=-math.inf),
        truncate=True if truncate is None else truncate,
    )


def rope_from_gguf(fields: Fields, architecture: str, head_dim: int, context: int) -> Rope:
    """RoPE from `{architecture}.rope.*`.

    llama3's scaling does not appear here: such files carry `rope_freqs.weight`, the divisor of
    each frequency.

    Args:
        fields: The key-values.
        architecture: As the file spells it.
        head_dim: D.
        context: The trained context length, 0 if unknown.

    Raises:
        ConfigError: A value is malformed or the kind of scaling is not supported.
    """
    prefix = f"{architecture}.rope."
    rotated = fields.optional_size((f"{prefix}dimension_count",))
    if rotated not in (None, head_dim):
        raise ConfigError(
            f"{prefix}dimension_count is {rotated} and the head has {head_dim} dimensions: "
            "rotating a part of each head is not supported", where=fields.where,
        )  # fmt: skip
    theta = fields.number((f"{prefix}freq_base",), DEFAULT_THETA, above=1.0)
    # Files from before `scaling.type` have linear scaling under this key.
    legacy = fields.optional_number((f"{prefix}scale_linear",))
    kind = fields.text((f"{prefix}scaling.type",)) or ("linear" if legacy else "none")
    if kind == "none":
        return Rope(theta, head_dim, context or None)
    if kind not in ("linear", "yarn"):
        raise _unsupported(Fields({}, fields.where, f"{prefix}scaling."), kind)
    factor = fields.number((f"{prefix}scaling.factor",), legacy or 1.0)
    inner = Fields({}, fields.where, f"{prefix}scaling.")
    if kind == "linear":
        return _checked(Rope(theta, head_dim, context or None, RopeScaling(kind, factor)), inner)
    original = fields.optional_size((f"{prefix}scaling.original_context_length",)) or context
    if not original:
        raise fields.missing((f"{prefix}scaling.original_context_length",))
    keys = [(f"{prefix}scaling.yarn_{name}", f"{prefix}scaling.{name}")
            for name in ("attn_factor", "beta_fast", "beta_slow")]  # fmt: skip
    attention = fields.optional_number(keys[0])
    if attention is not None:
        # llama.cpp multiplies its own magnitude correction by this; Hugging Face's key of that
        # name is the whole factor.
        attention *= 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0
    scaling = RopeScaling(
        kind, factor, original,
        beta_fast=fields.number(keys[1], 32.0), beta_slow=fields.number(keys[2], 1.0),
        attention_factor=attention,
    )  # fmt: skip
    return _checked(Rope(theta, head_dim, context or None, scaling), inner)


def _unsupported(fields: Fields, kind: str) -> ConfigError:
    return ConfigError(f"{fields.prefix}rope_type {kind!r} is not supported", where=fields.where,
                       hint=f"supported are {', '.join(SCALING_KINDS)}")  # fmt: skip
