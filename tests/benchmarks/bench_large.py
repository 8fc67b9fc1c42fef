"""Trace and compare a model of the size of Qwen2.5-7B in Q4_K: 28 layers, 7 tokens, all stages.

The model (`large_model.py`) and a stage directory of it take 4.3 GB in $APRTUI_BENCH_DIR (default:
~/.cache/aprtui-bench) and a minute to make. Both paths run in processes of their own, in turns. The
peer of the numpy path expands every weight with gguf-py and multiplies; two layers and an eighth of
the head are run, and the rest is extrapolated, since it would take minutes.

Memory is RssAnon, sampled every two milliseconds: everything that a pass allocates, device buffers
on the host's memory included, and not the page cache, which the file is read through.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from bench_trace import TOKENS, Side, folder, serve
from figures import Figure, interleave, milliseconds, report
from large_model import Shape, write_large_model

MOST_MEMORY = {"opencl": 3 << 30, "numpy": 4 << 30}
# Both sides in float32: 28 layers of different orders of addition.
MOST_DIFFERENCE = 1e-4
LEAST_SPEED = 3.0  # of the numpy path, against gguf-py
PEER_LAYERS, PEER_HEAD_SHARE = 2, 8
PEER_THREADS = 2
PEER_CHUNK_BYTES = 8 << 20
REPEATS = 2


def main() -> int:
    """Measure and print; with --side, be one of the sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES)
    name = parser.parse_args().side
    if name is not None:
        return serve(SIDES[name]())
    prepare()
    copy_s, flops_s = limits()
    names = ("opencl", "numpy", "peer")
    sides = {name: Side(name, __file__) for name in names}
    try:
        # The first run of each reads the file into the page cache and builds kernels.
        runs = [sides[name].run for name in names]
        first = [run() for run in runs]
        laps = dict(zip(names, interleave(runs, REPEATS, warmups=0)))
        peaks = {name: sides[name].peak_bytes() for name in names}
    finally:
        for side in sides.values():
            side.close()
    speed = statistics.median(a / b for a, b in zip(laps["peer"], laps["numpy"]))
    bounds = f"file over copy bandwidth {copy_s:.1f} s, flops over peak {flops_s:.1f} s"
    return report(
        [
            Figure("OpenCL trace + compare, 7B Q4_K", milliseconds(laps["opencl"]), "none", True,
                   bounds),
            Figure("its first run in a process", milliseconds(first[:1]), "none", True, "the same"),
            memory("opencl", peaks["opencl"]),
            Figure("numpy trace + compare, 7B Q4_K", milliseconds(laps["numpy"]), "none", True,
                   bounds),
            memory("numpy", peaks["numpy"]),
            Figure("its speed", f"{speed:.1f}x", f">= {LEAST_SPEED}x", speed >= LEAST_SPEED,
                   f"expansion by gguf-py and products ({milliseconds(laps['peer'])})"),
        ]
    )  # fmt: skip


def memory(name: str, peak_bytes: int) -> Figure:
    """The peak of a side against its bound."""
    most = MOST_MEMORY[name]
    return Figure(
        "its peak anonymous memory", f"{peak_bytes >> 20} MiB", f"<= {most >> 20} MiB",
        peak_bytes <= most, f"the file: {model_path().stat().st_size >> 20} MiB",
    )  # fmt: skip


def model_path() -> Path:
    """The model."""
    return folder() / "large-q4_k.apr"


def stages_path() -> Path:
    """Its stage directory."""
    return folder() / "large-stages"


def prepare() -> None:
    """Make the model and its stages unless they are there."""
    folder().mkdir(parents=True, exist_ok=True)
    if not model_path().exists():
        print(f"writing {model_path()} ...", file=sys.stderr)
        write_large_model(model_path(), Shape())
    if not stages_path().exists():
        from aprcore.dumps.trace import record_trace
        from aprcore.models.model import open_model

        print(f"writing {stages_path()} ...", file=sys.stderr)
        with open_model(model_path()) as model:
            record_trace(model, TOKENS, directory=stages_path())


def limits() -> tuple[float, float]:
    """Seconds that the file takes at the speed of a copy, and the products at peak speed.

    Both are measured here: the copy in pieces that fit no cache, by one thread as the loader does
    it, and the peak as a product of square float32 matrices.
    """
    source, target = np.ones(1 << 28, np.uint8), np.empty(1 << 28, np.uint8)
    square = np.ones((3072, 3072), np.float32)

    def copy() -> float:
        started = time.perf_counter()
        np.copyto(target, source)
        return (time.perf_counter() - started) / source.nbytes

    def multiply() -> float:
        started = time.perf_counter()
        square @ square
        return (time.perf_counter() - started) / (2 * len(square) ** 3)

    per_byte, per_flop = (min(laps) for laps in interleave([copy, multiply], 5))
    shape = Shape()
    kv = shape.kv_heads * shape.head_dim
    per_layer = shape.hidden * (2 * shape.hidden + 2 * kv + 3 * shape.ffn)
    products = shape.num_layers * per_layer * len(TOKENS) + shape.vocab * shape.hidden
    return model_path().stat().st_size * per_byte, 2 * products * per_flop


def compared(backend: Any) -> Callable[[], float]:
    """A trace of every stage, each compared with the directory's; opening is not counted."""
    from aprcore.judging.compare import compare
    from aprcore.runs.open_sides import open_sides
    from aprcore.runs.request import TOP_K, Request

    request = Request(model=model_path(), oracle=stages_path(), tokens=TOKENS)
    opened = ExitStack()  # never closed: for the life of this process
    sides = opened.enter_context(open_sides(request))
    oracle = sides.oracle
    assert oracle is not None

    def run(_opened: ExitStack = opened) -> float:
        started = time.perf_counter()
        worst, count = 0.0, 0
        for key, tensor in sides.tensors(backend):
            assert tensor is not None
            worst = max(worst, compare(tensor, oracle.read(key), TOP_K).relative_l2)
            count += 1
        seconds = time.perf_counter() - started
        assert count == len(oracle.keys()), f"{count} of {len(oracle.keys())} stages"
        if not worst <= MOST_DIFFERENCE:
            raise SystemExit(f"stages differ by {worst:.2g}, more than {MOST_DIFFERENCE}")
        return seconds

    return run


def on_device() -> Callable[[], float]:
    """On OpenCL."""
    from aprcore.engines.opencl.backend import OpenCLBackend

    return compared(OpenCLBackend())


def on_cpu() -> Callable[[], float]:
    """On the numpy path."""
    from aprcore.engines.numpy import NumpyBackend

    return compared(NumpyBackend())


def expanded_by_gguf() -> Callable[[], float]:
    """Every product of a pass over weights that gguf-py expands, in chunks, on two threads."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    from aprcore.ground.parallel import single_threaded_blas
    from aprcore.models.model import open_model
    from aprcore.network.weights import row_chunks

    opened = ExitStack()
    model = opened.enter_context(open_model(model_path()))
    pool = ThreadPoolExecutor(PEER_THREADS)
    random = np.random.default_rng(0)

    def multiply(weight: Any, tokens: int, share: int = 1) -> float:
        """Seconds of one product, extrapolated from the first of `share` parts of the rows."""
        columns = random.standard_normal((weight.shape[1], tokens)).astype(np.float32)
        chunks = list(row_chunks(weight, PEER_CHUNK_BYTES))
        chunks = chunks[: -(-len(chunks) // share)]

        def work(chunk: tuple[int, int]) -> None:
            rows = chunk[1] - chunk[0]
            blocks = weight.read_raw(*chunk).reshape(rows, -1)
            dequantize(blocks, GGMLQuantizationType[weight.dtype]) @ columns

        started = time.perf_counter()
        with single_threaded_blas():
            list(pool.map(work, chunks))
        return (time.perf_counter() - started) * weight.shape[0] / chunks[-1][1]

    def run(_opened: ExitStack = opened) -> float:
        layers = sum(
            multiply(weight, len(TOKENS))
            for name, weight in model.weights.items()
            if weight.dtype == "Q4_K"
            and name.startswith(tuple(f"model.layers.{layer}." for layer in range(PEER_LAYERS)))
        )
        head = multiply(model.weights["lm_head.weight"], 1, PEER_HEAD_SHARE)
        return layers * model.config.num_layers / PEER_LAYERS + head

    return run


SIDES: dict[str, Callable[[], Callable[[], float]]] = {
    "opencl": on_device,
    "numpy": on_cpu,
    "peer": expanded_by_gguf,
}

if __name__ == "__main__":
    sys.exit(main())
