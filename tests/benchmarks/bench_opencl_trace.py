"""Trace and compare on OpenCL, against transformers with every stage captured.

The model of bench_trace.py in float32, and quantised to Q4_K, embedding included. As there, every
side is a process with the model open, and they take turns. transformers has its weights in memory,
so what is held to a bound is a run that finds its weights on the device: on the host's memory that
is the third in a process. The first one, which reads the file and builds kernels, is reported.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from bench_trace import TOKENS, Side, folder, prepare, serve, transformers_captured
from figures import Figure, interleave, median_ratio, milliseconds, report

QUANTISED = "opencl-q4_k.apr"
MOST_TIME = {"f32": 0.8, "q4_k": 0.6}
AIMS = {"f32": 0.5, "q4_k": 0.35}
MOST_MEMORY = 0.25
REPEATS = 9


def main() -> int:
    """Measure and print; with --side, be one of the sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES)
    name = parser.parse_args().side
    if name is not None:
        return serve(SIDES[name]())
    prepare()
    quantise()
    sides = {name: Side(name, __file__) for name in SIDES}
    try:
        early = {name: (side.run(), side.run()) for name, side in sides.items()}
        runs = [side.run for side in sides.values()]
        laps = dict(zip(sides, interleave(runs, REPEATS)))
        resident = {name: side.peak_resident_bytes() for name, side in sides.items()}
        anonymous = {name: side.peak_bytes() for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.close()
    first = {name: seconds for name, (seconds, _) in early.items()}
    return report(
        [
            *(figure for kind in MOST_TIME for figure in times(kind, laps, first)),
            *(memory(name, resident, anonymous) for name in ("q4_k", "q4_k-streamed")),
        ]
    )


def times(kind: str, laps: Mapping[str, list[float]], first: Mapping[str, float]) -> list[Figure]:
    """A format with its weights on the device, from the file, and in a process's first run."""
    title, theirs = f"OpenCL trace + compare, {kind.upper()}", laps["captured"]

    def against(name: str, where: str, bound: float | None, peer: str) -> Figure:
        ratio = median_ratio(laps[name], theirs)
        return Figure(
            f"{title}, weights {where}", f"{ratio:.2f}x ({milliseconds(laps[name])})",
            "none" if bound is None else f"<= {bound}x", bound is None or ratio <= bound, peer,
        )  # fmt: skip

    peer = f"transformers captured ({milliseconds(theirs)}); aim {AIMS[kind]}x"
    began = f"transformers: {milliseconds([first['captured']])}"
    return [
        against(kind, "on the device", MOST_TIME[kind], peer),
        against(f"{kind}-streamed", "from the file", None, "the same"),
        Figure(f"{title}, first run of a process", milliseconds([first[kind]]), "none", True,
               began),
    ]  # fmt: skip


def memory(name: str, resident: Mapping[str, int], anonymous: Mapping[str, int]) -> Figure:
    """What a side of the quantised model holds, against transformers with its mapped weights."""
    most_bytes = MOST_MEMORY * resident["captured"]
    where = "from the file" if name.endswith("streamed") else "on the device"
    return Figure(
        f"peak resident memory, Q4_K, weights {where}",
        f"{resident[name] >> 20} MiB ({anonymous[name] >> 20} anonymous)",
        f"<= {int(most_bytes) >> 20} MiB",
        resident[name] <= most_bytes,
        f"transformers: {resident['captured'] >> 20} MiB, mapped weights included",
    )


def quantise() -> None:
    """Make the quantised model unless it is there; takes a minute."""
    target = folder() / QUANTISED
    if target.exists():
        return
    from aprcore.models.convert import import_model

    print(f"quantising into {target} ...", file=sys.stderr)
    import_model(folder() / "hf", target, quantize="q4_k", quantize_embeddings=True)


def compared(file: str, budget_bytes: int | None = None) -> Callable[[], float]:
    """Our trace on the device, each stage compared with the oracle's; opening is not counted."""
    from aprcore.engines.forward import AHEAD
    from aprcore.engines.opencl.backend import OpenCLBackend
    from aprcore.judging.compare import compare
    from aprcore.runs.open_sides import open_sides
    from aprcore.runs.request import TOP_K, Request

    request = Request(model=folder() / file, oracle=folder() / "oracle", tokens=TOKENS)
    opened = ExitStack()  # never closed: for the life of this process
    sides = opened.enter_context(open_sides(request))
    backend = OpenCLBackend(budget_bytes=budget_bytes)
    oracle = sides.oracle
    assert oracle is not None

    def run(_opened: ExitStack = opened) -> float:
        started = time.perf_counter()
        for key, tensor in sides.tensors(backend, AHEAD):
            assert tensor is not None
            compare(tensor, oracle.read(key), TOP_K)
        return time.perf_counter() - started

    return run


SIDES: dict[str, Callable[[], Callable[[], float]]] = {
    "f32": lambda: compared("model.apr"),
    "q4_k": lambda: compared(QUANTISED),
    "f32-streamed": lambda: compared("model.apr", budget_bytes=0),
    "q4_k-streamed": lambda: compared(QUANTISED, budget_bytes=0),
    "captured": transformers_captured,
}

if __name__ == "__main__":
    sys.exit(main())
