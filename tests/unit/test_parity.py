"""The gate between the CPU and another backend, and the fallback behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.engines.decode import Decoder, TokenChosen, generate
from aprcore.engines.engine import Engine
from aprcore.engines.numpy import NumpyBackend
from aprcore.ground.errors import BackendError, PlanError
from aprcore.models.model import Model, open_model
from aprcore.network.stages import StageKey
from aprcore.records.parity_report import CacheParity, ParityReport, StepParity, to_json
from aprcore.runs.fallback import GuardedDecoder, RejectedError, open_decoder, rejection_line
from aprcore.runs.parity_gate import (
    DEFAULT_STEPS,
    MOST_STEPS,
    ParityRequest,
    check_parity,
    compare_step,
)
from aprtui.commands import parity as command
from tiny import TOKENS, opened, write_model
from wrong_backends import (
    BlindToTheFirst,
    MissingTail,
    NotFinite,
    OutOfMemory,
    Race,
    StaleCache,
    WrongStride,
)

PREFIX = "[apr-cpu-vs-gpu-output-parity-v1] opencl path rejected, attempting fallback: "
CPU = Engine(NumpyBackend(1))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.apr")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with opened(path) as model:
        yield model


def events_of(path: Path, backend: Any = None, **request: Any) -> list[Any]:
    request = {"tokens": TOKENS, "against": "reference"} | request
    tested = None if backend is None else Engine(backend)
    return list(check_parity(ParityRequest(path, **request), CPU, tested))


def report_of(path: Path, backend: Any = None, **request: Any) -> ParityReport:
    report = events_of(path, backend, **request)[-1]
    assert isinstance(report, ParityReport)
    return report


class TestStep:
    """One step's logits: which of them are the same."""

    logits = np.array([0.0, 1.0, 9.0, 10.0], dtype=np.float32)

    def judge(self, tested: list[float]) -> StepParity:
        other = np.array(tested, dtype=np.float32)
        return compare_step(other, self.logits, step=2, position=8, token=1)

    def test_equal_logits_pass(self) -> None:
        found = self.judge([0, 1, 9, 10])
        assert found.passed
        assert (found.cosine, found.relative_l2, found.argmax_cpu) == (1.0, 0.0, 3)

    def test_a_near_tie_is_no_mismatch(self) -> None:
        found = self.judge([0, 1, 10, 9])
        assert found.passed and found.near_tie
        assert (found.argmax_cpu, found.argmax_tested) == (3, 2)
        assert found.gap == pytest.approx(0.1)

    def test_another_token_at_a_wider_gap_is_one(self) -> None:
        wide = np.array([0.0, 1.0, 8.4, 10.0], dtype=np.float32)
        swapped = np.array([0.0, 1.0, 10.0, 9.9], dtype=np.float32)
        found = compare_step(swapped, wide, step=2, position=8, token=1)
        assert found.cosine > 0.99
        assert not found.passed
        assert "chooses token 2, the CPU 3" in found.fault

    def test_a_low_cosine_is_one_even_where_the_token_is_the_same(self) -> None:
        found = self.judge([9, 1, 9, 10])
        assert found.argmax_tested == found.argmax_cpu
        assert "cosine" in found.fault

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_what_is_not_finite_never_passes(self, bad: float) -> None:
        found = self.judge([0, bad, 9, 10])
        assert "NaN or infinite" in found.fault
        assert (found.nonfinite_tested, found.nonfinite_cpu) == (1, 0)
        same = np.array([0, bad], dtype=np.float32)
        assert not compare_step(same, same, step=0, position=0, token=0).passed


class TestGate:
    def test_a_sound_backend_passes(self, path: Path) -> None:
        report = report_of(path)
        assert not report.diverges
        assert [step.step for step in report.steps] == [0, 1, 2, 3]
        assert [step.position for step in report.steps] == [4, 5, 6, 7]
        assert [cache.side for cache in report.caches] == ["numpy", "reference"]
        assert all(cache.num_tokens == len(TOKENS) + 3 for cache in report.caches)
        assert all(cache.relative_l2 <= 1e-5 for cache in report.caches)

    @pytest.mark.parametrize(
        ("backend", "step", "stage"),
        [
            (WrongStride(1), 0, "attention"),
            (MissingTail(1), 1, "ffn_out"),
            (Race(), 0, "attn_norm"),
            (BlindToTheFirst(1), 1, "attn_softmax"),
            (NotFinite(1), 0, "ffn_silu"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, NumpyBackend) else str(value),
    )
    def test_a_wrong_kernel_is_caught_and_named(
        self, path: Path, backend: NumpyBackend, step: int, stage: str
    ) -> None:
        report = report_of(path, backend)
        assert report.diverges
        assert report.steps[-1].step == step
        assert not report.caches
        first = report.first
        assert first is not None
        assert (first.step, first.key, first.kernel) == (step, StageKey(0, stage), True)
        assert f"step {step}, layer 0 · {stage}: " in report.reason

    def test_what_the_gate_lets_pass_is_shown_and_rejected_when_strict(self, path: Path) -> None:
        assert [step.explained for step in report_of(path, MissingTail(1)).steps] == [False, False]
        report = report_of(path, MissingTail(1), strict=True)
        assert len(report.steps) == 1
        assert report.first is not None
        assert report.first.key == StageKey(0, "ffn_out")
        assert all(step.explained for step in report_of(path, strict=True).steps)

    def test_the_cause_is_found_by_experiment(self, path: Path) -> None:
        assert "kv heads tiled" in report_of(path, WrongStride(1)).reason

    def test_a_wrong_cache_is_caught_by_the_full_pass(self, path: Path) -> None:
        report = report_of(path, StaleCache(1))
        assert all(step.passed for step in report.steps)
        assert [cache.passed for cache in report.caches] == [True, False]
        assert report.diverges
        assert report.first is not None
        assert (report.first.step, report.first.key) == (1, StageKey(0, "attn_scores"))

    def test_both_sides_advance_on_the_choice_of_the_cpu(self, path: Path) -> None:
        class Undecided(NumpyBackend):
            """Swaps the two best tokens where they are a near-tie."""

            swapped = 0
            fed: list[int] = []  # noqa: RUF012

            def embed(self, tokens: Any, weight: Any) -> Any:
                self.fed += tokens.tolist()
                return super().embed(tokens, weight)

            def linear(self, x: Any, weights: Any) -> Any:
                y = super().linear(x, weights)
                if weights[0].name == "model.embed_tokens.weight":
                    best, second = np.argsort(-y[0])[:2]
                    if y[0, best] - y[0, second] < 0.1 * (y[0].max() - y[0].min()):
                        y[0, [best, second]] = y[0, [second, best]]
                        self.swapped += 1
                return y

        backend = Undecided(1)
        report = report_of(path, backend, steps=8)
        ties = [step for step in report.steps if step.near_tie]
        assert backend.swapped and ties, "the model has no near-tie; choose another seed"
        assert all(step.passed for step in report.steps)
        chosen = [step.argmax_cpu for step in report.steps[:-1]]
        assert [step.token for step in report.steps[1:]] == chosen
        assert backend.fed[: len(TOKENS) + 8] == [*TOKENS, *chosen]

    def test_events_come_as_they_are_found(self, path: Path) -> None:
        names = [type(event).__name__ for event in events_of(path, steps=1)]
        assert names == [
            "ParityHeader", "StepParity", "StepParity", "CacheParity", "CacheParity",
            "ParityReport",
        ]  # fmt: skip

    def test_every_stage_of_every_step_can_be_judged(self, path: Path, model: Model) -> None:
        report = report_of(path, stages=True)
        assert not report.diverges
        keys = list(model.graph.keys)
        assert [stage.key for stage in report.stages] == keys * (DEFAULT_STEPS + 1)
        for stage in report.stages:
            assert stage.tested.kernel is not None and stage.comparison is not None
            assert stage.comparison.relative_l2 <= 1e-5, stage.key
        # Scores of a decoding step are judged against the cache that the tested side had.
        scores = [s for s in report.stages if s.key == StageKey(0, "attn_scores")]
        assert [s.layout.shape[1:] for s in scores if s.layout] == [(5, 5), (1, 6), (1, 7), (1, 8)]

    def test_a_wrong_kernel_that_the_gate_lets_pass_is_rejected_with_stages(
        self, path: Path
    ) -> None:
        report = report_of(path, MissingTail(1), stages=True)
        (step,) = report.steps
        assert step.cosine >= 0.99
        assert "though the logits pass" in step.fault
        assert report.first is not None
        assert (report.first.key, report.first.kernel) == (StageKey(0, "ffn_out"), True)
        faults = {stage.key.stage for stage in report.stages if stage.fault}
        assert faults == {"ffn_out"}
        verdicts = {stage["path"]: stage["verdict"] for stage in to_json(report)["stages"]}
        assert verdicts["layer-0/ffn_out"] == "FAIL"
        assert verdicts["layer-0/post_ffn_residual"] == "INHERITED"

    @pytest.mark.parametrize("steps", [0, 17, -1])
    def test_other_numbers_of_steps_are_refused(self, path: Path, steps: int) -> None:
        with pytest.raises(PlanError, match="1 to 16"):
            events_of(path, steps=steps)

    def test_the_command_knows_the_same_numbers(self) -> None:
        assert (command.DEFAULT_STEPS, command.MOST_STEPS) == (DEFAULT_STEPS, MOST_STEPS)


class TestJson:
    @pytest.mark.parametrize("backend", [None, WrongStride(1), NotFinite(1)])
    def test_it_is_strict_and_says_what_was_found(
        self, path: Path, backend: NumpyBackend | None
    ) -> None:
        report = report_of(path, backend)
        data = json.loads(json.dumps(to_json(report), allow_nan=False))
        assert data["schema"] == "apr-cpu-vs-gpu-output-parity-v1"
        assert data["diverges"] is report.diverges
        assert data["tokens"] == list(TOKENS)
        assert len(data["steps"]) == len(report.steps)
        assert {"argmax_cpu", "argmax_gpu", "cosine", "gap", "passed"} <= set(data["steps"][0])
        if backend is None:
            assert data["first_difference"] is None
            assert len(data["prefill_vs_decode"]) == 2
        else:
            assert data["first_difference"]["path"].startswith("layer-0/")


class TestFallback:
    """The CPU takes over, and says so."""

    def text(self, model: Model, source: Any, max_tokens: int = 8) -> list[int]:
        events = generate(source, TOKENS, max_tokens)
        return [event.token for event in events if isinstance(event, TokenChosen)]

    def guarded(self, model: Model, backend: NumpyBackend, reasons: list[str]) -> GuardedDecoder:
        trusted, tested = (Decoder(model.graph, model.weights, e) for e in (CPU, Engine(backend)))
        return GuardedDecoder(trusted, tested, reasons.append)

    @pytest.fixture(scope="class")
    def expected(self, model: Model) -> list[int]:
        return self.text(model, Decoder(model.graph, model.weights, CPU))

    def test_a_sound_device_goes_on_alone(self, model: Model, expected: list[int]) -> None:
        class Counting(NumpyBackend):
            passes = 0

            def embed(self, tokens: Any, weight: Any) -> Any:
                self.passes += 1
                return super().embed(tokens, weight)

        reasons: list[str] = []
        cpu, device = Counting(1), Counting(1)
        trusted, tested = (
            Decoder(model.graph, model.weights, Engine(backend)) for backend in (cpu, device)
        )
        source = GuardedDecoder(trusted, tested, reasons.append)
        assert self.text(model, source) == expected
        assert (cpu.passes, device.passes) == (DEFAULT_STEPS + 1, 8)
        assert source.engine.backend is device
        assert not reasons

    @pytest.mark.parametrize("backend", [WrongStride(1), BlindToTheFirst(1), NotFinite(1)])
    def test_a_wrong_device_is_rejected_once_and_named(
        self, model: Model, backend: NumpyBackend, expected: list[int]
    ) -> None:
        reasons: list[str] = []
        source = self.guarded(model, backend, reasons)
        assert self.text(model, source) == expected
        assert len(reasons) == 1
        assert "layer 0 · " in reasons[0]
        assert source.engine is CPU

    @pytest.mark.parametrize("pass_number", [0, 1, 3, 4, 6])
    def test_memory_that_runs_out_at_any_step(
        self, model: Model, pass_number: int, expected: list[int]
    ) -> None:
        reasons: list[str] = []
        source = self.guarded(model, OutOfMemory(pass_number), reasons)
        assert self.text(model, source) == expected
        assert reasons == ["the device is out of memory"]

    def test_logits_that_are_lost_after_the_gate_are_the_cpu_s(
        self, model: Model, expected: list[int]
    ) -> None:
        class Late(NumpyBackend):
            """Breaks down at a length that the gate does not reach."""

            def masked_softmax(self, scores: Any, mask: Any) -> Any:
                lost = np.float32(np.nan if scores.shape[2] > len(TOKENS) + DEFAULT_STEPS else 1)
                return super().masked_softmax(scores, mask) * lost

        reasons: list[str] = []
        guarded = self.guarded(model, Late(1), reasons)
        assert self.text(model, guarded) == expected
        (reason,) = reasons
        assert reason.startswith(f"step {DEFAULT_STEPS + 1}: logits are NaN or infinite")

    def test_stages_come_from_whoever_ran_the_step(self, model: Model) -> None:
        wanted = StageKey(0, "attention")
        sound = Decoder(model.graph, model.weights, CPU).feed(TOKENS, wanted.__eq__)
        rejected = self.guarded(model, WrongStride(1), []).feed(TOKENS, wanted.__eq__)
        np.testing.assert_array_equal(rejected.stages[wanted], sound.stages[wanted])

    def test_a_device_that_is_required_is_not_replaced(self, model: Model) -> None:
        def refuse(reason: str) -> None:
            raise RejectedError(reason)

        source = self.guarded(model, WrongStride(1), [])
        source._reject = refuse
        with pytest.raises(RejectedError, match="layer 0 · attention"):
            source.feed(TOKENS)

    def test_a_device_that_cannot_be_opened(
        self, model: Model, monkeypatch: pytest.MonkeyPatch, expected: list[int]
    ) -> None:
        def unavailable(name: str, **options: Any) -> Any:
            if name == "opencl":
                raise BackendError("no OpenCL platform is installed")
            return open_engine(name, **options)

        from aprcore.runs import fallback

        open_engine = fallback.open_engine
        monkeypatch.setattr(fallback, "open_engine", unavailable)
        reasons: list[str] = []
        opened = open_decoder(model, use_gpu=True, device=None, threads=1, reject=reasons.append)
        with opened as source:
            assert self.text(model, source) == expected
        assert reasons == ["no OpenCL platform is installed"]

    def test_the_line(self) -> None:
        assert rejection_line("opencl", "why") == f"{PREFIX}why"


def test_the_default_prompt_is_run(tmp_path: Path) -> None:
    from aprtui.demo import demo_path

    with open_model(demo_path() / "sound.apr") as model:
        tokens = model.tokenizer().encode("What is 2+2?")
    events = list(check_parity(ParityRequest(demo_path() / "sound.apr", against="reference")))
    assert events[0].tokens == tuple(tokens)
    assert events[0].prompt == "What is 2+2?"
    assert isinstance(events[-2], CacheParity)
