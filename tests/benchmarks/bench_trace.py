"""Trace and compare a Qwen2.5-0.5B-shaped model, against transformers with every stage captured.

Every side is a process of its own with the model open, and they take turns. The model is random
and float32; making it takes a minute, so it is kept in $APRTUI_BENCH_DIR (default:
~/.cache/aprtui-bench) between runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from figures import Figure, interleave, median_ratio, milliseconds, report

TOKENS = (3838, 374, 220, 17, 10, 17, 30)
SHAPE = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
MOST_TIME = 1.3
MOST_MEMORY = 0.25  # of transformers', which maps its weights: they are not in its figure
MOST_JUDGED = 4.0
# q, k, v and output projections, gate, up and down; what is left is small.
LAYER_FLOAT64_BYTES = 8 * (896 * (14 + 2 * 2) * 64 + 896 * 896 + 3 * 896 * 4864)
REPEATS = 7
SAMPLING_S = 0.002


def main() -> int:
    """Measure and print; with --side, be one of the two sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES)
    side = parser.parse_args().side
    if side is not None:
        return serve(SIDES[side]())
    prepare()
    names = ("compared", "judged", "captured", "plain")
    sides = {name: Side(name) for name in names}
    try:
        laps = dict(zip(names, interleave([sides[name].run for name in names], REPEATS)))
        peaks = {name: sides[name].peak_bytes() for name in names}
    finally:
        for one in sides.values():
            one.close()

    def against(name: str, peer: str, most: float, title: str, peer_title: str) -> Figure:
        ratio = median_ratio(laps[name], laps[peer])
        return Figure(
            title,
            f"{ratio:.2f}x ({milliseconds(laps[name])})",
            f"<= {most}x" if math.isfinite(most) else "none",
            ratio <= most,
            f"{peer_title} ({milliseconds(laps[peer])})",
        )

    def memory(name: str, most_bytes: float, title: str, peer_title: str) -> Figure:
        return Figure(
            title,
            f"{peaks[name] >> 20} MiB",
            f"<= {int(most_bytes) >> 20} MiB",
            peaks[name] <= most_bytes,
            peer_title,
        )

    limit = MOST_MEMORY * peaks["captured"]
    return report(
        [
            against("compared", "captured", MOST_TIME, "trace + compare, 0.5B shape, 7 tokens",
                    "transformers, the same stages captured"),
            against("compared", "plain", math.inf, "the same", "transformers, nothing captured"),
            memory("compared", limit, "its peak anonymous memory",
                   f"transformers: {peaks['captured'] >> 20} MiB, its weights mapped"),
            against("judged", "compared", MOST_JUDGED, "all three judgments", "trace + compare"),
            memory("judged", peaks["compared"] + LAYER_FLOAT64_BYTES, "its peak anonymous memory",
                   "trace + compare and one layer in float64"),
        ]
    )  # fmt: skip


def folder() -> Path:
    """Where the model is kept."""
    return Path(os.environ.get("APRTUI_BENCH_DIR") or Path.home() / ".cache" / "aprtui-bench")


def prepare() -> None:
    """Make the model in both formats and its oracle, unless they are there."""
    if (folder() / "complete").exists():
        return
    print(f"making the model in {folder()} ...", file=sys.stderr)
    folder().mkdir(parents=True, exist_ok=True)
    # In a process of its own: what it leaves in memory must not slow the measurement.
    subprocess.run([sys.executable, __file__, "--side", "maker"], check=True, input=b"run\n",
                   stdout=subprocess.DEVNULL)  # fmt: skip
    (folder() / "complete").touch()


class Side:
    """A process that has the model open and runs it on demand."""

    def __init__(self, name: str, script: str = __file__) -> None:
        self._process = subprocess.Popen(
            [sys.executable, script, "--side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self) -> float:
        """Seconds of one pass."""
        return float(self._ask("run"))

    def peak_bytes(self) -> int:
        """The most anonymous memory that any pass needed, the interpreter included."""
        return int(self._ask("peak"))

    def peak_resident_bytes(self) -> int:
        """The same with the pages of mapped files: libraries, and weights that are mapped."""
        return int(self._ask("resident"))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, what: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("a side of the benchmark has ended early")
        return json.loads(answer)


def serve(run: Callable[[], float]) -> int:
    """Answer the questions of `Side` on stdin."""
    peak = resident = 0
    for line in sys.stdin:
        match line.strip():
            case "run":
                with PeakMemory() as memory:
                    seconds = run()
                peak = max(peak, memory.peak_bytes)
                resident = max(resident, memory.peak_resident_bytes)
                print(json.dumps(seconds), flush=True)
            case "resident":
                print(json.dumps(resident), flush=True)
            case _:
                print(json.dumps(peak), flush=True)
    return 0


class PeakMemory:
    """Samples the resident memory of this process: anonymous, and with mapped files."""

    def __enter__(self) -> PeakMemory:
        self.peak_bytes, self.peak_resident_bytes = resident_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLING_S):
            anonymous, resident = resident_bytes()
            self.peak_bytes = max(self.peak_bytes, anonymous)
            self.peak_resident_bytes = max(self.peak_resident_bytes, resident)


def resident_bytes() -> tuple[int, int]:
    """RssAnon and VmRSS of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    if "RssAnon" not in fields:
        raise SystemExit("this system does not say how much anonymous memory a process has")
    anonymous, resident = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
    return anonymous, resident


def compared() -> Callable[[], float]:
    """Our trace of the .apr, each stage compared with the oracle's."""
    return bisection(cumulative_only=True)


def judged() -> Callable[[], float]:
    """The same with every stage judged on its own inputs too."""
    return bisection(cumulative_only=False)


def bisection(**options: Any) -> Callable[[], float]:
    """A whole run; opening the files is not counted."""
    from aprcore.runs.bisect import bisect
    from aprcore.runs.request import Request

    request = Request(
        model=folder() / "model.apr", oracle=folder() / "oracle", tokens=TOKENS, **options
    )
    complaints: list[str] = []

    def run() -> float:
        events = bisect(request)
        next(events)
        started = time.perf_counter()
        for event in events:
            last = event
        seconds = time.perf_counter() - started
        if last.diverges(strict=True) and not complaints:
            complaints.append(last.summary())
            print(f"a sound model is judged to be wrong: {last.summary()}", file=sys.stderr)
        return seconds

    return run


def transformers_captured() -> Callable[[], float]:
    """transformers with the hooks of `aprtui oracle`, kept until the next pass."""
    from aprcore.capture.transformers_pass import capture

    model = load()

    def run() -> float:
        kept = {}
        started = time.perf_counter()
        capture(model, TOKENS, kept.__setitem__)
        return time.perf_counter() - started

    return run


def transformers_plain() -> Callable[[], float]:
    """transformers alone."""
    import torch

    model = load()
    ids = torch.tensor([TOKENS])

    def run() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return time.perf_counter() - started

    return run


def load() -> Any:
    """The transformers model in float32."""
    from aprcore.capture.oracle import OracleRequest, load_model, quiet_transformers

    request = OracleRequest(source=folder() / "hf", tokens=TOKENS)
    with quiet_transformers():
        return load_model(request)


def maker() -> Callable[[], float]:
    """Makes everything; takes a minute."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import models
    from aprcore.capture.oracle import OracleRequest, write_oracle
    from aprcore.models.convert import import_model

    def run() -> float:
        model = models.build(models.RandomModel("qwen2", SHAPE))
        models.save(model, folder() / "hf")
        import_model(folder() / "hf", folder() / "model.apr", overwrite=True)
        write_oracle(OracleRequest(source=folder() / "hf", tokens=TOKENS), folder() / "oracle")
        return 0.0

    return run


SIDES: dict[str, Callable[[], Callable[[], float]]] = {
    "compared": compared,
    "judged": judged,
    "captured": transformers_captured,
    "plain": transformers_plain,
    "maker": maker,
}

if __name__ == "__main__":
    sys.exit(main())
