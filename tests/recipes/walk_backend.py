"""What a backend gets from its module and its line among the engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from toys import judge

from aprcore.engines.engine import ENGINES, open_engine
from aprcore.engines.forward import trace
from tiny import TOKENS, opened, trace_model, write_model, write_stages


def test_it_is_opened_by_name_and_its_pass_is_judged(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.apr")
    assert "toy" in ENGINES
    with opened(model) as held, open_engine("toy") as engine:
        assert engine.label == "toy"
        made = dict(trace(held.graph, held.weights, engine.backend, TOKENS))
    assert made.keys() == trace_model(model).keys()
    assert all(np.array_equal(x, x.astype(np.float16)) for x in made.values())
    dump = write_stages(tmp_path / "dump", made, dtype="float16")
    assert judge(model, dump).first_divergence is None
