"""What the settings change in the explorer: keys, colours' thresholds, top-K, the first hint."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from driving import come_to_rest, drive, explorer_of, press, settle
from textual import events
from textual.pilot import Pilot
from textual.widgets import Footer, Static

from aprcore.runs.request import Request
from aprtui import app as app_module
from aprtui.app import HINT_S, HINTED, ExplorerApp, run_explorer
from aprtui.commands.explore import add_explorer_options, open_explorer, request_under
from aprtui.keymap import check_keys, commands
from aprtui.settings import THEMES, Settings, SettingsError, is_first_use
from aprtui.settings_file import read_settings
from aprtui.theme import Paint
from conftest import FAULT

WHERE = Path("settings.toml")


def with_keys(**keys: str) -> Settings:
    return Settings(path=WHERE, keys={name.replace("_", "."): key for name, key in keys.items()})


def display_of(pilot: Pilot[Any], name: str) -> set[str]:
    """The keys that the footer and the help show for a binding."""
    active = explorer_of(pilot).active_bindings.values()
    return {pilot.app.get_key_display(one.binding) for one in active if one.binding.id == name}


class TestKeys:
    def test_a_key_does_another_thing_and_the_old_one_does_not(
        self, failing_request: Request
    ) -> None:
        app = ExplorerApp(failing_request, settings=with_keys(explorer_next="f8"))

        async def steps(pilot: Pilot[Any]) -> None:
            tree = explorer_of(pilot).tree_of_stages
            await press(pilot, "home", "n")
            assert tree.row.key is None
            await press(pilot, "f8")
            assert tree.row.key == FAULT
            assert display_of(pilot, "explorer.next") == {"f8"}

        drive(app, steps)

    def test_every_line_that_names_a_key_names_the_users(self, failing_request: Request) -> None:
        settings = with_keys(explorer_next="f8", explorer_changes="f9,z", explorer_rerun="ctrl+r")

        async def steps(pilot: Pilot[Any]) -> None:
            bar = explorer_of(pilot).verdict_bar.render().plain
            assert "[f8] next" in bar and "[n]" not in bar
            await press(pilot, "home", "u", "z")
            told = "\n".join(note.message for note in pilot.app._notifications)
            assert "f8 goes to the first divergence" in told
            assert "^r runs again" in told
            await press(pilot, "ctrl+r")
            await settle(pilot)
            assert "f9 shows them" in "\n".join(n.message for n in pilot.app._notifications)

        drive(ExplorerApp(failing_request, settings=settings), steps)

    def test_two_actions_change_places(self, failing_request: Request) -> None:
        settings = with_keys(explorer_next="p", explorer_previous="n")
        check_keys(settings.keys, WHERE)

        async def steps(pilot: Pilot[Any]) -> None:
            tree = explorer_of(pilot).tree_of_stages
            await press(pilot, "home", "p")
            assert tree.row.key == FAULT
            await press(pilot, "end", "n")
            assert tree.row.key is not None and tree.row.key != FAULT

        drive(ExplorerApp(failing_request, settings=settings), steps)

    def test_several_keys_of_any_kind(self, failing_request: Request) -> None:
        settings = with_keys(explorer_next="f8,ctrl+n,%", app_quit="f9")

        async def steps(pilot: Pilot[Any]) -> None:
            tree = explorer_of(pilot).tree_of_stages
            for key in ("f8", "ctrl+n", "percent_sign"):
                await press(pilot, "home", key)
                assert tree.row.key == FAULT, key
            await press(pilot, "q")
            assert pilot.app.is_running and not pilot.app._exit
            await press(pilot, "f9")
            assert pilot.app._exit

        drive(ExplorerApp(failing_request, settings=settings), steps)

    def test_a_letter_typed_into_the_filter_is_a_letter(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "slash", "é")
            assert explorer_of(pilot).query_one("#filter").value == "é"  # type: ignore[attr-defined]

        drive(ExplorerApp(failing_request, settings=with_keys(explorer_next="é")), steps)

    @pytest.mark.parametrize(
        ("keys", "parts"),
        [
            ({"explorer.nxt": "j"}, ["'explorer.nxt'", "did you mean explorer.next?"]),
            ({"explorer.next": "crtl+n"}, ["keys.explorer.next", "'crtl+n'"]),
            ({"explorer.next": "F5"}, ["'F5'"]),
            ({"explorer.next": "jj"}, ["'jj'"]),
            ({"explorer.next": "p"}, ["p is the key of explorer.previous too"]),
            ({"explorer.next": "q"}, ["q is the key of app.quit too"]),
            ({"explorer.next": "ctrl+c"}, ["ctrl+c is the key of app.interrupt too"]),
            ({"help.close": "ctrl+c"}, ["ctrl+c is the key of app.interrupt too"]),
            ({"explorer.next": "up"}, ["up is the key of tree.up too"]),
            ({"explorer.next": "?"}, ["question_mark is the key of explorer.help too"]),
            ({"explorer.next": "ctrl+p"}, ["ctrl+p opens the palette"]),
            ({"explorer.next": "f8", "explorer.why": "f9,f8"}, ["f8 is the key of"]),
        ],
    )
    def test_what_cannot_be_is_said_in_one_line(
        self, keys: dict[str, str], parts: list[str]
    ) -> None:
        with pytest.raises(SettingsError) as caught:
            check_keys(keys, WHERE)
        line = str(caught.value)
        assert line.startswith("settings.toml: ") and "\n" not in line
        for part in parts:
            assert part in line

    def test_what_never_meets_may_share_a_key(self) -> None:
        check_keys({"help.close": "n"}, WHERE)
        check_keys({"error.close": "x", "help.close": "x"}, WHERE)

    def test_every_binding_of_ours_can_be_named(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            shown = [one.binding for one in explorer_of(pilot).active_bindings.values()]
            ours = [one for one in shown if one.tooltip and one.action != "app.command_palette"]
            ours = [one for one in ours if not one.system and one.action != "command_palette"]
            assert len(ours) > 10
            assert {binding.id for binding in ours} <= set(commands())

        drive(ExplorerApp(failing_request), steps)

    def test_our_own_keys_do_not_clash(self) -> None:
        check_keys({name: ",".join(one.keys) for name, one in commands().items()}, WHERE)


def test_top_k_at_first(failing_request: Request) -> None:
    async def steps(pilot: Pilot[Any]) -> None:
        assert explorer_of(pilot).top_k == 50

    drive(ExplorerApp(failing_request, settings=Settings(top_k=50)), steps)


def test_thresholds_of_the_cosines_ink(failing_request: Request) -> None:
    async def steps(pilot: Pilot[Any]) -> None:
        for theme in ("okabe-ito", "okabe-ito-light"):
            pilot.app.theme = theme
            paint = Paint(pilot.app.theme_variables)
            found = [paint.cosine(x) for x in (0.96, 0.95, 0.85, 0.5, 0.1)]
            inks = ("pass", "pass", "noise", "inherited", "fail")
            assert found == [paint(f"verdict-{ink}") for ink in inks]

    drive(ExplorerApp(failing_request, settings=Settings(cosine=(0.95, 0.8, 0.5))), steps)


class TestHint:
    def hints_of(self, request: Request, settings: Settings, *, is_new: bool) -> list[str]:
        app = ExplorerApp(request, settings=settings, is_new=is_new)
        found: list[str] = []

        async def steps(pilot: Pilot[Any]) -> None:
            lines = explorer_of(pilot).query("#hint").results(Static)
            found.extend(str(line.render()).strip() for line in lines)

        drive(app, steps)
        return found

    def test_is_for_who_is_new(self, passing_request: Request) -> None:
        found = self.hints_of(passing_request, Settings(), is_new=True)
        assert found == ["? help · n next divergence · w why"]
        assert self.hints_of(passing_request, Settings(), is_new=False) == []

    def test_names_the_keys_that_they_have(self, passing_request: Request) -> None:
        settings = with_keys(explorer_next="ctrl+n,f8")
        assert self.hints_of(passing_request, settings, is_new=True) == [
            "? help · ^n next divergence · w why"
        ]

    def test_leaving_at_once_is_no_crash(self, passing_request: Request) -> None:
        async def leave_after(turns: int) -> None:
            app = ExplorerApp(passing_request, is_new=True)
            running = asyncio.create_task(app.run_async(headless=True, size=(120, 40)))
            while not app.is_running:
                await asyncio.sleep(0)
            app.post_message(events.Key("q", "q"))
            for _ in range(turns):
                await asyncio.sleep(0)
            await running
            assert not app.return_code

        for turns in (0, 4):
            asyncio.run(leave_after(turns))

    def test_is_one_line_that_covers_nothing_and_goes(self, passing_request: Request) -> None:
        """On the smallest screen a notification would hide the half of it, and what lies above."""
        app = ExplorerApp(passing_request, is_new=True)

        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            line = explorer.query_one("#hint")
            assert line.region.height == 1
            assert line.region.bottom == explorer.query_one(Footer).region.y
            assert not explorer.tree_of_stages.region.overlaps(line.region)
            assert not list(pilot.app._notifications)
            await press(pilot, "question_mark")
            assert not pilot.app.screen.query("#hint")
            await press(pilot, "escape")
            (timer,) = (one for one in app._timers if one._interval == HINT_S)
            await timer._tick(next_timer=0, count=1)  # its time has come
            await come_to_rest(pilot)
            assert not explorer.query("#hint")

        drive(app, steps, size=(40, 10))

    def test_names_actions_that_there_are(self) -> None:
        assert set(HINTED) <= set(commands())

    @pytest.mark.parametrize("hints", [True, False])
    def test_is_over_once_the_explorer_was_left(
        self, passing_request: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hints: bool
    ) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        shown: list[bool] = []

        def leave(app: ExplorerApp) -> None:
            shown.append(app._is_new)
            drive(app, lambda pilot: pilot.press("q"))

        monkeypatch.setattr(app_module.ExplorerApp, "run", leave)
        for _ in range(2):
            assert run_explorer(passing_request, Settings(hints=hints)) == 0
        assert shown == [hints, False]
        assert not is_first_use()


class TestTolerances:
    def arguments(self, *words: str) -> Any:
        from argparse import ArgumentParser

        parser = ArgumentParser()
        add_explorer_options(parser)
        return parser.parse_args(words)

    def test_the_option_counts_more(self) -> None:
        args = self.arguments("--trace", "dump", "--tolerances", "mine.toml")
        Path("mine.toml").write_text("[default]\nany = 1.0\n", "utf-8")
        request = request_under(args, Settings(tolerances=Path("theirs.toml")))
        assert request.budgets is not None and request.budgets.file[0].relative_l2 == 1.0
        assert request.notes == ()

    def test_a_saved_run_has_its_verdicts(self) -> None:
        request = request_under(self.arguments("run.aprx"), Settings(tolerances=Path("no.toml")))
        assert request.saved == Path("run.aprx") and request.notes == ()

    def test_a_verdict_that_they_change_is_not_changed_silently(
        self, failing_request: Request, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("loose.toml").write_text("[default]\nany = 10.0\n", "utf-8")
        settings = Settings(path=WHERE, tolerances=Path("loose.toml"))
        args = self.arguments("--trace", str(failing_request.trace), "--oracle",
                              str(failing_request.oracle))  # fmt: skip
        codes: list[int] = []
        found: list[tuple[str, ...]] = []

        def leave(app: ExplorerApp) -> None:
            async def steps(pilot: Pilot[Any]) -> None:
                report = explorer_of(pilot).state.report
                assert report is not None
                found.extend((explorer_of(pilot).state.header.notes, report.header.notes))  # type: ignore[union-attr]

            drive(app, steps, wait=settle)

        monkeypatch.setattr(app_module.ExplorerApp, "run", leave)
        monkeypatch.setenv("TEXTUAL_DRIVER", "textual.drivers.web_driver:WebDriver")
        codes.append(open_explorer(failing_request, Settings()))
        codes.append(open_explorer(request_under(args, settings), settings))
        assert codes == [1, 0]
        before, _, *after = found
        assert not any("loose.toml" in note for note in before)
        for said in after:
            assert any("loose.toml" in note and "settings.toml" in note for note in said)


def test_the_documentation_names_actions_that_there_are() -> None:
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text("utf-8")
    named = set(re.findall(r"`((?:app|explorer|tree|help)\.[a-z-]+)`", text))
    assert len(named) > 10
    assert named <= set(commands())
    for name in THEMES:
        assert f"| `{name}` |" in text


def test_the_example_of_the_documentation_can_be_used(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text("utf-8")
    example = text.split("```toml\n")[1].split("```")[0]
    (tmp_path / "settings.toml").write_text(example, "utf-8")
    found = read_settings(tmp_path / "settings.toml")
    check_keys(found.keys, found.path)
    assert found.top_k and found.cosine and found.tolerances and not found.hints
    assert len(found.keys) == 2
