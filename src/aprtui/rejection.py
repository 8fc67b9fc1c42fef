"""The line on stderr that says that a device's path was given up."""

from __future__ import annotations

import sys


def announce(reason: str, backend: str = "opencl") -> None:
    """Print the line, whatever else is printed."""
    from aprcore.runs.fallback import rejection_line
    from aprtui.text import ERROR_LIMIT, visible

    line = visible(rejection_line(backend, reason), limit=ERROR_LIMIT)
    print(line, file=sys.stderr, flush=True)
