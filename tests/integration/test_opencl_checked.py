"""Every kernel under Oclgrind: no access out of bounds, no data race.

Its exit code stays 0, so what counts is that its log is empty. Its check for uninitialised values
is left out: it does not know an instruction that its own compiler makes of a division.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opencl_device import require_device

pytestmark = pytest.mark.slow
require_device()


@pytest.fixture
def oclgrind(tmp_path: Path) -> dict[str, str]:
    """The environment in which Oclgrind is a platform; its Debian package registers none."""
    program = shutil.which("oclgrind")
    if program is None:
        pytest.skip("Oclgrind is not installed (on Debian: apt install oclgrind)")
    library = Path(program).resolve().parents[1] / "lib" / "oclgrind" / "liboclgrind-rt-icd.so"
    if not library.exists():
        pytest.skip(f"Oclgrind has no {library}")
    (tmp_path / "oclgrind.icd").write_text(f"{library}\n")
    log = tmp_path / "log"
    return {"OCL_ICD_VENDORS": str(tmp_path), "OCLGRIND_LOG": str(log), "OCLGRIND_DATA_RACES": "1"}


def run_checked(environment: dict[str, str], *arguments: str) -> str:
    """Run the walk under the simulator; returns its log."""
    walk = Path(__file__).parents[1] / "opencl_walk.py"
    subprocess.run(
        [sys.executable, str(walk), *arguments], env=os.environ | environment, check=True
    )
    return Path(environment["OCLGRIND_LOG"]).read_text()


@pytest.mark.parametrize("lanes", ["1", "16", "64"])
def test_no_kernel_reaches_out_of_bounds_or_races(lanes: str, oclgrind: dict[str, str]) -> None:
    assert run_checked(oclgrind, lanes) == ""


@pytest.mark.parametrize(("fault", "said"), [("broken", "Invalid write"), ("racing", "Data race")])
def test_the_simulator_notices_a_kernel_that_does(
    fault: str, said: str, oclgrind: dict[str, str]
) -> None:
    assert said.lower() in run_checked(oclgrind, "16", fault).lower()
