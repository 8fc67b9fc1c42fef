"""Fixtures that several files of unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from aprcore.network.stages import StageKey
from tiny import edited, trace_model, write_model, write_stages

UP = StageKey(1, "ffn_up")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model, its oracle, and a model with one wrong weight."""
    root = tmp_path_factory.mktemp("tiny")
    tensors = trace_model(write_model(root / "m.apr"))
    write_stages(root / "oracle", tensors)
    write_stages(root / "wrong", edited(tensors, UP, lambda x: -x))
    return root
