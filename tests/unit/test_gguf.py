"""GGUF files, whole, split and damaged."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from hypothesis import given, settings
from hypothesis import strategies as st

from aprcore.formats.gguf import read_gguf
from aprcore.ground.errors import AprError, FormatError, TruncatedError, UnsupportedError
from aprcore.network.weights import read_all

RNG = np.random.default_rng(7)


def write(path: Path, tensors: dict[str, Any], keys: dict[str, Any] | None = None) -> Path:
    """A file by the package's own writer; tensors are arrays or (raw bytes, type)."""
    writer = gguf.GGUFWriter(path, "qwen2")
    for key, (method, value) in (keys or {}).items():
        getattr(writer, method)(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind: Q, rows: int, blocks: int) -> np.ndarray:
    """Random bytes whose half-precision scales are ordinary numbers."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    raw = RNG.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    # A byte of 0x2. in the high half of every float16 keeps any two bytes finite and small.
    raw[..., 1::2] = (raw[..., 1::2] & 0x1F) | 0x20
    return raw.reshape(rows, -1)


KINDS = [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K,
         Q.IQ4_NL, Q.IQ4_XS, Q.TQ1_0, Q.TQ2_0, Q.BF16, Q.F16]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_package_reads_it(tmp_path: Path, kind: Q) -> None:
    block_values, _ = gguf.GGML_QUANT_SIZES[kind]
    raw = random_blocks(kind, 6, max(2, 64 // block_values))
    path = write(tmp_path / "m.gguf", {"pad": np.ones(3, np.float32), "x": (raw, kind)})
    tensor = read_gguf(path).tensors["x"]
    reference = gguf.GGUFReader(path).tensors[1]
    assert tensor.dtype == kind.name
    assert tensor.shape == tuple(reversed(reference.shape.tolist()))
    expected = gguf.quants.dequantize(reference.data, kind).astype(np.float32)
    assert np.isfinite(expected).all() and expected.std() > 0
    np.testing.assert_array_equal(tensor.read(1, 5), expected[1:5])


def test_dims_are_reversed_and_values_survive(tmp_path: Path) -> None:
    values = RNG.normal(size=(2, 3, 5)).astype(np.float32)
    path = write(tmp_path / "m.gguf", {"x": values, "half": values.astype(np.float16)})
    held = read_gguf(path)
    assert held.tensors["x"].shape == (2, 3, 5)
    np.testing.assert_array_equal(read_all(held.tensors["x"]), values)
    np.testing.assert_array_equal(read_all(held.tensors["half"]), values.astype(np.float16))


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment_is_respected(tmp_path: Path, alignment: int) -> None:
    values = RNG.normal(size=(3, 5)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_tensor("a", values[:1])
    writer.add_tensor("b", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    assert tensors["b"].offset_bytes % alignment == 0
    np.testing.assert_array_equal(read_all(tensors["b"]), values)


def test_key_values_of_every_type(tmp_path: Path) -> None:
    keys = {
        "u8": ("add_uint8", 200), "i8": ("add_int8", -3), "u16": ("add_uint16", 60000),
        "i16": ("add_int16", -300), "u32": ("add_uint32", 2**32 - 1), "i32": ("add_int32", -5),
        "u64": ("add_uint64", 2**63), "i64": ("add_int64", -(2**40)),
        "f32": ("add_float32", 1e-5), "f64": ("add_float64", 0.1), "yes": ("add_bool", True),
        "text": ("add_string", "é ▁\n"), "texts": ("add_array", ["a", "", "ü"]),
        "ints": ("add_array", [1, 2, 3]), "floats": ("add_array", [0.5, -1.0]),
        "flags": ("add_array", [True, False]),
    }  # fmt: skip
    metadata = read_gguf(write(tmp_path / "m.gguf", {"x": np.ones(1, np.float32)}, keys)).metadata
    assert {key: metadata[key] for key in keys} == {key: v for key, (_, v) in keys.items()}
    assert metadata["general.architecture"] == "qwen2"


def test_a_large_vocabulary_opens_quickly(tmp_path: Path) -> None:
    tokens = [f"token{i}" for i in range(150_000)]
    path = write(tmp_path / "m.gguf", {"x": np.ones(1, np.float32)},
                 {"tokenizer.ggml.tokens": ("add_array", tokens)})  # fmt: skip
    start = time.process_time()
    assert read_gguf(path).metadata["tokenizer.ggml.tokens"] == tokens
    assert time.process_time() - start < 1.5  # the package's reader takes several seconds


def write_parts(folder: Path, count: int) -> list[Path]:
    paths = []
    for number in range(count):
        keys = {"split.no": ("add_uint16", number), "split.count": ("add_uint16", count),
                "split.tensors.count": ("add_int32", count)}  # fmt: skip
        path = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
        paths.append(write(path, {f"t{number}": np.full(2, number, np.float32)}, keys))
    return paths


@pytest.mark.parametrize("named", [0, 2])
def test_split_files_are_one_model(tmp_path: Path, named: int) -> None:
    paths = write_parts(tmp_path, 3)
    held = read_gguf(paths[named])
    assert [read_all(held.tensors[f"t{n}"])[0] for n in range(3)] == [0, 1, 2]
    assert [file.path for file in held.files] == paths


def test_split_faults_name_the_part(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, 3)
    paths[1].rename(tmp_path / "aside")
    with pytest.raises(FormatError, match=r"m-00002-of-00003\.gguf: part 2 of 3 is missing"):
        read_gguf(paths[0])
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(paths[2].read_bytes())
    with pytest.raises(FormatError, match=r"00002-of-00003.*expected 1 and 3"):
        read_gguf(paths[0])
    with pytest.raises(FormatError, match=r"split\.count is 3"):
        read_gguf(paths[0].rename(tmp_path / "renamed.gguf"))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def info(name: str, dims: list[int], kind: int, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("blob", "error", "said"),
    [
        (b"GGUX" + bytes(40), FormatError, "does not begin with GGUF"),
        (b"GGUF", TruncatedError, ""),
        (header(version=1), UnsupportedError, "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedError, "big-endian"),
        (header(tensors=2**63), TruncatedError, "tensors"),
        (header(values=2**40), TruncatedError, "key-values"),
        (header(values=1) + struct.pack("<Q", 2**60) + bytes(20), FormatError, "claims"),
        (header(values=1) + pair("a", 77, bytes(8)), FormatError, "77 is no type"),
        (header(values=1) + pair("a", 9, struct.pack("<IQ", 0, 2**62)), TruncatedError, "numbers"),
        (header(values=1) + pair("a", 9, struct.pack("<IQ", 8, 2**61)), TruncatedError, "texts"),
        (header(values=1) + pair("a", 9, struct.pack("<IQ", 9, 1)), UnsupportedError, "arrays"),
        (header(values=2) + pair("a", 0, b"1") * 2, FormatError, "'a' appears twice"),
        (header(values=1) + pair("general.alignment", 4, struct.pack("<I", 24)), FormatError,
         "power of two"),
        (header(tensors=1) + info("x", [1] * 5, 0), FormatError, "5 dimensions"),
        (header(tensors=1) + info("x", [32], 999), UnsupportedError, "unknown type 999"),
        (header(tensors=1) + info("x", [33], 2), FormatError, "not whole Q4_0 blocks"),
        (header(tensors=1) + info("x", [200], 12), FormatError, "not whole Q4_K blocks"),
        (header(tensors=1) + info("x", [1], 0, offset=4) + bytes(64), FormatError, "alignment"),
        (header(tensors=1) + info("x", [2**20, 2**20], 0), TruncatedError, "'x' ends at"),
        (header(tensors=2) + info("x", [1], 0) * 2 + bytes(64), FormatError, "appears twice"),
    ],
    ids=range(20),
)  # fmt: skip
def test_damaged_files(tmp_path: Path, blob: bytes, error: type[AprError], said: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(blob)
    with pytest.raises(error) as caught:
        read_gguf(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: Any) -> bytes:
    keys = {"n": ("add_uint32", 3), "a": ("add_array", ["x", "yy"]), "f": ("add_float32", 2.0),
            "i": ("add_array", [1, 2, 3])}  # fmt: skip
    tensors = {"x": np.ones((4, 8), np.float32), "q": (random_blocks(Q.Q4_0, 2, 1), Q.Q4_0)}
    return write(tmp_path_factory.mktemp("sound") / "m.gguf", tensors, keys).read_bytes()


@settings(max_examples=400, deadline=1000)
@given(st.data())
def test_fuzzed_files_give_only_our_errors(tmp_path_factory: Any, sound: bytes, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    blob = bytearray(sound)
    for _ in range(data.draw(st.integers(0, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(blob[: data.draw(st.integers(len(blob) // 8, len(blob)))])
    try:
        held = read_gguf(path)
    except AprError as error:
        assert str(path) in str(error)
        return
    for tensor in held.tensors.values():
        tensor.read(0, min(1, tensor.shape[0]) if tensor.shape else 1)
