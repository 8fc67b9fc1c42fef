"""What an architecture's module says, besides its stages, for reading and capturing its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aprcore.ground.errors import ConfigError
from aprcore.ground.fields import Fields
from aprcore.network.architectures import blocks
from aprcore.network.operations import DOWN, GATE, UP, K, O, Q, V
from aprcore.network.stages import Builder, StageKey

Windows = tuple[int | None, ...]
"""Windows of the layers, repeated as often as it takes; None: the layer sees everything."""

ATTENTION_BIASES = frozenset(module.bias for module in (Q, K, V, O))
MLP_BIASES = frozenset(module.bias for module in (GATE, UP, DOWN))


class Number(NamedTuple):
    """A number of the family's own that its stages depend on.

    Attributes:
        key: As config.json and .apr metadata spell it, and `ModelConfig.numbers`.
        gguf: GGUF's key behind the architecture's name; "" where GGUF has none.
        default: What transformers assumes where config.json leaves it out.
    """

    key: str
    gguf: str
    default: float | None


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        name: transformers' `model_type`.
        gguf: GGUF's name of it, where it is another.
        layer, begin, end: Write the stages of a layer, of what comes before and after them.
        defaults: What transformers assumes for a key that config.json leaves out (a null is
            another matter). Source: its configuration classes, 5.23.
        switches: Keys of config.json that say whether biases exist, with the biases.
        windows: The windows that config.json states.
        gguf_windows: The windows of a GGUF file, from its window and pattern.
        numbers: See `Number`.
        attention_keywords: What transformers' attention call may be given besides its tensors.
        gguf_adjacent_pairs: Whether GGUF holds the rows of q and k for RoPE on adjacent pairs.
        gguf_norm_offset: What GGUF's writers add to the weights of norms.
        is_computed: Whether its models can be run; otherwise its stages are known from dumps.
    """

    name: str
    gguf: str = ""
    layer: Callable[[Builder], None] = blocks.pre_norm_layer
    begin: Callable[[Builder], StageKey] = blocks.embedding
    end: Callable[[Builder], None] = blocks.head
    defaults: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, frozenset[str]] = field(default_factory=dict)
    windows: Callable[[Fields, int], Windows] = lambda fields, num_layers: no_windows(
        fields, num_layers
    )
    gguf_windows: Callable[[int | None, Any, int], Windows] | None = None
    numbers: Sequence[Number] = ()
    attention_keywords: frozenset[str] = frozenset({"sliding_window"})
    gguf_adjacent_pairs: bool = False
    gguf_norm_offset: float = 0.0
    is_computed: bool = True


def windows_of_layer_types(fields: Fields, num_layers: int, window: int | None) -> Windows | None:
    """The windows that `layer_types` gives; None where config.json has no such key.

    Raises:
        ConfigError: It is no list of the two kinds, one for each layer.
    """
    kinds = fields.values.get("layer_types")
    if kinds is None:
        return None
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= known.keys():
        raise fields.fault("layer_types", kinds, "a list of full_attention and sliding_attention")
    if len(kinds) < num_layers:
        raise ConfigError(f"layer_types has {len(kinds)} entries for {num_layers} layers",
                          where=fields.where)  # fmt: skip
    if window is None and "sliding_attention" in kinds:
        raise ConfigError("layer_types has sliding_attention, and sliding_window is not given",
                          where=fields.where)  # fmt: skip
    return tuple(known[kind] for kind in kinds[:num_layers])


def no_windows(fields: Fields, num_layers: int) -> Windows:
    """Those of a family that has none: a window that `layer_types` gives to a layer is refused.

    Raises:
        ConfigError: There is one.
    """
    window = fields.optional_size(("sliding_window",))
    if set(windows_of_layer_types(fields, num_layers, window) or (None,)) != {None}:
        raise ConfigError(
            "layer_types has sliding_attention, and this architecture has no windows",
            where=fields.where, hint="the model may be of another architecture",
        )  # fmt: skip
    return (None,)


def qwen_windows(fields: Fields, num_layers: int) -> Windows:
    """Source: Qwen2Config and Qwen3Config: with `use_sliding_window`, the later layers have it."""
    window = fields.optional_size(("sliding_window",))
    if not fields.boolean("use_sliding_window"):
        window = None
    if window is not None and fields.values.get("layer_types") is None:
        first = fields.values.get("max_window_layers")
        if type(first) is not int or first < 0:
            raise fields.fault("max_window_layers", first, "a number of layers")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    return windows_of_layer_types(fields, num_layers, window) or (None,)
