"""Our float32 trace against transformers' own float32 eager pass, stage by stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aprcore.engines.forward import forward
from aprcore.engines.numpy import NumpyBackend
from aprcore.judging.compare import compare
from aprcore.models.model import open_model
from aprcore.network.graph import known_stages
from aprcore.network.stages import StageKey
from models import FIRST_GEMMA, build, gguf_can_hold, random_config, save, write_apr, write_gguf

pytest.importorskip("torch", reason="torch is not installed (the `oracle` extra)")
pytest.importorskip("transformers", reason="transformers is not installed (the `oracle` extra)")

from aprcore.capture.oracle import OracleRequest, load_model, quiet_transformers
from aprcore.capture.transformers_pass import capture, run_model

# Float32 on both sides, only the order of additions differs; the worst seen is 2.8e-6.
RELATIVE_L2_BOUND = 1e-5

QUICK_SEEDS = (*range(40), *range(FIRST_GEMMA, FIRST_GEMMA + 10))
ALL_SEEDS = range(FIRST_GEMMA + 50)


def capture_all(model, tokens) -> dict[StageKey, np.ndarray]:
    tensors: dict[StageKey, np.ndarray] = {}
    capture(model, tokens, lambda key, x: tensors.__setitem__(key, x.copy()))
    return tensors


def assert_trace_matches(path: Path, tokens, oracle: dict[StageKey, np.ndarray]) -> None:
    """Trace the model at `path` and hold every stage against `oracle`."""
    backend = NumpyBackend()
    seen = []
    with open_model(path) as model:
        for key, array in forward(model.graph, model.weights, backend, tokens):
            x = backend.to_host(array)
            seen.append(key)
            if known_stages()[key.stage].last_token:
                x = x[0]  # [1, V]: the one token that it is computed for
            assert x.shape == oracle[key].shape, key
            result = compare(x, oracle[key])
            assert result.relative_l2 <= RELATIVE_L2_BOUND, (key, result.relative_l2)
            assert result.nonfinite_a == 0, key
    assert seen[-1] == StageKey(None, "lm_head")
    assert x.argmax() == oracle[seen[-1]].argmax()
    assert set(seen) == set(oracle)


def check_random_model(seed: int, folder: Path) -> None:
    recipe = random_config(seed)
    model = build(recipe)
    plain = run_model(model, recipe.tokens)[0, -1].numpy()
    oracle = capture_all(model, recipe.tokens)
    assert np.array_equal(oracle[StageKey(None, "lm_head")], plain)
    assert_trace_matches(save(model, folder / "hf"), recipe.tokens, oracle)
    # Residues mod 4 are architectures, so halves are taken of blocks of four.
    rope_type = 0 if seed // 4 % 2 else 2
    apr = write_apr(model, folder / "model.apr", rope_type=rope_type)
    assert_trace_matches(apr, recipe.tokens, oracle)
    if gguf_can_hold(recipe):
        gguf = write_gguf(model, folder / "model.gguf")
        assert_trace_matches(gguf, recipe.tokens, oracle)


@pytest.mark.parametrize("seed", QUICK_SEEDS)
def test_random_models(seed, tmp_path):
    check_random_model(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", sorted({*ALL_SEEDS} - {*QUICK_SEEDS}))
def test_more_random_models(seed, tmp_path):
    check_random_model(seed, tmp_path)


def test_the_random_models_cover_what_they_should():
    recipes = [random_config(seed) for seed in ALL_SEEDS]
    assert recipes == [random_config(seed) for seed in ALL_SEEDS]

    def is_narrow(recipe):
        window = recipe.settings.get("sliding_window")
        return window is not None and window < recipe.num_tokens

    for some in (recipes, [recipes[seed] for seed in QUICK_SEEDS]):
        narrow = [recipe.architecture for recipe in some if is_narrow(recipe)]
        assert set(narrow) == {"mistral", "qwen2", "qwen3", "gemma2"}
        settings = [recipe.settings for recipe in some]
        heads = [(s["num_attention_heads"], s["num_key_value_heads"]) for s in settings]
        assert any(h % 2 and h > 1 for h, _ in heads)
        assert any(k == 1 < h for h, k in heads)
        assert any(1 < k < h for h, k in heads)
        assert any(s["head_dim"] * h != s["hidden_size"] for s, (h, _) in zip(settings, heads))
        assert {s["tie_word_embeddings"] for s in settings} == {True, False}
        kinds = {s["rope_parameters"]["rope_type"] for s in settings}
        assert kinds == {"default", "linear", "llama3", "yarn"}
        assert any(s.get("attention_bias") for s in settings)
        assert any(s.get("mlp_bias") for s in settings)
    assert {recipe.num_tokens for recipe in recipes} >= {1, 65}
    assert sum(r.settings.get("sliding_window") is not None for r in recipes[:FIRST_GEMMA]) >= 50
    assert sum(recipe.architecture == "gemma2" for recipe in recipes) == 50
    assert sum(map(gguf_can_hold, recipes)) >= 50


def test_stories260k(shared):
    path = shared / "data" / "stories260k"
    tokens = (1, 403, 407, 261, 378)
    with quiet_transformers():
        model = load_model(OracleRequest(path))
    assert_trace_matches(path, tokens, capture_all(model, tokens))


def test_the_demo_model():
    from aprcore.dumps.directory import TraceDirectory
    from aprtui.demo import demo_path

    trace = TraceDirectory(demo_path() / "oracle")
    oracle = {key: trace.read(key).reshape(trace.shape(key)) for key in trace.counts}
    assert_trace_matches(demo_path() / "sound.apr", trace.sidecar.tokens, oracle)
