"""A folder of named tensors: what is written is read, and a failure leaves nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aprcore.dumps.open import open_dump
from aprcore.dumps.sidecar import SIDECAR_NAME, Sidecar
from aprcore.dumps.tensor_folder import TENSORS_NAME, TensorFolderWriter
from aprcore.ground.errors import FormatError, TraceError
from aprcore.ground.precision import BFLOAT16
from aprcore.network.stages import StageKey

ATTN_NORM = StageKey(0, "attn_norm")


def _write(folder: Path, **tensors: np.ndarray) -> None:
    with TensorFolderWriter(folder, Sidecar(tokens=(5, 6, 7), backend="llama.cpp")) as writer:
        for name, values in tensors.items():
            writer.write(name.replace("_at_", "-"), [writer.hold(values)])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16.dtype])
def test_what_is_written_is_read_in_its_type(tmp_path: Path, dtype: np.dtype) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    _write(tmp_path / "dump", attn_norm_at_0=values, mask=np.zeros((3, 3), np.int32))
    dump = open_dump(tmp_path / "dump")
    assert dump.shape(ATTN_NORM) == (3, 4)
    assert np.array_equal(dump.read(ATTN_NORM), values.astype(np.float32).reshape(-1))
    assert dump.sidecar.tokens == (5, 6, 7)
    assert dump.sidecar.dtype == np.dtype(dtype).name
    assert dump.ignored == ("mask",)


def test_the_file_alone_is_read_with_the_sidecar_beside_it(tmp_path: Path) -> None:
    _write(tmp_path, attn_norm_at_0=np.ones((3, 4), np.float32))
    assert open_dump(tmp_path / TENSORS_NAME).sidecar.tokens == (5, 6, 7)


def test_a_folder_with_a_damaged_sidecar_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, attn_norm_at_0=np.ones((3, 4), np.float32))
    (tmp_path / SIDECAR_NAME).write_text("{", "utf-8")
    with pytest.raises(FormatError, match="JSON"):
        open_dump(tmp_path)


def test_pieces_are_joined_on_their_axis(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with TensorFolderWriter(tmp_path) as writer:
        pieces = [writer.hold(whole[:, :1]), writer.hold(whole[:, 1:])]
        writer.write("layer-0/q_post_rope", pieces, axis=1)
    assert np.array_equal(open_dump(tmp_path).read(StageKey(0, "q_post_rope")), whole.reshape(-1))


def test_the_safetensors_library_reads_it_too(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    values = np.arange(5, dtype=np.float32)
    _write(tmp_path, attn_norm_at_0=values, empty=np.empty((0, 4), np.float32))
    held = library.load_file(tmp_path / TENSORS_NAME)
    assert np.array_equal(held["attn_norm-0"], values)
    assert held["empty"].shape == (0, 4)


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    _write(tmp_path / "old", attn_norm_at_0=np.ones((3, 4), np.float32))
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    for name in ("old", "new"):
        with (
            pytest.raises(RuntimeError, match="on the way"),
            TensorFolderWriter(tmp_path / name) as w,
        ):
            w.write("attn_norm-0", [w.hold(np.zeros((3, 4), np.float32))])
            raise RuntimeError("on the way")
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_second_capture_takes_the_place_of_the_first(tmp_path: Path) -> None:
    _write(tmp_path, attn_norm_at_0=np.ones((3, 4), np.float32), l_out_at_0=np.ones((3, 4)))
    _write(tmp_path, attn_norm_at_0=np.zeros((3, 4), np.float32))
    dump = open_dump(tmp_path)
    assert dump.keys() == (ATTN_NORM,)
    assert not dump.read(ATTN_NORM).any()
    assert sorted(file.name for file in tmp_path.iterdir()) == [SIDECAR_NAME, TENSORS_NAME]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with (
        pytest.raises(TraceError, match="cannot be written"),
        TensorFolderWriter(tmp_path / "file" / "dump"),
    ):
        pass


def test_a_type_that_the_format_has_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="complex64"), TensorFolderWriter(tmp_path) as writer:
        writer.hold(np.zeros(3, np.complex64))
