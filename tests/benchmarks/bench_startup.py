"""`aprtui --help`, against an interpreter that does nothing."""

from __future__ import annotations

import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

from figures import Figure, interleave, milliseconds, report, timed

MOST_S = 0.150
REPEATS = 21


def main() -> int:
    """Measure and print."""
    script = Path(sysconfig.get_path("scripts")) / "aprtui"

    def launch(*command: str | Path) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    ours, theirs = interleave(
        [
            timed(lambda: launch(script, "--help")),
            timed(lambda: launch(sys.executable, "-c", "pass")),
        ],
        REPEATS,
    )
    extra = statistics.median(own - peer for own, peer in zip(ours, theirs))
    return report(
        [
            Figure(
                "aprtui --help",
                f"{extra * 1000:.0f} ms on top ({milliseconds(ours)})",
                f"< {MOST_S * 1000:.0f} ms",
                extra < MOST_S,
                f"python -c pass ({milliseconds(theirs)})",
            )
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
