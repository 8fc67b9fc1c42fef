"""Draw the pictures of the documentation: the explorer on the bundled demo, at 120 x 40.

Run it after the screen has changed: `python tools/make_screenshot.py`.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from aprcore.request import Request
from aprtui.app import ExplorerApp
from aprtui.demo import ORACLE, demo_path, load_faults

SIZE = (120, 40)
DOCS = Path(__file__).parents[1] / "docs"

# Picture, fault of the demo, keys pressed once the run has ended.
PICTURES = (
    ("screen.svg", "rope-pairs", ()),
    ("why.svg", "rope-pairs", ("w",)),
    ("quantised.svg", "quantised", ("down",) * 8),
)


async def draw(fault: str, keys: tuple[str, ...]) -> str:
    """The finished run of a fault after some keys."""
    root = demo_path()
    model = Path(os.path.relpath(load_faults()[fault].model, root))
    app = ExplorerApp(Request(model, Path(ORACLE)))
    async with app.run_test(size=SIZE) as pilot:
        while app.explorer.state.report is None:
            await pilot.pause(0.05)
        await pilot.press(*keys)
        await pilot.pause(0.5)  # longer than the detail pane waits
        return app.export_screenshot(title=f"aprtui demo --fault {fault}")


if __name__ == "__main__":
    os.environ.pop("NO_COLOR", None)
    os.chdir(demo_path())  # paths on the screen should not show where this was drawn
    for name, fault, keys in PICTURES:
        (DOCS / name).write_text(asyncio.run(draw(fault, keys)), "utf-8")
        print(f"{name}: {(DOCS / name).stat().st_size} bytes")
