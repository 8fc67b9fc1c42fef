"""What the tests of a run with a second side share."""

from __future__ import annotations

from typing import Any

import pytest

from aprcore.network.stages import StageKey
from aprcore.records.parity import StageParity
from aprcore.records.report import Report
from aprtui.cli import main
from aprtui.demo import demo_path
from opencl_device import obstacle
from tiny import NUM_LAYERS

needs_device = pytest.mark.skipif(bool(obstacle()), reason=f"no OpenCL device: {obstacle()}")

PREFIX = "[apr-cpu-vs-gpu-output-parity-v1] opencl path rejected, attempting fallback: "
LOGITS = StageKey(None, "lm_head")
NUM_STAGES = 1 + 17 * NUM_LAYERS + 2
DEMO = demo_path()


def pair_at(report: Report, key: StageKey) -> StageParity:
    return next(stage for stage in report.parity if stage.key == key)


def faults(report: Report) -> list[StageKey]:
    return [stage.key for stage in report.parity if stage.fault]


def called(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, list[str]]:
    code = main(["bisect", *map(str, args)])
    out, errors = capsys.readouterr()
    return code, out, errors.splitlines()
