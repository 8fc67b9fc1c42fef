"""The bundled demo keeps its promises, without torch."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

from aprcore.dumps.directory import TraceDirectory
from aprcore.engines.forward import forward
from aprcore.engines.numpy import NumpyBackend
from aprcore.judging.compare import compare
from aprcore.judging.logits import compare_logits
from aprcore.judging.verdict import Verdict
from aprcore.models.model import Model, open_model
from aprcore.network.stages import StageKey
from aprcore.records.report import Report
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from aprtui.demo import DemoFault, demo_path, load_faults

FAULTS = load_faults()
MODEL_LIMIT_BYTES = 450_000
TOTAL_LIMIT_BYTES = 3_000_000


@pytest.fixture(scope="module")
def sound():
    with open_model(demo_path() / "sound.apr") as model:
        yield model


@pytest.fixture(scope="module")
def oracle() -> TraceDirectory:
    return TraceDirectory(demo_path() / "oracle")


def last_logits(model: Model, tokens: list[int]) -> np.ndarray:
    backend = NumpyBackend()
    key = StageKey(None, "lm_head")
    passed = dict(forward(model.graph, model.weights, backend, tokens, lambda k: k == key))
    return backend.to_host(passed[key])


def answer(model: Model, question: str) -> str:
    """The model's greedy continuation, up to its end token."""
    tokenizer = model.tokenizer()
    tokens, text = tokenizer.encode(question), ""
    for _ in range(8):
        token = int(last_logits(model, tokens).argmax())
        if tokenizer.token_text(token) == "<|endoftext|>":
            return text
        text += tokenizer.token_text(token)
        tokens.append(token)
    return f"{text}..."


def tensors_of(fault: DemoFault, tokens: tuple[int, ...]):
    """The faulty side's tensors, in the order of computation."""
    if fault.trace is not None:
        trace = TraceDirectory(fault.trace)
        yield from ((key, trace.read(key)) for key in trace.counts)
        return
    backend = NumpyBackend()
    with open_model(fault.model) as model:
        for key, x in forward(model.graph, model.weights, backend, tokens):
            yield key, backend.to_host(x)


def test_all_hundred_sums_are_right(sound):
    for a, b in itertools.product(range(10), repeat=2):
        assert answer(sound, f"What is {a}+{b}?") == f"{a}+{b}={a + b}"


def test_the_oracle_asks_for_a_digit(sound, oracle):
    tokenizer = sound.tokenizer()
    assert oracle.sidecar.prompt == "What is 2+2?2+2="
    assert tuple(tokenizer.encode(oracle.sidecar.prompt)) == oracle.sidecar.tokens
    texts = [tokenizer.token_text(token) for token in oracle.sidecar.tokens]
    assert texts == ["What", " is", " ", "2", "+", "2", "?", "2", "+", "2", "="]
    logits = oracle.read(StageKey(None, "lm_head"))
    assert tokenizer.token_text(int(logits.argmax())) == "4"


def test_every_byte_can_be_encoded(sound):
    for text in ("¿Qué?", "\x00\x7f", "数", "[/INST] [bold]"):
        assert "".join(map(sound.tokenizer().token_text, sound.tokenizer().encode(text)))


def test_the_sound_model_agrees_with_its_oracle(sound, oracle):
    backend = NumpyBackend()
    seen = set()
    for key, x in forward(sound.graph, sound.weights, backend, oracle.sidecar.tokens):
        assert compare(backend.to_host(x), oracle.read(key)).relative_l2 <= 1e-5, key
        seen.add(key)
    assert seen == set(oracle.counts)


def test_the_manifest_has_faults_of_both_kinds():
    kinds = [fault.kind for fault in FAULTS.values()]
    assert min(kinds.count("model"), kinds.count("kernel")) >= 2
    assert next(iter(FAULTS)) == "rope-pairs"
    for name, fault in FAULTS.items():
        assert name == fault.name != "none"
        assert fault.model.is_file()
        assert (fault.trace is not None) == (fault.kind == "kernel")
        assert (fault.layer is None) == (fault.kind == "sound")
        assert fault.layer is None or f"layer {fault.layer}" in fault.description


PLANTED = [fault for fault in FAULTS.values() if fault.kind != "sound"]


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.name)
def test_the_planted_stage_is_blamed(fault):
    report = judge(fault)
    first = report.first_divergence
    assert first is not None
    assert first.key == StageKey(fault.layer, fault.stage)
    assert first.blamed == fault.kind
    assert {s.key.layer for s in report.stages if s.verdict is Verdict.FAIL} == {fault.layer}


def test_quantised_weights_look_wrong_and_are_not_blamed():
    report = judge(FAULTS["quantised"])
    assert not report.diverges(strict=True)
    cosines = [stage.comparison.cosine for stage in report.stages]
    assert min(cosines) < 0.999
    assert {Verdict.NOISE, Verdict.INHERITED} <= set(report.counts)


def test_the_default_fault_is_found_among_rounding():
    """The story of the demo: most stages are off by rounding, and one of them is to blame."""
    report = judge(next(iter(FAULTS.values())))
    planted = report.first_divergence
    before = report.stages[: report.stages.index(planted)]
    assert any(stage.comparison.cosine < 0.9999 for stage in before)
    assert not any(stage.verdict.is_divergence for stage in before)


def judge(fault: DemoFault) -> Report:
    return run(Request(model=fault.model, trace=fault.trace, oracle=demo_path() / "oracle"))


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.name)
def test_the_answer_is_visibly_wrong(fault, sound, oracle):
    *_, (key, logits) = tensors_of(fault, oracle.sidecar.tokens)
    result = compare_logits(logits, oracle.read(key))
    digit = sound.tokenizer().token_text(result.argmax_a)
    assert digit.isdigit()
    assert digit != "4"


@pytest.mark.parametrize("fault", [f for f in FAULTS.values() if f.trace], ids=lambda f: f.name)
def test_a_dump_says_what_it_is(fault, oracle):
    sidecar = TraceDirectory(fault.trace).sidecar
    assert sidecar.tokens == oracle.sidecar.tokens
    assert sidecar.dtype == "float32"
    assert list(sidecar.stages) == list(oracle.sidecar.stages)


def test_sizes():
    files = [p for p in demo_path().rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert all(p.stat().st_size <= MODEL_LIMIT_BYTES for p in files)
    assert sum(p.stat().st_size for p in files) <= TOTAL_LIMIT_BYTES


def test_the_demo_opens_without_torch_and_transformers():
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from aprcore.runs.bisect import run\n"
        "from aprcore.runs.request import Request\n"
        "from aprtui.demo import demo_path, load_faults\n"
        "for fault in load_faults().values():\n"
        "    run(Request(model=fault.model, trace=fault.trace, oracle=demo_path() / 'oracle'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
