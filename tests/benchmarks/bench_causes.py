"""What finding causes takes: a run in which two stages of every layer fail, against a sound one.

A llama of 30 layers in SmolLM2-135M's shape, with a vocabulary cut to 4096. The zoo's engine traces
it: soundly, with kv heads tiled in every layer, with a wrong RoPE base in every layer, and with one
fault alone. Model and dumps are kept between runs in $APRTUI_BENCH_DIR (default:
~/.cache/aprtui-bench).
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import bench_trace
from figures import Figure, interleave, median_ratio, milliseconds, report

SHAPE = {
    "vocab_size": 4096, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
}  # fmt: skip
LENGTHS = (7, 64)
# Faults of the zoo by dump, and whether every layer has them.
FAULTS = {"sound": (), "kv-tiled": ("kv-tiled",), "rope": ("rope-theta-10k",),
          "one": ("kv-tiled-scores",), "unknown": ("unknown",)}  # fmt: skip
ONE_LAYER = 11
REPEATS = 3
# Sixty stages that fail, seven tokens; the same at 64 tokens; one that fails.
MOST_SECONDS = 8.0
MOST_TIMES = 3.0
MOST_MORE_SECONDS = 2.0


def main() -> int:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    prepare()
    return report([figure for count in LENGTHS for figure in compare(count)])


def compare(count: int) -> list[Figure]:
    """Runs of so many tokens against the sound one, in turns."""
    laps = dict(zip(FAULTS, interleave([partial(lap, name, count) for name in FAULTS], REPEATS)))
    sound = laps["sound"]
    peer, figures = f"the sound run ({milliseconds(sound)})", []
    for name in ("kv-tiled", "rope", "unknown"):
        seconds, ratio = median(laps[name]), median_ratio(laps[name], sound)
        is_short = count == LENGTHS[0]
        figures.append(
            Figure(
                f"60 stages fail ({name}), {count} tokens",
                f"{ratio:.1f}x ({milliseconds(laps[name])})",
                f"<= {MOST_SECONDS:g} s" if is_short else f"<= {MOST_TIMES:g}x",
                seconds <= MOST_SECONDS if is_short else ratio <= MOST_TIMES,
                peer,
            )
        )
    more = median(a - b for a, b in zip(laps["one"], sound))
    return [
        *figures,
        Figure(f"one stage fails, {count} tokens", f"{more:.1f} s more",
               f"<= {MOST_MORE_SECONDS:g} s", more <= MOST_MORE_SECONDS, peer),
    ]  # fmt: skip


def lap(name: str, count: int) -> float:
    """Seconds of a run; one that does not find what was planted is worth nothing."""
    from aprcore.judging.verdict import Verdict
    from aprcore.runs.bisect import run
    from aprcore.runs.request import Request

    planted = 0 if name == "sound" else 1 if name == "one" else 2 * SHAPE["num_hidden_layers"]
    started = time.perf_counter()
    found = run(Request(model=folder() / "model", trace=dump(name, count)))
    seconds = time.perf_counter() - started
    failed = [stage for stage in found.stages if stage.verdict is Verdict.FAIL]
    if len(failed) != planted:
        raise SystemExit(f"{name}: {len(failed)} stages fail where {planted} should")
    named = [s for s in failed if s.explanation is not None and s.explanation.named]
    if len(named) != (0 if name == "unknown" else planted):
        raise SystemExit(f"{name}: the cause is not what was planted: {found.summary()}")
    return seconds


def folder() -> Path:
    """Where model and dumps are kept."""
    return bench_trace.folder() / "causes"


def dump(name: str, count: int) -> Path:
    """One dump."""
    return folder() / f"{name}-{count}"


def prepare() -> None:
    """Make the model and its dumps, unless they are there."""
    if (folder() / "complete").exists():
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for the zoo and the tests' models
    print(f"making a model of 30 layers and its dumps in {folder()} ...", file=sys.stderr)
    from models import RandomModel, build, save

    folder().mkdir(parents=True, exist_ok=True)
    save(build(RandomModel("llama", SHAPE, 11)), folder() / "model")
    for count in LENGTHS:
        for name in FAULTS:
            write_dump(name, count)
    (folder() / "complete").touch()


def write_dump(name: str, count: int) -> None:
    """Trace the model with the zoo's engine and write every stage."""
    import torch

    from aprcore.dumps.sidecar import Sidecar
    from aprcore.dumps.writer import TraceWriter
    from aprcore.models.model import open_model
    from aprcore.network.weights import read_all
    from zoo.engine import Engine, plain_frequencies
    from zoo.trial import key_of

    tokens = random_tokens(count)
    with open_model(folder() / "model") as model:
        weights = {n: torch.from_numpy(read_all(w)) for n, w in model.weights.items()}
        rope = model.config.rope
        frequencies = plain_frequencies(rope.theta, rope.head_dim)
        engine = Engine(model.config, weights, frequencies)
        layers = (ONE_LAYER,) if name == "one" else range(model.config.num_layers)
        wrong = {
            key_of(stage, layer): fault
            for layer in layers
            for stage, fault in faults_of(name).items()
        }
        with torch.inference_mode():
            made = engine.run(tokens, wrong)
    sidecar = Sidecar(tokens=tokens, backend="zoo", arithmetic="f32", dtype="float32")
    with TraceWriter(dump(name, count), sidecar) as writer:
        for key, tensor in made.items():
            writer.write(key, tensor.numpy())


def faults_of(name: str):
    """What is computed wrongly, by stage."""
    import torch

    from zoo import kernels

    if name == "unknown":  # errors of 1%, of which no cause is right

        def noisy(step):
            y = step.sound()
            noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(step.key.layer))
            return y * (1 + 0.01 * noise)

        return {"attn_out": noisy, "ffn_up": noisy}
    return {s: wrong for fault in FAULTS[name] for s, wrong in kernels.FAULTS[fault].stages.items()}


def random_tokens(count: int) -> tuple[int, ...]:
    """Token ids, the same every time."""
    import random

    draw = random.Random(count)
    return tuple(draw.randrange(SHAPE["vocab_size"]) for _ in range(count))


if __name__ == "__main__":
    sys.exit(main())
