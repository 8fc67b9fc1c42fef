"""Figures per token, maps at any zoom, histograms: against plain numpy on whole arrays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aprcore.dumps.stage_file import HEADER, write_stage_file
from aprcore.ground.errors import AprError, TraceError, TruncatedError
from aprcore.judging.compare import compare
from aprcore.judging.layouts import Layout, zero_masked
from aprcore.network.operations import Scores
from aprcore.network.stages import StageKey
from aprcore.pictures import (
    OUTLIER_RMS,
    Cancelled,
    FilePlane,
    Grid,
    HeatMap,
    MapKind,
    MapView,
    MemoryPlane,
    TensorPair,
    histogram,
    levels_of,
    map_kinds,
    token_figures,
    values,
    views,
)
from aprcore.pictures.heat_map import DIRECT_VALUES
from aprcore.pictures.records import PIECE_VALUES

Floats = NDArray[Any]

KEY = StageKey(1, "ffn_up")
SCORES = StageKey(1, "attn_scores")
LARGEST = np.finfo(np.float32).max
SPECIAL = (math.nan, math.inf, -math.inf)


def matrix_layout(*shape: int) -> Layout:
    return Layout(shape, shape, ("token", "dim"))


def head_layout(tokens: int, heads: int, dim: int) -> Layout:
    return Layout((tokens, heads * dim), (tokens, heads, dim), ("token", "head", "dim"))


def score_layout(*shape: int) -> Layout:
    return Layout(shape, shape, ("head", "token", "position"))


def pair_of(a: Floats | None, b: Floats | None, layout: Layout, key: StageKey = KEY) -> TensorPair:
    planes = [
        None if x is None else MemoryPlane(np.asarray(x, np.float32).reshape(-1), layout)
        for x in (a, b)
    ]
    return TensorPair(key, *planes)


def draw(shape: tuple[int, ...], seed: int, *, bad: int = 0) -> Floats:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(shape).astype(np.float32)
    places = generator.integers(0, max(1, x.size), bad if x.size else 0)
    x.reshape(-1)[places] = generator.choice(SPECIAL, places.size)
    return x


def shown(kind: MapKind, a: Floats, b: Floats) -> Floats:
    """What a map of whole arrays shows, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(all="ignore"):
        match kind:
            case MapKind.TRACE:
                return a
            case MapKind.ORACLE:
                return b
            case MapKind.DIFF:
                return np.abs(a - b)
            case MapKind.RATIO:
                return np.where(a == b, np.where(np.isfinite(a), 0, np.nan), abs(a - b) / abs(b))


def check_grid(grid: Grid, whole: Floats) -> None:
    """Every cell against its window of the whole matrix."""
    for row, column in np.ndindex(grid.values.shape):
        top = grid.top + row * grid.cell_rows
        left = grid.left + column * grid.cell_columns
        window = whole[top : top + grid.cell_rows, left : left + grid.cell_columns]
        assert window.size
        finite = np.isfinite(window)
        assert grid.nonfinite[row, column] == window.size - finite.sum()
        expected = window[finite][np.abs(window[finite]).argmax()] if finite.any() else 0.0
        value = float(grid.values[row, column])
        assert abs(value) == pytest.approx(abs(expected), rel=1e-6)
        if np.count_nonzero(np.abs(window[finite]) == abs(expected)) == 1:
            assert value == pytest.approx(expected, rel=1e-6)


class TestMaps:
    @settings(deadline=None, max_examples=150)
    @given(
        height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 9),
        bad=st.integers(0, 30), kind=st.sampled_from(MapKind),
        top=st.integers(0, 39), left=st.integers(0, 39), cell_rows=st.integers(1, 45),
        cell_columns=st.integers(1, 45), rows=st.integers(1, 9), columns=st.integers(1, 9),
    )  # fmt: skip
    def test_a_cell_is_the_largest_of_its_window(
        self, height: int, width: int, seed: int, bad: int, kind: MapKind, top: int, left: int,
        cell_rows: int, cell_columns: int, rows: int, columns: int,
    ) -> None:  # fmt: skip
        a, b = draw((height, width), seed, bad=bad), draw((height, width), seed + 100, bad=bad // 2)
        b[0, 0] = 0  # a ratio that is infinite, or not even that
        heat_map = HeatMap(pair_of(a, b, matrix_layout(height, width)), kind)
        grid = heat_map.grid(top, left, cell_rows, cell_columns, rows, columns)
        whole = shown(kind, a, b)
        assert (grid.top, grid.left) == (min(top, height - 1), min(left, width - 1))
        assert (grid.cell_rows, grid.cell_columns) == (cell_rows, cell_columns)
        assert grid.values.shape == (
            min(rows, -(-(height - grid.top) // cell_rows)),
            min(columns, -(-(width - grid.left) // cell_columns)),
        )
        check_grid(grid, whole)
        nan = {MapKind.TRACE: np.isnan(a), MapKind.ORACLE: np.isnan(b)}.get(
            kind, np.isnan(a) | np.isnan(b)
        )
        for cell in np.ndindex(grid.values.shape):
            rows_of, columns_of = (
                slice(at + i * size, at + (i + 1) * size)
                for at, i, size in zip((grid.top, grid.left), cell, (cell_rows, cell_columns))
            )
            assert grid.nan[cell] == nan[rows_of, columns_of].sum()
        finite = np.abs(whole[np.isfinite(whole)])
        assert grid.largest == pytest.approx(finite.max(initial=0), rel=1e-6)

    @pytest.fixture(scope="class", params=[(3100, 771), (9, 300_001), (1, 2_200_000), (270_003, 8)],
                    ids=lambda shape: f"{shape[0]}x{shape[1]}")  # fmt: skip
    def large(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
        """Both sides of a tensor too large to be kept whole, in files, and as arrays."""
        shape = request.param
        assert math.prod(shape) > DIRECT_VALUES
        a, b = draw(shape, 1, bad=500), draw(shape, 2, bad=300)
        folder = tmp_path_factory.mktemp("large")
        planes = []
        for name, x in (("a", a), ("b", b)):
            write_stage_file(folder / name, KEY.layer, x)
            planes.append(FilePlane(folder / name, None, matrix_layout(*shape), HEADER.size))
        pair = TensorPair(KEY, *planes)
        kinds = (MapKind.DIFF, MapKind.ORACLE)
        flat = views(matrix_layout(*shape))[-1]
        return {kind: (HeatMap(pair, kind, flat), shown(kind, a, b)) for kind in kinds}

    @settings(deadline=None, max_examples=60)
    @given(data=st.data())
    def test_so_it_is_of_a_large_tensor_in_files(self, large: Any, data: st.DataObject) -> None:
        heat_map, whole = large[data.draw(st.sampled_from(sorted(large, key=str)))]
        height, width = whole.shape
        zoom = st.sampled_from([1, 2, 3, 5, 8, 16, 33, 64, 100, 400, 3000])
        wanted = [
            data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1)),
            data.draw(zoom), data.draw(zoom),
            data.draw(st.sampled_from([1, 7, 60])), data.draw(st.sampled_from([1, 7, 60])),
        ]  # fmt: skip
        grid = heat_map.grid(*wanted)
        check_grid(grid, whole)
        top, left, cell_rows, cell_columns, _, _ = wanted
        # Nothing that was asked for is lost, and little else comes with it.
        assert top - 64 < grid.top <= top and left - 64 < grid.left <= left
        assert cell_rows <= grid.cell_rows < cell_rows + 64
        assert cell_columns <= grid.cell_columns < cell_columns + 64

    def test_panning_at_a_coarse_zoom_stays_on_the_cells(self, large: Any) -> None:
        heat_map, _ = large[MapKind.DIFF]
        first = heat_map.overview(40, 60)
        down, right = (min(2, count - 1) for count in first.values.shape)
        top, left = down * first.cell_rows, right * first.cell_columns
        again = heat_map.grid(top, left, first.cell_rows, first.cell_columns, 99, 99)
        assert (again.top, again.left) == (top, left)
        assert (again.cell_rows, again.cell_columns) == (first.cell_rows, first.cell_columns)
        np.testing.assert_array_equal(again.values, first.values[down:, right:])

    def test_the_overview_fits_and_covers_everything(self, large: Any) -> None:
        heat_map, whole = large[MapKind.ORACLE]
        grid = heat_map.overview(40, 60)
        rows, columns = grid.values.shape
        assert rows <= 40 and columns <= 60
        assert rows * grid.cell_rows >= whole.shape[0]
        assert columns * grid.cell_columns >= whole.shape[1]
        assert grid.nonfinite.sum() == np.count_nonzero(~np.isfinite(whole)) > 0
        assert grid.nan.sum() == np.count_nonzero(np.isnan(whole)) > 0
        assert np.abs(grid.values).max() == grid.largest

    def test_a_peak_is_where_the_cell_says(self, large: Any) -> None:
        heat_map, whole = large[MapKind.DIFF]
        grid = heat_map.grid(0, 0, 3, 70, 5, 5)
        for row, column in np.ndindex(grid.values.shape):
            top, left = row * grid.cell_rows, column * grid.cell_columns
            found = heat_map.peak(top, left, grid.cell_rows, grid.cell_columns)
            at = found.position["token"], found.position["dim"]
            assert found.index == at[0] * whole.shape[1] + at[1]
            assert top <= at[0] < top + grid.cell_rows
            assert left <= at[1] < left + grid.cell_columns
            if grid.nonfinite[row, column]:
                assert not math.isfinite(whole[at])
            else:
                assert abs(found.trace - found.oracle) == pytest.approx(grid.values[row, column])

    def test_overflow_is_large_and_not_infinite(self) -> None:
        a, b = np.array([[3e38, 1.0, 1.0]]), np.array([[-3e38, 1e-45, 0.0]])
        pair = pair_of(a, b, matrix_layout(1, 3))
        diff, ratio = (HeatMap(pair, kind).overview(9, 9) for kind in (MapKind.DIFF, MapKind.RATIO))
        assert diff.values.tolist() == [[LARGEST, 1.0, 1.0]]
        assert ratio.values[0].tolist() == [2.0, LARGEST, 0.0]
        assert diff.nonfinite.tolist() == [[0, 0, 0]]
        assert ratio.nonfinite.tolist() == [[0, 0, 1]]
        assert ratio.nan.tolist() == [[0, 0, 0]]

    @pytest.mark.parametrize("kind", [MapKind.DIFF, MapKind.RATIO])
    def test_the_difference_of_infinities_is_not_called_nan(self, kind: MapKind) -> None:
        a = np.array([[math.inf, math.inf, math.nan, 1.0]])
        b = np.array([[math.inf, -math.inf, math.inf, math.inf]])
        grid = HeatMap(pair_of(a, b, matrix_layout(1, 4)), kind).overview(1, 4)
        assert grid.nonfinite.tolist() == [[1, 1, 1, 1]]
        assert grid.nan.tolist() == [[0, 0, 1, 0]]

    def test_levels_of_a_map(self) -> None:
        x = np.array([[0.0, 1e-9, 1e-8, 1.1e-8, 0.5, 1.0, -1.0, -1e-4, math.nan, -math.inf]])
        grid = HeatMap(pair_of(x, None, matrix_layout(1, 10)), MapKind.TRACE).overview(1, 10)
        assert levels_of(grid, 1.0, 8, 20).tolist() == [[0, 1, 1, 1, 20, 20, -20, -10, 21, 22]]
        assert levels_of(grid, 0.01, 8, 20)[0, 4:7].tolist() == [20, 20, -20]
        assert levels_of(grid, 0.0, 8, 20).tolist() == [[0] * 8 + [21, 22]]

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
    def test_an_empty_tensor_has_an_empty_map(self, shape: tuple[int, int]) -> None:
        pair = pair_of(np.zeros(shape), np.zeros(shape), matrix_layout(*shape))
        for grid in (HeatMap(pair).overview(5, 5), HeatMap(pair).grid(2, 2, 3, 3, 5, 5)):
            assert grid.values.size == 0 and grid.largest == 0

    @pytest.mark.parametrize("layout", [matrix_layout(64, 64 * 1024), head_layout(64, 64, 1024)],
                             ids=["levels", "reduced"])  # fmt: skip
    def test_it_is_given_up_when_nobody_waits(self, layout: Layout) -> None:
        x = np.zeros(math.prod(layout.shape), np.float32)
        asked = []

        def is_cancelled() -> bool:
            asked.append(True)
            return len(asked) > 2

        with pytest.raises(Cancelled):
            HeatMap(pair_of(x, x, layout), MapKind.DIFF, views(layout)[-1], is_cancelled)
        assert len(asked) < 8


class TestViews:
    def test_each_head_is_a_part_of_all_of_them(self) -> None:
        layout = score_layout(3, 4, 5)
        a, b = draw((3, 4, 5), 1), draw((3, 4, 5), 2)
        pair = pair_of(a, b, layout)
        everything, by_token, *heads = views(layout)
        assert [view.name for view in heads] == ["head 0", "head 1", "head 2"]
        stacked = HeatMap(pair, MapKind.DIFF, everything).overview(99, 99).values
        assert stacked.shape == (12, 5)
        for number, view in enumerate(heads):
            heat_map = HeatMap(pair, MapKind.DIFF, view)
            np.testing.assert_array_equal(heat_map.overview(99, 99).values,
                                          stacked[4 * number : 4 * number + 4])  # fmt: skip
            assert heat_map.largest == pytest.approx(np.abs(a - b)[number].max())
            assert heat_map.value(3, 2).position == {"head": number, "token": 3, "position": 2}
        largest = HeatMap(pair, MapKind.DIFF, by_token)
        np.testing.assert_array_equal(largest.overview(99, 99).values, np.abs(a - b).max(axis=2))
        found = largest.value(2, 1)
        assert found.position == {"head": 2, "token": 1,
                                  "position": int(np.abs(a - b)[2, 1].argmax())}  # fmt: skip

    def test_heads_by_tokens_of_queries(self) -> None:
        layout = head_layout(5, 3, 4)
        a, b = draw((5, 3, 4), 1, bad=5), draw((5, 3, 4), 2)
        heat_map = HeatMap(pair_of(a, b, layout), MapKind.TRACE, views(layout)[1])
        grid = heat_map.overview(99, 99)
        assert (grid.rows, grid.columns) == ("head", "token")
        check_grid_of_runs = np.abs(np.where(np.isfinite(a), a, 0)).max(axis=2).T
        np.testing.assert_array_equal(np.abs(grid.values), check_grid_of_runs)
        np.testing.assert_array_equal(grid.nonfinite, (~np.isfinite(a)).sum(axis=2).T)
        for head, token in np.ndindex(3, 5):
            found = heat_map.value(head, token)
            assert (found.position["head"], found.position["token"]) == (head, token)
            assert found.trace is not None and found.oracle is not None
            if grid.nonfinite[head, token]:
                assert not math.isfinite(found.trace)
            else:
                assert found.trace == grid.values[head, token]
            assert found.oracle == b[token, head, found.position["dim"]]

    @pytest.mark.parametrize(
        "layout", [Layout((9,), (9,), ("token id",)), Layout((9,), (9,), ("index",))]
    )
    def test_a_vector_is_one_row(self, layout: Layout) -> None:
        (view,) = views(layout)
        assert (view.num_rows, view.num_columns, view.columns) == (1, 9, layout.axes[0])

    @pytest.mark.parametrize(
        ("count", "fold"), [(64, 8), (65, 16), (2048, 64), (50257, 256), (152064, 512)]
    )
    def test_a_long_vector_is_folded(self, count: int, fold: int) -> None:
        x = draw((count,), 3, bad=2)
        pair = pair_of(x, x * 2, Layout((count,), (count,), ("token id",)))
        heat_map = HeatMap(pair, MapKind.TRACE)
        assert heat_map.view.fold == fold
        assert heat_map.shape == (-(-count // fold), fold)
        assert fold / 4 < heat_map.shape[0] <= fold
        grid = heat_map.overview(99_999, 99_999)
        bad = ~np.isfinite(x)
        assert grid.values.reshape(-1)[:count].tolist() == np.where(bad, 0, x).tolist()
        assert not grid.values.reshape(-1)[count:].any()
        assert grid.nonfinite.sum() == bad.sum()
        for index in (0, fold - 1, fold, count // 2, count - 1):
            found = heat_map.value(*divmod(index, fold))
            assert (found.index, found.position) == (index, {"token id": index})
        assert heat_map.value(heat_map.shape[0] - 1, fold - 1).index == count - 1
        flat = HeatMap(pair, MapKind.TRACE, views(pair.both()[0].layout)[1])
        assert flat.shape == (1, count)
        assert flat.largest == heat_map.largest

    def test_a_very_long_vector_in_a_file_is_folded(self, tmp_path: Path) -> None:
        count = 3 * 8192**2 // 16 + 5
        layout = Layout((count,), (count,), ("index",))
        x = draw((count,), 4)
        write_stage_file(tmp_path / "x", KEY.layer, x)
        plane = FilePlane(tmp_path / "x", None, layout, HEADER.size)
        heat_map = HeatMap(TensorPair(KEY, plane, None), MapKind.TRACE)
        rows, columns = heat_map.shape
        assert rows * columns > DIRECT_VALUES
        whole = np.zeros((rows, columns), np.float32)
        whole.reshape(-1)[:count] = x
        for grid in (heat_map.overview(40, 60), heat_map.grid(rows - 9, columns - 9, 1, 1, 9, 9),
                     heat_map.grid(5, 7, 3, 2, 30, 50)):  # fmt: skip
            check_grid(grid, whole)

    def test_sides_of_different_sizes_are_shown_apart(self) -> None:
        small, large = matrix_layout(2, 3), matrix_layout(4, 3)
        pair = TensorPair(KEY, MemoryPlane(np.ones(6, np.float32), small),
                          MemoryPlane(np.full(12, -2, np.float32), large))  # fmt: skip
        assert not pair.comparable
        assert map_kinds(pair) == (MapKind.TRACE, MapKind.ORACLE)
        assert HeatMap(pair, MapKind.TRACE).shape == (2, 3)
        oracle = HeatMap(pair, MapKind.ORACLE)
        assert oracle.shape == (4, 3)
        found = oracle.value(3, 2)
        assert (found.trace, found.oracle) == (None, -2)
        with pytest.raises(ValueError, match="no two sides"):
            HeatMap(pair, MapKind.DIFF)
        with pytest.raises(ValueError, match="no two sides"):
            token_figures(pair)
        counted = histogram(pair)
        assert counted.diff is None
        assert counted.trace is not None and counted.oracle is not None
        assert (counted.trace.sum(), counted.oracle.sum()) == (6, 12)
        window = values(pair, 4, 100)
        assert window.trace is not None and window.oracle is not None
        assert (window.trace.size, window.oracle.size, window.total) == (2, 8, 12)

    def test_one_side_alone(self) -> None:
        pair = pair_of(draw((2, 3), 1), None, matrix_layout(2, 3))
        assert map_kinds(pair) == (MapKind.TRACE,)
        with pytest.raises(ValueError, match="has no oracle"):
            HeatMap(pair, MapKind.ORACLE)
        assert histogram(pair).oracle is None
        assert values(pair, 0, 5).oracle is None


class TestFiles:
    @settings(deadline=None, max_examples=60)
    @given(data=st.data())
    def test_windows_of_a_file_are_those_of_the_tensor(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        shape = data.draw(st.sampled_from([(3, 7, 7), (2, 300, 300), (2, 5, 9)]))
        layout = score_layout(*shape)
        dumped = draw(shape, 3, bad=20)
        path = tmp_path_factory.mktemp("scores") / "s.bin"
        write_stage_file(path, SCORES.layer, dumped)
        plane = FilePlane(path, Scores(1.0), layout, HEADER.size)
        whole = zero_masked(Scores(1.0), dumped.reshape(-1), layout).reshape(plane.shape)
        assert np.count_nonzero(whole) < np.count_nonzero(dumped)
        rows, columns = plane.shape
        top, bottom = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
        left, right = sorted(data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns))))
        np.testing.assert_array_equal(
            plane.read(top, bottom, left, right), whole[top:bottom, left:right]
        )
        start, stop = sorted(
            data.draw(st.tuples(st.integers(0, whole.size), st.integers(0, whole.size)))
        )
        np.testing.assert_array_equal(plane.read_flat(start, stop), whole.reshape(-1)[start:stop])

    def test_another_size_than_the_run_saw_is_an_error(self, tmp_path: Path) -> None:
        write_stage_file(tmp_path / "x", 1, np.zeros(7, np.float32))
        with pytest.raises(TraceError, match="changed since the run"):
            FilePlane(tmp_path / "x", None, matrix_layout(2, 4), HEADER.size)

    def test_a_file_that_is_gone_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(AprError, match="no such file"):
            FilePlane(tmp_path / "x", None, matrix_layout(2, 4), HEADER.size)

    def test_so_is_one_that_shrinks_while_it_is_open(self, tmp_path: Path) -> None:
        write_stage_file(tmp_path / "x", 1, np.ones(8, np.float32))
        plane = FilePlane(tmp_path / "x", None, matrix_layout(2, 4), HEADER.size)
        heat_map = HeatMap(TensorPair(KEY, plane, None), MapKind.TRACE)
        with (tmp_path / "x").open("r+b") as file:
            file.truncate(20)
        with pytest.raises(TruncatedError):
            heat_map.value(1, 3)


class TestTokens:
    @pytest.mark.parametrize("bad", [0, 4])
    @pytest.mark.parametrize("layout", [head_layout(5, 3, 4), score_layout(3, 5, 5)],
                             ids=["queries", "scores"])  # fmt: skip
    def test_each_head_of_each_token_is_compared_on_its_own(self, layout: Layout, bad: int) -> None:
        a, b = draw(layout.factors, 1, bad=bad), draw(layout.factors, 2, bad=bad)
        a[0, 0], b[0, 0] = 0, 0
        b[1, 1] = 0
        a[2, 2] = 0
        found = token_figures(pair_of(a, b, layout))
        assert found.heads
        assert found.cosine.shape == (5, 3)
        by_token = layout.axes[0] == "token"
        for token, head in np.ndindex(5, 3):
            at = (token, head) if by_token else (head, token)
            expected = compare(a[at], b[at])
            assert found.relative_l2[token, head] == pytest.approx(expected.relative_l2)
            assert found.cosine[token, head] == pytest.approx(expected.cosine)
            assert found.max_abs_diff[token, head] == pytest.approx(expected.max_abs_diff)
            left_out = a[at].size - expected.finite_count
            assert found.nonfinite[token, head] == left_out
        assert found.nonfinite.sum() > 0 or not bad

    @pytest.mark.parametrize("layout", [head_layout(5, 3, 4), score_layout(3, 5, 5),
                                        matrix_layout(5, 60)])  # fmt: skip
    def test_heads_together_are_the_token(self, layout: Layout) -> None:
        a, b = draw(layout.factors, 1, bad=3), draw(layout.factors, 2)
        found = token_figures(pair_of(a, b, layout), by_head=False)
        assert not found.heads
        for token in range(5):
            rows = [x[:, token] if layout.axes[0] == "head" else x[token] for x in (a, b)]
            expected = compare(*rows)
            assert found.relative_l2[token] == pytest.approx(expected.relative_l2)
            assert found.cosine[token] == pytest.approx(expected.cosine)
            assert found.max_abs_diff[token] == pytest.approx(expected.max_abs_diff)

    def test_a_long_row_is_streamed(self) -> None:
        layout = Layout((PIECE_VALUES + 7,), (PIECE_VALUES + 7,), ("token id",))
        a, b = draw(layout.shape, 1), draw(layout.shape, 2)
        found = token_figures(pair_of(a, b, layout))
        assert found.relative_l2.tolist() == pytest.approx([compare(a, b).relative_l2])
        with pytest.raises(Cancelled):
            token_figures(pair_of(a, b, layout), lambda: True)


class TestHistogram:
    @settings(deadline=None, max_examples=60)
    @given(
        size=st.integers(0, 300), seed=st.integers(0, 50), bad=st.integers(0, 5),
        bins=st.integers(1, 80), spread=st.sampled_from([0.0, 1.0, 20.0]),
    )  # fmt: skip
    def test_it_counts_what_numpy_counts(
        self, size: int, seed: int, bad: int, bins: int, spread: float
    ) -> None:
        layout = Layout((size,), (size,), ("index",))
        factor = np.exp(spread * np.random.default_rng(seed).standard_normal(size))
        a, b = ((draw((size,), seed + n, bad=bad) * factor).astype(np.float32) for n in (0, 100))
        a[: size // 5] = b[: size // 4] = 0
        a[:1], b[-1:] = 1e-44, -3e38
        found = histogram(pair_of(a, b, layout), bins)
        assert 1 <= found.edges.size - 1 <= bins
        assert (np.diff(found.edges) > 0).all()
        both = np.isfinite(a) & np.isfinite(b)
        with np.errstate(over="ignore", invalid="ignore"):
            diff = np.clip((a - b)[both], -LARGEST, LARGEST)
        sides = (a, found.trace), (b, found.oracle), (diff, found.diff)
        for number, (x, counts) in enumerate(sides):
            sizes = np.abs(x[np.isfinite(x)].astype(np.float64))
            assert counts is not None
            assert found.zeros[number] == np.count_nonzero(sizes == 0)
            assert counts.sum() == np.count_nonzero(sizes)
            places = np.searchsorted(found.edges, sizes[sizes > 0], side="right") - 1
            np.testing.assert_array_equal(counts, np.bincount(places, minlength=counts.size))
        for number, x in enumerate((a, b)):
            finite = x[np.isfinite(x)].astype(np.float64)
            assert found.nonfinite[number] == x.size - finite.size
            bound = found.outlier_bound[number]
            assert found.outliers[number] == np.count_nonzero(np.abs(finite) >= bound)
            rms = math.sqrt(np.mean(finite**2)) if finite.size else 0.0
            assert min(OUTLIER_RMS * rms, 2.0**128) <= bound * (1 + 1e-6)

    def test_the_bins_are_nearly_even_powers(self) -> None:
        x = np.exp(draw((4000,), 1) * 3)
        found = histogram(pair_of(x, None, Layout((4000,), (4000,), ("index",))))
        assert found.edges.size == 61
        ratios = np.diff(np.log2(found.edges))
        assert ratios.max() - ratios.min() < 4 / 128  # each edge is rounded to 1/128 of itself

    def test_outliers_stand_out(self) -> None:
        x = np.append(draw((100_000,), 1), np.float32(-40.0))
        found = histogram(pair_of(x, x, Layout(x.shape, x.shape, ("index",))))
        assert found.outliers == (1, 1)
        assert found.zeros == (0, 0, x.size)

    def test_it_is_given_up_when_nobody_waits(self) -> None:
        x = np.zeros(5, np.float32)
        with pytest.raises(Cancelled):
            histogram(pair_of(x, x, Layout((5,), (5,), ("index",))), 9, lambda: True)


def test_a_window_of_values() -> None:
    a, b = draw((3, 4), 1), draw((3, 4), 2)
    window = values(pair_of(a, b, matrix_layout(3, 4)), 5, 3)
    np.testing.assert_array_equal(window.trace, a.reshape(-1)[5:8])
    np.testing.assert_array_equal(window.oracle, b.reshape(-1)[5:8])
    assert values(pair_of(a, b, matrix_layout(3, 4)), 50, 3).trace.size == 0


def test_views_cover_the_tensor() -> None:
    for layout in (matrix_layout(3, 4), head_layout(3, 4, 5), score_layout(3, 4, 5)):
        view = views(layout)[0]
        assert isinstance(view, MapView)
        assert view.num_rows * view.num_columns == math.prod(layout.shape)
