"""Running again, watching files, comparing with the run before, and handing a run on."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_runs import kernel_run
from driving import come_to_rest, drive, explorer_of, press, settle, until
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, Static

from aprcore.network.stages import StageKey
from aprcore.records.report import CauseSought, RunEvent
from aprcore.records.saved_run import SavedRun, save_run
from aprcore.runs.bisect import bisect, run
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.rows import Row
from aprtui.screen_options import ScreenOptions
from aprtui.screens.changes import ChangesScreen
from aprtui.screens.error import ErrorScreen
from aprtui.screens.export import ExportScreen
from aprtui.watch import Signature, signature_of, wait_for_change
from conftest import FAULT, faulty, rounded, save, sound_tensors

# Between two looks at the files; an engine that dumps pauses for less.
INTERVAL_S = 0.1


def told(pilot: Pilot[Any]) -> str:
    """Every notification so far."""
    return "\n".join(str(note.message) for note in pilot.app._notifications)


def mend(folder: str = "engine-dump") -> None:
    """The engine's author fixes the fault and dumps again."""
    shutil.rmtree(folder)
    save(folder, rounded(sound_tensors()))


class TestAgain:
    def test_files_are_read_again(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            assert explorer.state.exit_code == 1
            mend()
            await press(pilot, "r")
            await settle(pilot)
            assert explorer.state.exit_code == 0
            assert explorer.state.divergences == []
            assert "fixed" in told(pilot)

        drive(ExplorerApp(failing_request), steps)

    def test_the_cursor_stays_where_the_user_took_it(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            explorer.navigation.go_to(StageKey(2, "ffn_out"))
            await press(pilot, "r")
            await settle(pilot)
            assert explorer.tree_of_stages.row == Row(key=StageKey(2, "ffn_out"))

        drive(ExplorerApp(failing_request), steps)

    def test_the_tree_shows_the_new_figures(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            tree = explorer_of(pilot).tree_of_stages

            def line() -> str:
                number = tree.rows.index(Row(key=FAULT))
                return tree.render_line(number - tree.scroll_offset.y).text

            assert "FAIL" in line()
            mend()
            await press(pilot, "r")
            await settle(pilot)
            assert "PASS" in line()

        drive(ExplorerApp(failing_request), steps)

    def test_files_that_cannot_be_used_leave_the_last_run_on_screen(
        self, failing_request: Request
    ) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            (Path("engine-dump") / "lm_head.bin").write_bytes(b"APR")
            await press(pilot, "r")
            await until(pilot, lambda: "lm_head.bin" in told(pilot))
            assert not isinstance(pilot.app.screen, ErrorScreen)
            assert explorer_of(pilot).state.exit_code == 1

        drive(ExplorerApp(failing_request), steps)

    def test_a_run_that_could_not_start_can_be_tried_again(self) -> None:
        request = Request(trace=save("engine-dump", sound_tensors()), oracle=Path("hf-stages"))

        async def steps(pilot: Pilot[Any]) -> None:
            assert isinstance(pilot.app.screen, ErrorScreen)
            save("hf-stages", sound_tensors())
            await press(pilot, "r")
            await settle(pilot)
            assert explorer_of(pilot).state.exit_code == 0

        drive(ExplorerApp(request), steps)


class TestWatching:
    @pytest.fixture(autouse=True)
    def looks(self, monkeypatch: pytest.MonkeyPatch) -> list[Signature]:
        """What the watch has seen, look by look; it looks more often than for a user."""
        seen: list[Signature] = []

        def look(*asked: Any) -> Signature:
            seen.append(signature_of(*asked))
            return seen[-1]

        monkeypatch.setattr("aprtui.watch.signature_of", look)
        often = partial(wait_for_change, interval_s=INTERVAL_S)
        monkeypatch.setattr("aprtui.screens.running.wait_for_change", often)
        return seen

    def test_a_new_dump_is_run_at_once(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            mend()
            await until(pilot, lambda: explorer.state.report and not explorer.state.divergences)
            assert explorer.state.number >= 2

        app = ExplorerApp(failing_request, options=ScreenOptions(watch=True))
        drive(app, steps)

    def test_the_error_goes_when_the_files_can_be_used(self) -> None:
        request = Request(trace=save("engine-dump", sound_tensors()), oracle=Path("hf-stages"))

        async def steps(pilot: Pilot[Any]) -> None:
            assert isinstance(pilot.app.screen, ErrorScreen)
            save("hf-stages", sound_tensors())
            await until(pilot, lambda: explorer_of(pilot).state.report is not None)
            await until(pilot, lambda: not isinstance(pilot.app.screen, ErrorScreen))
            assert explorer_of(pilot).state.exit_code == 0

        drive(ExplorerApp(request, options=ScreenOptions(watch=True)), steps)

    def test_a_run_saved_beside_its_dump_does_not_start_the_next(
        self, failing_request: Request, looks: list[Signature]
    ) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            worker = explorer.running.worker
            assert saved.exists()
            # Two that see the same make the next run; the first of these may have begun before.
            seen = len(looks)
            await until(pilot, lambda: len(looks) >= seen + 4)
            await come_to_rest(pilot)
            assert explorer.running.worker is worker
            assert explorer.state.number == 1

        saved = Path("engine-dump") / "run.aprx"
        drive(ExplorerApp(failing_request, options=ScreenOptions(watch=True, save=saved)), steps)

    def test_a_saved_run_that_is_replaced_is_opened_again(self, failing_request: Request) -> None:
        def write() -> None:
            report = run(failing_request)
            save_run(Path("run.aprx"), report)

        write()

        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            assert explorer.state.exit_code == 1
            mend()
            write()
            await until(pilot, lambda: explorer.state.report and not explorer.state.divergences)

        request = Request(saved=Path("run.aprx"))
        drive(ExplorerApp(request, options=ScreenOptions(watch=True)), steps)

    def test_every_change_is_seen(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            state = explorer_of(pilot).state
            mend()
            await until(pilot, lambda: state.report and not state.divergences)
            shutil.rmtree("engine-dump")
            save("engine-dump", faulty(sound_tensors()))
            await until(pilot, lambda: state.report and state.divergences)

        drive(ExplorerApp(failing_request, options=ScreenOptions(watch=True)), steps)

    def test_without_it_nothing_is_run(
        self, failing_request: Request, looks: list[Signature]
    ) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            worker = explorer.running.worker
            mend()
            await asyncio.sleep(4 * INTERVAL_S)
            await come_to_rest(pilot)
            assert not looks
            assert explorer.running.worker is worker
            assert explorer.state.number == 1

        drive(ExplorerApp(failing_request), steps)


class TestChanges:
    def test_none_before_the_second_run(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "x")
            assert "no run before" in told(pilot)

        drive(ExplorerApp(failing_request), steps)

    def test_fixed_stages_are_listed_and_lead_back(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            mend()
            await press(pilot, "r")
            await settle(pilot)
            await press(pilot, "x")
            assert isinstance(pilot.app.screen, ChangesScreen)
            table = pilot.app.screen.query_one(DataTable)
            assert "fixed" in str(table.get_row_at(0)[0])
            assert str(table.get_row_at(0)[1]) == str(FAULT)
            await press(pilot, "enter")
            assert explorer_of(pilot).tree_of_stages.row.key == FAULT

        drive(ExplorerApp(failing_request), steps)

    @pytest.mark.parametrize("size", [(40, 10), (80, 24), (120, 40), (200, 60)])
    def test_picture(
        self, failing_request: Request, snap_compare: Any, size: tuple[int, int]
    ) -> None:
        async def wait(pilot: Pilot[Any]) -> None:
            await settle(pilot)
            tensors = rounded(sound_tensors())
            tensors[StageKey(2, "ffn_gate")] *= np.float32(1.5)
            shutil.rmtree("engine-dump")
            save("engine-dump", tensors)
            await press(pilot, "r")
            await settle(pilot)
            pilot.app.clear_notifications()
            await press(pilot, "x")

        assert snap_compare(ExplorerApp(failing_request), terminal_size=size, run_before=wait)


class TestExport:
    @pytest.mark.parametrize("name", ["run.html", "run.md", "run.json", "run.svg", "run.aprx"])
    def test_the_suffix_says_what_is_written(self, name: str) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "e")
            assert isinstance(pilot.app.screen, ExportScreen)
            pilot.app.screen.query_one(Input).value = name
            await press(pilot, "enter")
            await until(pilot, lambda: f"wrote {name}" in told(pilot))

        drive(ExplorerApp(kernel_run("kv-tiled")), steps)
        content = Path(name).read_bytes()
        match Path(name).suffix:
            case ".html":
                assert b"data:image/png" in content
                assert b"kv heads tiled" in content
            case ".md":
                assert b"kv heads tiled" in content
            case ".json":
                assert json.loads(content)["first_divergence"] == "layer-2/attn_scores"
            case ".svg":
                assert content.startswith(b"<svg")
                assert b"attn_scores" in content
            case ".aprx":
                assert SavedRun(Path(name)).report.diverges()

    def test_a_wrong_name_is_said_there(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "e")
            screen = pilot.app.screen
            for value in ("run.docx", "nowhere/run.html", "~no-such-user/run.html", ""):
                screen.query_one(Input).value = value
                await press(pilot, "enter")
                assert pilot.app.screen is screen
            await press(pilot, "escape")
            assert pilot.app.screen is explorer_of(pilot)

        before = set(Path().iterdir())
        drive(ExplorerApp(failing_request), steps)
        assert set(Path().iterdir()) == before

    def test_a_file_is_replaced_only_when_asked_twice(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "e")
            screen = pilot.app.screen
            screen.query_one(Input).value = "kept.md"
            await press(pilot, "enter")
            problem = screen.query_one("#export-problem", Static)
            assert str(problem.render()) == "kept.md exists: enter again replaces it"
            screen.query_one(Input).value = "other.md"
            await press(pilot, "enter")  # about another file nothing was said yet
            assert pilot.app.screen is screen
            assert {Path(name).read_text() for name in ("kept.md", "other.md")} == {"before"}
            await press(pilot, "enter")
            await until(pilot, lambda: "wrote other.md" in told(pilot))

        for name in ("kept.md", "other.md"):
            Path(name).write_text("before")
        drive(ExplorerApp(failing_request), steps)
        assert Path("kept.md").read_text() == "before"
        assert "layer 1 · q_post_rope" in Path("other.md").read_text()

    @pytest.mark.parametrize("size", [(40, 10), (80, 24), (120, 40)])
    def test_picture(
        self, failing_request: Request, snap_compare: Any, size: tuple[int, int]
    ) -> None:
        async def wait(pilot: Pilot[Any]) -> None:
            await settle(pilot)
            await press(pilot, "e")
            screen = pilot.app.screen
            screen.query_one(Input).value = "report.docx"
            await press(pilot, "enter")

        assert snap_compare(ExplorerApp(failing_request), terminal_size=size, run_before=wait)


class TestCopying:
    def test_a_stage_goes_to_the_clipboard_of_the_terminal(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "y")
            text = pilot.app.clipboard
            assert text.startswith("layer 2 · attn_scores  FAIL\nkernel FAIL: kv heads tiled")
            assert "cumulative: relative L2 1.2e+00, cosine 0.2098475" in text

        drive(ExplorerApp(kernel_run("kv-tiled")), steps)

    def test_it_is_the_terminal_that_copies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[str] = []

        async def steps(pilot: Pilot[Any]) -> None:
            assert pilot.app._driver is not None
            monkeypatch.setattr(pilot.app._driver, "write", written.append)
            await press(pilot, "home", "y")
            coded = base64.b64encode(pilot.app.clipboard.encode()).decode()
            assert f"\x1b]52;c;{coded}\a" in "".join(written)
            assert pilot.app.clipboard.startswith("first divergence: layer 2")

        drive(ExplorerApp(kernel_run("kv-tiled")), steps)


class TestSaving:
    def test_the_run_is_saved_when_it_is_over_and_opens_again(self) -> None:
        request = kernel_run("kv-tiled")

        async def steps(pilot: Pilot[Any]) -> None:
            await until(pilot, lambda: "wrote run.aprx" in told(pilot))

        drive(ExplorerApp(request, options=ScreenOptions(save=Path("run.aprx"))), steps)
        for path in Path().iterdir():
            if path.name != "run.aprx":
                path.unlink()

        async def look(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            assert explorer.tree_of_stages.row.key == StageKey(2, "attn_scores")
            assert explorer.state.exit_code == 1
            assert len(explorer.state.reports) == len(explorer.state.keys)

        drive(ExplorerApp(Request(saved=Path("run.aprx"))), look)
        assert run(Request(saved=Path("run.aprx"))).diverges()


def shown(pilot: Pilot[Any]) -> str:
    """The words of the whole screen, in the order in which its lines have them."""
    lines = pilot.app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in line) for line in lines)


class TestCauses:
    def test_a_stage_fails_on_screen_before_its_cause_is_found(self) -> None:
        looked = threading.Event()

        def held_up(request: Request) -> Iterator[RunEvent]:
            for event in bisect(request):
                yield event
                if isinstance(event, CauseSought):
                    looked.wait(timeout=60)

        async def look(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            try:
                await until(pilot, lambda: explorer.state.sought is not None)
                assert explorer.state.sought is not None
                stage = explorer.state.sought.stage
                await come_to_rest(pilot)
                assert explorer.state.is_running and explorer.state.divergences == [stage.key]
                explorer.navigation.go_to(stage.key)
                await come_to_rest(pilot)
                bar = explorer.verdict_bar.render().plain
                assert "FAIL" in bar and f"cause of {stage.key}, search 1" in bar
                await press(pilot, "w")
                assert "Its cause is being looked for" in shown(pilot)
            finally:
                looked.set()
            await settle(pilot)

        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            assert explorer.state.sought is None
            assert explorer.state.divergences == list(dict.fromkeys(explorer.state.divergences))
            first = explorer.state.first_divergence
            assert first is not None and first.explanation is not None
            assert first.explanation.named and "kv heads" in shown(pilot)
            assert "looked for" not in shown(pilot)
            assert "cos " in shown(pilot)

        drive(ExplorerApp(kernel_run("kv-tiled"), held_up), steps, wait=look)
