"""`aprtui` and `python -m aprtui`: the way in, which Ctrl-C may interrupt at any moment."""

import os
import sys

INTERRUPTED = 130  # as `aprtui.cli.INTERRUPTED`, which may not be loaded yet


def main() -> int:
    """Run the command line; an interrupt while modules are still loading is no traceback either."""
    try:
        from aprtui.cli import main as run

        code = run()
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        _leave_at_once()
    return code


def _leave_at_once() -> None:
    """End without waiting for a thread that waits for a kernel: no device can stop one."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
