"""What the screen says of the three judgments, and the keys that go with it."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from demo_runs import ODD_STAGE, fused_run, kernel_run, model_run, odd_run
from driving import come_to_rest, drive, explorer_of, finish, press
from rich.console import Console
from textual.pilot import Pilot

from aprcore.network.stages import StageKey
from aprcore.records.telling import finding_of, format_times
from aprcore.runs.budget import Budget, Budgets
from aprtui.app import ExplorerApp
from aprtui.formatting import format_compact
from aprtui.judgments import judgment_lines
from aprtui.lineage import trace_upstream
from aprtui.measures import Measure
from aprtui.rows import Filter, SortOrder, matching_keys
from aprtui.run_state import RunState
from aprtui.theme import VARIABLES, Paint
from aprtui.why import explain_run, explain_stage
from aprtui.widgets.stage_columns import MARKS_COLUMN, columns_for
from aprtui.widgets.tabs import DetailTab, TabStrip

PAINT = Paint(VARIABLES)


def written(renderable: Any, width: int = 100) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(renderable)
    return " ".join(console.export_text().split())


def why(state: RunState, key: StageKey) -> str:
    return written(explain_stage(state.reports[key], state, PAINT, figures=True))


class TestWhy:
    def test_a_cause_is_named_with_its_proof_and_advice(self) -> None:
        state = finish(kernel_run("kv-tiled"))
        said = why(state, StageKey(2, "attn_scores"))
        assert "kv heads tiled" in said
        assert "when tried: cosine 1.0000000" in said
        assert "look at:" in said
        assert "also tried" in said
        finding = finding_of(state.reports[StageKey(2, "attn_scores")])
        assert finding.startswith("kernel FAIL: kv heads tiled")

    def test_a_symptom_stands_in_for_a_cause(self) -> None:
        said = why(finish(odd_run()), ODD_STAGE)
        assert "causes tried gives this output" in said
        assert "Visible: a factor for each dim" in said

    def test_what_a_budget_accepts_is_told_whatever_its_reason_says(self) -> None:
        budgets = Budgets((Budget(("ffn_silu",), None, 2.0),))
        state = finish(replace(odd_run(), budgets=budgets))
        accepted = replace(state.reports[ODD_STAGE], reason="in other words")
        state.reports[ODD_STAGE] = accepted
        assert why(state, ODD_STAGE).startswith("Accepted: in other words.")
        state.reports[ODD_STAGE] = replace(accepted, accepted=False, reason="within your budget")
        assert why(state, ODD_STAGE).startswith("Not to blame")

    def test_the_fault_is_named_where_its_error_is_inherited(self) -> None:
        state = finish(model_run("rope-pairs"))
        said = why(state, StageKey(None, "lm_head"))
        assert said.startswith("Not to blame")
        assert "Inherited from ✗ layer 2 · qkv_matmul model FAIL: q_proj and k_proj rows" in said
        assert "Also to blame upstream: layer 2 · qkv_bias." in said
        assert "2 stages are to blame" in written(explain_run(state, None, PAINT))
        assert written(explain_run(state, 0, PAINT)) == "Nothing is to blame in layer 0."

    def test_rounding_is_followed_to_where_it_began(self) -> None:
        state = finish(model_run("quantised"))
        lineage = trace_upstream(state, StageKey(3, "attn_norm"))
        assert lineage is not None
        assert lineage.faults == ()
        assert lineage.origin == StageKey(0, "qkv_matmul")
        assert trace_upstream(state, StageKey(0, "qkv_matmul")) is None
        assert "nothing upstream is to blame" in why(state, StageKey(3, "attn_norm"))

    def test_the_way_goes_through_what_was_not_dumped(self) -> None:
        state = finish(kernel_run("kv-tiled"))
        del state.reports[StageKey(2, "attn_out")]
        lineage = trace_upstream(state, StageKey(2, "post_attn_residual"))
        assert lineage is not None
        assert lineage.origin == StageKey(2, "attn_scores")
        assert StageKey(2, "attn_out") in lineage.path


class TestTable:
    @pytest.mark.parametrize("width", [38, 64, 119])
    def test_lines_fit(self, width: int) -> None:
        state = finish(model_run("rope-pairs"))
        assert state.header is not None
        for report in state.reports.values():
            lines = list(judgment_lines(report, state.header, PAINT, width))
            assert all(line.cell_len <= width for line in lines[:4])

    def test_a_span_says_what_to_dump(self) -> None:
        state = finish(fused_run())
        assert state.header is not None
        report = state.reports[StageKey(1, "attention")]
        said = " ".join(line.plain for line in judgment_lines(report, state.header, PAINT, 64))
        assert "judged from" in said
        assert "dump attn_scores, attn_softmax to narrow it" in said
        assert "– model      no oracle" in said

    def test_columns_by_width(self) -> None:
        def names(width: int, shown: Measure = Measure.CUMULATIVE) -> list[str]:
            return [c.heading for c in columns_for(tuple(Measure), shown, width, width >= 46)]

        assert names(39) == ["cosine"]
        assert names(49) == ["cosine", MARKS_COLUMN.heading]
        assert names(63) == ["cosine", "model L2", "kern. L2"]
        assert names(72) == ["cosine", "rel. L2", "model L2", "kern. L2"]
        assert names(63, Measure.MODEL) == ["model L2", "bound", "noise"]

    @pytest.mark.parametrize(
        ("width", "headings"),
        [
            (39, ["rel.L2"]),
            (49, ["rel. L2", MARKS_COLUMN.heading]),
            (63, ["rel. L2", "model L2", "kern. L2"]),
            (72, ["rel. L2", "cosine", "model L2", "kern. L2"]),
        ],
    )
    def test_sorted_by_relative_l2_that_comes_first(self, width: int, headings: list[str]) -> None:
        columns = columns_for(tuple(Measure), Measure.CUMULATIVE, width, width >= 46, True)
        assert [column.heading for column in columns] == headings
        assert all(len(column.heading) <= column.cells for column in columns)

    def test_figures(self) -> None:
        assert [format_compact(x) for x in (1.7e-2, 1.1, 1e-12, 0.0)] == [
            "1.7e-2", "1.1e0", "1e-12", "0",
        ]  # fmt: skip
        assert format_compact(0.26, 5) == "3e-1"
        assert [format_times(x) for x in (0.784, 61.2, 4.1e7)] == ["0.78x", "61x", "4e+07x"]


class TestKeys:
    def test_why_and_back(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            await press(pilot, "w")
            assert screen.tab is DetailTab.WHY
            await press(pilot, "w")
            assert screen.tab is DetailTab.TOP_K
            await press(pilot, "left_square_bracket")
            assert screen.tab is DetailTab.WHY
            await press(pilot, "right_square_bracket")
            assert screen.tab is DetailTab.TOP_K
            at = screen.query_one(TabStrip).render().plain.index("Why")
            await pilot.click(TabStrip, offset=(at, 0))
            await come_to_rest(pilot)
            assert screen.tab is DetailTab.WHY

        drive(ExplorerApp(kernel_run("kv-tiled")), steps)

    def test_on_a_tiny_screen_why_takes_the_place_of_the_tree(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            assert not screen.detail.display
            await press(pilot, "w")
            assert screen.detail.display
            assert not screen.query_one("#stages").display
            await press(pilot, "n")
            assert screen.tree_of_stages.row.key == StageKey(2, "attention")
            await press(pilot, "w")
            assert screen.query_one("#stages").display
            assert screen.focused is screen.tree_of_stages

        drive(ExplorerApp(kernel_run("kv-tiled")), steps, size=(40, 10))

    def test_figures_and_order_go_together(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            tree = explorer_of(pilot).tree_of_stages
            await press(pilot, "t")
            assert (tree.measure, tree.order) == (Measure.MODEL, SortOrder.COMPUTATION)
            await press(pilot, "t", "t", "s")
            assert (tree.measure, tree.order) == (Measure.CUMULATIVE, SortOrder.COSINE)
            await press(pilot, "t", "t")
            assert (tree.measure, tree.order) == (Measure.KERNEL, SortOrder.KERNEL)
            assert tree.rows[1].key == StageKey(2, "attn_scores")
            await press(pilot, "s")
            assert tree.order is SortOrder.COMPUTATION

        drive(ExplorerApp(kernel_run("kv-tiled")), steps)

    def test_failures_come_before_larger_errors(self) -> None:
        state = finish(model_run("rope-pairs"))
        first, second, third, *_ = matching_keys(state, Filter(), SortOrder.MODEL)
        assert [first, second] == [StageKey(2, "qkv_matmul"), StageKey(2, "qkv_bias")]
        assert state.reports[third].model is not None

    def test_without_an_oracle_only_the_kernel_counts(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            assert screen.tree_of_stages.measure is Measure.KERNEL
            await press(pilot, "t", "s")
            assert screen.tree_of_stages.order is SortOrder.KERNEL

        drive(ExplorerApp(kernel_run("kv-tiled", oracle=False)), steps)
