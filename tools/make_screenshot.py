"""Draw docs/screen.svg: the explorer on the bundled demo, at 120 x 40.

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
TARGET = Path(__file__).parents[1] / "docs" / "screen.svg"


async def draw() -> str:
    """The finished run, with the cursor on the first divergence."""
    fault = next(iter(load_faults().values()))
    root = demo_path()
    app = ExplorerApp(Request(Path(os.path.relpath(fault.model, root)), Path(ORACLE)))
    async with app.run_test(size=SIZE) as pilot:
        while app.explorer.state.report is None:
            await pilot.pause(0.05)
        await pilot.pause(0.5)  # longer than the detail pane waits
        return app.export_screenshot(title="aprtui demo")


if __name__ == "__main__":
    os.environ.pop("NO_COLOR", None)
    os.chdir(demo_path())  # paths on the screen should not show where this was drawn
    TARGET.write_text(asyncio.run(draw()), "utf-8")
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes")
