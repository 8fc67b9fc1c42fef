"""A model's configuration out of `.apr` metadata, `config.json` or GGUF's key-values.

The three dialects differ in their keys and defaults, so each is a table of keys; what the values
must satisfy is said once. Source: FORMATS.md, "Metadata keys" and "GGUF"; defaults of
`config.json` from the configuration classes of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aprcore.ground.errors import ConfigError, Where
from aprcore.ground.fields import Fields
from aprcore.network.config import ACTIVATIONS, ARCHITECTURES, Declaration, ModelConfig
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

_QWEN_DEFAULTS = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip

# What transformers assumes for a key that config.json leaves out (a null is another matter).
HUGGINGFACE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
        "attention_bias": False, "mlp_bias": False,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": {**_QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
}  # fmt: skip

DEFAULT_EPS = 1e-6  # of all four architectures in transformers

# Spellings of an activation that compute the same function.
ACTIVATION_ALIASES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}

_ATTENTION_BIASES = frozenset(f"self_attn.{letter}_proj.bias" for letter in "qkvo")
_MLP_BIASES = frozenset(f"mlp.{name}_proj.bias" for name in ("gate", "up", "down"))


def declare_huggingface(values: Mapping[str, Any], where: Where) -> Declaration:
    """What a `config.json` says.

    Raises:
        ConfigError: A value is missing, malformed, contradictory or not supported.
    """
    architecture = _find_architecture(Fields(values, where), ("model_type",))
    _refuse_quantised(values, where)
    fields = Fields({**HUGGINGFACE_DEFAULTS[architecture], **values}, where)
    sizes = _read_sizes(fields, HUGGINGFACE_KEYS)
    rope = rope_from_json(fields, sizes["head_dim"], sizes["max_position_embeddings"])
    window = _find_window(fields, architecture, sizes["num_layers"])
    config = _build_config(fields, HUGGINGFACE_KEYS, architecture, sizes, rope, window)
    tied = fields.boolean("tie_word_embeddings") or False
    switches = [
        (fields.boolean("attention_bias"), _ATTENTION_BIASES, ("llama", "qwen3")),
        (fields.boolean("mlp_bias"), _MLP_BIASES, ("llama",)),
        (not tied, frozenset({"lm_head.weight"}), ARCHITECTURES),
    ]
    promised: frozenset[str] = frozenset()
    denied: frozenset[str] = frozenset()
    for switch, weights, honoured_by in switches:
        if architecture in honoured_by:
            promised |= weights if switch else frozenset()
            # A head beside a promise of tying is no contradiction: see aprcore.models.names.
            denied |= frozenset() if switch or "lm_head.weight" in weights else weights
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
    architecture = _find_architecture(fields, ("architecture", "model_type"))
    _refuse_experts(fields, ("num_experts",))
    sizes = _read_sizes(fields, APR_KEYS, embedding_rows)
    rope = rope_from_json(fields, sizes["head_dim"], sizes["max_position_embeddings"])
    window = fields.optional_size(APR_KEYS["sliding_window"])
    config = _build_config(fields, APR_KEYS, architecture, sizes, rope, window)
    pairing = values.get("rope_type")
    if pairing is None:
        adjacent = gguf_names and architecture in ("llama", "mistral")
    elif pairing in (0, 2) and not isinstance(pairing, bool):
        adjacent = pairing == 0
    else:
        raise fields.fault("rope_type", pairing, "0 (adjacent pairs) or 2 (split halves)")
    return Declaration(config, tied=fields.boolean("tie_word_embeddings"), adjacent_pairs=adjacent)


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
    architecture = _find_architecture(Fields(values, where), ("general.architecture",))
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
    # llama.cpp writes 0 for a window that is off.
    window_key = keys["sliding_window"][0]
    window = fields.optional_size((window_key,)) if fields.values.get(window_key) else None
    config = _build_config(fields, keys, architecture, sizes, rope, window)
    return Declaration(config, adjacent_pairs=architecture in ("llama", "mistral"))


def _find_architecture(fields: Fields, keys: tuple[str, ...]) -> str:
    """The supported architecture that the metadata names, however it spells it.

    Raises:
        ConfigError: None is named, or none of those named is supported.
    """
    named = [name for key in keys if (name := fields.text((key,)))]
    classes = fields.values.get("architectures")
    if isinstance(classes, list):
        named += [name for name in classes if isinstance(name, str)]
    for name in named:
        short = name.lower().removesuffix("forcausallm")
        if short in ARCHITECTURES:
            return short
    supported = f"supported are {', '.join(ARCHITECTURES)}"
    if not named:
        raise ConfigError(f"no architecture is named ({keys[0]})", where=fields.where,
                          hint=supported)  # fmt: skip
    raise ConfigError(f"architecture {named[0]!r} is not supported", where=fields.where,
                      hint=supported)  # fmt: skip


def _refuse_quantised(values: Mapping[str, Any], where: Where) -> None:
    """Packed weights of GPTQ, AWQ and the like have other names and shapes than the table's."""
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


def _find_window(fields: Fields, architecture: str, num_layers: int) -> int | None:
    """The sliding window of a `config.json`, if any layer uses it.

    Source: transformers' MistralModel, Qwen2Config and Qwen3Config. Llama has none whatever its
    file says.
    """
    window = fields.optional_size(("sliding_window",))
    if architecture == "mistral":
        return window
    if architecture == "llama" or not fields.boolean("use_sliding_window"):
        return None
    kinds = fields.values.get("layer_types")
    if kinds is None:
        first = fields.values.get("max_window_layers")
        if type(first) is not int or first < 0:
            raise fields.fault("max_window_layers", first, "a number of layers")
        return window if first < num_layers else None
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= {"full_attention",
                                                                  "sliding_attention"}:  # fmt: skip
        raise fields.fault("layer_types", kinds, "a list of full_attention and sliding_attention")
    return window if "sliding_attention" in kinds else None


def _build_config(
    fields: Fields,
    keys: KeyTable,
    architecture: str,
    sizes: Mapping[str, int],
    rope: Rope,
    window: int | None,
) -> ModelConfig:
    """The checked values as a `ModelConfig`.

    Raises:
        ConfigError: The activation or the norm's epsilon is not usable.
    """
    named = fields.text(keys["hidden_act"]) or "silu"
    activation = ACTIVATION_ALIASES.get(named, named)
    if activation not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {named!r} is not supported", where=fields.where,
                          hint=f"supported are {', '.join(ACTIVATIONS)}")  # fmt: skip
    return ModelConfig(
        architecture=architecture,
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
        sliding_window=window,
    )
