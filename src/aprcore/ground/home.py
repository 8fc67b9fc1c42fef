"""The home directory in a path that a user wrote."""

from __future__ import annotations

import os
from pathlib import Path


def expand_user(text: str) -> Path:
    """A path whose leading "~" or "~user" is that home directory, as in a shell.

    Where there is no such user, or a container's user has no home, it stays as it is: unlike
    pathlib's, this never raises, and whoever opens the path says that it does not exist.
    """
    return Path(os.path.expanduser(text))  # noqa: PTH111
