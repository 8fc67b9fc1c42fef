"""Reading, verifying and writing .apr files."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aprcore.formats.apr import DTYPE_IDS, AprFlag, header_crc32, read_apr, verify_apr
from aprcore.formats.apr_writer import AprWriter, TensorEntry
from aprcore.ground.errors import (
    AprError,
    ChecksumError,
    FormatError,
    TruncatedError,
    UnsupportedError,
)
from aprcore.quant.types import FORMATS, BlockLayout, storage_size

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared is absent")

VALID = ("floats", "quantized", "rare")
# What the refusal must say, so that a file is refused for its own fault and not for another.
HOSTILE = {
    "apr1_magic": "another generation",
    "bad_header_crc": "header's checksum",
    "bad_magic": "GGUF file",
    "column_major": "column-major.*transpose",
    "cut_in_data": "'a' ends at byte 1024",
    "cut_in_index": "within 150 bytes",
    "data_offset_wraps": "18446744073709551584",
    "empty": "is empty",
    "encrypted_flag": "encrypted",
    "flipped_header_bit": "header's checksum",
    "four_billion_tensors": "4294967295 tensors do not fit",
    "four_bytes": "4 bytes are too few",
    "header_only": "64 bytes are too few",
    "huge_dims": "9223372036854775808x9223372036854775808",
    "index_offset_past_end": "index at byte 9223372036854775808",
    "lz4_flag": "LZ4",
    "metadata_4gb": "4294967295 bytes of metadata",
    "metadata_a_list": "not a JSON object",
    "metadata_bad_utf8": "not UTF-8",
    "metadata_not_json": "not JSON",
    "metadata_offset_past_end": "metadata needs 2 bytes",
    "name_runs_past_end": "name of 60000 bytes",
    "nine_dims": "9 dimensions",
    "sharded_flag": "shard",
    "size_too_big": "has 832 bytes but takes 768",
    "size_too_small": "has 64 bytes but takes 768",
    "unknown_dtype": "unknown type id 77",
    "unsorted_index": "'a' follows 'b'",
    "version_9": "version 9.0",
}
HOSTILE_DATA = ("bad_footer_crc", "flipped_weight_bit")


def write_file(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], metadata: Any = None
) -> Path:
    entries = [TensorEntry(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()]
    with AprWriter(path, metadata or {}, entries) as writer:
        for entry in writer.entries:
            content = tensors[entry.name][2]
            half = len(content) // 2
            writer.write(entry.name, content[:half])
            if entry.size_bytes:
                writer.write(entry.name, np.frombuffer(content[half:], np.uint8))
    return path


def small_file(path: Path) -> Path:
    ones = np.ones(70, np.float32).tobytes()
    return write_file(
        path,
        {"a": ("F32", (2, 35), ones), "b.q8": ("AprQ8", (35,), ones[:39]),
         "c.q4": ("Q4_0", (2, 64), ones[:72])},
        {"architecture": "llama", "hidden_size": 64},
    )  # fmt: skip


def repair_header(content: bytearray) -> None:
    """Give a damaged header the right checksum, so that what lies behind the check is reached."""
    content[40:44] = struct.pack("<I", header_crc32(bytes(content[:64])))


class TestGoldenFiles:
    @needs_golden
    @pytest.mark.parametrize("name", VALID)
    def test_values_are_right_bit_for_bit(self, name: str) -> None:
        apr = verify_apr(GOLDEN / "valid" / f"{name}.apr")
        assert apr.metadata == {"architecture": "llama", "name": name}
        with np.load(GOLDEN / "valid" / f"{name}.npz") as expected:
            assert set(apr.tensors) == set(expected)
            for key, tensor in apr.tensors.items():
                values = tensor.read(0, tensor.shape[0])
                assert values.shape == expected[key].shape
                assert values.tobytes() == expected[key].tobytes(), key

    @needs_golden
    def test_an_ambiguous_id_is_decided_by_size(self) -> None:
        tensors = read_apr(GOLDEN / "valid" / "quantized.apr").tensors
        rare = read_apr(GOLDEN / "valid" / "rare.apr").tensors
        ambiguous = ("apr_q4.legacy_id", "q4_1", "q5_0", "q5_1", "q8_0.shares_id_8")
        found = {name: tensors[name].dtype for name in ambiguous}
        assert found == {"apr_q4.legacy_id": "AprQ4", "q4_1": "Q4_1", "q5_0": "Q5_0",
                         "q5_1": "Q5_1", "q8_0.shares_id_8": "Q8_0"}  # fmt: skip
        assert [rare[name].dtype for name in ("f64", "i8", "u8")] == ["F64", "I8", "U8"]

    @needs_golden
    def test_every_hostile_file_is_in_the_table(self) -> None:
        stored = {path.stem for path in (GOLDEN / "hostile").glob("*.apr")}
        assert stored == {*HOSTILE, *HOSTILE_DATA}

    @needs_golden
    @pytest.mark.parametrize("name", HOSTILE)
    def test_a_hostile_file_is_refused_at_once(self, name: str) -> None:
        path = GOLDEN / "hostile" / f"{name}.apr"
        tracemalloc.start()
        started = time.thread_time()  # others may have the processor meanwhile
        try:
            with pytest.raises(FormatError, match=HOSTILE[name]) as caught:
                read_apr(path)
            elapsed_s = time.thread_time() - started
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert elapsed_s < 1
        assert peak_bytes < 20e6  # of the 200 MB that the whole process may take
        line = str(caught.value)
        assert f"{name}.apr: " in line
        assert "\n" not in line

    @needs_golden
    @pytest.mark.parametrize("name", HOSTILE_DATA)
    def test_damaged_data_opens_but_fails_verification(self, name: str) -> None:
        path = GOLDEN / "hostile" / f"{name}.apr"
        assert len(read_apr(path).tensors) == 2
        with pytest.raises(ChecksumError, match="file's checksum"):
            verify_apr(path)


class TestReading:
    def test_duplicate_keys_the_last_wins_and_null_is_kept(self, tmp_path: Path) -> None:
        path = write_file(tmp_path / "m.apr", {}, {"k": "12345", "x": None})
        content = bytearray(path.read_bytes())
        text = b'{"k": "12345", "x": null}'
        twice = b'{"k":1,"k":2,"x":null}'.ljust(len(text))
        content[64 : 64 + len(text)] = twice
        path.write_bytes(content)
        assert read_apr(path).metadata == {"k": 2, "x": None}

    def test_deeply_nested_metadata_is_refused(self, tmp_path: Path) -> None:
        depth = 200_000
        path = write_file(tmp_path / "m.apr", {}, {"k": "x" * (2 * depth)})
        content = bytearray(path.read_bytes())
        nested = b'{"k": ' + b"[" * depth
        content[64 : 64 + len(nested)] = nested
        path.write_bytes(content)
        with pytest.raises(FormatError, match="nests too deeply"):
            read_apr(path)

    def test_both_layout_flags_mean_column_major(self, tmp_path: Path) -> None:
        path = small_file(tmp_path / "m.apr")
        content = bytearray(path.read_bytes())
        content[6:8] = struct.pack("<H", AprFlag.ROW_MAJOR | AprFlag.COLUMN_MAJOR)
        repair_header(content)
        path.write_bytes(content)
        with pytest.raises(UnsupportedError, match="column-major"):
            read_apr(path)

    def test_a_tensor_does_not_reach_into_the_footer(self, tmp_path: Path) -> None:
        path = write_file(tmp_path / "m.apr", {"a": ("U8", (64,), bytes(64))})
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(TruncatedError, match="'a' ends at byte 256 but the data ends at 252"):
            read_apr(path)

    def test_duplicate_names_are_refused(self, tmp_path: Path) -> None:
        ones = np.ones(2, np.float32).tobytes()
        path = write_file(tmp_path / "m.apr", {"a": ("F32", (2,), ones), "b": ("F32", (2,), ones)})
        path.write_bytes(path.read_bytes().replace(b"\x01\0b", b"\x01\0a"))
        with pytest.raises(FormatError, match="'a' is there twice"):
            read_apr(path)

    def test_verify_reports_progress_to_the_end(self, tmp_path: Path) -> None:
        size = 5 * 1024 * 1024
        path = write_file(tmp_path / "m.apr", {"a": ("U8", (size,), bytes(size))})
        seen: list[tuple[int, int]] = []
        verify_apr(path, lambda done, total: seen.append((done, total)))
        total = path.stat().st_size - 4
        assert seen[-1] == (total, total)
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        assert len(seen) >= 5

    def test_verify_wants_reserved_bytes_zero(self, tmp_path: Path) -> None:
        path = small_file(tmp_path / "m.apr")
        content = bytearray(path.read_bytes())
        content[50] = 1
        repair_header(content)
        path.write_bytes(content)
        read_apr(path)
        with pytest.raises(FormatError, match="reserved bytes of the header are not zero"):
            verify_apr(path)


def shapes_of(dtype: str) -> st.SearchStrategy[tuple[int, ...]]:
    row = FORMATS[dtype]
    leading = st.lists(st.integers(1, 4), max_size=2)
    if row.layout in (BlockLayout.PLAIN, BlockLayout.FLAT, BlockLayout.SCALED):
        return leading.flatmap(lambda dims: st.just(tuple(dims)))
    if row.layout is BlockLayout.PADDED_ROWS:
        last = st.integers(1, 600)
    else:
        last = st.integers(1, 3).map(lambda blocks: blocks * row.block_values)
    return st.tuples(leading, last).map(lambda pair: (*pair[0], pair[1]))


STORABLE = sorted({name for names in DTYPE_IDS.values() for name in names})
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=64)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    tensors = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=5)):
        dtype = draw(st.sampled_from(STORABLE))
        shape = draw(shapes_of(dtype))
        seed = draw(st.integers(0, 2**32))
        tensors[name] = dtype, shape, np.random.default_rng(seed).bytes(storage_size(dtype, shape))
    return tensors


class TestWriting:
    @settings(deadline=None, max_examples=100)
    @given(tensors=tensor_sets(), metadata=st.dictionaries(NAMES, JSON, max_size=4))
    def test_what_is_written_is_read(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        tensors: dict[str, tuple[str, tuple[int, ...], bytes]],
        metadata: dict[str, Any],
    ) -> None:
        assume(all(len(name.encode()) <= 256 for name in tensors))
        path = write_file(tmp_path_factory.getbasetemp() / "trip.apr", tensors, metadata)
        apr = verify_apr(path)
        assert apr.metadata == metadata
        assert list(apr.tensors) == sorted(tensors)
        for name, (dtype, shape, content) in tensors.items():
            found = apr.tensors[name]
            assert (found.dtype, found.shape) == (dtype, shape)
            assert apr.file.read_bytes(found.offset_bytes, found.size_bytes) == content
            assert (found.offset_bytes - apr.header.data_offset_bytes) % 64 == 0
            assert math.prod(found.read(0, shape[0] if shape else 1).shape) == math.prod(shape)
        apr.close()

    def test_the_layout_is_that_of_the_format(self, tmp_path: Path) -> None:
        path = small_file(tmp_path / "m.apr")
        content = path.read_bytes()
        fields = struct.unpack_from("<4sBBHIQIQQI20s", content)
        metadata = json.dumps({"architecture": "llama", "hidden_size": 64}).encode()
        flags = AprFlag.ROW_MAJOR | AprFlag.QUANTIZED
        assert fields[:9] == (b"APR\0", 2, 0, flags, 3, 64, len(metadata), 128, 256)
        assert fields[10] == bytes(20)
        assert content[64:128] == metadata.ljust(64, b"\0")
        assert content[128:132] == b"\x01\0a\x00"
        assert len(content) % 64 == 4
        assert AprWriter(path, {"architecture": "llama", "hidden_size": 64}, [
            TensorEntry("a", "F32", (2, 35)), TensorEntry("b.q8", "AprQ8", (35,)),
            TensorEntry("c.q4", "Q4_0", (2, 64))]).size_bytes == len(content)  # fmt: skip

    def test_flags_tell_of_vocabulary_and_quantisation(self, tmp_path: Path) -> None:
        floats = {"a": ("F16", (2,), bytes(4)), "b": ("BF16", (2,), bytes(4))}
        path = write_file(tmp_path / "m.apr", floats, {"tokenizer.vocabulary": ["x"]})
        assert read_apr(path).flags == AprFlag.ROW_MAJOR | AprFlag.HAS_VOCAB

    @pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
    def test_after_an_error_the_old_file_stands(
        self, tmp_path: Path, fault: type[BaseException]
    ) -> None:
        path = tmp_path / "m.apr"
        path.write_bytes(b"old")
        with pytest.raises(fault), AprWriter(path, {}, [TensorEntry("a", "F32", (9,))]) as writer:
            writer.write("a", np.ones(3, np.float32))
            assert len(list(tmp_path.iterdir())) == 2
            raise fault
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_tensor_must_be_complete_and_in_turn(self, tmp_path: Path) -> None:
        entries = [TensorEntry("b", "F32", (2,)), TensorEntry("a", "F32", (2,))]

        def write(name: str, content: bytes) -> None:
            with AprWriter(tmp_path / "m.apr", {}, entries) as writer:
                writer.write(name, content)

        with pytest.raises(ValueError, match="'b' is not complete"):
            write("a", bytes(8))
        with pytest.raises(ValueError, match="not the turn of 'b'"):
            write("b", bytes(8))
        with pytest.raises(ValueError, match="'a' takes 8 bytes, not 9"):
            write("a", bytes(9))
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("the system has no /dev/full")
        monkeypatch.setattr(Path, "open", lambda *args, **kwargs: open("/dev/full", "wb"))  # noqa: PTH123, SIM115
        with pytest.raises(AprError, match=r"m\.apr: the disk is full; free space"):
            write_file(tmp_path / "m.apr", {"a": ("U8", (1 << 22,), bytes(1 << 22))})
        assert list(tmp_path.iterdir()) == []

    def test_a_file_that_may_not_grow_leaves_nothing(self, tmp_path: Path) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            with pytest.raises(AprError, match="cannot be written: File too large"):
                write_file(tmp_path / "m.apr", {"a": ("U8", (1 << 22,), bytes(1 << 22))})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []

    def test_targets_that_cannot_be(self, tmp_path: Path) -> None:
        with pytest.raises(AprError, match="no such folder"):
            write_file(tmp_path / "none" / "m.apr", {})
        for target in (tmp_path, Path(os.devnull)):
            with pytest.raises(AprError, match="is not a regular file"):
                write_file(target, {})
        with pytest.raises(AprError, match="cannot be written"):
            (tmp_path / "file").touch()
            write_file(tmp_path / "file" / "m.apr", {})

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
    def test_a_read_only_folder_is_one_line(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(AprError, match="the folder cannot be written"):
            write_file(tmp_path / "m.apr", {})

    def test_what_the_format_cannot_hold(self, tmp_path: Path) -> None:
        def refuse(words: str, *entries: TensorEntry, metadata: Any = None) -> None:
            with pytest.raises(FormatError, match=words):
                AprWriter(tmp_path / "m.apr", metadata or {}, entries)

        a = TensorEntry("a", "F32", (1,))
        refuse("'a' is given twice", a, a)
        refuse("longer than 256 bytes", TensorEntry("é" * 129, "F32", (1,)))
        refuse("no id for Q2_K", TensorEntry("a", "Q2_K", (256,)))
        refuse("more than 8 dimensions", TensorEntry("a", "F32", (1,) * 9))
        refuse("metadata cannot be written", metadata={"x": math.nan})
        refuse("more than the 16777216 allowed", metadata={"x": "y" * (16 << 20)})


class TestDamage:
    """Whatever bytes a file has, reading it gives an `AprError` or a tensor, nothing else."""

    @pytest.fixture(scope="class")
    def content(self, tmp_path_factory: pytest.TempPathFactory) -> bytes:
        return small_file(tmp_path_factory.mktemp("damage") / "m.apr").read_bytes()

    @settings(deadline=None, max_examples=400)
    @given(
        flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=6),
        cut=st.none() | st.integers(0, 10_000),
        repair=st.booleans(),
    )
    def test_any_damage(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        content: bytes,
        flips: list[tuple[int, int]],
        cut: int | None,
        repair: bool,
    ) -> None:
        damaged = bytearray(content)
        for position, change in flips:
            # Half of the flips go into header, metadata and index, where the decisions are.
            limit = 256 if position % 2 else len(damaged)
            damaged[position // 2 % limit] ^= change
        if cut is not None:
            del damaged[cut % len(damaged) :]
        if repair and len(damaged) >= 64:
            repair_header(damaged)
        path = tmp_path_factory.getbasetemp() / "damaged.apr"
        path.write_bytes(damaged)
        try:
            apr = read_apr(path)
        except AprError as error:
            assert str(error).count("\n") == 0
        else:
            for tensor in apr.tensors.values():
                rows = tensor.shape[0] if tensor.shape else 1
                values = tensor.read(0, rows)
                assert values.size == math.prod(tensor.shape)
            apr.close()
        if damaged == content:
            verify_apr(path).close()
        else:
            with pytest.raises(AprError):
                verify_apr(path)

    @settings(deadline=None, max_examples=100)
    @given(content=st.binary(max_size=400), magic=st.booleans())
    def test_any_bytes(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes, magic: bool
    ) -> None:
        whole = bytearray(b"APR\0\2\0\0\4" + content if magic else content)
        if len(whole) >= 64:
            repair_header(whole)
        path = tmp_path_factory.getbasetemp() / "random.apr"
        path.write_bytes(whole)
        with pytest.raises(AprError):
            verify_apr(path)

    def test_shrinking_while_open_is_an_error(self, tmp_path: Path) -> None:
        apr = read_apr(small_file(tmp_path / "m.apr"))
        os.truncate(apr.path, 300)
        with pytest.raises(TruncatedError, match="replaced while open"):
            apr.tensors["a"].read(0, 2)

    def test_an_input_error_is_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        apr = read_apr(small_file(tmp_path / "m.apr"))

        def fail(*args: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(FormatError, match="cannot be read: Input/output error"):
            apr.tensors["a"].read(0, 1)
