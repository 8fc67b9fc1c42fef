"""What `aprtui capture llama.cpp` writes: everything, once, and what the engine computed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from runs import DEMO_TOKENS, STORIES_TOKENS, capture

from aprcore.capture.llama_cpp import LlamaCppRequest, capture_llama_cpp
from aprcore.dumps.tensor_files import read_safetensors_dump
from aprcore.dumps.tensor_folder import TENSORS_NAME
from aprcore.ground.errors import AprError, PlanError, TokenizerError, TraceError
from aprtui.cli import main

SCHEMA = Path(__file__).parents[2] / "docs" / "trace.schema.json"


def _read(dump: Path) -> dict[str, np.ndarray]:
    arrays = read_safetensors_dump(dump / TENSORS_NAME).arrays
    return {name: array.read() for name, array in arrays.items()}


def _sidecar(dump: Path) -> dict:
    return json.loads((dump / "_trace.json").read_text("utf-8"))


def test_every_tensor_of_one_name_is_there(models: dict[str, Path], tmp_path: Path) -> None:
    """The demo has biases: the projection, its sum with the bias, and what is rotated of it."""
    held = _read(capture(models["demo"], DEMO_TOKENS, tmp_path))
    assert held["Qcur_pre-0"].shape == held["Qcur_bias-0"].shape == (11, 64)
    assert held["Qcur-0"].shape == (11, 4, 16)
    bias = held["Qcur_bias-0"] - held["Qcur_pre-0"]
    assert np.allclose(bias, bias[0], atol=1e-6)
    first = held["Qcur_bias-0"][0].reshape(4, 16)
    assert np.array_equal(held["Qcur-0"][0], first)  # at position 0 nothing is rotated
    assert np.array_equal(held["Vcur-0"].reshape(11, -1), held["Vcur_bias-0"])


def test_chunks_are_joined_to_what_one_pass_gives(models: dict[str, Path], tmp_path: Path) -> None:
    whole = _read(capture(models["stories"], STORIES_TOKENS, tmp_path / "a", kv_type="f32"))
    joined = _read(
        capture(models["stories"], STORIES_TOKENS, tmp_path / "b", kv_type="f32", ubatch=4)
    )
    assert joined.keys() == whole.keys()
    seen = [name for name in whole if not name.startswith("kq")]
    assert {n: joined[n].shape for n in whole} == {n: whole[n].shape for n in whole}
    for name in seen:
        assert np.allclose(joined[name], whole[name], atol=1e-4), name
    below = np.tril(np.ones((9, 9), bool))
    for name in ("kq-1", "kq_soft_max-1"):
        a, b = (held[name][:, :, :9] * below for held in (whole, joined))
        assert np.allclose(a, b, atol=1e-3), name


def test_scores_are_padded_where_the_cache_grows(models: dict[str, Path], tmp_path: Path) -> None:
    tokens = tuple(1 + i % 500 for i in range(300))
    held = _read(capture(models["stories"], tokens, tmp_path, ubatch=128))
    weights = held["kq_soft_max-0"]
    assert weights.shape[:2] == (8, 300)
    assert weights.shape[2] >= 300
    assert np.allclose(weights.sum(axis=2), 1, atol=1e-3)


def test_a_step_has_its_history(models: dict[str, Path], tmp_path: Path) -> None:
    capture(models["stories"], STORIES_TOKENS, tmp_path, step=2)
    sidecar = _sidecar(tmp_path)
    assert sidecar["positions"] == [10]
    assert len(sidecar["tokens"]) == 1
    assert sidecar["history"][:9] == list(STORIES_TOKENS)
    assert len(sidecar["history"]) == 10
    assert _read(tmp_path)["l_out-0"].shape == (1, 64)


def test_a_rotated_cache_shows_attention_after_the_way_back(
    models: dict[str, Path], tmp_path: Path
) -> None:
    plain = _read(capture(models["blocks"], (1, 2, 3, 4), tmp_path / "a", flash_attention=True))
    turned = _read(capture(models["blocks"], (1, 2, 3, 4), tmp_path / "b", kv_type="q8_0",
                           flash_attention=True))  # fmt: skip
    assert not any("rotated" in name for name in plain)
    off = np.abs(turned["kqv_out_rotated-0"] - plain["kqv_out-0"]).max()
    assert np.abs(turned["kqv_out-0"] - plain["kqv_out-0"]).max() < off / 20


def test_the_sidecar_says_what_ran(models: dict[str, Path], tmp_path: Path) -> None:
    capture(models["stories"], STORIES_TOKENS, tmp_path, kv_type="bf16", flash_attention=True,
            ubatch=4, parameters={"rope_freq_base": 50000.0})  # fmt: skip
    sidecar = _sidecar(tmp_path)
    jsonschema.validate(sidecar, json.loads(SCHEMA.read_text("utf-8")))
    assert sidecar["tokens"] == list(STORIES_TOKENS)
    assert sidecar["backend"] == "llama.cpp"
    assert sidecar["arithmetic"] == {"kv_cache": "bf16"}
    assert sidecar["attention"] == "flash"
    assert sidecar["versions"]["llama-cpp-python"]
    assert sidecar["model"]["architecture"] == "llama"
    assert sidecar["model"]["num_layers"] == 5
    assert sidecar["settings"] == {
        "kv_type": "bf16", "flash_attention": True, "ubatch": 4, "gpu_layers": 0, "threads": 1,
        "rope_freq_base": 50000.0,
    }  # fmt: skip


def test_flash_attention_reads_no_float32(models: dict[str, Path], tmp_path: Path) -> None:
    """A cache of float32 is cast for it: what it gives is what a cache of float16 gives."""
    held = {}
    for kv_type in ("f32", "f16"):
        folder = tmp_path / kv_type
        capture(models["stories"], STORIES_TOKENS, folder, kv_type=kv_type, flash_attention=True)
        assert _sidecar(folder)["arithmetic"] == {"kv_cache": "f16"}
        held[kv_type] = _read(folder)["kqv_out-0"]
    assert np.array_equal(held["f32"], held["f16"])


def test_a_prompt_is_made_tokens_by_the_engine(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "dump"
    arguments = ["capture", "llama.cpp", str(models["demo"]), "--prompt", "What is 2+2?"]
    assert main([*arguments, "-o", str(output)]) == 0
    assert "7 tokens" in capsys.readouterr().out
    assert _sidecar(output)["prompt"] == "What is 2+2?"
    assert len(_sidecar(output)["tokens"]) == 7


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"tokens": (1, 999999)}, TokenizerError, "outside the vocabulary of 512"),
        ({"prompt": "Once"}, TokenizerError, "has no tokenizer"),
        ({"tokens": (1,), "kv_type": "q8_0"}, PlanError, "only with flash attention"),
        ({"tokens": (1,), "kv_type": "q8_0", "flash_attention": True}, TraceError,
         "K cache type q8_0 with block size 32 does not divide"),
        ({"tokens": (1,), "kv_type": "f8"}, PlanError, "no type of a cache"),
        ({"tokens": (1,), "parameters": {"rope_base": 1.0}}, PlanError, "is rope_freq_base meant"),
        ({"tokens": (1,), "parameters": {"rope_scaling_type": 1.5}}, PlanError, "whole number"),
        ({"tokens": (1,), "overrides": {"llama.rope.dimension_count": 4}}, TraceError,
         "invalid n_rot"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_named_and_writes_nothing(
    models: dict[str, Path], tmp_path: Path, settings: dict, error: type[AprError], said: str
) -> None:
    output = tmp_path / "dump"
    with pytest.raises(error, match=said):
        capture_llama_cpp(LlamaCppRequest(models["stories"], **settings), output)
    assert not output.exists()


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(AprError, match=r"m\.gguf"):
        capture_llama_cpp(LlamaCppRequest(tmp_path / "m.gguf", tokens=(1,)), tmp_path / "dump")


def test_an_interrupted_capture_leaves_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    def interrupt(count: int) -> None:
        if count == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_llama_cpp(
            LlamaCppRequest(models["stories"], tokens=STORIES_TOKENS), tmp_path / "dump", interrupt
        )
    assert not (tmp_path / "dump").exists()


# What ggml does where an assertion fails: it says so, and ends the process.
ABORTING = """
import ctypes, sys
from pathlib import Path
import llama_cpp
from aprtui.commands import capture

def abort(done):
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_abort(b"/src/ggml.c", 12, b"GGML_ASSERT(sound) failed")

capture._show_progress = abort
sys.stderr.isatty = lambda: True
from aprtui.cli import main
sys.exit(main(["capture", "llama.cpp", *sys.argv[1:]]))
"""


def test_an_engine_that_ends_the_process_leaves_one_line_and_nothing_else(
    models: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "dump"
    done = subprocess.run(
        [sys.executable, "-c", ABORTING, str(models["stories"]), "--tokens", "1,2", "-o",
         str(output)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "llama.cpp gives up: ggml.c:12: GGML_ASSERT(sound) failed" in done.stderr
    assert not output.exists()
