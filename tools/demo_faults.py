"""Plant the demo's faults: wrong .apr files, and stage dumps of a wrong engine.

Each is tried in one layer after the other until the model's answer to the oracle's prompt is a
wrong digit, and each is checked: the first stage that differs from the oracle is the planted one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from aprcore.backends.numpy import NumpyBackend
from aprcore.compare import compare, compare_logits
from aprcore.formats.apr import read_apr
from aprcore.formats.apr_writer import AprWriter, TensorEntry
from aprcore.forward import forward
from aprcore.judge import FLOAT32_BOUND
from aprcore.model import Model, open_model
from aprcore.stages import StageKey
from aprcore.trace import TraceDirectory, TraceWriter
from aprcore.weights import read_all
from wrong_engine import Mistake, run_engine

Weights = dict[str, np.ndarray]
Tensors = Iterable[tuple[StageKey, np.ndarray]]

# A later layer hides better; the last one is where people look first.
LAYERS = (2, 1, 3, 0)


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        name: Its name in the manifest.
        stage: The first stage that it spoils.
        description: One line, with the layer to be filled in.
        spoil: What a bad conversion does to the weights of a layer; None: a wrong engine.
    """

    name: str
    stage: str
    description: str
    spoil: Callable[[Weights, str, Model], None] | None = None


def leave_adjacent_pairs(weights: Weights, prefix: str, model: Model) -> None:
    """Rows of q and k as llama.cpp permutes them, in a file that says they are not permuted."""
    config = model.config
    for part, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
        for kind in ("weight", "bias"):
            name = f"{prefix}self_attn.{part}_proj.{kind}"
            rows = weights[name]
            halves = rows.reshape(heads, 2, config.head_dim // 2, *rows.shape[1:])
            weights[name] = halves.swapaxes(1, 2).reshape(rows.shape)


def lose_bias(weights: Weights, prefix: str, model: Model) -> None:
    """Zeros where the biases of q, k and v were."""
    for part in "qkv":
        weights[f"{prefix}self_attn.{part}_proj.bias"] *= 0


def swap_gate_and_up(weights: Weights, prefix: str, model: Model) -> None:
    """Take the halves of a fused gate_up matrix in the wrong order."""
    gate, up = (f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]


FAULTS = (
    Fault("rope-pairs", "qkv_matmul",
          "bad conversion: q and k of layer {layer} kept their rows in adjacent-pair order",
          leave_adjacent_pairs),
    Fault("bias-lost", "qkv_bias",
          "bad conversion: the q, k and v biases of layer {layer} came out as zeros", lose_bias),
    Fault("gate-up-swapped", "ffn_gate",
          "bad conversion: gate and up of layer {layer} are swapped", swap_gate_and_up),
    Fault("kv-tiled", "attn_scores",
          "wrong engine: layer {layer} tiles the kv heads (0 1 0 1) instead of grouping them"),
    Fault("residual-normed", "post_attn_residual",
          "wrong engine: layer {layer} adds attention to the normalised stream, not to the stream"),
)  # fmt: skip


def plant_faults(target: Path) -> None:
    """Write every fault beside the sound model, and the manifest.

    Raises:
        SystemExit: A fault does not show as it should.
    """
    oracle = TraceDirectory(target / "oracle")
    with open_model(target / "sound.apr") as model:
        check_sound(model, oracle)
        entries = [plant(fault, model, oracle, target) for fault in FAULTS]
    manifest = {"schema": "aprtui-demo-faults-v1", "faults": entries}
    (target / "faults.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def plant(fault: Fault, model: Model, oracle: TraceDirectory, target: Path) -> dict[str, object]:
    """Write one fault, in the first layer in which it makes the answer a wrong digit.

    Returns:
        Its entry of the manifest.
    """
    for layer in LAYERS:
        tensors = spoiled_pass(fault, layer, model, oracle.sidecar.tokens, target)
        answer = check_divergence(tensors, oracle, StageKey(layer, fault.stage), model)
        print(f"{fault.name} in layer {layer}: the answer is {answer!r}")
        if answer.isdigit() and answer != "4":
            break
    else:
        raise SystemExit(f"{fault.name} never makes the answer a wrong digit")
    place = {"model": f"faults/{fault.name}.apr"}
    if fault.spoil is None:
        place = {"trace": f"faults/{fault.name}"}
        write_trace(fault, tensors, oracle, target / place["trace"])
    return {
        "name": fault.name,
        "kind": "trace" if fault.spoil is None else "model",
        **place,
        "layer": layer,
        "stage": fault.stage,
        "description": fault.description.format(layer=layer),
    }


def spoiled_pass(
    fault: Fault, layer: int, model: Model, tokens: tuple[int, ...], target: Path
) -> list[tuple[StageKey, np.ndarray]]:
    """Every tensor of a pass with the fault in a layer; a wrong model is written on the way."""
    if fault.spoil is None:
        return list(run_engine(model, tokens, Mistake(fault.name, layer)))
    weights = {name: read_all(weight) for name, weight in model.weights.items()}
    fault.spoil(weights, f"model.layers.{layer}.", model)
    path = target / "faults" / f"{fault.name}.apr"
    entries = [TensorEntry(name, "F32", values.shape) for name, values in weights.items()]
    metadata = read_apr(model.path).metadata
    with AprWriter(path, metadata, entries) as writer:
        for entry in writer.entries:
            writer.write(entry.name, np.ascontiguousarray(weights[entry.name]))
    backend = NumpyBackend()
    with open_model(path) as wrong:
        passed = forward(wrong.config, wrong.weights, backend, tokens)
        return [(key, backend.to_host(x)) for key, x in passed]


def write_trace(fault: Fault, tensors: Tensors, oracle: TraceDirectory, directory: Path) -> None:
    """Write a wrong engine's dump, with a sidecar that says where it comes from."""
    sidecar = replace(
        oracle.sidecar,
        model={**(oracle.sidecar.model or {}), "file": "sound.apr"},
        backend=f"tools/wrong_engine.py ({fault.name})",
        attention=None,
        versions={"numpy": np.__version__},
        created_utc=None,
    )
    with TraceWriter(directory, sidecar) as writer:
        for key, values in tensors:
            writer.write(key, values)


def check_sound(model: Model, oracle: TraceDirectory) -> None:
    """Hold the sound model against the oracle, computed by both engines.

    Raises:
        SystemExit: A stage differs.
    """
    backend = NumpyBackend()
    tokens = oracle.sidecar.tokens or ()
    ours = (
        (k, backend.to_host(x)) for k, x in forward(model.config, model.weights, backend, tokens)
    )
    for engine, tensors in (
        ("aprcore", ours),
        ("wrong_engine", run_engine(model, tokens, Mistake())),
    ):
        worst = max(compare(x, oracle.read(key)).relative_l2 for key, x in tensors)
        print(f"sound model through {engine}: worst relative L2 {worst:.1e}")
        if worst > 1e-5:
            raise SystemExit("the sound model differs from its oracle")


def check_divergence(
    tensors: Tensors, oracle: TraceDirectory, planted: StageKey, model: Model
) -> str:
    """Hold a faulty pass against the oracle.

    Returns:
        The text of the most likely next token.

    Raises:
        SystemExit: The first stage that differs is not the planted one.
    """
    first = None
    for key, x in tensors:
        if first is None and compare(x, oracle.read(key)).relative_l2 > FLOAT32_BOUND:
            first = key
    if first != planted:
        raise SystemExit(f"the first divergence is {first}, not {planted}")
    logits = compare_logits(x, oracle.read(key))
    return model.tokenizer().token_text(logits.argmax_a)
