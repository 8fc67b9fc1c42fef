"""Themes: readable to everyone, in the colours that they promise."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
from driving import come_to_rest, drive, press, settle
from textual.color import Color
from textual.pilot import Pilot

from aprcore.runs.request import Request
from aprtui import settings
from aprtui.app import ExplorerApp
from aprtui.settings import Settings
from aprtui.theme import MARKS, THEMES, VARIABLES, Paint

Compare = Callable[..., bool]

# WCAG 2.2, success criteria 1.4.3 (AA) and 1.4.6 (AAA), for text of any size; 1.4.11 for frames.
TEXT_RATIO, HIGH_RATIO, FRAME_RATIO = 4.5, 7.0, 3.0


def luminance(color: str) -> float:
    """Relative luminance. Source: WCAG 2.2, definition of the term."""
    channels = [c / 255 for c in Color.parse(color).rgb]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours, 1 to 21."""
    darker, lighter = sorted((luminance(a), luminance(b)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_what_the_standard_says() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the known near miss


def test_the_command_line_names_the_themes_that_there_are() -> None:
    assert list(settings.THEMES) == list(THEMES)


@pytest.mark.parametrize("name", THEMES)
class TestContrast:
    def test_every_ink_on_every_ground(self, name: str) -> None:
        theme = THEMES[name]
        least = HIGH_RATIO if name == "high-contrast" else TEXT_RATIO
        inks = {ink: theme.variables[ink] for ink in VARIABLES}
        inks["foreground"] = str(theme.foreground)
        inks["footer"] = theme.variables["footer-key-foreground"]
        for ink, color in inks.items():
            for ground in (theme.background, theme.surface, theme.panel):
                assert contrast(color, str(ground)) >= least, (ink, color, ground)

    def test_the_line_under_the_cursor(self, name: str) -> None:
        variables = THEMES[name].variables
        found = [variables[f"block-cursor-{part}"] for part in ("foreground", "background")]
        assert contrast(*found) >= TEXT_RATIO

    def test_frames_that_mean_something(self, name: str) -> None:
        theme = THEMES[name]
        for color in (theme.primary, theme.error, theme.success, theme.warning):
            assert contrast(str(color), str(theme.surface)) >= FRAME_RATIO


@pytest.mark.parametrize("name", [name for name in THEMES if name != "monochrome"])
def test_grave_verdicts_have_colours_of_their_own(name: str) -> None:
    words = ("PASS", "INHERITED", "FAIL", "NONFINITE")
    colors = [THEMES[name].variables[MARKS[word].ink] for word in words]
    assert len(set(colors)) == len(words)


def test_monochrome_tells_verdicts_apart_by_style() -> None:
    paint = Paint(THEMES["monochrome"].variables)
    words = ("PASS", "INHERITED", "FAIL")
    passed, inherited, failed = (paint(MARKS[word].ink) for word in words)
    assert passed.color == inherited.color == failed.color
    assert failed.reverse and failed.bold
    assert inherited.underline and not inherited.reverse
    assert not (passed.reverse or passed.underline or passed.bold)


def colors_of(picture: str) -> set[str]:
    """Colours of texts and of the grounds behind them, without the window drawn around."""
    texts = re.findall(r"-r\d+ \{ fill: (#\w+)", picture)
    grounds = re.findall(r'<rect fill="(#\w+)"[^>]*crispEdges', picture)
    return {color.lower() for color in (*texts, *grounds)}


@pytest.mark.parametrize(
    "keys",
    [(), ("w",), ("question_mark",), ("slash", *"rope"), ("tab", "tab")],
    ids=["tree", "why", "help", "filter", "detail"],
)
def test_monochrome_has_two_colours(failing_request: Request, keys: tuple[str, ...]) -> None:
    app = ExplorerApp(failing_request, settings=Settings(theme="monochrome"))

    async def steps(pilot: Pilot[Any]) -> None:
        await press(pilot, *keys)
        found = colors_of(pilot.app.export_screenshot())
        assert {"#000000", "#ffffff"} <= found
        # The picture's own ink, of cells that have none.
        assert found - {"#000000", "#ffffff", "#c5c8c6"} == set()

    drive(app, steps)


def test_others_have_more(failing_request: Request) -> None:
    async def steps(pilot: Pilot[Any]) -> None:
        assert len(colors_of(pilot.app.export_screenshot())) > 6

    drive(ExplorerApp(failing_request), steps)


def test_only_themes_with_our_inks_are_offered(failing_request: Request) -> None:
    app = ExplorerApp(failing_request)
    assert set(app.available_themes) == set(THEMES)
    assert app.theme == settings.DEFAULT_THEME


def test_another_theme_is_drawn_at_once(failing_request: Request) -> None:
    async def steps(pilot: Pilot[Any]) -> None:
        before = colors_of(pilot.app.export_screenshot())
        for name, other in itertools.pairwise([*THEMES, *THEMES]):
            pilot.app.theme = other
            await come_to_rest(pilot)
            after = colors_of(pilot.app.export_screenshot())
            assert after != before, (name, other)
            assert THEMES[other].variables["verdict-pass"].lower() in after
            before = after

    drive(ExplorerApp(failing_request), steps)


@pytest.mark.parametrize("name", [name for name in THEMES if name != settings.DEFAULT_THEME])
@pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=["80x24", "120x40"])
def test_pictures(
    snap_compare: Compare, mixed_request: Request, name: str, size: tuple[int, int]
) -> None:
    app = ExplorerApp(mixed_request, settings=Settings(theme=name))
    assert snap_compare(app, terminal_size=size, run_before=settle)
