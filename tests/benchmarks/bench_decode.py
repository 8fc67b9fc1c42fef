"""Decoding on the CPU and on OpenCL in tokens per second, and what starting the device takes.

The bundled demo model, and the models of bench_opencl_trace.py. Start-up is measured in processes
of their own, with empty caches (PoCL keeps built kernels in $POCL_CACHE_DIR, pyopencl and its tools
theirs below $XDG_CACHE_HOME) and again with the caches that the first left behind.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_opencl_trace import QUANTISED, quantise
from bench_trace import TOKENS, folder, prepare
from figures import Figure, interleave, report, timed

DEMO_TOKENS = tuple(range(40, 47))
MOST_DIFFERENCE = 1e-5
# Before it is measured: kernels are built, and on the host's memory weights kept from their second
# use.
WARM_STEPS = 3
# Tokens of a lap, and laps; a text of a few dozen tokens in all.
DEMO_STEPS, STEPS, REPEATS = 16, 3, 5
STARTS = 3

# Prints seconds: importing and opening the device, the first pass of the demo, the second one.
START = """
import json, time
started = time.perf_counter()
from aprcore.engines.opencl.backend import OpenCLBackend
op = OpenCLBackend()
opened = time.perf_counter()
from aprcore.engines.engine import Engine
from aprcore.engines.decode import Decoder
from aprcore.models.model import open_model
from aprtui.demo import demo_path
model = open_model(demo_path() / "sound.apr")
decoder = Decoder(model.graph, model.weights, Engine(op))
laps = [opened - started]
for _ in range(2):
    lap = time.perf_counter()
    decoder.fresh().feed(range(40, 47))
    laps.append(time.perf_counter() - lap)
print(json.dumps(laps))
"""


def main() -> int:
    """Measure and print."""
    from aprtui.demo import demo_path

    prepare()
    quantise()
    figures = startup()
    for title, path, tokens, steps in (
        ("demo", demo_path() / "sound.apr", DEMO_TOKENS, DEMO_STEPS),
        ("0.5B shape, F32", folder() / "model.apr", TOKENS, STEPS),
        ("0.5B shape, Q4_K", folder() / QUANTISED, TOKENS, STEPS),
    ):
        figures += decoding(title, path, tokens, steps)
    return report(figures)


def decoding(title: str, path: Path, tokens: Sequence[int], steps: int) -> list[Figure]:
    """Both backends on one model, in turns; each feeds itself its own choices."""
    from aprcore.engines.decode import Decoder
    from aprcore.engines.engine import open_engine
    from aprcore.models.model import open_model

    with (
        open_model(path) as model,
        open_engine("opencl") as device,
        open_engine("numpy") as cpu,
    ):
        decoders = [Decoder(model.graph, model.weights, engine) for engine in (device, cpu)]
        runs = [timed(decode(decoder, tokens, steps)) for decoder in decoders]
        laps = interleave(runs, REPEATS)
        differences = [difference(decoder) for decoder in decoders]
    speeds = [statistics.median(steps / lap for lap in side) for side in laps]
    found = f"decode, {title}"
    return [
        Figure(f"{found}, OpenCL", f"{speeds[0]:.1f} tokens/s", "none", True,
               f"numpy path: {speeds[1]:.1f} tokens/s"),
        Figure(f"{found}, cached logits", f"{max(differences):.1e} relative L2",
               f"<= {MOST_DIFFERENCE:.0e}", max(differences) <= MOST_DIFFERENCE,
               "a full pass over the same tokens, the worse of both paths"),
    ]  # fmt: skip


def decode(decoder: Any, tokens: Sequence[int], steps: int) -> Callable[[], None]:
    """So many greedy steps; the prompt and the first steps are taken here."""
    chosen = decoder.feed(tokens).choice

    def run(count: int = steps) -> None:
        nonlocal chosen
        for _ in range(count):
            chosen = decoder.feed([chosen]).choice

    run(WARM_STEPS)
    return run


def difference(decoder: Any) -> float:
    """How far the next step's logits are from those of a full pass over the same tokens."""
    from aprcore.judging.compare import compare

    full = decoder.fresh().feed(decoder.tokens).logits
    cached = decoder.fresh()
    cached.feed(decoder.tokens[:-1])
    return compare(cached.feed(decoder.tokens[-1:]).logits, full).relative_l2


def startup() -> list[Figure]:
    """Opening the device and building the kernels of a pass, cold and warm."""
    colds, warms = [], []
    for _ in range(STARTS):
        with tempfile.TemporaryDirectory() as caches:
            colds.append(start(caches))
            warms.append(start(caches))
    figures = []
    for name, laps in (("cold", colds), ("warm", warms)):
        opening, first, second = (statistics.median(column) for column in zip(*laps))
        figures.append(
            Figure(f"OpenCL start-up, {name} caches",
                   f"{opening:.2f} s to open, {first - second:.2f} s to build", "none", True,
                   f"a pass of the demo with everything built: {second * 1000:.0f} ms")
        )  # fmt: skip
    return figures


def start(caches: str) -> list[float]:
    """The seconds that `START` prints, with all caches below a folder."""
    variables = os.environ | {"POCL_CACHE_DIR": f"{caches}/pocl", "XDG_CACHE_HOME": caches}
    done = subprocess.run(
        [sys.executable, "-c", START], check=True, capture_output=True, text=True, env=variables
    )
    return list(json.loads(done.stdout))


if __name__ == "__main__":
    sys.exit(main())
