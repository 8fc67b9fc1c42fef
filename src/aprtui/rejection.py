"""The line on stderr that says that a device's path was given up."""

from __future__ import annotations

import sys


def announce(reason: str, backend: str = "opencl") -> None:
    """Print the line, whatever else is printed."""
    from aprcore.parity.fallback import rejection_line
    from aprtui.cli import LINE_LIMIT
    from aprtui.text import visible

    line = visible(rejection_line(backend, reason), limit=LINE_LIMIT)
    print(line, file=sys.stderr, flush=True)
