"""`aprtui` and `python -m aprtui`: the way in, which Ctrl-C may interrupt at any moment.

SIGTERM is taken as Ctrl-C is: what a command has begun to write is removed.
"""

import os
import signal
import sys

INTERRUPTED = 130  # as `aprtui.cli.INTERRUPTED`, which may not be loaded yet
TERMINATED = 143


def main() -> int:
    """Run the command line; an interrupt while modules are still loading is no traceback either."""
    asked: list[int] = []

    def terminate(number: int, frame: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGTERM, terminate)
        from aprtui.cli import main as run

        code = run()
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        _leave_at_once(TERMINATED if asked else INTERRUPTED)
    return code


def _leave_at_once(code: int) -> None:
    """End without waiting for a thread that waits for a kernel: no device can stop one."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
