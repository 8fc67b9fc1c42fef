"""`aprtui` and `python -m aprtui`: the way in, which Ctrl-C may interrupt at any moment."""

import sys


def main() -> int:
    """Run the command line; an interrupt while modules are still loading is no traceback either."""
    try:
        from aprtui.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130  # as `aprtui.cli.INTERRUPTED`, which may not be loaded yet


if __name__ == "__main__":
    sys.exit(main())
