"""Fixtures for every kind of test."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from syrupy.location import PyTestLocation

# Objects more than before that make the collector look; Python's 700 come and go with every key.
GARBAGE = 50_000
SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference files beside the repository, which is not part of it."""
    if not SHARED.is_dir():
        pytest.skip("the folder of reference files (../shared) is absent")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def settings_of_nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the user of this machine likes, or has seen, changes no test."""
    folder = tmp_path_factory.mktemp("home")
    file = folder / "settings.toml"
    file.write_text("hints = false\n", "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APRTUI_SETTINGS", str(file))
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield


def pytest_configure() -> None:
    """Keep pictures of screens under `snapshots/<test file>` rather than beside the tests."""
    import pytest_textual_snapshot

    # In the background of a script it is ignored, and so would be by what the tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    # A process of pytest-xdist says 80 x 24 for the terminal that it does not have.
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)

    class Pictures(pytest_textual_snapshot.SVGImageExtension):
        @classmethod
        def dirname(cls, *, test_location: PyTestLocation) -> str:
            return str(Path(__file__).parents[1] / "snapshots" / Path(test_location.filepath).stem)

    pytest_textual_snapshot.SVGImageExtension = Pictures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes minutes, so that no processor waits for it in the end."""

    def seconds(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return 0.0 if marker is None else float(marker.args[0])

    items.sort(key=seconds, reverse=True)


def pytest_collection_finish() -> None:
    """Have the collector look less often, and never at what was imported.

    It would be at work for a quarter of the time that tests of the screen take.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE)
