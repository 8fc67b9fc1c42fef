"""What a new architecture gets from its module and its operation alone."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from toys import CONFIG, judge, judge_fault, write_huggingface

from aprcore.dumps.open import open_dump
from aprcore.dumps.plan import parse_stages
from aprcore.engines.forward import trace
from aprcore.engines.reference import ReferenceBackend
from aprcore.ground.errors import ConfigError
from aprcore.judging.verdict import Verdict
from aprcore.models.convert import import_model
from aprcore.models.model import open_model
from aprcore.network.stages import StageKey
from aprtui.cli import main
from models import GGUF_NAMES
from tiny import NUM_LAYERS, SIZES, TOKENS, draw_weights, opened, trace_model, write_stages

FACTOR = 0.5
DECLARED = {"model_type": "parallel", "residual_multiplier": FACTOR}
SUM, NORM, OUT = (StageKey(1, name) for name in ("branch_sum", "branch_norm", "post_ffn_residual"))


def weights(has_norm: bool = True):
    also = ("branch_norm",) if has_norm else ()
    return draw_weights(has_bias=False, architecture="parallel", also=also)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_huggingface(tmp_path_factory.mktemp("toy") / "model", weights(), DECLARED)


def write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "parallel-lm")
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(SIZES["E"])
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(SIZES["F"])
    writer.add_head_count(SIZES["H"])
    writer.add_head_count_kv(SIZES["K"])
    writer.add_key_length(SIZES["D"])
    writer.add_value_length(SIZES["D"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(SIZES["V"])
    writer.add_float32("parallel-lm.residual_scale", FACTOR)
    for name, values in weights().items():
        module, _, kind = name.rpartition(".")
        if module.startswith("model.layers."):
            number, _, inner = module.removeprefix("model.layers.").partition(".")
            name = f"blk.{number}.{GGUF_NAMES[inner]}.{kind}"
        else:
            name = f"{GGUF_NAMES[module]}.{kind}"
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_its_pass_is_what_its_module_says(model: Path) -> None:
    tensors = trace_model(model)
    x = tensors[StageKey(0, "post_ffn_residual")]
    both = tensors[StageKey(1, "attn_out")] + tensors[StageKey(1, "ffn_out")]
    normed = both / np.sqrt(np.square(both).mean(axis=1, keepdims=True) + 1e-6)
    normed *= weights()["model.layers.1.post_attention_layernorm.weight"]
    np.testing.assert_allclose(tensors[SUM], both, rtol=1e-5)
    np.testing.assert_allclose(tensors[NORM], normed, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tensors[OUT], x + FACTOR * normed, rtol=1e-4, atol=1e-5)


def test_the_reference_agrees(model: Path) -> None:
    tensors = trace_model(model)
    with opened(model) as held:
        exact = dict(trace(held.graph, held.weights, ReferenceBackend(), TOKENS))
    assert exact.keys() == tensors.keys()
    for key, values in exact.items():
        np.testing.assert_allclose(tensors[key], values, rtol=1e-3, atol=1e-4)


def test_it_is_read_from_every_format(model: Path, tmp_path: Path) -> None:
    files = [write_gguf(tmp_path / "m.gguf"), tmp_path / "m.apr"]
    import_model(model, files[1])
    expected = trace_model(model)
    for file in files:
        found = trace_model(file)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_its_number_means_nothing_to_another(tmp_path: Path) -> None:
    wrong = DECLARED | {"model_type": "llama"}
    with pytest.raises(ConfigError, match=r"residual_multiplier is 0\.5"):
        open_model(write_huggingface(tmp_path / "wrong", weights(), wrong))


def test_a_conditional_stage_is_there_where_its_weight_is(model: Path, tmp_path: Path) -> None:
    bare = write_huggingface(tmp_path / "bare", weights(has_norm=False), DECLARED)
    with opened(model) as held, opened(bare) as without:
        assert NORM in held.graph and NORM not in without.graph
        assert without.graph.inputs(OUT)[1] == SUM
    found = trace_model(bare)
    x = found[StageKey(0, "post_ffn_residual")]
    np.testing.assert_allclose(found[OUT], x + FACTOR * found[SUM], rtol=1e-5, atol=1e-6)


def test_its_dump_is_judged(model: Path, tmp_path: Path) -> None:
    dump = write_stages(tmp_path / "dump", trace_model(model))
    report = judge(model, dump, dump)
    assert set(report.counts) == {Verdict.PASS}
    assert all(stage.kernel and stage.model for stage in report.stages)
    assert {SUM, NORM, OUT} <= {stage.key for stage in report.stages}


def test_a_fault_is_blamed(model: Path, tmp_path: Path) -> None:
    tensors = trace_model(model)
    x = tensors[StageKey(0, "post_ffn_residual")]
    found = judge_fault(tmp_path, model, OUT, lambda _: x + tensors[NORM])
    assert found.verdict is Verdict.FAIL and found.blamed == "kernel"
    assert found.explanation is not None and found.explanation.tried


def test_a_fault_of_a_new_stage_is_named(model: Path, tmp_path: Path) -> None:
    gain = weights()["model.layers.1.post_attention_layernorm.weight"]
    found = judge_fault(tmp_path, model, NORM, lambda x: x / gain)
    assert found.explanation is not None and "weight" in found.explanation.named[0].name


def test_names_of_other_engines_are_read(model: Path, tmp_path: Path) -> None:
    tensors = trace_model(model)
    stored = {
        "both-1": tensors[SUM], "both_normed-1": tensors[NORM], "l_out-1": tensors[OUT],
        "model.layers.0.post_attention_layernorm": tensors[StageKey(0, "branch_norm")],
        "layer-2/branch_sum": tensors[StageKey(2, "branch_sum")],
    }  # fmt: skip
    np.savez(tmp_path / "dump.npz", **stored)
    with opened(model) as held:
        dump = open_dump(tmp_path / "dump.npz", graph=held.graph)
    assert dump.ignored == ()
    assert set(dump.keys()) == {
        SUM, NORM, OUT, StageKey(0, "branch_norm"), StageKey(2, "branch_sum")
    }  # fmt: skip
    assert np.array_equal(dump.read(NORM), tensors[NORM].reshape(-1))


def test_its_stages_are_words_of_the_command_line(model: Path, tmp_path: Path) -> None:
    assert parse_stages("Branch_Sum,branch_norm") == ("branch_sum", "branch_norm")
    tokens, out = ",".join(map(str, TOKENS)), tmp_path / "out"
    assert not main(
        ["trace", str(model), "--tokens", tokens, "--save-tensor", "branch_norm",
         "--save-tensor-layers", "1..2", "--save-tensor-dir", str(out)]
    )  # fmt: skip
    assert [str(path.relative_to(out)) for path in out.rglob("*.bin")] == [f"{NORM.path}.bin"]
