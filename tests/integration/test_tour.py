"""The tour of the explorer goes as it must, and the documentation shows what it shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyte
import pytest
from pyte.screens import Char

from record_tour import CAST, COLUMNS, PICTURES, ROWS, SCENES, STEP_S, make_files
from screen_files import draw_screen

# What the recording shows, in order, with the command line that each step belongs to.
STEPS = [
    (f"aprtui {scene.command}", step)
    for scene in SCENES
    for step in scene.steps[:-1]
    if not step.moves
]


@pytest.mark.slow
def test_the_documentation_shows_what_the_tour_shows(tmp_path: Path) -> None:
    made = make_files(tmp_path, recorded_screens())
    stale = {path for path, text in made.items() if not says(path, text)}
    stale |= set(PICTURES.glob("*.svg")) - made.keys()
    names = ", ".join(sorted(path.name for path in stale))
    assert not stale, f"no longer what the explorer shows: {names}; `make tour` makes them anew"


def recorded_screens() -> Iterator[list[list[Char]]]:
    """What a player of the recording shows at each step."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    _, *events = map(json.loads, CAST.read_text("utf-8").splitlines())
    for data in [data for _, kind, data in events if kind == "o"][:-1]:  # the last is its end
        stream.feed(data)
        yield [[screen.buffer[y][x] for x in range(COLUMNS)] for y in range(ROWS)]


def says(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text("utf-8") == text


def test_a_player_of_the_recording_sees_the_pictures() -> None:
    """It holds differences from one step to the next; another terminal has to understand them."""
    header, *events = map(json.loads, CAST.read_text("utf-8").splitlines())
    assert (header["version"], header["width"], header["height"]) == (2, COLUMNS, ROWS)
    assert [data for _, kind, data in events if kind == "m"] == [step.told for _, step in STEPS]
    times = [time for time, kind, _ in events if kind == "o"]
    assert times == [STEP_S * number for number in range(len(STEPS) + 1)]
    for (command, step), cells in zip(STEPS, recorded_screens(), strict=True):
        if step.picture is not None:
            assert says(PICTURES / f"{step.picture}.svg", draw_screen(cells, command)), step.told
