"""Tensors of a finished run, on demand: what the run saw, to the last bit."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.dumps.plan import Plan
from aprcore.ground.errors import AprError
from aprcore.judging.layouts import layout_of
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.pictures import FilePlane, HeatMap, MapKind, MemoryPlane, Plane
from aprcore.records.report import Report, StageReport
from aprcore.runs.bisect import bisect
from aprcore.runs.request import Request
from aprcore.runs.tensors import LayerInputs, TensorStore
from tiny import NUM_LAYERS, SIZES, TOKENS, Tensors, edited, trace_model, write_model, write_stages

T, H, K, D = len(TOKENS), SIZES["H"], SIZES["K"], SIZES["D"]
ALL_SIZES = SIZES | {"T": T, "S": T}
SCORES, Q, QKV = (StageKey(1, name) for name in ("attn_scores", "q_post_rope", "qkv_bias"))
LOGITS, FINAL_NORM = StageKey(None, "lm_head"), StageKey(None, "final_norm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.apr")


@pytest.fixture(scope="module")
def tensors(model: Path) -> Tensors:
    return trace_model(model)


@pytest.fixture(scope="module")
def oracle(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stages(tmp_path_factory.mktemp("oracle") / "o", tensors)


def run(request: Request, kept: LayerInputs | None = None) -> dict[StageKey, StageReport]:
    *_, report = bisect(request, kept)
    assert isinstance(report, Report)
    return {stage.key: stage for stage in report.stages}


def whole(plane: Plane | None) -> Any:
    assert plane is not None
    rows, columns = plane.shape
    flat = plane.read_flat(0, math.prod(plane.layout.shape))
    np.testing.assert_array_equal(plane.read(0, rows, 0, columns).reshape(-1), flat)
    return flat


def check_listed(report: StageReport, trace: Any, oracle: Any) -> None:
    """The largest differences that the report lists are those of the tensors."""
    assert report.comparison is not None
    top = report.comparison.top
    assert len(top)
    np.testing.assert_array_equal(trace[top.indices], top.a)
    np.testing.assert_array_equal(oracle[top.indices], top.b)


class TestTracedModel:
    @pytest.mark.parametrize("keeps", [True, False], ids=["kept", "not kept"])
    @pytest.mark.parametrize("threads", [1, 2])
    def test_every_tensor_is_made_again_to_the_last_bit(
        self, model: Path, oracle: Path, tensors: Tensors, keeps: bool, threads: int
    ) -> None:
        kept = LayerInputs() if keeps else None
        request = Request(model=model, oracle=oracle, threads=threads)
        reports = run(request, kept)
        assert set(reports) == set(tensors)
        store = TensorStore(request, kept)
        for key, report in reports.items():
            pair = store.open(report)
            assert pair.comparable
            assert pair.layout == report.layout
            np.testing.assert_array_equal(whole(pair.trace), tensors[key].reshape(-1))
            np.testing.assert_array_equal(whole(pair.oracle), tensors[key].reshape(-1))
        store.close()

    def test_a_device_is_not_opened_to_look_at_the_cpus_side(
        self, model: Path, oracle: Path, tensors: Tensors
    ) -> None:
        report = run(Request(model=model, oracle=oracle))[Q]
        store = TensorStore(Request(model=model, oracle=oracle, gpu=True, device="no such device"))
        np.testing.assert_array_equal(whole(store.open(report).trace), tensors[Q].reshape(-1))

    def test_only_inputs_of_layers_are_kept(self, model: Path, tensors: Tensors) -> None:
        kept = LayerInputs()
        run(Request(model=model, tokens=TOKENS), kept)
        assert sorted(kept, key=str) == [
            StageKey(0, "embedding"),
            *(StageKey(layer, "post_ffn_residual") for layer in range(NUM_LAYERS)),
        ]
        for key in kept:
            np.testing.assert_array_equal(kept[key], tensors[key])

    def test_one_layer_of_work_at_most(
        self, model: Path, oracle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from aprcore.engines.numpy import NumpyBackend

        kept = LayerInputs()
        request = Request(model=model, oracle=oracle)
        reports = run(request, kept)
        products = []
        linear = NumpyBackend.linear

        def counted(self: NumpyBackend, x: Any, weights: Any) -> Any:
            products.extend(weight.name for weight in weights)
            return linear(self, x, weights)

        monkeypatch.setattr(NumpyBackend, "linear", counted)
        store = TensorStore(request, kept)
        for key, report in reports.items():
            products.clear()
            store.open(report)
            layer = f"model.layers.{key.layer}." if key.layer is not None else ""
            assert all(name.startswith(layer) and len(products) <= 7 for name in products)
        assert products  # the head

    def test_a_stage_can_be_opened_while_the_run_goes_on(
        self, model: Path, oracle: Path, tensors: Tensors
    ) -> None:
        kept = LayerInputs()
        request = Request(model=model, oracle=oracle)
        store = TensorStore(request, kept)
        events = bisect(request, kept)
        for event in events:
            if isinstance(event, StageReport) and event.key == Q:
                break
        np.testing.assert_array_equal(whole(store.open(event).trace), tensors[Q].reshape(-1))
        events.close()

    def test_without_an_oracle_there_is_one_side(self, model: Path, tensors: Tensors) -> None:
        kept = LayerInputs()
        request = Request(model=model, tokens=TOKENS)
        pair = TensorStore(request, kept).open(run(request, kept)[SCORES])
        assert pair.oracle is None and not pair.comparable
        np.testing.assert_array_equal(whole(pair.trace), tensors[SCORES].reshape(-1))

    def test_a_stage_that_the_oracle_lacks_has_a_trace_all_the_same(
        self, model: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        rest = {key: x for key, x in tensors.items() if key.stage != "post_ffn_residual"}
        plan = Plan(stages=frozenset({"post_ffn_residual", "attn_norm"}), layers=None)
        request = Request(model=model, oracle=write_stages(tmp_path / "o", rest), plan=plan)
        kept = LayerInputs()
        report = run(request, kept)[StageKey(1, "post_ffn_residual")]
        assert report.verdict is Verdict.MISSING
        pair = TensorStore(request, kept).open(report)
        assert pair.oracle is None
        np.testing.assert_array_equal(
            whole(pair.trace), tensors[StageKey(1, "post_ffn_residual")].reshape(-1)
        )

    def test_a_full_disk_keeps_nothing_and_says_nothing(
        self, model: Path, oracle: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        room = [tensors[StageKey(0, "embedding")].nbytes * 2]
        pwrite = os.pwrite

        def write(descriptor: int, data: Any, offset: int) -> int:
            if offset + len(data) > room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwrite(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", write)
        kept = LayerInputs()
        request = Request(model=model, oracle=oracle)
        reports = run(request, kept)
        assert len(kept) == 2
        key = StageKey(2, "ffn_up")
        made = whole(TensorStore(request, kept).open(reports[key]).trace)
        np.testing.assert_array_equal(made, tensors[key].reshape(-1))

    def test_closed_inputs_are_forgotten(self, tensors: Tensors) -> None:
        kept = LayerInputs()
        key = StageKey(0, "embedding")
        kept.keep(key, tensors[key])
        assert key in kept
        kept.close()
        kept.keep(key, tensors[key])
        assert len(kept) == 0

    def test_inputs_that_go_while_a_tensor_is_made_are_an_error(
        self, model: Path, oracle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = LayerInputs()
        request = Request(model=model, oracle=oracle)
        reports = run(request, kept)
        store = TensorStore(request, kept)
        store.open(reports[SCORES])  # the model is open from here on
        monkeypatch.setattr(os, "preadv", lambda *_: 0)  # a file that ends early
        with pytest.raises(AprError, match="what was kept of the run is gone; run again"):
            store.open(reports[Q])


Change = Callable[[np.ndarray], np.ndarray]


def heads_first(x: np.ndarray) -> np.ndarray:
    return x.reshape(T, -1, D).transpose(1, 0, 2).reshape(x.shape)


def tokens_first(x: np.ndarray) -> np.ndarray:
    return x.transpose(1, 0, 2)


def pairs_adjacent(x: np.ndarray) -> np.ndarray:
    return x.reshape(T, -1, 2, D // 2).swapaxes(2, 3).reshape(x.shape)


def fused_by_head(x: np.ndarray) -> np.ndarray:
    q, k, v = np.split(x, [H * D, (H + K) * D], axis=1)
    return np.concatenate([part.reshape(T, K, -1) for part in (q, k, v)], axis=2).reshape(T, -1)


PERMUTED = [
    pytest.param(has_model, side, key, change, id=f"{change.__name__}-{side}-{has_model}")
    for has_model in (True, False)
    for side in ("trace", "oracle")
    for key, change in (
        (Q, heads_first), (SCORES, tokens_first), (Q, pairs_adjacent), (QKV, fused_by_head),
    )
    # Held against the model, the order of q, k and v is the oracle's own.
    if not (key == QKV and side == "oracle" and has_model)
]  # fmt: skip


class TestDumps:
    def test_files_in_canonical_layout_are_read_by_position(
        self, oracle: Path, tensors: Tensors
    ) -> None:
        request = Request(trace=oracle, oracle=oracle)
        reports = run(request)
        store = TensorStore(request)
        for key, report in reports.items():
            pair = store.open(report)
            assert isinstance(pair.trace, FilePlane) and isinstance(pair.oracle, FilePlane)
            assert pair.comparable and pair.layout == report.layout
            np.testing.assert_array_equal(whole(pair.trace), tensors[key].reshape(-1))

    @pytest.mark.parametrize(("has_model", "side", "key", "change"), PERMUTED)
    def test_a_permuted_side_is_shown_as_it_was_judged(
        self, model: Path, tensors: Tensors, oracle: Path, tmp_path: Path, key: StageKey,
        change: Change, side: str, has_model: bool,
    ) -> None:  # fmt: skip
        other = write_stages(tmp_path / "p", edited(tensors, key, change))
        sides = {"trace": oracle, "oracle": oracle} | {side: other}
        request = Request(model=model if has_model else None, **sides)
        report = run(request)[key]
        assert report.verdict is Verdict.LAYOUT
        assert report.permuted and report.permuted in report.reason
        pair = TensorStore(request).open(report)
        for plane in (pair.trace, pair.oracle):
            np.testing.assert_array_equal(whole(plane), tensors[key].reshape(-1))
        assert HeatMap(pair, MapKind.DIFF).largest == 0

    def test_so_it_is_where_another_judgment_fails(
        self, model: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        """The reason names no permutation then."""
        trace = write_stages(tmp_path / "t", edited(tensors, Q, heads_first))
        wrong = edited(tensors, Q, lambda x: x * 1.5)
        request = Request(model=model, trace=trace, oracle=write_stages(tmp_path / "o", wrong))
        report = run(request)[Q]
        assert report.verdict is Verdict.FAIL and "heads" not in report.reason
        pair = TensorStore(request).open(report)
        np.testing.assert_array_equal(whole(pair.trace), tensors[Q].reshape(-1))
        check_listed(report, whole(pair.trace), whole(pair.oracle))

    def test_so_it_is_without_the_other_side(
        self, model: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        trace = write_stages(tmp_path / "t", edited(tensors, Q, heads_first))
        request = Request(model=model, trace=trace)
        report = run(request)[Q]
        pair = TensorStore(request).open(report)
        assert pair.oracle is None
        np.testing.assert_array_equal(whole(pair.trace), tensors[Q].reshape(-1))

    @pytest.mark.parametrize("has_model", [True, False], ids=["judged", "dumps only"])
    def test_both_sides_in_layouts_of_their_own(
        self, model: Path, tensors: Tensors, tmp_path: Path, has_model: bool
    ) -> None:
        trace = write_stages(tmp_path / "t", edited(tensors, Q, heads_first))
        oracle = write_stages(tmp_path / "o", edited(tensors, Q, pairs_adjacent))
        request = Request(model=model if has_model else None, trace=trace, oracle=oracle)
        report = run(request)[Q]
        assert report.verdict is Verdict.LAYOUT
        pair = TensorStore(request).open(report)
        for plane in (pair.trace, pair.oracle):
            np.testing.assert_array_equal(whole(plane), tensors[Q].reshape(-1))

    @pytest.mark.parametrize("has_model", [True, False], ids=["judged", "dumps only"])
    def test_scores_above_the_diagonal_are_zero(
        self, model: Path, tensors: Tensors, oracle: Path, tmp_path: Path, has_model: bool
    ) -> None:
        above = np.triu(np.ones((T, T), bool), 1)
        trace = write_stages(
            tmp_path / "t", edited(tensors, SCORES, lambda x: np.where(above, -np.inf, x))
        )
        request = Request(model=model if has_model else None, trace=trace, oracle=oracle)
        pair = TensorStore(request).open(run(request)[SCORES])
        np.testing.assert_array_equal(whole(pair.trace), tensors[SCORES].reshape(-1))
        assert HeatMap(pair).overview(99, 99).nonfinite.sum() == 0

    @pytest.mark.parametrize("key", [Q, FINAL_NORM, SCORES])
    def test_the_last_token_alone_is_held_against_the_last_token(
        self, tensors: Tensors, oracle: Path, tmp_path: Path, key: StageKey
    ) -> None:
        axis = 1 if key == SCORES else 0
        trace = write_stages(
            tmp_path / "t",
            edited(tensors, key, lambda x: x.take([-1], axis=axis) * np.float32(1.00001)),
        )
        request = Request(trace=trace, oracle=oracle)
        report = run(request)[key]
        assert report.verdict is Verdict.LAYOUT
        pair = TensorStore(request).open(report)
        assert pair.comparable and pair.layout == report.layout
        row = tensors[key].take(-1, axis=axis).reshape(-1)
        np.testing.assert_array_equal(whole(pair.oracle), row)
        check_listed(report, whole(pair.trace), whole(pair.oracle))

    def test_logits_of_every_token_are_cut_to_the_last(
        self, tensors: Tensors, oracle: Path, tmp_path: Path
    ) -> None:
        every = np.stack([tensors[LOGITS] + n for n in (4, 3, 2, 1, 0)])
        trace = write_stages(tmp_path / "t", tensors | {LOGITS: every.astype(np.float32)})
        request = Request(trace=trace, oracle=oracle)
        pair = TensorStore(request).open(run(request)[LOGITS])
        np.testing.assert_array_equal(whole(pair.trace), tensors[LOGITS])

    def test_other_sizes_have_a_layout_each(
        self, tensors: Tensors, oracle: Path, tmp_path: Path
    ) -> None:
        key = StageKey(1, "ffn_up")
        trace = write_stages(tmp_path / "t", edited(tensors, key, lambda x: x[:, :-3]))
        request = Request(trace=trace, oracle=oracle)
        report = run(request)[key]
        assert report.verdict is Verdict.SHAPE
        pair = TensorStore(request).open(report)
        assert not pair.comparable
        assert pair.trace is not None and pair.oracle is not None
        count = tensors[key].size
        assert pair.oracle.layout == layout_of(key, ALL_SIZES, count)
        assert pair.trace.layout == layout_of(key, ALL_SIZES, count - 3 * T)
        np.testing.assert_array_equal(whole(pair.oracle), tensors[key].reshape(-1))
        np.testing.assert_array_equal(whole(pair.trace), tensors[key][:, :-3].reshape(-1))

    def test_a_missing_side_is_absent(self, tensors: Tensors, oracle: Path, tmp_path: Path) -> None:
        rest = {key: x for key, x in tensors.items() if key != Q}
        request = Request(trace=write_stages(tmp_path / "t", rest), oracle=oracle)
        pair = TensorStore(request).open(run(request)[Q])
        assert pair.trace is None
        np.testing.assert_array_equal(whole(pair.oracle), tensors[Q].reshape(-1))

    def test_one_file_of_named_tensors(
        self, tensors: Tensors, oracle: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "dump.npz"
        chosen = {k.path: x for k, x in tensors.items() if k.stage in ("attn_norm", "ffn_up")}
        np.savez(path, tokens=np.array(TOKENS), **chosen)
        request = Request(trace=path, oracle=oracle)
        reports = run(request)
        key = StageKey(1, "attn_norm")
        pair = TensorStore(request).open(reports[key])
        assert isinstance(pair.trace, MemoryPlane)
        np.testing.assert_array_equal(whole(pair.trace), tensors[key].reshape(-1))


class TestBrokenFiles:
    @pytest.fixture
    def request_of_copies(self, oracle: Path, tmp_path: Path) -> Request:
        for name in ("t", "o"):
            shutil.copytree(oracle, tmp_path / name)
        return Request(trace=tmp_path / "t", oracle=tmp_path / "o")

    def test_a_directory_that_is_gone(self, request_of_copies: Request, tmp_path: Path) -> None:
        report = run(request_of_copies)[Q]
        shutil.rmtree(tmp_path / "t")
        with pytest.raises(AprError, match="does not exist"):
            TensorStore(request_of_copies).open(report)

    def test_a_file_that_is_gone(self, request_of_copies: Request, tmp_path: Path) -> None:
        reports = run(request_of_copies)
        store = TensorStore(request_of_copies)
        store.open(reports[SCORES])
        (tmp_path / "t" / f"{Q.path}.bin").unlink()
        with pytest.raises(AprError, match=r"q_post_rope\.bin: no such file"):
            store.open(reports[Q])

    def test_a_file_that_was_written_anew(self, request_of_copies: Request, tmp_path: Path) -> None:
        reports = run(request_of_copies)
        store = TensorStore(request_of_copies)
        store.open(reports[SCORES])
        path = tmp_path / "t" / f"{Q.path}.bin"
        path.write_bytes(path.read_bytes() + bytes(4))
        with pytest.raises(AprError, match="has changed since the run"):
            store.open(reports[Q])

    def test_a_model_that_is_gone(self, model: Path, oracle: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copy(model, tmp_path / "m.apr"))
        request = Request(model=copy, oracle=oracle)
        report = run(request)[Q]
        copy.unlink()
        with pytest.raises(AprError, match=r"m\.apr"):
            TensorStore(request).open(report)

    def test_another_run_than_the_reports(self, model: Path) -> None:
        report = run(Request(model=model, tokens=TOKENS))[Q]
        with pytest.raises(AprError, match="has changed since the run"):
            TensorStore(Request(model=model, tokens=TOKENS[:3])).open(report)
