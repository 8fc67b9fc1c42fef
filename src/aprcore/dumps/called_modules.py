"""TensorRT-LLM's hooks: `rank0/1.LlamaModel-2.LlamaDecoderLayer-2.Attention-output.1.pt`.

A path of calls, each with its number among the calls of its caller and the class of the module, so
a module is known by when it is called. After a call its arguments are written a second time, before
what it gives; both get the names of `forward`'s arguments as long as those last.
Source: `tensorrt_llm/_torch/debug/debug_hook.py`, `tensorrt_llm/_torch/models/modeling_llama.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

_FILE = re.compile(
    r"(?:.*/)?(?P<calls>\d+\.\w+(?:-\d+\.\w+)*)-(?P<side>input|output)\.(?P<name>\w+)", re.ASCII
)


class _Call(NamedTuple):
    """A call: its number among those of its caller, and the class of its module."""

    number: int
    kind: str


_Path = tuple[_Call, ...]


def name_called_modules(files: Iterable[str]) -> Mapping[str, str]:
    """What the tensors of the first pass are called by their modules' names, by file.

    Those of other modules keep their own names.

    Args:
        files: Paths without their suffix, of one rank; others are left out.
    """
    ports: dict[_Path, dict[str, list[str]]] = {}
    found: dict[tuple[_Path, str, str], str] = {}
    for file in files:
        match = _FILE.fullmatch(file)
        if match is None:
            continue
        calls = tuple(_Call(int(number), kind) for number, _, kind in
                      (call.partition(".") for call in match["calls"].split("-")))  # fmt: skip
        of_call = ports.setdefault(calls, {"input": [], "output": []})
        of_call[match["side"]].append(match["name"])
        found[calls, match["side"], match["name"]] = file
    return {file: file.rpartition("/")[2] for file in found.values()} | {
        found[calls, side, name]: f"{module}.{port}"
        for calls, module in _modules(set(ports)).items()
        for side, name, port in _tensors(ports[calls])
    }


def _tensors(ports: Mapping[str, list[str]]) -> Iterator[tuple[str, str, str]]:
    """Side and name of a call's files, each with the port that it is of."""
    arguments, written = ports["input"], ports["output"]
    if len(arguments) == 1:
        yield "input", arguments[0], "input"
    given = [name for name in written if name not in arguments]
    named = [name for name in given if not name.isdecimal()]
    if len(named) > 1:  # in which order they came is not said
        return
    numbered = sorted((name for name in given if name.isdecimal()), key=int)
    for index, name in enumerate([*named, *numbered]):
        yield "output", name, f"output.{index}"


def _modules(calls: set[_Path]) -> dict[_Path, str]:
    """The modules that are known, by the calls that lead to them."""
    children: dict[_Path, list[_Path]] = defaultdict(list)
    for path in {call[:length] for call in calls for length in range(1, len(call) + 1)}:
        children[path[:-1]].append(path)
    for paths in children.values():
        paths.sort()
    layers = sorted(path for paths in children.values() for path in paths
                    if "DecoderLayer" in path[-1].kind)  # fmt: skip
    if not layers:
        return {}
    model = layers[0][:-1]
    layers = [path for path in layers if path[:-1] == model]
    found: dict[_Path, str] = {}
    for path in children[model]:
        if "Embedding" in path[-1].kind:
            found[path] = "model.embed_tokens"
        elif "Norm" in path[-1].kind:
            found[path] = "model.norm"
    for path in children[model[:-1]]:
        if "Logits" in path[-1].kind or "LMHead" in path[-1].kind:
            found.setdefault(path, "lm_head")
    for number, layer in enumerate(layers):
        found.update(_of_layer(children, layer, number, len(layers)))
    return {path: module for path, module in found.items() if path in calls}


def _of_layer(
    children: Mapping[_Path, Sequence[_Path]], layer: _Path, number: int, num_layers: int
) -> Iterator[tuple[_Path, str]]:
    """The modules of a layer: a norm behind the network is the next layer's, called early."""
    prefix = f"model.layers.{number}"
    norm = f"{prefix}.input_layernorm"
    for path in children.get(layer, ()):
        kind = path[-1].kind
        products = [p for p in children.get(path, ()) if "Linear" in p[-1].kind]
        names: tuple[str, ...] = ()
        if "Norm" in kind:
            yield path, norm
        elif "Attention" in kind:
            names = ("self_attn.qkv_proj", "self_attn.o_proj")
            norm = f"{prefix}.post_attention_layernorm"
        elif "MLP" in kind:
            names = ("mlp.gate_up_proj", "mlp.down_proj")
            is_last = number == num_layers - 1
            norm = "model.norm" if is_last else f"model.layers.{number + 1}.input_layernorm"
        if len(products) == len(names):
            yield from zip(products, (f"{prefix}.{name}" for name in names))
        if names:
            yield path, f"{prefix}.{names[0].partition('.')[0]}"
