"""Differences of files, directories and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.dumps.stage_file import write_stage_file
from aprcore.ground.errors import AprError
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.runs.diff import Diff, diff_paths, to_json
from tiny import draw_weights, write_model, write_stages

NORM, UP, LOGITS = StageKey(0, "attn_norm"), StageKey(1, "ffn_up"), StageKey(None, "lm_head")
X = np.arange(1, 7, dtype=np.float32)


def file(path: Path, values: Any = X, layer: int | None = 0) -> Path:
    write_stage_file(path, layer, np.asarray(values, dtype=np.float32))
    return path


def verdicts(diff: Diff) -> dict[str, Verdict]:
    return {row.name: row.verdict for row in diff.rows}


def strict_json(diff: Diff) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(json.dumps(to_json(diff), allow_nan=False))
    return record


class TestFiles:
    def test_the_record_has_exactly_the_keys_of_the_schema(self, tmp_path: Path) -> None:
        a, b = file(tmp_path / "a.bin"), file(tmp_path / "b.bin", [1, 2, 3, 4, 5, 8])
        record = strict_json(diff_paths(a, b, top_k=2))
        rms = np.sqrt(4 / 6)
        cosine = X @ [1, 2, 3, 4, 5, 8] / np.linalg.norm(X) / np.linalg.norm([1, 2, 3, 4, 5, 8])
        assert record == {
            "schema": "apr-stage-diff-v1",
            "path_a": str(a),
            "path_b": str(b),
            "layer": 0,
            "dim_product": 6,
            "max_abs_diff": 2.0,
            "max_abs_diff_index": 5,
            "rms_diff": pytest.approx(rms),
            "cosine_sim": pytest.approx(cosine),
            "top_diffs": [
                {"index": 5, "a": 6.0, "b": 8.0, "abs_diff": 2.0},
                {"index": 0, "a": 1.0, "b": 1.0, "abs_diff": 0.0},
            ],
        }

    def test_a_whole_model_stage_says_so(self, tmp_path: Path) -> None:
        a, b = (file(tmp_path / f"{name}.bin", layer=None) for name in "ab")
        assert strict_json(diff_paths(a, b))["layer"] == "whole-model"

    def test_non_finite_numbers_are_words(self, tmp_path: Path) -> None:
        a = file(tmp_path / "a.bin", [np.nan, 1, np.inf])
        b = file(tmp_path / "b.bin", [0, 1, -np.inf])
        diffs = strict_json(diff_paths(a, b, top_k=2))["top_diffs"]
        assert diffs == [
            {"index": 0, "a": "nan", "b": 0.0, "abs_diff": "nan"},
            {"index": 2, "a": "inf", "b": "-inf", "abs_diff": "inf"},
        ]

    @pytest.mark.parametrize(
        ("b", "tolerance", "differs"),
        [
            (X, 0, False),
            (X * np.float32(1.01), 0, True),
            (X * np.float32(1.01), 0.0098, True),  # |a - b| / |b| = 0.01 / 1.01
            (X * np.float32(1.01), 0.0100, False),
            (-X, 1.9, True),
            (-X, 2.1, False),
        ],
    )
    def test_the_tolerance_is_a_relative_l2(
        self, tmp_path: Path, b: np.ndarray, tolerance: float, differs: bool
    ) -> None:
        paths = file(tmp_path / "a.bin"), file(tmp_path / "b.bin", b)
        assert diff_paths(*paths, tolerance=tolerance).differs() == differs

    @pytest.mark.parametrize(
        ("b", "differs"),
        [([np.nan, np.inf, 1], False), ([np.nan, -np.inf, 1], True), ([np.nan, 1, np.inf], True),
         ([1, np.inf, 1], True)],
    )  # fmt: skip
    def test_nan_equals_nan_at_the_same_place_only(
        self, tmp_path: Path, b: list[float], differs: bool
    ) -> None:
        paths = file(tmp_path / "a.bin", [np.nan, np.inf, 1]), file(tmp_path / "b.bin", b)
        assert diff_paths(*paths).differs() == differs
        # No tolerance forgives a NaN that only one side has.
        assert diff_paths(*paths, tolerance=1e9).differs() == differs

    def test_signs_of_zero_and_empty_files_are_equal(self, tmp_path: Path) -> None:
        for a, b in (([0.0], [-0.0]), ([], [])):
            paths = file(tmp_path / "a.bin", a), file(tmp_path / "b.bin", b)
            diff = diff_paths(*paths)
            assert not diff.differs(strict=True)
            strict_json(diff)

    def test_other_sizes_and_layers_are_errors(self, tmp_path: Path) -> None:
        a = file(tmp_path / "a.bin")
        for b, words in (
            (file(tmp_path / "b.bin", X[:5]), "its size is 5, that of .* is 6"),
            (file(tmp_path / "c.bin", layer=3), "its layer is 3, that of .* is 0"),
            (file(tmp_path / "d.bin", layer=None), "its layer is whole-model"),
        ):
            with pytest.raises(AprError, match=words) as caught:
                diff_paths(a, b)
            assert str(b) in str(caught.value)


class TestDirectories:
    def test_each_tensor_gets_a_row(self, tmp_path: Path) -> None:
        a = write_stages(tmp_path / "a", {NORM: X, UP: X, LOGITS: X})
        b = write_stages(tmp_path / "b", {NORM: X, UP: X[:4], StageKey(2, "ffn_up"): X, LOGITS: -X})
        diff = diff_paths(a, b)
        assert verdicts(diff) == {
            "layer-0/attn_norm": Verdict.PASS,
            "layer-1/ffn_up": Verdict.SHAPE,
            "layer-2/ffn_up": Verdict.MISSING,
            "lm_head": Verdict.FAIL,
        }
        assert [row.detail for row in diff.rows] == [
            "", "A has 6 values, B 4", "A lacks it", ""
        ]  # fmt: skip
        records = strict_json(diff)["tensors"]
        assert [r["verdict"] for r in records] == ["PASS", "SHAPE", "MISSING", "FAIL"]
        assert set(records[0]) - set(records[1]) >= {"cosine_sim", "max_abs_diff", "top_diffs"}

    def test_a_missing_tensor_counts_only_when_strict(self, tmp_path: Path) -> None:
        a = write_stages(tmp_path / "a", {NORM: X, UP: X})
        b = write_stages(tmp_path / "b", {NORM: X})
        for sides in ((a, b), (b, a)):
            diff = diff_paths(*sides)
            assert not diff.differs()
            assert diff.differs(strict=True)

    def test_a_shape_that_differs_counts(self, tmp_path: Path) -> None:
        a = write_stages(tmp_path / "a", {NORM: X})
        b = write_stages(tmp_path / "b", {NORM: X[:3]})
        assert diff_paths(a, b, tolerance=1e9).differs()

    def test_nothing_in_common_is_an_error(self, tmp_path: Path) -> None:
        a = write_stages(tmp_path / "a", {NORM: X})
        b = write_stages(tmp_path / "b", {UP: X})
        with pytest.raises(AprError, match="no tensor in common"):
            diff_paths(a, b)


class TestModels:
    NAME = "model.layers.1.mlp.up_proj.weight"

    def test_weights_are_compared_one_by_one(self, tmp_path: Path) -> None:
        changed = draw_weights()[self.NAME]
        changed[3, 4] += 1
        a = write_model(tmp_path / "a.apr")
        b = write_model(tmp_path / "b.apr", changed={self.NAME: changed})
        diff = diff_paths(b, a, top_k=1)
        assert [row.name for row in diff.rows if row.verdict is not Verdict.PASS] == [self.NAME]
        (row,) = (row for row in diff.rows if row.name == self.NAME)
        assert row.comparison is not None
        assert row.comparison.max_index == 3 * changed.shape[1] + 4
        assert len(diff.rows) == len(draw_weights())
        assert diff.differs()
        assert not diff_paths(a, a).differs(strict=True)

    def test_other_layers_are_missing_rows(self, tmp_path: Path) -> None:
        a = write_model(tmp_path / "a.apr", num_layers=2)
        b = write_model(tmp_path / "b.apr", num_layers=3)
        found = verdicts(diff_paths(a, b, tolerance=1e9))
        assert found["model.layers.2.mlp.up_proj.weight"] is Verdict.MISSING
        assert found["model.layers.1.mlp.up_proj.weight"] is Verdict.PASS


def test_two_kinds_cannot_be_compared(tmp_path: Path) -> None:
    paths = (
        file(tmp_path / "a.bin"), write_stages(tmp_path / "d", {NORM: X}),
        write_model(tmp_path / "m.apr"),
    )  # fmt: skip
    for a in paths:
        for b in paths:
            if a is not b:
                with pytest.raises(AprError, match="compare two files, two directories or two"):
                    diff_paths(a, b)


@pytest.mark.parametrize("name", ["none.bin", "none", "x" * 300])
def test_a_path_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(AprError, match=r"does not exist|cannot be read") as caught:
        diff_paths(file(tmp_path / "a.bin"), tmp_path / name)
    assert name in str(caught.value)
