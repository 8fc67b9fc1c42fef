"""A whole run, from two sides on disk to the report."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.writer import TraceWriter
from aprcore.ground.errors import TruncatedError
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.records.report import Report, RunHeader
from aprcore.runs.bisect import bisect, run
from aprcore.runs.request import Request
from aprcore.runs.tensors import TensorStore
from aprtui.demo import demo_path
from bisect_runs import LOGITS, found_at, only_pass
from tiny import (
    NUM_LAYERS,
    TOKENS,
    Tensors,
    draw_weights,
    edited,
    embedded_tokenizer,
    trace_model,
    write_model,
    write_stages,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = ["[bold]", "\x1b[2J", *map(chr, range(ord("a"), ord("a") + 26))]
    metadata = embedded_tokenizer(vocabulary)
    return write_model(tmp_path_factory.mktemp("model") / "m.apr", metadata=metadata)


@pytest.fixture(scope="module")
def tensors(model: Path) -> Tensors:
    return trace_model(model)


@pytest.fixture(scope="module")
def oracle(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stages(tmp_path_factory.mktemp("oracle") / "o", tensors, prompt="sums")


class TestAgreement:
    def test_a_model_agrees_with_its_own_trace(self, model: Path, oracle: Path) -> None:
        report = run(Request(model=model, oracle=oracle))
        assert only_pass(report)
        assert len(report.stages) == 1 + 17 * NUM_LAYERS + 2
        assert report.first_divergence is None
        assert not report.diverges(strict=True)
        assert report.header.tokens == TOKENS
        assert report.header.prompt == "sums"

    def test_so_do_two_dumps_without_a_model(self, oracle: Path) -> None:
        assert only_pass(run(Request(trace=oracle, oracle=oracle)))

    def test_so_does_a_dump_judged_with_the_model(self, model: Path, oracle: Path) -> None:
        assert only_pass(run(Request(model=model, trace=oracle, oracle=oracle)))

    def test_files_of_an_earlier_run_are_left_out_and_named(
        self, oracle: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        dump = write_stages(tmp_path / "dump", tensors)
        few = {key: x for key, x in tensors.items() if key.layer == 0}
        write_stages(dump, few)  # a later run of fewer layers over the same directory
        report = run(Request(trace=dump, oracle=oracle))
        notes = [note for note in report.header.notes if "earlier run" in note]
        assert len(notes) == 1
        assert "files of the trace that its sidecar does not list" in notes[0]
        assert "layer-1/attn_norm" in notes[0]
        assert f"and {len(tensors) - len(few) - 3} more" in notes[0]
        assert not any("earlier run" in note for note in run(Request(trace=oracle)).header.notes)

    def test_the_stream_is_header_stages_report(self, model: Path, oracle: Path) -> None:
        events = list(bisect(Request(model=model, oracle=oracle)))
        header, *stages, report = events
        assert isinstance(header, RunHeader)
        assert isinstance(report, Report)
        assert tuple(stages) == report.stages
        assert tuple(stage.key for stage in report.stages) == header.keys

    def test_without_an_oracle_there_are_statistics(self, model: Path) -> None:
        report = run(Request(model=model, tokens=TOKENS))
        assert not report.diverges(strict=True)
        assert all(stage.trace is not None for stage in report.stages)
        assert all(stage.comparison is None for stage in report.stages)

    def test_the_default_prompt_is_recorded(self, tmp_path: Path) -> None:
        vocabulary = list("What is 2+?Ġ")
        model = write_model(tmp_path / "m.apr", metadata=embedded_tokenizer(vocabulary))
        header = next(bisect(Request(model=model)))
        assert isinstance(header, RunHeader)
        assert header.prompt == "What is 2+2?"

    def test_logits_are_named_by_the_tokenizer(self, model: Path, oracle: Path) -> None:
        report = run(Request(model=model, oracle=oracle))
        logits = found_at(report, LOGITS).logits
        assert logits is not None
        assert logits.comparison.agree
        assert set(logits.texts) == set(logits.comparison.top_a)
        assert report.header.token_texts is not None
        assert report.header.token_texts[1] == "[bold]"


@pytest.mark.parametrize("has_model", [True, False], ids=["with model", "dumps only"])
@pytest.mark.parametrize("stage", ["attn_norm", "q_post_rope", "attn_softmax", "ffn_swigl"])
def test_a_planted_wrong_stage_is_the_first_divergence(
    model: Path, tensors: Tensors, oracle: Path, tmp_path: Path, stage: str, has_model: bool
) -> None:
    key = StageKey(1, stage)
    wrong = write_stages(tmp_path / "w", edited(tensors, key, lambda x: x[..., ::-1]))
    report = run(Request(model=model if has_model else None, trace=wrong, oracle=oracle))
    assert report.first_divergence is not None
    assert report.first_divergence.key == key
    assert report.first_divergence.verdict is Verdict.FAIL
    assert report.diverges()
    before = report.stages[: report.stages.index(report.first_divergence)]
    assert {stage.verdict for stage in before} == {Verdict.PASS}


def test_a_wrong_weight_is_found_where_it_is_used(tmp_path: Path, oracle: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    wrong = write_model(tmp_path / "w.apr", changed={name: 1.1 * draw_weights()[name]})
    report = run(Request(model=wrong, oracle=oracle))
    assert report.first_divergence is not None
    assert report.first_divergence.key == StageKey(1, "attn_out")
    failed = [s.key for s in report.stages if s.verdict is Verdict.FAIL]
    assert failed == [StageKey(1, "attn_out")]  # what follows is inherited


class TestEndingEarly:
    def open_files(self) -> set[str]:
        links = Path("/proc/self/fd")
        if not links.is_dir():
            pytest.skip("no /proc")
        return {os.readlink(x) for x in map(str, links.iterdir()) if os.path.islink(x)}  # noqa: PTH114, PTH115

    @pytest.mark.parametrize("events", [1, 2, 9])
    def test_closing_the_stream_closes_the_files(
        self, model: Path, oracle: Path, events: int
    ) -> None:
        stream = bisect(Request(model=model, oracle=oracle))
        for _ in range(events):
            next(stream)
        assert str(model) in self.open_files()
        stream.close()
        gc.collect()
        assert str(model) not in self.open_files()

    def test_an_oracle_that_breaks_meanwhile_is_an_error_and_closes_the_files(
        self, model: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        oracle = write_stages(tmp_path / "o", tensors)
        stream = bisect(Request(model=model, oracle=oracle))
        next(stream)
        os.truncate(oracle / "layer-1/ffn_up.bin", 20)
        with pytest.raises(TruncatedError, match=r"ffn_up\.bin"):
            list(stream)
        assert str(model) not in self.open_files()


STORIES = Path(__file__).parents[2].parent / "shared" / "data" / "stories260k"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260k model is absent")
class TestStories:
    """A trained model: Llama, 5 layers, grouped kv heads, tied head."""

    @pytest.fixture(scope="class")
    def traced(self) -> Tensors:
        return trace_model(STORIES, (1, 403, 407, 261, 378))

    def test_it_agrees_with_itself_and_a_wrong_stage_is_found(
        self, traced: Tensors, tmp_path: Path
    ) -> None:
        tokens = (1, 403, 407, 261, 378)
        oracle = write_stages(tmp_path / "o", traced, tokens=tokens)
        assert only_pass(run(Request(model=STORIES, oracle=oracle)))
        key = StageKey(3, "k_post_rope")
        trace = write_stages(
            tmp_path / "t", edited(traced, key, lambda x: np.roll(x, 1, axis=0)), tokens=tokens
        )
        report = run(Request(model=STORIES, trace=trace, oracle=oracle))
        assert report.first_divergence is not None
        assert report.first_divergence.key == key


class TestRepeatedTokens:
    """Equal inputs round to equal errors: however long the prompt, nothing averages out."""

    @pytest.mark.parametrize("prompt", ["a" * 120, "ab" * 80, "What is 2+2?" * 12])
    def test_a_sound_model_is_not_blamed(self, prompt: str) -> None:
        report = run(Request(model=demo_path() / "sound.apr", prompt=prompt))
        assert report.counts == {Verdict.PASS: len(report.stages)}

    def test_a_fault_among_them_still_is(self, tmp_path: Path) -> None:
        request = Request(model=demo_path() / "sound.apr", prompt="ab" * 80)
        key = StageKey(2, "ffn_gate")
        store, report = TensorStore(request), run(request)
        folder = tmp_path / "dump"
        with TraceWriter(folder, Sidecar(tokens=report.header.tokens, dtype="float32")) as writer:
            for stage in report.stages:
                plane = store.open(stage).trace
                assert plane is not None
                values = plane.read_flat(0, plane.shape[0] * plane.shape[1]).copy()
                if stage.key == key:
                    values[::17] *= np.float32(1 + 2e-6)
                writer.write(stage.key, values)
        found = run(Request(model=demo_path() / "sound.apr", trace=folder)).first_divergence
        assert found is not None and found.key == key
