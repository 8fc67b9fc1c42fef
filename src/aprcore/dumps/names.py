"""Which tensors of one file are which stages: our own names, and those of other engines.

A dialect says where a stored name belongs (a layer and a short name) and which short names make a
stage. Knowing another engine's names is adding a dialect.

Source: modules of transformers' Llama, Mistral, Qwen2 and Qwen3; `cb(...)` in llama.cpp's
`llama-graph.cpp` and `src/models`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from aprcore.network.graph import BY_NAME, Scope, StageKey, parse_path

Place = tuple[int | None, str]  # the layer, and the name within it


class Reading(Enum):
    """What must be done to stored values before they are a stage's."""

    PLAIN = "as they are"
    PADDED = "positions beyond the tokens cut off"
    SCORES = "positions cut off, and divided by sqrt(D)"


class Rule(NamedTuple):
    """A stage, and the short names of the tensors that make it, side by side on the last axis.

    For `Reading.SCORES` the second name is that of the queries: it tells D.
    """

    stage: str
    sources: tuple[str, ...]
    reading: Reading = Reading.PLAIN


class Recipe(NamedTuple):
    """The stored names behind one stage's tensor; see `Rule`."""

    names: tuple[str, ...]
    reading: Reading = Reading.PLAIN


@dataclass(frozen=True, slots=True)
class Dialect:
    """A way of naming tensors.

    Attributes:
        parse: The place of a stored name, or None if it is not of this dialect.
        rules: What makes a stage; the first that applies counts.
    """

    parse: Callable[[str], Place | None]
    rules: Sequence[Rule]


def resolve(
    names: Sequence[str], dialects: Iterable[Dialect]
) -> tuple[dict[StageKey, Recipe], tuple[str, ...]]:
    """The recipe of every stage that the names make, and the names that make none.

    Where two dialects know a stage or a name, the earlier one counts.
    """
    recipes: dict[StageKey, Recipe] = {}
    known: set[str] = set()
    for dialect in dialects:
        found: dict[Place, str] = {}
        for name in names:
            place = None if name in known else dialect.parse(name)
            if place is not None:
                found.setdefault(place, name)
        for layer in dict.fromkeys(layer for layer, _ in found):
            for rule in dialect.rules:
                key = _key(layer, rule.stage)
                held = [found[layer, name] for name in rule.sources if (layer, name) in found]
                if key is None or not held:
                    continue
                if key not in recipes and len(held) == len(rule.sources):
                    recipes[key] = Recipe(tuple(held), rule.reading)
                if key in recipes:  # another name for what is there already is no stranger
                    known.update(held)
    return recipes, tuple(name for name in names if name not in known)


def _key(layer: int | None, stage: str) -> StageKey | None:
    """The key of a stage found in a layer, or None where it cannot live there."""
    match BY_NAME[stage].scope:
        case Scope.MODEL:
            return StageKey(None, stage) if layer is None else None
        case Scope.FIRST_LAYER:
            return StageKey(0, stage) if not layer else None
        case Scope.LAYER:
            return None if layer is None else StageKey(layer, stage)


def known_dialects(names: Iterable[str], *, has_qkv_bias: bool) -> tuple[Dialect, ...]:
    """Every dialect, the one to trust most first.

    Args:
        names: The stored names; llama.cpp's vary between its versions.
        has_qkv_bias: Whether the model adds a bias to q, k and v: a projection's output is then
            what comes after it.
    """
    return (
        Dialect(_parse_own, [Rule(stage, (stage,)) for stage in BY_NAME]),
        Dialect(_parse_huggingface, _huggingface_rules(has_qkv_bias)),
        Dialect(_parse_llama_cpp, _llama_cpp_rules(frozenset(names))),
    )


def _parse_own(name: str) -> Place | None:
    key = parse_path(name.removesuffix(".bin"))
    return None if key is None else (key.layer, key.stage)


_WRAPPERS = r"(?:(?:base_model|model|module|_orig_mod)\.)*"
_LAYER_MODULE = re.compile(rf"{_WRAPPERS}layers\.(\d{{1,9}})(?:\.(.+))?", re.ASCII)
_MODEL_MODULE = re.compile(rf"{_WRAPPERS}((?:embed_tokens|norm|lm_head|logits).*)", re.ASCII)


def _parse_huggingface(name: str) -> Place | None:
    """A module's name, with or without ".output", ".output.0", ".input" or the like at its end."""
    if match := _LAYER_MODULE.fullmatch(name):
        return int(match[1]), _port(match[2] or "")
    if match := _MODEL_MODULE.fullmatch(name):
        return None, _port(match[1])
    return None


def _port(module: str) -> str:
    """A module's name without its first output's suffix; inputs and later outputs keep one."""
    words = module.split(".") if module else []
    index = int(words.pop()) if words and re.fullmatch(r"\d{1,9}", words[-1], re.ASCII) else 0
    if words and words[-1] in ("output", "outputs", "out"):
        words.pop()
    elif words and words[-1] in ("input", "inputs", "in"):
        words[-1] = "input"
    return ".".join([*words, str(index)] if index else words)


def _huggingface_rules(has_qkv_bias: bool) -> list[Rule]:
    qkv = "qkv_bias" if has_qkv_bias else "qkv_matmul"
    return [
        Rule("embedding", ("embed_tokens",)),
        Rule("attn_norm", ("input_layernorm",)),
        Rule(qkv, tuple(f"self_attn.{letter}_proj" for letter in "qkv")),
        Rule(qkv, ("self_attn.qkv_proj",)),
        Rule("attn_softmax", ("self_attn.1",)),
        Rule("attention", ("self_attn.o_proj.input",)),
        Rule("attn_out", ("self_attn.o_proj",)),
        Rule("attn_out", ("self_attn",)),
        Rule("post_attn_residual", ("post_attention_layernorm.input",)),
        Rule("ffn_norm", ("post_attention_layernorm",)),
        Rule("ffn_gate", ("mlp.gate_proj",)),
        Rule("ffn_up", ("mlp.up_proj",)),
        Rule("ffn_silu", ("mlp.act_fn",)),
        Rule("ffn_swigl", ("mlp.down_proj.input",)),
        Rule("ffn_out", ("mlp.down_proj",)),
        Rule("ffn_out", ("mlp",)),
        Rule("post_ffn_residual", ("",)),
        Rule("final_norm", ("norm",)),
        Rule("lm_head", ("lm_head",)),
        Rule("lm_head", ("logits",)),
    ]


_LLAMA_CPP_LAYER = re.compile(r"([A-Za-z_]+)-(\d{1,9})", re.ASCII)
_LLAMA_CPP_MODEL = ("inp_embd", "result_norm", "result_output")


def _parse_llama_cpp(name: str) -> Place | None:
    if name in _LLAMA_CPP_MODEL:
        return None, name
    match = _LLAMA_CPP_LAYER.fullmatch(name)
    return None if match is None else (int(match[2]), match[1])


def _llama_cpp_rules(names: frozenset[str]) -> list[Rule]:
    """What `cb()` calls the tensors of a layer.

    Qcur, Kcur and Vcur name several tensors in turn; a file holds one of each name, the last, which
    is after RoPE. So there is no qkv_matmul, and Vcur alone makes no stage.
    """
    # Until early 2025 kqv_out was the output of the projection, since then it is its input. The
    # old graph gives itself away by what it calls the input.
    is_old = any(name.startswith(("kqv_merged_cont-", "kqv_wo-")) for name in names)
    return [
        Rule("embedding", ("inp_embd",)),
        Rule("attn_norm", ("attn_norm",)),
        Rule("q_post_rope", ("Qcur",)),
        Rule("k_post_rope", ("Kcur",)),
        # Scaling is left to the softmax, and both hold the cache's padded length of positions.
        Rule("attn_scores", ("kq", "Qcur"), Reading.SCORES),
        Rule("attn_softmax", ("kq_soft_max",), Reading.PADDED),
        Rule("attn_softmax", ("kq_soft_max_ext",), Reading.PADDED),
        Rule("attention", ("kqv_merged_cont",)),
        Rule("attn_out" if is_old else "attention", ("kqv_out",)),
        Rule("attn_out", ("attn_out",)),
        Rule("post_attn_residual", ("ffn_inp",)),
        Rule("ffn_norm", ("ffn_norm",)),
        Rule("ffn_gate", ("ffn_gate_b",)),  # with its bias, where there is one
        Rule("ffn_gate", ("ffn_gate",)),
        Rule("ffn_up", ("ffn_up_b",)),
        Rule("ffn_up", ("ffn_up",)),
        Rule("ffn_silu", ("ffn_silu",)),
        Rule("ffn_swigl", ("ffn_gate_par",)),
        Rule("ffn_swigl", ("ffn_swiglu",)),
        Rule("ffn_out", ("ffn_out",)),
        Rule("post_ffn_residual", ("l_out",)),
        Rule("final_norm", ("result_norm",)),
        Rule("lm_head", ("result_output",)),
    ]


def mapped_dialect(mapping: Mapping[str, Sequence[Sequence[str]]]) -> Dialect:
    """The dialect of a user's table: for each stage the patterns that make it, in alternatives.

    A pattern is a stored name in which `{layer}` stands for the layer's number.
    """
    rules = [Rule(stage, tuple(p)) for stage, choices in mapping.items() for p in choices]
    patterns = {
        pattern: re.compile(
            re.escape(pattern).replace(re.escape("{layer}"), r"(\d{1,9})"), re.ASCII
        )
        for rule in rules
        for pattern in rule.sources
    }

    def parse(name: str) -> Place | None:
        for pattern, expression in patterns.items():
            if match := expression.fullmatch(name):
                return (int(match[1]) if match.groups() else None), pattern
        return None

    return Dialect(parse, rules)
