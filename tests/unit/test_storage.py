"""The open file, the cursor and the stored tensor."""

from __future__ import annotations

import gc
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprcore.formats.apr_writer import TensorEntry
from aprcore.formats.storage import PIECE_BYTES, StoredTensor
from aprcore.ground.data_file import Cursor, DataFile
from aprcore.ground.errors import FormatError, TruncatedError, UnsupportedError
from aprcore.models.convert import TensorPlan, encode_tensor
from aprcore.models.import_types import ImportTypes
from aprcore.models.names import SplitHalves
from aprcore.quant.types import storage_size
from stored_weights import random_bytes, random_tensor, stored_tensor

Write = Callable[[bytes], DataFile]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Puts bytes into a file and opens it."""

    def make(content: bytes) -> DataFile:
        path = tmp_path / "data.bin"
        path.write_bytes(content)
        return DataFile(path)

    return make


def tensor(file: DataFile, dtype: str, *shape: int, offset: int = 0) -> StoredTensor:
    return StoredTensor("t", shape, dtype, file, offset, storage_size(dtype, shape))


class TestDataFile:
    def test_reads_by_position(self, write: Write) -> None:
        file = write(b"abcdef")
        assert file.size_bytes == 6
        assert file.read_bytes(2, 3) == b"cde"
        buffer = np.zeros((2, 2), np.uint8)
        file.read_into(1, buffer)
        assert buffer.tobytes() == b"bcde"

    def test_refuses_what_is_not_a_file_with_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "file").write_bytes(b"x")
        for name, words in {
            "missing": "no such file",
            "file/below": "no such file",
            ".": "is a directory",
            "empty": "is empty",
            "pipe": "not a regular file",
            "n\0ul": "not a file name",
            "x" * 300: "cannot be opened",
        }.items():
            with pytest.raises(FormatError, match=words):
                DataFile(f"{tmp_path}/{name}")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_refuses_an_unreadable_file(self, tmp_path: Path) -> None:
        path = tmp_path / "secret"
        path.write_bytes(b"x")
        path.chmod(0)
        with pytest.raises(FormatError, match="permission denied"):
            DataFile(path)

    def test_a_file_that_shrinks_is_an_error_not_a_crash(self, write: Write) -> None:
        file = write(bytes(8192))
        os.truncate(file.path, 100)
        with pytest.raises(TruncatedError, match=r"data\.bin.*replaced while open"):
            file.read_into(0, np.empty(8192, np.uint8))

    def test_checks_the_size_before_allocating(self, write: Write) -> None:
        with pytest.raises(TruncatedError, match="4 bytes in all"):
            write(b"abcd").read_bytes(0, 1 << 60)

    def test_closes_with_the_last_reference(self, write: Write) -> None:
        def is_open() -> bool:
            # Not how many there are: the collector closes what other tests left to it, too.
            links = Path("/proc/self/fd").iterdir()
            return any(os.path.realpath(link) == str(path) for link in links)

        file = write(b"abcd")
        path = file.path
        assert is_open()
        del file
        gc.collect()
        assert not is_open()

    def test_reading_a_closed_file_is_a_value_error(self, write: Write) -> None:
        with write(b"abcd") as file:
            pass
        file.close()
        with pytest.raises(ValueError, match="is closed"):
            file.read_bytes(0, 1)


class TestCursor:
    def test_reads_every_kind_in_order(self, write: Write) -> None:
        content = struct.pack("<BHIQ", 1, 2, 3, 4) + "é".encode() + b"tail"
        cursor = Cursor(write(content))
        found = cursor.u8(), cursor.u16(), cursor.u32(), cursor.u64(), cursor.text(2)
        assert found == (1, 2, 3, 4, "é")
        assert cursor.remaining_bytes == 4
        assert cursor.take(4) == b"tail"

    def test_names_the_file_the_part_and_the_offset(self, write: Write) -> None:
        cursor = Cursor(write(b"abcdef"), 2, 5, "tensor index")
        cursor.u16()
        with pytest.raises(TruncatedError, match=r"data\.bin.*tensor index needs 8.*byte 4\)"):
            cursor.u64()
        with pytest.raises(TruncatedError):
            cursor.take(1 << 62)

    def test_refuses_text_that_is_not_utf8(self, write: Write) -> None:
        with pytest.raises(FormatError, match=r"not UTF-8 \(at byte 1\)"):
            Cursor(write(b"a\xff\xfe"), 1).text(2)

    def test_crosses_its_window(self, write: Write) -> None:
        numbers = np.arange(50_000, dtype="<u4")
        cursor = Cursor(write(b"\0\0\0" + numbers.tobytes()), 3)
        assert [cursor.u32() for _ in numbers] == numbers.tolist()


class TestStoredTensor:
    @pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64", "I8", "I64", "U8"])
    def test_rows_are_those_of_numpy(self, write: Write, dtype: str) -> None:
        values = np.arange(-60, 60, dtype=np.float64).reshape(6, 4, 5)
        if dtype == "U8":
            values += 60
        if dtype == "BF16":
            stored = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
        else:
            numbers = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I64": "<i8"}
            stored = values.astype(numbers.get(dtype, "u1"))
        weight = tensor(write(b"pad" + stored.tobytes()), dtype, 6, 4, 5, offset=3)
        np.testing.assert_array_equal(weight.read(0, 6), values.astype(np.float32))
        rows = weight.read(2, 5)
        assert rows.shape == (3, 4, 5)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, values[2:5])

    @pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q4_K", "AprQ4", "AprQ8"])
    def test_any_rows_equal_those_of_the_whole(self, write: Write, dtype: str) -> None:
        cols = 320 if dtype != "Q4_K" else 300  # AprQ4 rows begin in blocks of others only at 300
        cols = 300 if dtype == "AprQ4" else cols
        size = storage_size(dtype, (7, cols))
        content = np.random.default_rng(1).integers(0, 120, size, dtype=np.uint8).tobytes()
        weight = tensor(write(content), dtype, 7, cols)
        whole = weight.read(0, 7)
        for start in range(8):
            for stop in range(start, 8):
                rows = weight.read(start, stop)
                assert rows.tobytes() == whole[start:stop].tobytes()

    @pytest.mark.parametrize("dtype", ["F16", "AprQ4", "AprQ8", "Q8_0"])
    def test_pieces_join_without_a_seam(self, write: Write, dtype: str) -> None:
        rows, cols = 3, PIECE_BYTES + 32
        size = storage_size(dtype, (rows, cols))
        content = np.random.default_rng(2).integers(0, 120, size, dtype=np.uint8).tobytes()
        file = write(content)
        whole = tensor(file, dtype, rows, cols).read(0, rows)
        narrow = tensor(file, dtype, rows * cols // 32, 32).read(0, rows * cols // 32)
        assert whole.tobytes() == narrow.tobytes()

    def test_reads_float32_straight_into_the_buffer(self, write: Write) -> None:
        values = np.arange(12, dtype=np.float32)
        values[5] = np.uint32(0x7FA0_1234).view(np.float32)  # a signalling NaN keeps its bits
        buffer = np.full(20, 9, np.float32)
        rows = tensor(write(values.tobytes()), "F32", 4, 3).read(1, 3, buffer)
        assert np.shares_memory(rows, buffer)
        assert rows.shape == (2, 3)
        assert buffer[:6].tobytes() == values[3:9].tobytes()
        assert (buffer[6:] == 9).all()

    def test_refuses_rows_and_buffers_out_of_range(self, write: Write) -> None:
        weight = tensor(write(bytes(48)), "F32", 4, 3)
        for start, stop in ((-1, 2), (0, 5), (3, 2)):
            with pytest.raises(IndexError, match="which has 4"):
                weight.read(start, stop)
        for buffer in (np.empty(5, np.float32), np.empty(6), np.empty((12,), np.float32)[::2]):
            with pytest.raises(ValueError, match="need 6 contiguous float32"):
                weight.read(0, 2, buffer)  # type: ignore[arg-type]

    def test_takes_scalars_and_empty_tensors(self, write: Write) -> None:
        file = write(np.float32(3.5).tobytes())
        assert tensor(file, "F32").read(0, 1).tolist() == [3.5]
        assert tensor(file, "F32", 0, 7).read(0, 0).shape == (0, 7)
        assert tensor(file, "Q8_0", 2, 0).read(0, 2).shape == (2, 0)

    def test_says_which_size_is_wrong(self, write: Write) -> None:
        file = write(bytes(100))
        with pytest.raises(FormatError, match=r"'t' \(F32, 2x3\) takes 24 bytes but 20"):
            StoredTensor("t", (2, 3), "F32", file, 0, 20)
        with pytest.raises(TruncatedError, match="'t' ends at byte 104 but the file has 100"):
            StoredTensor("t", (2, 3), "F32", file, 80, 24)
        with pytest.raises(UnsupportedError, match="'t': unsupported tensor type 'F8_E4M3'"):
            StoredTensor("t", (2, 3), "F8_E4M3", file, 0, 6)
        with pytest.raises(FormatError, match="'t' has an absurd shape"):
            StoredTensor("t", (1 << 40, 1 << 40, 0), "F32", file, 0, 0)
        with pytest.raises(UnsupportedError, match="not whole Q4_0 blocks"):
            StoredTensor("t", (2, 33), "Q4_0", file, 0, 36)

    def test_threads_do_not_share_a_buffer(self, write: Write) -> None:
        values = np.arange(400_000, dtype=np.float32) % 2048
        weight = tensor(write(values.astype(np.float16).tobytes()), "F16", 400, 1000)
        wrong: list[int] = []

        def check(first: int) -> None:
            for row in range(first, 400, 4):
                if not np.array_equal(weight.read(row, row + 1)[0], values[row * 1000 :][:1000]):
                    wrong.append(row)

        threads = [threading.Thread(target=check, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_raw_rows_are_the_stored_bytes(self, write: Write) -> None:
        content = np.random.default_rng(3).bytes(3 * 2 * 144)
        weight = tensor(write(content), "Q4_K", 3, 320)
        assert weight.read_raw(1, 3).tobytes() == content[288:]
        with pytest.raises(ValueError, match="no bytes of their own"):
            tensor(write(content), "AprQ4", 4, 8).read_raw(0, 1)

    @pytest.mark.parametrize(("dtype", "size"), [("Q8_0", 96), ("Q4_K", 600), ("AprQ4", 70)])
    def test_any_part_of_a_vector_in_blocks_is_that_of_the_whole(
        self, dtype: str, size: int
    ) -> None:
        vector = stored_tensor(dtype, (size,), random_bytes(dtype, (1, size), 4))
        row = stored_tensor(dtype, (1, size), random_bytes(dtype, (1, size), 4))
        whole = row.read(0, 1)[0]
        for start, stop in ((0, size), (0, 5), (30, 40), (33, 64), (size - 1, size), (7, 7)):
            assert np.array_equal(vector.read(start, stop), whole[start:stop]), (start, stop)

    def test_values_of_a_vector_in_blocks_have_no_bytes_of_their_own(self, tmp_path: Path) -> None:
        vector = random_tensor("Q8_0", (64,), 5)
        with pytest.raises(ValueError, match="the Q8_0 vector 'w' have no bytes of their own"):
            vector.read_raw(32, 64)
        # Such a vector is copied as it is, and one in another order of rows is made float.
        types = ImportTypes()
        assert types.choose(vector) == ("Q8_0", "")
        assert types.choose(SplitHalves("w", vector, 32)) == (
            "F32", "rows of Q8_0 cannot be taken apart"
        )  # fmt: skip
        plan = TensorPlan(vector, TensorEntry("w", "Q8_0", (64,)), "")
        copied = np.concatenate(list(encode_tensor(plan, tmp_path, {})))
        assert copied.tobytes() == random_bytes("Q8_0", (64,), 5)

    @given(data=st.binary(min_size=1, max_size=200), offset=st.integers(-5, 210),
           size=st.integers(0, 210))  # fmt: skip
    def test_never_accepts_an_extent_outside_the_file(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes, offset: int, size: int
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "extent.bin"
        path.write_bytes(data)
        with DataFile(path) as file:
            if offset >= 0 and offset + size <= len(data):
                found = StoredTensor("t", (size,), "U8", file, offset, size).read(0, size)
                assert found.tolist() == list(data[offset : offset + size])
            else:
                with pytest.raises(TruncatedError):
                    StoredTensor("t", (size,), "U8", file, offset, size)
