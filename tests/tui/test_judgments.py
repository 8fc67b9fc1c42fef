"""Pictures of the three judgments and of the Why tab, looked at before they were accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from demo_runs import ODD_STAGE, fused_run, kernel_run, model_run, odd_run
from driving import settle, then_press

from aprcore.network.stages import StageKey
from aprcore.runs.budget import Budget, Budgets
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp

Compare = Callable[..., bool]
SIZES = {"40x10": (40, 10), "80x24": (80, 24), "120x40": (120, 40), "200x60": (200, 60)}
WIDE = SIZES["120x40"]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
class TestSizes:
    def test_why_model(self, snap_compare: Compare, size: Any) -> None:
        app = ExplorerApp(model_run("rope-pairs"))
        assert snap_compare(app, terminal_size=size, run_before=then_press("w"))

    def test_kernel(self, snap_compare: Compare, size: Any) -> None:
        app = ExplorerApp(kernel_run("kv-tiled"))
        assert snap_compare(app, terminal_size=size, run_before=settle)


class TestWhy:
    def test_kernel(self, snap_compare: Compare) -> None:
        app = ExplorerApp(kernel_run("kv-tiled"))
        assert snap_compare(app, terminal_size=WIDE, run_before=then_press("w"))

    def test_no_color(self, snap_compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        app = ExplorerApp(kernel_run("residual-normed"))
        assert snap_compare(app, terminal_size=WIDE, run_before=then_press("w"))

    def test_noise(self, snap_compare: Compare) -> None:
        app = ExplorerApp(model_run("quantised"))
        run_before = then_press("w", at=StageKey(0, "qkv_matmul"))
        assert snap_compare(app, terminal_size=WIDE, run_before=run_before)

    @pytest.mark.parametrize("size", [(80, 24), WIDE], ids=["80x24", "120x40"])
    def test_inherited(self, snap_compare: Compare, size: Any) -> None:
        app = ExplorerApp(model_run("rope-pairs"))
        run_before = then_press("w", at=StageKey(3, "attn_norm"))
        assert snap_compare(app, terminal_size=size, run_before=run_before)

    def test_inherited_from_rounding(self, snap_compare: Compare) -> None:
        app = ExplorerApp(model_run("quantised"))
        assert snap_compare(
            app, terminal_size=WIDE, run_before=then_press("w", at=StageKey(None, "lm_head"))
        )

    @pytest.mark.parametrize("size", [(80, 24), WIDE], ids=["80x24", "120x40"])
    def test_symptom_without_a_cause(self, snap_compare: Compare, size: Any) -> None:
        app = ExplorerApp(odd_run())
        assert snap_compare(app, terminal_size=size, run_before=then_press("w", at=ODD_STAGE))

    def test_within_a_budget(self, snap_compare: Compare) -> None:
        budgets = Budgets((Budget(("ffn_silu",), None, 2.0),))
        app = ExplorerApp(replace(odd_run(), budgets=budgets))
        assert snap_compare(app, terminal_size=WIDE, run_before=then_press("w", at=ODD_STAGE))

    def test_beyond_a_budget(self, snap_compare: Compare) -> None:
        budgets = Budgets((Budget(("qkv_matmul",), 0, 1e-3),))
        app = ExplorerApp(replace(model_run("quantised"), budgets=budgets, strict=True))
        assert snap_compare(app, terminal_size=WIDE, run_before=then_press("w"))

    def test_every_fault_of_the_run(self, snap_compare: Compare) -> None:
        app = ExplorerApp(model_run("rope-pairs"))
        assert snap_compare(app, terminal_size=WIDE, run_before=then_press("home", "w"))

    def test_two_dumps(self, snap_compare: Compare, failing_request: Request) -> None:
        run_before = then_press("w", at=StageKey(2, "ffn_up"))
        app = ExplorerApp(failing_request)
        assert snap_compare(app, terminal_size=(100, 30), run_before=run_before)

    @pytest.mark.parametrize(
        "key",
        [
            StageKey(0, "ffn_up"),  # SHAPE
            StageKey(0, "q_post_rope"),  # LAYOUT
            StageKey(1, "attn_norm"),  # NONFINITE
            StageKey(1, "ffn_out"),  # MISSING
        ],
        ids=["shape", "layout", "nonfinite", "missing"],
    )
    def test_findings(self, snap_compare: Compare, mixed_request: Request, key: StageKey) -> None:
        app = ExplorerApp(mixed_request)
        assert snap_compare(app, terminal_size=(100, 30), run_before=then_press("w", at=key))


class TestTree:
    @pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
    def test_model_figures(self, snap_compare: Compare, size: Any) -> None:
        app = ExplorerApp(model_run("rope-pairs"))
        assert snap_compare(app, terminal_size=size, run_before=then_press("t"))

    @pytest.mark.parametrize("size", [(80, 24), WIDE], ids=["80x24", "120x40"])
    def test_sorted_by_kernel_error(self, snap_compare: Compare, size: Any) -> None:
        app = ExplorerApp(kernel_run("kv-tiled"))
        assert snap_compare(app, terminal_size=size, run_before=then_press(*"ssss"))


class TestWithoutAnOracle:
    @pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
    def test_kernel_alone(self, snap_compare: Compare, size: Any) -> None:
        app = ExplorerApp(kernel_run("kv-tiled", oracle=False))
        assert snap_compare(app, terminal_size=size, run_before=settle)

    @pytest.mark.parametrize("size", [(80, 24), WIDE], ids=["80x24", "120x40"])
    def test_judged_over_a_span(self, snap_compare: Compare, size: Any) -> None:
        app = ExplorerApp(fused_run())
        assert snap_compare(
            app, terminal_size=size, run_before=then_press(at=StageKey(1, "attention"))
        )
