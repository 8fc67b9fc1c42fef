"""Faults in the real llama.cpp are found where they are, and called what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from faults import FAULTS, PlantedFault
from runs import STORIES_TOKENS, capture, divergences, judge

RANK = 4


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_located_and_named(
    models: dict[str, Path], tmp_path: Path, fault: PlantedFault, kv_type: str
) -> None:
    model = models["stories"]
    dump = capture(model, STORIES_TOKENS, tmp_path / "dump", kv_type=kv_type, **fault.request)
    if fault.shifts_positions:
        _say_from_zero(dump)
    report = judge(model, dump)
    found = divergences(report)
    stages = {s.key.path for s in report.stages if s.key.stage in fault.stages}
    assert stages <= found.keys()
    assert {path.rpartition("/")[2] for path in found} <= fault.stages | fault.others
    assert {path: reason for path, reason in found.items()
            if path in stages and fault.cause not in reason} == {}  # fmt: skip


def test_a_block_that_the_engine_has_otherwise_is_found(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """The engine runs a file in which one block of 32 weights is zero."""
    changed = Path(shutil.copy(models["stories-Q8_0"], tmp_path / "changed.gguf"))
    _overwrite(changed, "blk.2.ffn_down.weight", lambda values: _without_a_block(values, row=3))
    dump = capture(changed, STORIES_TOKENS, tmp_path / "dump")
    found = divergences(judge(models["stories-Q8_0"], dump))
    assert set(found) == {"layer-2/ffn_out"}
    assert "block" in found["layer-2/ffn_out"]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_adapter_by_a_wrong_scale_is_found(
    models: dict[str, Path], tmp_path: Path, scale: float
) -> None:
    """The model has an adapter merged, and llama.cpp adds the same one to the base."""
    draw = np.random.default_rng(3)
    down, up = draw.normal(size=(RANK, 64)), draw.normal(size=(32, RANK))
    down, up = (x.astype(np.float32) * 0.1 for x in (down, up))
    adapter = _write_adapter(tmp_path / "lora.gguf", "blk.1.attn_v.weight", down, up)
    merged = Path(shutil.copy(models["stories"], tmp_path / "merged.gguf"))
    _overwrite(merged, "blk.1.attn_v.weight", lambda values: values + up @ down)
    dump = capture(models["stories"], STORIES_TOKENS, tmp_path / "dump", kv_type="f32",
                   adapter=adapter, adapter_scale=scale)  # fmt: skip
    found = divergences(judge(merged, dump))
    assert set(found) == (set() if scale == 1 else {"layer-1/qkv_matmul"})


def _say_from_zero(dump: Path) -> None:
    """Have the sidecar claim what the engine should have done."""
    file = dump / "_trace.json"
    sidecar = json.loads(file.read_text("utf-8"))
    sidecar["positions"] = list(range(len(sidecar["tokens"])))
    file.write_text(json.dumps(sidecar), "utf-8")


def _overwrite(path: Path, name: str, change) -> None:
    """Change the stored values of one tensor in place."""
    path.chmod(0o644)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    stored = np.array(tensor.data)
    changed = change(stored)
    assert changed.shape == stored.shape and not np.array_equal(changed, stored)
    with path.open("r+b") as file:
        file.seek(tensor.data_offset)
        file.write(np.ascontiguousarray(changed, stored.dtype).tobytes())


def _without_a_block(values: np.ndarray, *, row: int) -> np.ndarray:
    """Rows of Q8_0 blocks, 2 bytes of scale and 32 integers each; one of them is cleared."""
    changed = values.copy()
    changed[row, 34:68] = 0
    return changed


def _write_adapter(path: Path, weight: str, down: np.ndarray, up: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", RANK)
    writer.add_tensor(f"{weight}.lora_a", down)
    writer.add_tensor(f"{weight}.lora_b", up)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
