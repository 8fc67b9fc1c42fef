"""Every kernel under Oclgrind: no access out of bounds, no data race.

Its exit code stays 0, so what counts is that its log is empty. Its check for uninitialised values
is left out: it does not know an instruction that its own compiler makes of a division.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aprcore.backends.opencl.device import list_devices
from opencl_device import obstacle


def has_oclgrind() -> bool:
    return not obstacle() and any("oclgrind" in one.platform.lower() for one in list_devices())


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not has_oclgrind(), reason="Oclgrind is not installed as an OpenCL platform"
    ),
]


def run_checked(folder: Path, *arguments: str) -> str:
    """Run the walk under the simulator; returns its log."""
    log = folder / "log"
    environment = os.environ | {"OCLGRIND_LOG": str(log), "OCLGRIND_DATA_RACES": "1"}
    walk = Path(__file__).parents[1] / "opencl_walk.py"
    subprocess.run([sys.executable, str(walk), *arguments], env=environment, check=True)
    return log.read_text()


@pytest.mark.parametrize("lanes", ["1", "16", "64"])
def test_no_kernel_reaches_out_of_bounds_or_races(lanes: str, tmp_path: Path) -> None:
    assert run_checked(tmp_path, lanes) == ""


def test_the_simulator_notices_a_kernel_that_does(tmp_path: Path) -> None:
    assert "Invalid write" in run_checked(tmp_path, "1", "broken")
