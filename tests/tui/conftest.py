"""Small runs for the tests of the screen: stage files of a made-up engine, judged for real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.writer import TraceWriter
from aprcore.network.graph import known_stages, outline
from aprcore.network.stages import StageKey, resolve_shape
from aprcore.records.report import Report, RunHeader, StageReport
from aprcore.runs.bisect import bisect
from aprcore.runs.request import Request

SIZES = {"T": 7, "S": 7, "H": 4, "K": 2, "D": 8, "E": 32, "F": 64, "V": 96}
LAYERS = 3
TOKENS = (3838, 374, 220, 17, 10, 17, 30)
TEXTS = ("What", " is", " ", "2", "+", "2", "?")
PROMPT = "What is 2+2?"
FAULT = StageKey(1, "q_post_rope")
BROKEN = StageKey(1, "attn_norm")

Tensors = dict[StageKey, Any]
Event = RunHeader | StageReport | Report
Engine = Callable[[Request], Iterator[Event]]


def sound_tensors() -> Tensors:
    """Every tensor of a pass, at random."""
    random = np.random.default_rng(7)
    tensors = {}
    for key in outline(LAYERS, (), "llama").including(["qkv_bias"]).keys:
        shape = resolve_shape(known_stages()[key.stage].shape, SIZES)
        tensors[key] = random.standard_normal(shape).astype(np.float32)
    return tensors


def rounded(tensors: Tensors) -> Tensors:
    """The same with the rounding of another order of summation."""
    random = np.random.default_rng(8)
    return {
        key: (x * (1 + 3e-7 * random.standard_normal(x.shape))).astype(np.float32)
        for key, x in tensors.items()
    }


def faulty(tensors: Tensors) -> Tensors:
    """The same with a fault that spreads: a little at `FAULT`, then through all that follows."""
    random = np.random.default_rng(9)
    spoiled = rounded(tensors)
    keys = list(spoiled)
    for key in keys[keys.index(FAULT) :]:
        amount = 0.8 if key == FAULT else (0.3 if key.stage != "k_post_rope" else 0)
        spoiled[key] = (spoiled[key] + amount * random.standard_normal(spoiled[key].shape)).astype(
            np.float32
        )
    spoiled[StageKey(None, "lm_head")][11] += 6  # it says another token
    return spoiled


def save(folder: str, tensors: Tensors, **sidecar: Any) -> Path:
    """Write a directory of stage files in the working directory."""
    said = {"tokens": TOKENS, "prompt": PROMPT, "dtype": "float32", "backend": "made-up", **sidecar}
    with TraceWriter(Path(folder), Sidecar(**said)) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def no_guessing() -> Iterator[None]:
    """Keys and clicks wait for nothing by themselves.

    Textual's pilot guesses from the processor time of the process whether it has done its work,
    which takes 40 ms for each key and is wrong where others need the processor, too.
    `driving.come_to_rest` knows.
    """

    async def yield_to_the_loop(*_: float) -> None:
        await asyncio.sleep(0)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("textual.app", "textual.pilot"):
            patch.setattr(f"{module}.wait_for_idle", yield_to_the_loop)
        yield


@pytest.fixture(autouse=True)
def quiet_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory of one's own, so that relative paths on screen are always the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    # Its environment variable is read once, before any test.
    monkeypatch.setattr("textual.constants.TEXTUAL_ANIMATIONS", "none")


@pytest.fixture
def passing_request() -> Request:
    """Both sides agree."""
    oracle = sound_tensors()
    return Request(trace=save("engine-dump", rounded(oracle)), oracle=save("hf-stages", oracle))


@pytest.fixture
def failing_request() -> Request:
    """The trace is wrong from `FAULT` on."""
    oracle = sound_tensors()
    return Request(trace=save("engine-dump", faulty(oracle)), oracle=save("hf-stages", oracle))


@pytest.fixture
def lone_request() -> Request:
    """A trace with a NaN and no oracle."""
    tensors = rounded(sound_tensors())
    tensors[StageKey(1, "ffn_silu")][3, 5] = np.nan
    return Request(trace=save("engine-dump", tensors))


@pytest.fixture
def mixed_request() -> Request:
    """One of every verdict that two directories can have."""
    oracle = sound_tensors()
    trace = rounded(oracle)
    q = StageKey(0, "q_post_rope")
    trace[q] = trace[q].reshape(7, 4, 8).transpose(1, 0, 2).copy()
    trace[StageKey(0, "ffn_up")] = trace[StageKey(0, "ffn_up")][:, :60].copy()
    trace[StageKey(1, "attn_norm")][2, 3] = np.inf
    trace[StageKey(2, "ffn_gate")] *= -1
    del trace[StageKey(1, "ffn_out")]
    return Request(trace=save("engine-dump", trace), oracle=save("hf-stages", oracle))


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal's colours decide how a map is drawn."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")


@pytest.fixture
def broken_request() -> Request:
    """A trace with NaN and infinities at `BROKEN`, and a stage of another size."""
    oracle = sound_tensors()
    trace = rounded(oracle)
    trace[BROKEN][2, 3] = np.inf
    trace[BROKEN][4, 5:9] = np.nan
    trace[StageKey(0, "ffn_up")] = trace[StageKey(0, "ffn_up")][:, :60].copy()
    return Request(trace=save("engine-dump", trace), oracle=save("hf-stages", oracle))


@pytest.fixture
def with_texts() -> Engine:
    """The engine, with the texts of the tokens that two directories alone do not have."""

    def run(request: Request) -> Iterator[Event]:
        for event in bisect(request):
            if isinstance(event, RunHeader):
                yield replace(event, token_texts=TEXTS)
            elif isinstance(event, StageReport) and event.logits is not None:
                found = event.logits.comparison
                ids = sorted({*found.top_a, *found.top_b})
                texts = {token: chr(ord("0") + n) for n, token in enumerate(ids)}
                yield replace(event, logits=replace(event.logits, texts=texts))
            else:
                yield event

    return run


@pytest.fixture
def stopping(with_texts: Engine) -> Callable[[int | None], Engine]:
    """Makes an engine that stays silent after so many events."""

    def make(count: int | None) -> Engine:
        def run(request: Request) -> Iterator[Event]:
            yield from list(with_texts(request))[:count]

        return run

    return make
