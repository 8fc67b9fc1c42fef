"""Configuration out of the three dialects."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprcore.ground.errors import AprError, ConfigError
from aprcore.network.architectures import COMPUTED as ARCHITECTURES
from aprcore.network.config import ModelConfig
from aprcore.network.dialects import (
    APR_KEYS,
    ARITHMETIC_KEYS,
    GGUF_ARITHMETIC_KEYS,
    declare_apr,
    declare_gguf,
    declare_huggingface,
)

HF: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 80, "vocab_size": 99, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "max_position_embeddings": 777,
}  # fmt: skip
APR: dict[str, Any] = {
    "architecture": "qwen2", "hidden_size": 48, "num_layers": 3, "num_heads": 6,
    "num_kv_heads": 2, "intermediate_size": 80, "vocab_size": 99, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 777, "rope_theta": 5e5,
}  # fmt: skip
GGUF: dict[str, Any] = {
    "general.architecture": "qwen2", "qwen2.embedding_length": 48, "qwen2.block_count": 3,
    "qwen2.attention.head_count": 6, "qwen2.attention.head_count_kv": 2,
    "qwen2.feed_forward_length": 80, "qwen2.vocab_size": 99, "qwen2.context_length": 777,
    "qwen2.attention.layer_norm_rms_epsilon": 1e-5, "qwen2.rope.freq_base": 5e5,
}  # fmt: skip


def hf(**changes: Any) -> ModelConfig:
    return declare_huggingface({**HF, **changes}, "config.json").config


def apr(**changes: Any) -> ModelConfig:
    return declare_apr(
        {**APR, **changes}, "m.apr", gguf_names=False, embedding_rows=None
    ).config  # fmt: skip


def gguf(**changes: Any) -> ModelConfig:
    values = {**GGUF, **{f"qwen2.{key}": value for key, value in changes.items()}}
    return declare_gguf(values, "m.gguf", embedding_rows=None).config


def test_the_dialects_agree() -> None:
    assert apr() == gguf() == hf(model_type="qwen2", use_sliding_window=False)
    assert apr().head_dim == 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("absent", ["none", "all", *HF])
def test_absent_keys_mean_what_transformers_means(architecture: str, absent: str) -> None:
    from transformers import AutoConfig

    values = {key: value for key, value in HF.items() if absent not in ("all", key)}
    values.pop("model_type", None)
    try:
        theirs = AutoConfig.for_model(architecture, **values)
    except Exception as error:  # transformers refuses too
        assert "multiple" in str(error)
        with pytest.raises(ConfigError):
            declare_huggingface({"model_type": architecture, **values}, None)
        return
    has_own = architecture in ("qwen3", "gemma2")  # their head's size does not follow
    floored = theirs.hidden_size % theirs.num_attention_heads and not has_own
    if floored or theirs.num_attention_heads % theirs.num_key_value_heads:
        # transformers rounds the head's size down, or fails only when it runs.
        with pytest.raises(ConfigError, match="not a multiple"):
            declare_huggingface({"model_type": architecture, **values}, None)
        return
    ours = declare_huggingface({"model_type": architecture, **values}, None).config
    assert ours.hidden_size == theirs.hidden_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.vocab_size == theirs.vocab_size
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    heads = theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == getattr(theirs, "head_dim", heads)
    kinds = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    for layer in range(min(ours.num_layers, 40)):
        on = kinds is None or kinds[layer] == "sliding_attention"
        assert ours.windows[layer % len(ours.windows)] == (window if on else None)
    for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        assert ours.numbers.get(key) == getattr(theirs, key, None)


@pytest.mark.parametrize("field", APR_KEYS)
def test_every_alias_of_apr_is_read(field: str) -> None:
    kept = {key: value for key, value in APR.items() if key not in APR_KEYS[field]}
    value: Any = {"hidden_act": "gelu", "rms_norm_eps": 0.25, "head_dim": 10,
                  "num_kv_heads": 3, "num_heads": 4, "hidden_size": 96}.get(field, 5)  # fmt: skip
    configs = []
    for alias in APR_KEYS[field]:
        others = dict.fromkeys(APR_KEYS[field])  # null counts as absent
        declared = declare_apr(
            {**kept, **others, alias: value}, None, gguf_names=False, embedding_rows=None
        )
        configs.append(declared.config)
    name = "window" if field == "sliding_window" else field
    assert {getattr(config, name) for config in configs} == {value}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "llama", "LLAMA"])
def test_architecture_spellings(name: str) -> None:
    assert apr(architecture=name).architecture == "llama"
    values = {key: value for key, value in HF.items() if key != "model_type"}
    declared = declare_huggingface({**values, "architectures": [name]}, None)
    assert declared.config.architecture == "llama"


def test_unknown_architecture_lists_the_supported() -> None:
    with pytest.raises(ConfigError) as caught:
        hf(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    assert "gpt_neox" in str(caught.value) and "config.json" in str(caught.value)
    assert all(name in str(caught.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads is 5, not a multiple"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 10**30}, "hidden_size is 1000"),
        ({"hidden_size": 50}, "not a multiple of num_attention_heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_scaling": 3}, "rope_scaling is 3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor is 0"),
        ({"rope_scaling": {"type": 1}}, "rope_scaling.type is 1"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differs by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_refusals_name_the_key_and_the_file(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hf(**changes)
    assert said in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


def test_llama3_limits_must_be_in_order() -> None:
    scaling = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}
    with pytest.raises(ConfigError, match="low_freq_factor"):
        hf(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {}, 4096),
        ("llama", {"sliding_window": 64}, None),
        ("qwen2", {"sliding_window": 64}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2},
         (None, None, 64)),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True,
                   "layer_types": ["full_attention"] * 3}, None),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True,
                   "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
         (None, 64, None)),
        ("gemma2", {"sliding_window": 64}, (64, None, 64)),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, None),
    ],
)  # fmt: skip
def test_sliding_window(architecture: str, changes: dict[str, Any], windows: Any) -> None:
    found = hf(model_type=architecture, **changes).windows
    expected = windows if isinstance(windows, tuple) else (windows,) * 3
    assert tuple(found[layer % len(found)] for layer in range(3)) == expected


def test_windows_of_a_family_without_any_are_refused() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ConfigError, match="layer_types has sliding_attention"):
        hf(layer_types=kinds, sliding_window=8)
    assert hf(layer_types=["full_attention"] * 3, sliding_window=8).windows == (None,)


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        (None, (8, 8, 8)), (3, (8, 8, None)), (2, (8, None, 8)), (1, (8, 8, 8)), (0, (None,) * 3),
        ([True, False, True], (8, None, 8)), ([0, 1, 0], (None, 8, None)),
    ],
)  # fmt: skip
def test_the_pattern_of_a_gguf_window(pattern: Any, windows: tuple[int | None, ...]) -> None:
    changes = {} if pattern is None else {"attention.sliding_window_pattern": pattern}
    found = gguf(**{"attention.sliding_window": 8, **changes}).windows
    assert tuple(found[layer % len(found)] for layer in range(3)) == windows


@pytest.mark.parametrize("pattern", [[True], "x", -1, 4, [True, 2.0, False]])
def test_other_patterns_are_refused(pattern: Any) -> None:
    with pytest.raises(ConfigError, match="sliding_window_pattern"):
        gguf(**{"attention.sliding_window": 8, "attention.sliding_window_pattern": pattern})


def test_attention_in_both_directions_is_read_from_every_dialect() -> None:
    assert not hf(is_causal=False).is_causal
    assert not apr(is_causal=False).is_causal
    assert not gguf(**{"attention.causal": False}).is_causal
    assert hf().is_causal and apr(is_causal=True).is_causal and gguf().is_causal


@pytest.mark.parametrize("key", sorted(ARITHMETIC_KEYS))
def test_a_key_that_changes_the_arithmetic_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is .*which no stage of llama describes"):
        hf(**{key: 2})
    for neutral in (None, *ARITHMETIC_KEYS[key]):
        assert hf(**{key: neutral}) == hf()


@pytest.mark.parametrize("key", sorted(GGUF_ARITHMETIC_KEYS))
def test_and_so_is_one_of_gguf(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"qwen2\.{key} is .*which no stage of qwen2 describes"):
        gguf(**{key: 2})
    for neutral in GGUF_ARITHMETIC_KEYS[key]:
        assert gguf(**{key: neutral}) == gguf()


def test_promises_of_a_config() -> None:
    declared = declare_huggingface({**HF, "attention_bias": True, "mlp_bias": False}, None)
    assert {"self_attn.q_proj.bias", "self_attn.o_proj.bias", "lm_head.weight"} == {
        name for name in declared.promised if "k_proj" not in name and "v_proj" not in name
    }
    assert "mlp.up_proj.bias" in declared.denied
    tied = declare_huggingface({**HF, "tie_word_embeddings": True}, None)
    assert tied.tied and "lm_head.weight" not in tied.promised | tied.denied


@pytest.mark.parametrize(
    ("changes", "gguf_names", "adjacent"),
    [
        ({"rope_type": 0}, False, True),
        ({"rope_type": 2}, True, False),
        ({"architecture": "llama"}, False, False),
        ({"architecture": "llama"}, True, True),
        ({"architecture": "qwen2"}, True, False),
    ],
)
def test_order_of_rows_in_apr(changes: dict[str, Any], gguf_names: bool, adjacent: bool) -> None:
    declared = declare_apr({**APR, **changes}, None, gguf_names=gguf_names, embedding_rows=None)
    assert declared.adjacent_pairs is adjacent


def test_apr_refuses_other_rope_types_and_experts() -> None:
    with pytest.raises(ConfigError, match="rope_type is 1"):
        apr(rope_type=1)
    with pytest.raises(ConfigError, match="num_experts is 8"):
        apr(num_experts=8)
    assert apr(num_experts=0) == apr()


def test_gguf_scaling_and_per_layer_lists() -> None:
    linear = gguf(**{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}).rope.scaling
    assert (linear.kind, linear.factor) == ("linear", 4.0)
    assert gguf(**{"rope.scale_linear": 2.0}).rope.scaling.factor == 2.0
    assert gguf(**{"rope.scaling.type": "none"}).rope.scaling.kind == "default"
    yarn = gguf(**{"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                   "rope.scaling.original_context_length": 128}).rope  # fmt: skip
    assert yarn.scaling.original_max_position_embeddings == 128
    assert yarn.attention_factor() == pytest.approx(1.1386294361)
    assert gguf(**{"attention.head_count_kv": [2, 2, 2]}).num_kv_heads == 2
    for changes, said in [
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"attention.head_count_kv": [2, 1, 2]}, "head_count_kv"),
        ({"rope.dimension_count": 4}, "dimension_count is 4"),
        ({"attention.value_length": 16}, "value_length is 16"),
        ({"expert_count": 4}, "expert_count is 4"),
    ]:
        with pytest.raises(ConfigError, match=said):
            gguf(**changes)


def test_the_embedding_tells_a_missing_vocabulary() -> None:
    values = {key: value for key, value in GGUF.items() if key != "qwen2.vocab_size"}
    assert declare_gguf(values, None, embedding_rows=123).config.vocab_size == 123
    with pytest.raises(ConfigError, match="vocab_size is missing"):
        declare_gguf(values, None, embedding_rows=None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 100) | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**400, "llama", "yarn", "llama3", "linear", "Qwen2ForCausalLM"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)  # fmt: skip
ROPE = st.dictionaries(
    st.sampled_from(["type", "rope_type", "factor", "rope_theta", "low_freq_factor", "beta_fast",
                     "high_freq_factor", "original_max_position_embeddings", "mscale"]), JSON,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["hf", "apr", "gguf"]), st.data(),
    st.dictionaries(st.sampled_from(["rope_scaling", "rope_parameters"]), ROPE | JSON),
)  # fmt: skip
def test_any_value_gives_a_config_or_an_error(dialect: str, data: Any, rope: Any) -> None:
    base = {"hf": HF, "apr": APR, "gguf": GGUF}[dialect]
    keys = [*base, "head_dim", "layer_types", "max_window_layers", "use_sliding_window",
            "sliding_window", "rope_type", "architectures", "qwen2.rope.scaling.type",
            "qwen2.rope.scaling.factor", "qwen2.attention.key_length"]  # fmt: skip
    changes = data.draw(st.dictionaries(st.sampled_from(keys), JSON, max_size=3))
    values = {**base, **changes, **rope}
    try:
        if dialect == "hf":
            config = declare_huggingface(values, "f").config
        elif dialect == "apr":
            config = declare_apr(values, "f", gguf_names=False, embedding_rows=None).config
        else:
            config = declare_gguf(values, "f", embedding_rows=None).config
    except AprError as error:
        assert str(error).startswith("f: ")
        return
    assert config.num_heads % config.num_kv_heads == 0 and config.head_dim % 2 == 0
    assert len(config.rope.inverse_frequencies()) == config.head_dim // 2
