"""Pictures of every screen and state, looked at before they were accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from driving import settle, then_press

from aprcore.ground.errors import FormatError, TraceError
from aprcore.records.report import RunHeader
from aprcore.runs.bisect import bisect
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp

Compare = Callable[..., bool]
SIZES = {"40x10": (40, 10), "80x24": (80, 24), "120x40": (120, 40), "200x60": (200, 60)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
class TestSizes:
    def test_first_divergence(
        self, snap_compare: Compare, failing_request: Request, with_texts: Any, size: Any
    ) -> None:
        app = ExplorerApp(failing_request, with_texts)
        assert snap_compare(app, terminal_size=size, run_before=settle)

    def test_all_pass(
        self, snap_compare: Compare, passing_request: Request, with_texts: Any, size: Any
    ) -> None:
        app = ExplorerApp(passing_request, with_texts)
        assert snap_compare(app, terminal_size=size, run_before=settle)


class TestProgress:
    def test_opening(self, snap_compare: Compare, passing_request: Request, stopping: Any) -> None:
        app = ExplorerApp(passing_request, stopping(0))
        assert snap_compare(app, terminal_size=(100, 24), run_before=settle)

    def test_pending(self, snap_compare: Compare, passing_request: Request, stopping: Any) -> None:
        app = ExplorerApp(passing_request, stopping(1))
        assert snap_compare(app, terminal_size=(100, 30), run_before=settle)

    def test_running(self, snap_compare: Compare, failing_request: Request, stopping: Any) -> None:
        app = ExplorerApp(failing_request, stopping(32))
        assert snap_compare(app, terminal_size=(120, 40), run_before=settle)

    def test_running_narrow(
        self, snap_compare: Compare, passing_request: Request, stopping: Any
    ) -> None:
        app = ExplorerApp(passing_request, stopping(26))
        assert snap_compare(app, terminal_size=(80, 24), run_before=settle)


class TestStates:
    @pytest.mark.parametrize("width", [80, 200])
    def test_no_oracle(self, snap_compare: Compare, lone_request: Request, width: int) -> None:
        app = ExplorerApp(lone_request)
        assert snap_compare(app, terminal_size=(width, 40), run_before=settle)

    @pytest.mark.parametrize("width", [80, 120])
    def test_logits(
        self, snap_compare: Compare, failing_request: Request, with_texts: Any, width: int
    ) -> None:
        app = ExplorerApp(failing_request, with_texts)
        assert snap_compare(app, terminal_size=(width, 30), run_before=then_press("end"))

    def test_token_texts(
        self, snap_compare: Compare, failing_request: Request, with_texts: Any
    ) -> None:
        app = ExplorerApp(failing_request, with_texts)
        assert snap_compare(app, terminal_size=(120, 56), run_before=then_press("end"))

    def test_every_verdict(self, snap_compare: Compare, mixed_request: Request) -> None:
        keys = ["slash", *"layer", "enter"]
        app = ExplorerApp(mixed_request)
        assert snap_compare(app, terminal_size=(120, 66), run_before=then_press(*keys))

    def test_other_size(self, snap_compare: Compare, mixed_request: Request) -> None:
        app = ExplorerApp(mixed_request)
        assert snap_compare(app, terminal_size=(120, 40), run_before=then_press("home", "n"))

    def test_not_finite(self, snap_compare: Compare, mixed_request: Request) -> None:
        app = ExplorerApp(mixed_request)
        assert snap_compare(app, terminal_size=(80, 24), run_before=then_press("n"))

    @pytest.mark.parametrize("width", [80, 120])
    def test_not_finite_is_worst(
        self, snap_compare: Compare, mixed_request: Request, width: int
    ) -> None:
        app = ExplorerApp(mixed_request)
        keys = ["s", "s", "home", "down"]
        assert snap_compare(app, terminal_size=(width, 40), run_before=then_press(*keys))

    def test_detail_on_a_tiny_screen(self, snap_compare: Compare, failing_request: Request) -> None:
        app = ExplorerApp(failing_request)
        assert snap_compare(app, terminal_size=(40, 10), run_before=then_press("enter"))

    def test_filter(self, snap_compare: Compare, failing_request: Request) -> None:
        app = ExplorerApp(failing_request)
        keys = ["slash", *"rope fail"]
        assert snap_compare(app, terminal_size=(120, 30), run_before=then_press(*keys))

    @pytest.mark.parametrize("width", [80, 200])
    def test_sorted(self, snap_compare: Compare, failing_request: Request, width: int) -> None:
        app = ExplorerApp(failing_request)
        assert snap_compare(app, terminal_size=(width, 30), run_before=then_press("s"))

    def test_no_color(
        self, snap_compare: Compare, mixed_request: Request, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        app = ExplorerApp(mixed_request)
        assert snap_compare(app, terminal_size=(120, 40), run_before=settle)


class TestOverlays:
    @pytest.mark.parametrize(
        "size", [(40, 10), (120, 40), (120, 60)], ids=["40x10", "120x40", "120x60"]
    )
    def test_help(self, snap_compare: Compare, failing_request: Request, size: Any) -> None:
        app = ExplorerApp(failing_request)
        run_before = then_press("question_mark")
        assert snap_compare(app, terminal_size=size, run_before=run_before)

    def test_palette(self, snap_compare: Compare, failing_request: Request) -> None:
        run_before = then_press("ctrl+p", *"layer 2 rope")

        app = ExplorerApp(failing_request)
        assert snap_compare(app, terminal_size=(100, 30), run_before=run_before)

    @pytest.mark.parametrize("size", [(40, 10), (80, 24)], ids=["40x10", "80x24"])
    def test_error(self, snap_compare: Compare, size: Any) -> None:
        def failing(request: Request) -> Iterator[Any]:
            raise TraceError(
                "does not exist", where="hf-stages", hint="give a directory of stage files"
            )

        app = ExplorerApp(Request(trace=Path("dump"), oracle=Path("hf-stages")), failing)
        assert snap_compare(app, terminal_size=size, run_before=settle)

    def test_error_in_the_middle(
        self, snap_compare: Compare, passing_request: Request, stopping: Any
    ) -> None:
        def failing(request: Request) -> Iterator[Any]:
            yield from stopping(30)(request)
            raise FormatError(
                "its header promises 224 values", where="hf-stages/layer-1/ffn_up.bin",
                offset_bytes=8, hint="dump it again",
            )  # fmt: skip

        app = ExplorerApp(passing_request, failing)
        assert snap_compare(app, terminal_size=(100, 30), run_before=settle)


class TestHostileText:
    @pytest.fixture
    def hostile(self) -> Any:
        """Names and tokens that look like markup, move the cursor or turn the line around."""
        texts = ("[bold]", "[/INST]", "\x1b[2J", "\u202eabc", "a\nb", "日本", "[@click=app.quit]x")

        def run(request: Request) -> Iterator[Any]:
            for event in bisect(request):
                if isinstance(event, RunHeader):
                    trace = replace(event.trace, path="[red]dump\x1b[31m", label="[/] \x07 v1")
                    event = replace(
                        event, trace=trace, model="[/INST].apr", prompt="[b]hi\r\n",
                        token_texts=texts, notes=("the file [link]x[/link] \x1b]0;t\x07 is odd",),
                    )  # fmt: skip
                yield event

        return run

    @pytest.mark.parametrize("width", [80, 120])
    def test_shown_literally(
        self, snap_compare: Compare, passing_request: Request, hostile: Any, width: int
    ) -> None:
        app = ExplorerApp(passing_request, hostile)
        assert snap_compare(app, terminal_size=(width, 30), run_before=settle)

    def test_in_errors(self, snap_compare: Compare) -> None:
        def failing(request: Request) -> Iterator[Any]:
            raise FormatError(
                "begins with b'[/x]'", where="[bold]\x1b[2J.apr", hint="remove the [/] in it"
            )

        app = ExplorerApp(Request(model=Path("[bold]\x1b[2J.apr")), failing)
        assert snap_compare(app, terminal_size=(80, 24), run_before=settle)

    def test_bug_in_the_engine(self, snap_compare: Compare, passing_request: Request) -> None:
        def failing(request: Request) -> Iterator[Any]:
            raise ZeroDivisionError("float [/division] by zero")

        app = ExplorerApp(passing_request, failing)
        assert snap_compare(app, terminal_size=(80, 24), run_before=settle)
