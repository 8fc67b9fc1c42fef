"""Hugging Face directories, whole, sharded and damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprcore.formats.huggingface import read_huggingface, read_safetensors
from aprcore.ground.errors import AprError, FormatError, TruncatedError, UnsupportedError
from aprcore.network.weights import read_all


def write_safetensors(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write_shards(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shard(folder: Path, name: str, *tensors: str) -> None:
    header = {t: entry("F32", [1], 4 * i, 4 * i + 4) for i, t in enumerate(tensors)}
    write_safetensors(folder / name, header, np.arange(len(tensors), dtype="<f4").tobytes())


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    values = torch.randn(5, 7) * 3
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8,
              torch.int16, torch.int32, torch.int64, torch.uint8]  # fmt: skip
    tensors = {str(dtype): values.abs().to(dtype) for dtype in dtypes}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 3)
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    held = read_safetensors(tmp_path / "m.safetensors")
    assert held.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert held[name].shape == tuple(tensor.shape)
        if name != "scalar":
            np.testing.assert_array_equal(read_all(held[name]), tensor.float().numpy())
    assert held["scalar"].read(0, 1).item() == 2.5


def test_shards_make_one_table(folder: Path) -> None:
    shard(folder, "a.safetensors", "x", "y")
    shard(folder, "b.safetensors", "z")
    write_shards(folder, {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"})
    held = read_huggingface(folder)
    assert {name: read_all(t).item() for name, t in held.tensors.items()} == {
        "x": 0, "y": 1, "z": 0,
    }  # fmt: skip
    assert [file.path.name for file in held.files] == ["a.safetensors", "b.safetensors"]


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder, "a.safetensors", "x")
    write_shards(folder, {"x": "a.safetensors", "z": "b.safetensors"})
    with pytest.raises(FormatError, match=r"b\.safetensors: this shard is missing"):
        read_huggingface(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shard(folder, "a.safetensors", "x", "y")
    shard(folder, "b.safetensors", "y")
    write_shards(folder, {"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(FormatError, match=r"'y' is also in a\.safetensors"):
        read_huggingface(folder)


def test_a_tensor_that_its_shard_lacks_is_named(folder: Path) -> None:
    shard(folder, "a.safetensors", "x")
    write_shards(folder, {"x": "a.safetensors", "y": "a.safetensors"})
    with pytest.raises(FormatError, match="'y' is not in it"):
        read_huggingface(folder)


@pytest.mark.parametrize(
    "location", ["../a.safetensors", "/etc/a.safetensors", "d/a.safetensors", "..\\a.safetensors",
                 "a.bin", 3, None],
)  # fmt: skip
def test_an_index_cannot_leave_its_directory(folder: Path, location: Any) -> None:
    inside = folder / "inside"
    inside.mkdir()
    (inside / "config.json").write_text("{}")
    shard(folder, "a.safetensors", "x")
    write_shards(inside, {"x": location})
    with pytest.raises(FormatError, match="weight_map "):
        read_huggingface(inside)


def test_pickled_weights_get_a_hint(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(FormatError, match=r"neither model\.safetensors nor"):
        read_huggingface(folder)


@pytest.mark.parametrize(
    ("header", "error", "said"),
    [
        (b"[]", FormatError, "not a JSON object"),
        (b"{", FormatError, "not JSON"),
        (b'{"\xff": {}}', FormatError, "not UTF-8"),
        (b"[" * 100_000, FormatError, "deeply"),
        (b'{"x":' + b"9" * 5000 + b"}", FormatError, "not JSON"),
        (b'{"x": {}, "x": {}}', FormatError, "'x' appears twice"),
        ({"x": []}, FormatError, "'x' is [], not a table"),
        ({"x": {"dtype": "F32", "shape": [1]}}, FormatError, "'x': data_offsets is missing"),
        ({"x": entry("F32", [-1], 0, 4)}, FormatError, "'x': shape[0] is -1, not an integer >= 0"),
        ({"x": entry("F32", [1], 4, 0)}, FormatError, "data_offsets"),
        ({"x": entry("F32", [2], 0, 4)}, FormatError, "takes 8 bytes but 4"),
        ({"x": entry("F32", [2], 0, 8)}, TruncatedError, "'x' ends at byte"),
        ({"x": entry("F32", [2**62, 2**62], 0, 4)}, FormatError, "'x'"),
        ({"x": entry("F8_E4M3", [4], 0, 4)}, UnsupportedError, "'x'"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: Any, error: type[AprError], said: str) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", header, b"1234")
    with pytest.raises(error) as caught:
        read_safetensors(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("size", [2**64 - 1, 2**40, 100_000_001, 1000])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"{}")
    with pytest.raises(FormatError):
        read_safetensors(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_fuzzed_files_give_only_our_errors(tmp_path_factory: Any, data: Any) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    write_safetensors(path, {"x": entry("F32", [2], 0, 8), "y": entry("BF16", [1], 8, 10)},
                      bytes(10))  # fmt: skip
    blob = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(blob[: data.draw(st.integers(0, len(blob)))])
    try:
        held = read_safetensors(path)
    except AprError as error:
        assert str(path) in str(error)
        return
    for tensor in held.values():
        tensor.read(0, min(1, tensor.shape[0]) if tensor.shape else 1)
