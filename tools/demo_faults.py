"""Plant the demo's faults: wrong .apr files, and stage dumps of a wrong engine.

Each is tried in one layer after the other until the model's answer to the oracle's prompt is a
wrong digit, and each is checked: the first stage to blame is the planted one. One fault sits in
quantised weights, where every later stage looks wrong by rounding alone; the same weights without
the fault are there too, and nothing of them may be blamed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from aprcore.dumps.directory import TraceDirectory
from aprcore.dumps.writer import TraceWriter
from aprcore.engines.forward import forward
from aprcore.engines.numpy import NumpyBackend
from aprcore.formats.apr import read_apr
from aprcore.formats.apr_writer import AprWriter, TensorEntry
from aprcore.judging.compare import compare
from aprcore.models.convert import import_model
from aprcore.models.model import Model, open_model
from aprcore.network.stages import StageKey
from aprcore.network.weights import read_all
from aprcore.records.report import Report
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from wrong_engine import Mistake, run_engine

Weights = dict[str, np.ndarray]
Tensors = Iterable[tuple[StageKey, np.ndarray]]

# The story of the demo: its rounding takes the cosine below 0.999 and leaves every answer right.
QUANTIZE = "q6_k"
QUANTISED = {
    "name": "quantised",
    "kind": "sound",
    "model": "faults/quantised.apr",
    "layer": None,
    "stage": None,
    "description": "nothing wrong: Q6_K weights, whose rounding takes the cosine below 0.999",
}

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
        quantize: What the weights of a bad conversion are rounded to.
    """

    name: str
    stage: str
    description: str
    spoil: Callable[[Weights, str, Model], None] | None = None
    quantize: str | None = None

    @property
    def kind(self) -> str:
        """Which judgment finds it: "model" or "kernel"."""
        return "kernel" if self.spoil is None else "model"


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
          leave_adjacent_pairs, QUANTIZE),
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
    import_model(target / "sound.apr", target / QUANTISED["model"], quantize=QUANTIZE,
                 overwrite=True)  # fmt: skip
    check_quantised(target)
    entries.insert(1, QUANTISED)
    manifest = {"schema": "aprtui-demo-faults-v1", "faults": entries}
    (target / "faults.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def plant(fault: Fault, model: Model, oracle: TraceDirectory, target: Path) -> dict[str, object]:
    """Write one fault, in the first layer in which it makes the answer a wrong digit.

    Returns:
        Its entry of the manifest.
    """
    for layer in LAYERS:
        place = spoil(fault, layer, model, oracle, target)
        answer = check_blame(fault, layer, target, place)
        print(f"{fault.name} in layer {layer}: the answer is {answer!r}")
        if answer.isdigit() and answer != "4":
            break
    else:
        raise SystemExit(f"{fault.name} never makes the answer a wrong digit")
    return {
        "name": fault.name,
        "kind": fault.kind,
        **place,
        "layer": layer,
        "stage": fault.stage,
        "description": fault.description.format(layer=layer),
    }


def spoil(
    fault: Fault, layer: int, model: Model, oracle: TraceDirectory, target: Path
) -> dict[str, str]:
    """Write the wrong model or the wrong engine's dump; return its place in the manifest."""
    if fault.spoil is None:
        place = {"trace": f"faults/{fault.name}"}
        tensors = run_engine(model, oracle.sidecar.tokens, Mistake(fault.name, layer))
        write_trace(fault, tensors, oracle, target / place["trace"])
        return place
    place = {"model": f"faults/{fault.name}.apr"}
    weights = {name: read_all(weight) for name, weight in model.weights.items()}
    fault.spoil(weights, f"model.layers.{layer}.", model)
    path = target / place["model"]
    entries = [TensorEntry(name, "F32", values.shape) for name, values in weights.items()]
    metadata = read_apr(model.path).metadata
    with AprWriter(path, metadata, entries) as writer:
        for entry in writer.entries:
            writer.write(entry.name, np.ascontiguousarray(weights[entry.name]))
    if fault.quantize is not None:
        wide = path.rename(path.with_suffix(".f32.apr"))
        import_model(wide, path, quantize=fault.quantize)
        wide.unlink()
    return place


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
        (k, backend.to_host(x)) for k, x in forward(model.graph, model.weights, backend, tokens)
    )
    for engine, tensors in (
        ("aprcore", ours),
        ("wrong_engine", run_engine(model, tokens, Mistake())),
    ):
        worst = max(compare(x, oracle.read(key)).relative_l2 for key, x in tensors)
        print(f"sound model through {engine}: worst relative L2 {worst:.1e}")
        if worst > 1e-5:
            raise SystemExit("the sound model differs from its oracle")


def check_blame(fault: Fault, layer: int, target: Path, place: dict[str, str]) -> str:
    """Run the demo of a fault.

    Returns:
        The text of the most likely next token.

    Raises:
        SystemExit: The first stage to blame is not the planted one, or for another reason.
    """
    report = run(
        Request(
            model=target / place.get("model", "sound.apr"),
            trace=target / place["trace"] if "trace" in place else None,
            oracle=target / "oracle",
        )
    )
    first = report.first_divergence
    if first is None or first.key != StageKey(layer, fault.stage) or first.blamed != fault.kind:
        raise SystemExit(f"{fault.name} in layer {layer}: {report.summary()}")
    return next_token(report)


def check_quantised(target: Path) -> None:
    """Run the demo of sound quantised weights.

    Raises:
        SystemExit: A stage is blamed, the answer is wrong, or no cosine falls below 0.999.
    """
    report = run(Request(model=target / str(QUANTISED["model"]), oracle=target / "oracle"))
    cosine = min(stage.comparison.cosine for stage in report.stages if stage.comparison)
    print(f"quantised: {report.summary()}; lowest cosine {cosine:.5f}")
    if report.diverges() or next_token(report) != "4" or cosine > 0.999:
        raise SystemExit("the sound quantised model is no demo")


def next_token(report: Report) -> str:
    """The text of the token that the side under test would say next."""
    logits = next(stage.logits for stage in report.stages if stage.logits is not None)
    return logits.texts[logits.comparison.argmax_a]
