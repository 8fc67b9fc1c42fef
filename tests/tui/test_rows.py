"""Rows, filters, and how figures and verdicts are written."""

from __future__ import annotations

import ast
import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
from demo_runs import model_run
from driving import finish
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import aprtui
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.records.report import RunHeader, StageReport
from aprcore.records.telling import (
    SEVERITY,
    figures_of,
    format_cosine,
    format_ratio,
    format_value,
    quoted,
)
from aprcore.runs.bisect import bisect
from aprcore.runs.request import Request
from aprtui.formatting import format_short
from aprtui.rows import RUN_ROW, Filter, Row, SortOrder, arrange, matching_keys, summarise_layer
from aprtui.run_state import RunState
from aprtui.stage_table import PATH_WIDTH, StageTable
from aprtui.theme import COSINE_INKS, MARKS, VARIABLES, cosine_ink


@pytest.fixture
def state(failing_request: Request) -> RunState:
    return finish(failing_request)


class TestFilter:
    @pytest.mark.parametrize(
        ("text", "key", "accepted"),
        [
            ("layer 3", StageKey(3, "attn_norm"), True),
            ("layer 3", StageKey(30, "attn_norm"), False),
            ("l3 norm", StageKey(3, "attn_norm"), True),
            ("3 norm", StageKey(3, "qkv_bias"), False),
            ("layer 3 · q_post_rope", StageKey(3, "q_post_rope"), True),
            ("layer-3", StageKey(3, "attn_norm"), True),
            ("PENDING rope", StageKey(1, "q_post_rope"), True),
            ("fail", StageKey(1, "q_post_rope"), False),
            ("lm_head", StageKey(None, "lm_head"), True),
            ("", StageKey(None, "lm_head"), True),
        ],
    )
    def test_words(self, text: str, key: StageKey, accepted: bool) -> None:
        assert Filter.parse(text).accepts(key, None) is accepted

    @given(st.text())
    def test_anything_can_be_typed(self, text: str) -> None:
        Filter.parse(text).accepts(StageKey(0, "embedding"), None)


class TestArrange:
    def test_nothing_before_the_run_is_open(self) -> None:
        empty = RunState()
        rows = arrange(empty, expanded=(), filter=Filter(), order=SortOrder.COMPUTATION)
        assert rows == []

    def test_layers_fold_and_the_model_comes_last(self, state: RunState) -> None:
        rows = arrange(state, expanded={1}, filter=Filter(), order=SortOrder.COMPUTATION)
        assert rows[:4] == [RUN_ROW, Row(0), Row(1), Row(key=StageKey(1, "attn_norm"))]
        assert rows[-1] == Row(key=StageKey(None, "lm_head"))
        assert sum(row.key is not None for row in rows) == 17 + 2

    def test_a_filter_unfolds_and_leaves_out(self, state: RunState) -> None:
        rows = arrange(
            state, expanded=(), filter=Filter.parse("rope fail"), order=SortOrder.COMPUTATION
        )
        q1, q2 = StageKey(1, "q_post_rope"), StageKey(2, "q_post_rope")
        assert rows == [RUN_ROW, Row(1), Row(key=q1), Row(2), Row(key=q2)]

    def test_a_layer_says_its_worst(self, state: RunState) -> None:
        assert summarise_layer(state, 0).worst is Verdict.PASS
        summary = summarise_layer(state, 1)
        assert summary.worst is Verdict.FAIL
        assert (summary.done, summary.total) == (17, 17)
        assert summary.lowest is not None
        assert summary.lowest.key == StageKey(1, "q_post_rope")


class TestNotFinite:
    KEY = StageKey(1, "attn_norm")

    @pytest.fixture
    def state(self, mixed_request: Request) -> RunState:
        """A stage whose finite values agree; one of them is infinite."""
        return finish(mixed_request)

    def test_its_figures_are_nan(self, state: RunState) -> None:
        found = state.reports[self.KEY].comparison
        assert found is not None and found.cosine > 0.999
        assert all(math.isnan(figure) for figure in figures_of(found))

    @pytest.mark.parametrize("order", [SortOrder.COSINE, SortOrder.RELATIVE_L2])
    def test_it_fares_worst(self, state: RunState, order: SortOrder) -> None:
        assert matching_keys(state, Filter(), order)[0] == self.KEY
        lowest = summarise_layer(state, 1).lowest
        assert lowest is not None and lowest.key == self.KEY


class TestPrintedTable:
    @staticmethod
    def lines(request: Request) -> tuple[str, dict[str, str]]:
        """The headings, and the line of every stage."""
        out = io.StringIO()
        table = StageTable(Console(file=out, width=200))
        for event in bisect(request):
            if isinstance(event, RunHeader):
                table.open(event)
            elif isinstance(event, StageReport):
                table.add(event)
        headings, *rows = out.getvalue().partition("\n\n")[2].splitlines()
        return headings, {row.split()[0]: row for row in rows}

    def test_not_finite(self, mixed_request: Request) -> None:
        headings, rows = self.lines(mixed_request)
        row = rows["layer-1/attn_norm"]
        assert row.split()[2:4] == ["nan", "nan"]
        assert row.index("∞") == headings.index("verdict")

    def test_judgments(self) -> None:
        headings, rows = self.lines(model_run("rope-pairs"))
        assert headings.endswith("  model L2/bound  kernel L2/bound  verdict")
        judged = [row for row in rows.values() if "/" in row[PATH_WIDTH:]]
        assert any("✗" in row[: headings.index("verdict")] for row in judged)
        for row in judged:
            assert row[headings.index("kernel") - 2 :].startswith((" ✓", " ✗", "  "))
            assert row[headings.index("verdict") - 3 :][1:3] == "  "


class TestLooks:
    def test_every_verdict_has_a_mark_of_its_own(self) -> None:
        words = {verdict.value for verdict in Verdict}
        assert set(MARKS) == words == set(SEVERITY)
        assert len({mark.glyph for mark in MARKS.values()}) == len(words)
        assert all(mark.ink in VARIABLES for mark in MARKS.values())

    def test_cosine_inks_are_in_order(self) -> None:
        assert [cosine_ink(c) for c in (1, 0.9995, 0.99, 0.5, -1, math.nan)] == [
            *(ink for _, ink in COSINE_INKS),
            *["verdict-fail"] * 3,
        ]

    def test_figures(self) -> None:
        assert format_cosine(0.8312) == "0.8312000"
        assert format_ratio(3.21e-7) == "3.2e-07"
        assert [format_value(x) for x in (0.0, math.nan, -math.inf)] == ["0", "NaN", "-Inf"]

    @given(st.floats())
    def test_short_figures_are_short(self, x: float) -> None:
        # Three-digit exponents are beyond float32.
        assert len(format_short(x)) <= 10

    @given(st.text())
    def test_quoted_text_is_one_printable_line(self, text: str) -> None:
        assert quoted(text).isprintable()


class TestImports:
    @pytest.mark.parametrize("module", ["aprtui.app", "aprtui.screens.explorer"])
    def test_nothing_heavy_is_loaded(self, module: str) -> None:
        code = f"import sys, {module}; print(sorted(m for m in sys.modules if '.' not in m))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        loaded = set(ast.literal_eval(done.stdout))
        assert not loaded & {"torch", "transformers", "pyopencl", "gguf", "tokenizers", "numpy"}

    def test_modules_stay_small(self) -> None:
        own = ("app", "session", "rows", "run_state", "description", "theme")
        root = Path(aprtui.__file__).parent
        files = [root / f"{name}.py" for name in own]
        files += [*(root / "widgets").glob("*.py"), *(root / "screens").glob("*.py")]
        assert all(len(file.read_text("utf-8").splitlines()) < 400 for file in files)
