"""The maps and the profile of a report."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aprcore.judging.compare import compare
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.records.report import (
    Report,
)
from aprcore.reports.collect import collect_maps
from aprcore.reports.maps import (
    DECADES,
    SHADES,
    StageMap,
    describe_map,
    encode_png,
    lost_text,
    row_labels,
)
from aprcore.reports.profile import curves_of, draw_profile
from aprcore.runs.tensors import TensorStore
from report_runs import broken, found_in, grid_of, reports, request


def decoded(png: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [rows, columns] and palette [n, 3] of a PNG, its checksums verified."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    rest = png[8:]
    while rest:
        size, name = struct.unpack(">I4s", rest[:8])
        assert struct.unpack(">I", rest[8 + size : 12 + size])[0] == zlib.crc32(rest[4 : 8 + size])
        chunks[name], rest = rest[8 : 8 + size], rest[12 + size :]
    width, height, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, kind, list(chunks)[-1]) == (8, 3, b"IEND")
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:], np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)


class TestMaps:
    def test_brightness_is_the_logarithm_of_the_magnitude(self) -> None:
        values = [[-1000, 100, 10], [1, 0.1, 0.05], [0, 0, 0]]
        pixels, palette = decoded(encode_png(grid_of(values, [[0] * 3, [0] * 3, [0, 3, 0]])))
        steps = (SHADES - 1) / DECADES
        expected = [[4 * steps, 3 * steps, 2 * steps], [steps, 0, 0], [0, SHADES, 0]]
        np.testing.assert_array_equal(pixels, np.round(expected))
        assert len(palette) == 256
        lightness = palette[:SHADES] @ np.array([0.2126, 0.7152, 0.0722])
        assert (np.diff(lightness) > -1).all()
        assert lightness[-1] - lightness[0] > 150
        # What is not finite is a colour that no magnitude has.
        assert np.abs(palette[:SHADES].astype(int) - palette[SHADES]).sum(axis=1).min() > 60

    def test_all_zero_is_all_dark(self) -> None:
        pixels, _ = decoded(encode_png(grid_of(np.zeros((2, 5)))))
        assert pixels.shape == (2, 5)
        assert not pixels.any()

    def test_the_map_of_a_fault_keeps_its_largest_difference(self) -> None:
        report = found_in("kv-tiled")
        store = TensorStore(request("kv-tiled"))
        maps = collect_maps(report, store)
        faults = {s.key: s for s in report.stages if s.verdict and s.verdict.is_divergence}
        assert [shown.key for shown in maps] == list(faults)
        for shown in maps:
            found = faults[shown.key].comparison
            assert found is not None
            assert shown.grid.largest == pytest.approx(found.max_abs_diff, rel=1e-6)
            assert np.abs(shown.grid.values).max() == pytest.approx(shown.grid.largest, rel=1e-6)
        assert [shown.key for shown in collect_maps(report, store, limit=1)] == [maps[0].key]
        assert maps[0].heads == 4
        assert [name for name, _ in row_labels(maps[0])] == [f"head {n}" for n in range(4)]
        assert row_labels(maps[1])[0][0] == '0 "What"'

    def test_files_that_are_gone_have_no_map(self, tmp_path: Path) -> None:
        absent = replace(request("kv-tiled"), trace=tmp_path / "absent")
        assert collect_maps(found_in("kv-tiled"), TensorStore(absent)) == ()

    def test_a_map_is_told_in_words(self) -> None:
        values = np.zeros((2, 3))
        values[1, 2] = -4
        grid = grid_of(values, [[0, 2, 0], [0, 0, 0]], cell_columns=14)
        said = describe_map(StageMap(StageKey(3, "attn_norm"), grid))
        assert "layer 3 · attn_norm" in said
        assert "the largest is 4.0e+00 at token 1, dim 28 to 41" in said
        assert "1 of 6 cells are above a tenth of it" in said
        assert said.endswith("2 values NaN")
        mixed = grid_of(values, [[0, 2, 0], [0, 0, 9]], nan=np.array([[0, 1, 0], [0, 0, 0]]))
        assert lost_text(mixed) == "1 value NaN, 10 infinite"
        assert lost_text(grid_of(values, 1, nan=np.zeros((2, 3)))) == "6 values infinite"
        assert lost_text(grid_of(values)) == ""

    def test_a_folded_vector_says_its_own_indices(self) -> None:
        values = np.zeros((3, 4))
        values[2, 1] = 1
        grid = grid_of(values, rows="", columns="token id", fold=64, cell_rows=2, cell_columns=16)
        said = describe_map(StageMap(StageKey(None, "lm_head"), grid))
        assert "at token id 272 to 351" in said  # row 4, column 16 and the row below it


class TestProfile:
    def test_it_has_the_judgments_that_were_made(self) -> None:
        names = {
            name: [curve.name for curve in curves_of(report)] for name, report in reports().items()
        }
        assert names["kv-tiled"] == ["cumulative", "model", "kernel"]
        assert names["without model"] == ["cumulative"]
        assert names["without oracle"] == ["kernel"]
        assert names["empty"] == []
        assert draw_profile(reports()["empty"]) is None

    def test_a_curve_has_a_point_per_stage_and_rises_where_the_error_does(self) -> None:
        report = found_in("kv-tiled")
        text = str(draw_profile(report))
        points = re.search(r'<g class="curve kernel"><polyline points="([^"]+)"', text)
        assert points is not None
        heights = [float(point.split(",")[1]) for point in points[1].split()]
        assert len(heights) == len(report.stages)
        errors = [stage.kernel.relative_l2 for stage in report.stages if stage.kernel]
        assert np.argmin(heights) == np.argmax(errors)
        clipped = np.clip(errors, 1e-9, 10)
        order = np.argsort(clipped, kind="stable")
        assert (np.diff(np.array(heights)[order]) <= 0.11).all()  # rounded to a tenth

    def test_a_deep_run_has_all_of_its_points(self) -> None:
        found = found_in("kv-tiled")
        stages = tuple(
            replace(stage, key=StageKey(layer, stage.key.stage))
            for layer in range(80)
            for stage in found.stages
            if stage.key.layer == 2
        )
        text = str(draw_profile(replace(found, stages=stages)))
        drawn = re.findall(r'<polyline points="([\d., -]+)"></polyline>', text)
        assert [len(points.split()) for points in drawn[:3]] == [len(stages)] * 3
        numbers = re.findall(r'text-anchor="middle">(\d+)</text>', text)
        assert len(numbers) <= 16
        assert text.count('class="fault"') >= 80

    def test_what_is_not_finite_is_at_the_top_and_a_gap_is_a_gap(self) -> None:
        keys = [StageKey(n, "attn_norm") for n in range(4)]
        nan, ones = np.full(6, np.nan, np.float32), np.ones(6, np.float32)
        found = [compare(ones, ones, 1), compare(nan, ones, 1), None, compare(ones, ones, 1)]
        stages = tuple(broken(k, Verdict.PASS, comparison=c) for k, c in zip(keys, found))
        text = str(draw_profile(Report(found_in("none").header, stages, 0.0)))
        curve = re.search(r'<g class="curve cumulative">(.*?)</g>', text)
        assert curve is not None
        lines = [
            [tuple(map(float, p.split(","))) for p in points.split()]
            for points in re.findall(r'points="([^"]+)"', curve[1])
        ]
        assert [len(line) for line in lines] == [2, 2]  # the lone point is drawn twice
        assert lines[0][0][1] > lines[0][1][1]
        assert lines[1][0] == lines[1][1]
