"""A model's configuration out of `.apr` metadata, `config.json` or GGUF's key-values.

The three dialects differ in their keys and defaults, so each is a table of keys; what the values
must satisfy is said once. Source: docs/formats.md, "Models"; defaults of `config.json` from the
configuration classes of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from aprcore.ground.errors import ConfigError, Where
from aprcore.ground.fields import Fields
from aprcore.network.architectures import ARCHITECTURES, COMPUTED
from aprcore.network.architectures.family import Architecture, Windows, windows_of_layer_types
from aprcore.network.config import ACTIVATIONS, Declaration, ModelConfig
from aprcore.network.operations import HEAD
from aprcore.network.rope import Rope
from aprcore.network.rope_dialects import rope_from_gguf, rope_from_json

KeyTable = Mapping[str, tuple[str, ...]]

APR_KEYS: KeyTable = {
    "hidden_size": ("hidden_size", "hidden_dim", "d_model", "n_embd"),
    "num_layers": ("num_layers", "n_layers", "num_hidden_layers", "n_layer"),
    "num_heads": ("num_heads", "n_heads", "num_attention_heads", "n_head"),
    "num_kv_heads": ("num_kv_heads", "n_kv_heads", "num_key_value_heads"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size", "n_vocab"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "intermediate_dim", "n_inner"),
    "max_position_embeddings": (
        "max_position_embeddings", "max_seq_len", "context_length", "n_ctx",
    ),
    "rms_norm_eps": ("rms_norm_eps", "layer_norm_eps", "norm_eps"),
    "hidden_act": ("hidden_act",),
    "sliding_window": ("sliding_window",),
}  # fmt: skip

HUGGINGFACE_KEYS: KeyTable = {
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "intermediate_size": ("intermediate_size",),
    "max_position_embeddings": ("max_position_embeddings",),
    "rms_norm_eps": ("rms_norm_eps",),
    "hidden_act": ("hidden_act", "hidden_activation"),
    "sliding_window": ("sliding_window",),
}

DEFAULT_EPS = 1e-6  # of every architecture here, in transformers

# Spellings of an activation that compute the same function.
ACTIVATION_ALIASES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}

# Keys of config.json that change what is computed, with the values that change nothing. A family
# that honours one says so (`Architecture.numbers`); elsewhere it is refused, since a
# model that is computed otherwise than its file says is worse than none. Source: configuration
# classes of transformers 5.23.
ARITHMETIC_KEYS: Mapping[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "query_pre_attn_scalar": (),
    "logit_softcap": (0, 0.0), "attention_multiplier": (), "embedding_multiplier": (1,),
    "residual_multiplier": (1,), "logits_scaling": (1,), "logit_scale": (1,), "scale_emb": (1,),
    "scale_depth": (), "clip_qkv": (), "qk_norm": (False,), "use_qk_norm": (False,),
    "qk_layernorm": (False,), "no_rope_layers": (), "no_rope_layer_interval": (),
    "attention_chunk_size": (), "attn_temperature_tuning": (False, 0), "alibi": (False,),
    "use_alibi": (False,), "parallel_attn": (False,), "use_parallel_residual": (False,),
    "use_bidirectional_attention": (False,), "rope_local_base_freq": (), "num_experts": (0, 1),
    "num_local_experts": (0, 1), "n_routed_experts": (0, 1), "kv_lora_rank": (0,),
    "add_cross_attention": (False,), "sinks": (False,), "use_sliding_window_attention": (False,),
}  # fmt: skip


def declare_huggingface(
    values: Mapping[str, Any], where: Where, architecture: str | None = None
) -> Declaration:
    """What a `config.json` says.

    Args:
        values: The file.
        where: Its path.
        architecture: What to read it as, for a model with code of its own; None: as it says.

    Raises:
        ConfigError: A value is missing, malformed, contradictory or not supported.
    """
    family = _find_architecture(Fields(values, where), ("model_type",), architecture)
    _refuse_quantised(values, where)
    fields = Fields({**family.defaults, **values}, where)
    sizes = _read_sizes(fields, HUGGINGFACE_KEYS)
    rope = rope_from_json(fields, sizes["head_dim"], sizes["max_position_embeddings"])
    config = _build_config(fields, HUGGINGFACE_KEYS, family, sizes, rope)
    config = replace(
        config,
        windows=family.windows(fields, config.num_layers),
        numbers=_numbers_of_json(fields, family, with_defaults=True),
    )
    _refuse_unknown(fields, family)
    tied = fields.boolean("tie_word_embeddings") or False
    promised: frozenset[str] = frozenset()
    denied: frozenset[str] = frozenset()
    for key, biases in family.switches.items():
        if fields.boolean(key):
            promised |= biases
        else:
            denied |= biases
    # A head beside a promise of tying is no contradiction: see aprcore.models.names.
    promised |= frozenset() if tied else frozenset({HEAD})
    return Declaration(config, promised, denied, tied)


def declare_apr(
    values: Mapping[str, Any], where: Where, *, gguf_names: bool, embedding_rows: int | None
) -> Declaration:
    """What the metadata of a `.apr` file says.

    Args:
        values: The metadata.
        where: The file.
        gguf_names: Whether its tensors have GGUF's names. Where `rope_type` is absent that
            decides the order of q and k rows: such a file was copied from a GGUF as it stood.
        embedding_rows: Rows of the embedding: the vocabulary where the metadata is silent.

    Raises:
        ConfigError: As `declare_huggingface`.
    """
    fields = Fields(values, where)
    family = _find_architecture(fields, ("architecture", "model_type"))
    _refuse_experts(fields, ("num_experts",))
    sizes = _read_sizes(fields, APR_KEYS, embedding_rows)
    rope = rope_from_json(fields, sizes["head_dim"], sizes["max_position_embeddings"])
    config = _build_config(fields, APR_KEYS, family, sizes, rope)
    config = replace(
        config,
        windows=_windows_of_apr(fields, family, config.num_layers),
        numbers=_numbers_of_json(fields, family, with_defaults=False),
    )
    _refuse_unknown(fields, family)
    pairing = values.get("rope_type")
    if pairing is None:
        adjacent = gguf_names and family.gguf_adjacent_pairs
    elif pairing in (0, 2) and not isinstance(pairing, bool):
        adjacent = pairing == 0
    else:
        raise fields.fault("rope_type", pairing, "0 (adjacent pairs) or 2 (split halves)")
    return Declaration(
        config, tied=fields.boolean("tie_word_embeddings"), adjacent_pairs=adjacent,
        norm_offset=family.gguf_norm_offset if gguf_names else 0.0,
    )  # fmt: skip


def declare_gguf(
    values: Mapping[str, Any], where: Where, *, embedding_rows: int | None
) -> Declaration:
    """What the key-values of a GGUF file say.

    Args:
        values: The key-values.
        where: The file.
        embedding_rows: Rows of the embedding: the vocabulary where the metadata is silent.

    Raises:
        ConfigError: As `declare_huggingface`.
    """
    family = _find_architecture(Fields(values, where), ("general.architecture",))
    spelled = values["general.architecture"]
    keys: KeyTable = {
        "hidden_size": (f"{spelled}.embedding_length",),
        "num_layers": (f"{spelled}.block_count",),
        "num_heads": (f"{spelled}.attention.head_count",),
        "num_kv_heads": (f"{spelled}.attention.head_count_kv",),
        "head_dim": (f"{spelled}.attention.key_length",),
        "vocab_size": (f"{spelled}.vocab_size",),
        "intermediate_size": (f"{spelled}.feed_forward_length",),
        "max_position_embeddings": (f"{spelled}.context_length",),
        "rms_norm_eps": (f"{spelled}.attention.layer_norm_rms_epsilon",),
        "hidden_act": (),
        "sliding_window": (f"{spelled}.attention.sliding_window",),
    }
    # Some writers give one value per layer; the supported architectures have equal layers.
    fields = Fields({key: _same_for_all_layers(value) for key, value in values.items()}, where)
    _refuse_experts(fields, (f"{spelled}.expert_count",))
    sizes = _read_sizes(fields, keys, embedding_rows)
    value_length = fields.optional_size((f"{spelled}.attention.value_length",))
    if value_length not in (None, sizes["head_dim"]):
        raise ConfigError(
            f"{spelled}.attention.value_length is {value_length} and the key length is "
            f"{sizes['head_dim']}; they must be equal", where=where,
        )  # fmt: skip
    rope = rope_from_gguf(fields, spelled, sizes["head_dim"], sizes["max_position_embeddings"])
    config = _build_config(fields, keys, family, sizes, rope)
    causal = fields.boolean(f"{spelled}.attention.causal")
    config = replace(
        config,
        windows=_windows_of_gguf(fields, family, spelled, config.num_layers),
        is_causal=causal is None or causal,
        numbers=_numbers_of_gguf(fields, family, spelled),
    )
    _refuse_unknown_gguf(fields, family, spelled)
    return Declaration(config, adjacent_pairs=family.gguf_adjacent_pairs,
                       norm_offset=family.gguf_norm_offset)  # fmt: skip


def _find_architecture(
    fields: Fields, keys: tuple[str, ...], architecture: str | None = None
) -> Architecture:
    """The supported architecture that the metadata names, however it spells it.

    Raises:
        ConfigError: None is named, or none of those named is supported.
    """
    if architecture is not None:
        return ARCHITECTURES[architecture]
    named = [name for key in keys if (name := fields.text((key,)))]
    classes = fields.values.get("architectures")
    if isinstance(classes, list):
        named += [name for name in classes if isinstance(name, str)]
    for name in named:
        short = name.lower().removesuffix("forcausallm")
        for found in map(ARCHITECTURES.__getitem__, COMPUTED):
            if short in (found.name, found.gguf):
                return found
    supported = f"supported are {', '.join(COMPUTED)}"
    if not named:
        raise ConfigError(f"no architecture is named ({keys[0]})", where=fields.where,
                          hint=supported)  # fmt: skip
    raise ConfigError(f"architecture {named[0]!r} is not supported", where=fields.where,
                      hint=supported)  # fmt: skip


def _numbers_of_json(
    fields: Fields, family: Architecture, *, with_defaults: bool
) -> dict[str, float]:
    """The family's own numbers; a null is none, and a missing one what transformers assumes."""
    found = {}
    for number in family.numbers:
        value = fields.optional_number((number.key,))
        if value is None and with_defaults and number.key not in fields.values:
            value = number.default
        if value is not None:
            found[number.key] = value
    return found


def _numbers_of_gguf(fields: Fields, family: Architecture, spelled: str) -> dict[str, float]:
    found = {}
    for number in family.numbers:
        key = f"{spelled}.{number.gguf}"
        # llama.cpp writes 0 for what is off.
        if number.gguf and fields.values.get(key):
            found[number.key] = fields.number((key,))
        elif number.gguf and key not in fields.values and number.default is not None:
            found[number.key] = number.default
    return found


def _windows_of_apr(fields: Fields, family: Architecture, num_layers: int) -> Windows:
    """A window of `.apr` is on wherever it is stated; `layer_types` says for which layers."""
    window = fields.optional_size(APR_KEYS["sliding_window"])
    stated = windows_of_layer_types(fields, num_layers, window)
    if stated is not None:
        return stated
    if family.gguf_windows is not None:
        return family.gguf_windows(window, None, num_layers)
    return (window,)


def _windows_of_gguf(
    fields: Fields, family: Architecture, spelled: str, num_layers: int
) -> Windows:
    """Source: llama.cpp's `llama_hparams::set_swa_pattern` and its keys.

    A pattern is a list that says of each layer whether it has the window, or a number n: every
    n-th layer sees everything.

    Raises:
        ConfigError: The pattern is neither.
    """
    key = f"{spelled}.attention.sliding_window"
    # llama.cpp writes 0 for a window that is off.
    window = fields.optional_size((key,)) if fields.values.get(key) else None
    pattern = fields.values.get(f"{key}_pattern")
    if window is None:
        return (None,)
    if pattern is None:
        if family.gguf_windows is not None:
            return family.gguf_windows(window, None, num_layers)
        return (window,)
    if isinstance(pattern, list) and len(pattern) == num_layers:
        if all(type(flag) in (bool, int) for flag in pattern):
            return tuple(window if flag else None for flag in pattern)
    elif type(pattern) in (bool, int) and 0 <= pattern <= num_layers:
        # One value may stand for all layers, as llama.cpp's own writer folds equal ones.
        if isinstance(pattern, bool) or pattern < 2:
            return (window,) if pattern else (None,)
        return (*(window for _ in range(pattern - 1)), None)
    raise fields.fault(f"{key}_pattern", pattern, "a period or one flag for each layer")


def _refuse_unknown(fields: Fields, family: Architecture) -> None:
    """Refuse a key that changes the arithmetic and that this family does not describe.

    Raises:
        ConfigError: There is one, with a value that changes something.
    """
    known = {number.key for number in family.numbers}
    for key, neutral in ARITHMETIC_KEYS.items():
        value = fields.values.get(key)
        if value is None or key in known or value in neutral or value == []:
            continue
        raise ConfigError(
            f"{key} is {value!r}, which no stage of {family.name} describes", where=fields.where,
            hint="its numbers would be another model's; remove the key if the model ignores it",
        )  # fmt: skip


# Keys of GGUF behind the architecture's name, as `ARITHMETIC_KEYS`. Source: gguf's constants.
GGUF_ARITHMETIC_KEYS: Mapping[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,), "logit_scale": (0, 1),
    "embedding_scale": (0, 1), "residual_scale": (0, 1), "attention.scale": (0,),
    "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,),
    "use_parallel_residual": (False,), "attention.temperature_scale": (0, 1),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,), "router_logit_softcapping": (0,),
}  # fmt: skip


def _refuse_unknown_gguf(fields: Fields, family: Architecture, spelled: str) -> None:
    known = {number.gguf for number in family.numbers}
    for key, neutral in GGUF_ARITHMETIC_KEYS.items():
        value = fields.values.get(f"{spelled}.{key}")
        if value is None or key in known or value in neutral:
            continue
        raise ConfigError(
            f"{spelled}.{key} is {value!r}, which no stage of {family.name} describes",
            where=fields.where,
        )


def _refuse_quantised(values: Mapping[str, Any], where: Where) -> None:
    """Packed weights of GPTQ, AWQ and the like have other names and shapes than the stages'."""
    scheme = values.get("quantization_config")
    if scheme:
        method = scheme.get("quant_method", "unknown") if isinstance(scheme, dict) else "unknown"
        raise ConfigError(f"the checkpoint is quantised (quantization_config: {method})",
                          where=where, hint="use the float checkpoint or a GGUF")  # fmt: skip


def _refuse_experts(fields: Fields, keys: tuple[str, ...]) -> None:
    found = fields.find(keys)
    if found is not None and found[1]:
        raise ConfigError(f"{found[0]} is {found[1]!r}: mixtures of experts are not supported",
                          where=fields.where)  # fmt: skip


def _same_for_all_layers(value: Any) -> Any:
    numbers = isinstance(value, list) and value and all(type(v) is int for v in value)
    return value[0] if numbers and len(set(value)) == 1 else value


def _read_sizes(
    fields: Fields, keys: KeyTable, embedding_rows: int | None = None
) -> dict[str, int]:
    """The integers that shapes are made of, consistent with each other.

    Raises:
        ConfigError: One is missing, malformed or contradicts another.
    """
    sizes = {name: fields.size(keys[name]) for name in ("hidden_size", "num_layers", "num_heads",
                                                        "intermediate_size")}  # fmt: skip
    sizes["vocab_size"] = fields.size(keys["vocab_size"], embedding_rows)
    sizes["num_kv_heads"] = fields.size(keys["num_kv_heads"], sizes["num_heads"])
    sizes["max_position_embeddings"] = fields.optional_size(keys["max_position_embeddings"]) or 0
    heads, kv_heads = sizes["num_heads"], sizes["num_kv_heads"]
    if heads % kv_heads:
        raise ConfigError(
            f"{keys['num_heads'][0]} is {heads}, not a multiple of {keys['num_kv_heads'][0]}, "
            f"{kv_heads}", where=fields.where,
        )  # fmt: skip
    head_dim = fields.optional_size(keys["head_dim"])
    if head_dim is None:
        head_dim, rest = divmod(sizes["hidden_size"], heads)
        if rest:
            raise ConfigError(
                f"{keys['hidden_size'][0]} is {sizes['hidden_size']}, not a multiple of "
                f"{keys['num_heads'][0]}, {heads}, and {keys['head_dim'][0]} is missing",
                where=fields.where,
            )
    if head_dim % 2 or not head_dim:
        raise ConfigError(f"{keys['head_dim'][0]} is {head_dim}; RoPE needs it even",
                          where=fields.where)  # fmt: skip
    sizes["head_dim"] = head_dim
    return sizes


def _build_config(
    fields: Fields,
    keys: KeyTable,
    family: Architecture,
    sizes: Mapping[str, int],
    rope: Rope,
) -> ModelConfig:
    """The checked values as a `ModelConfig`.

    Raises:
        ConfigError: The activation or the norm's epsilon is not usable.
    """
    spelled = "hidden_activation"  # Gemma's files may have both, and this is the one that counts
    usual = family.defaults.get(spelled)
    names = keys["hidden_act"] if usual is None else (spelled, *keys["hidden_act"])
    named = fields.text(names) or usual or "silu"
    activation = ACTIVATION_ALIASES.get(named, named)
    if activation not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {named!r} is not supported", where=fields.where,
                          hint=f"supported are {', '.join(ACTIVATIONS)}")  # fmt: skip
    return ModelConfig(
        architecture=family.name,
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        num_kv_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        intermediate_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        rms_norm_eps=fields.number(keys["rms_norm_eps"], DEFAULT_EPS),
        rope=rope,
        hidden_act=activation,
        max_position_embeddings=sizes["max_position_embeddings"] or None,
        is_causal=fields.boolean("is_causal") is not False,
    )
