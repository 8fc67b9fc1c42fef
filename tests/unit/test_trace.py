"""APRT files, their sidecars, and writing directories of them all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprcore.dumps.directory import TraceDirectory
from aprcore.dumps.sidecar import Sidecar, read_sidecar
from aprcore.dumps.stage_file import read_stage_file, write_stage_file
from aprcore.dumps.writer import TraceWriter
from aprcore.ground.errors import AprError, FormatError, TraceError, TruncatedError
from aprcore.network.stages import StageKey
from tiny import leftovers, write_stages

NORM = StageKey(0, "attn_norm")
LOGITS = StageKey(None, "lm_head")
EMBEDDING = StageKey(0, "embedding")
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def aprt(layer: int, values: bytes, count: int | None = None) -> bytes:
    """An APRT file made from docs/formats.md alone."""
    return (
        b"APRT" + struct.pack("<II", layer, len(values) // 4 if count is None else count) + values
    )


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class TestStageFile:
    @given(layer=st.none() | st.integers(0, 2**32 - 2), words=st.lists(st.integers(0, 2**32 - 1)))
    def test_bytes_are_those_of_the_format_and_every_bit_survives(
        self, tmp_path_factory: pytest.TempPathFactory, layer: int | None, words: list[int]
    ) -> None:
        path = tmp_path_factory.mktemp("aprt") / "x.bin"
        bits = np.array(words, dtype="<u4")  # NaN payloads, signalling ones too, and infinities
        write_stage_file(path, layer, bits.view("<f4"))
        number = 0xFFFFFFFF if layer is None else layer
        assert path.read_bytes() == aprt(number, bits.tobytes())
        found_layer, values = read_stage_file(path)
        assert found_layer == layer
        assert values.view("<u4").tolist() == words

    def test_stores_float32_row_major(self, tmp_path: Path) -> None:
        path = tmp_path / "x.bin"
        write_stage_file(path, 1, np.asfortranarray(VALUES.astype(np.float64)))
        assert path.read_bytes() == aprt(1, VALUES.tobytes())

    @given(data=st.data())
    def test_a_file_of_another_length_is_refused(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        path = tmp_path_factory.mktemp("aprt") / "x.bin"
        content = aprt(0, VALUES.tobytes())
        cut = data.draw(st.integers(0, len(content) - 1))
        with pytest.raises(TruncatedError, match=f"{cut} bytes long") as caught:
            read_stage_file(put(path, content[:cut]))
        assert str(path) in str(caught.value)
        extra = data.draw(st.binary(min_size=1, max_size=9))
        with pytest.raises(FormatError, match="promises 6 values") as longer:
            read_stage_file(put(path, content + extra))
        assert not isinstance(longer.value, TruncatedError)

    @given(content=st.binary(max_size=64))
    def test_garbage_is_a_format_error(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes
    ) -> None:
        path = put(tmp_path_factory.mktemp("aprt") / "x.bin", content)
        if content[:4] == b"APRT" and len(content) >= 12:
            return
        with pytest.raises(FormatError):
            read_stage_file(path)

    def test_a_promise_of_sixteen_gigabytes_costs_nothing(self, tmp_path: Path) -> None:
        path = put(tmp_path / "x.bin", aprt(0, b"", count=0xFFFFFFFF))
        with pytest.raises(TruncatedError, match="promises 4294967295 values"):
            read_stage_file(path)

    @pytest.mark.parametrize(
        ("header", "place"),
        [(1, NORM), (0xFFFFFFFF, NORM), (0, LOGITS)],
    )
    def test_the_header_must_agree_with_the_folder(
        self, tmp_path: Path, header: int, place: StageKey
    ) -> None:
        path = put(tmp_path / f"{place.path}.bin", aprt(header, VALUES.tobytes()))
        with pytest.raises(
            FormatError, match=r"its header says .* its place in the directory says"
        ):
            TraceDirectory(tmp_path).read(place)
        assert read_stage_file(path)[1].size == 6  # on its own it is fine

    def test_what_cannot_be_opened_is_named(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.bin")  # reading it would wait for a writer
        for path in (tmp_path / "none.bin", tmp_path, tmp_path / "pipe.bin"):
            with pytest.raises(TraceError, match=r"cannot be read|not a regular file") as caught:
                read_stage_file(path)
            assert str(path) in str(caught.value)


class TestDirectory:
    def test_tensors_are_listed_in_the_order_of_computation(self, tmp_path: Path) -> None:
        keys = [LOGITS, StageKey(10, "attn_norm"), StageKey(2, "ffn_up"), StageKey(2, "attn_norm"),
                EMBEDDING]  # fmt: skip
        for key in keys:
            number = 0xFFFFFFFF if key.layer is None else key.layer
            put(tmp_path / f"{key.path}.bin", aprt(number, VALUES.tobytes()))
        directory = TraceDirectory(tmp_path)
        assert [key.path for key in directory.keys()] == [
            "layer-0/embedding", "layer-2/attn_norm", "layer-2/ffn_up", "layer-10/attn_norm",
            "lm_head",
        ]  # fmt: skip
        assert directory.num_layers == 11
        assert directory.counts[NORM._replace(layer=2)] == 6
        assert directory.sidecar == Sidecar()

    def test_files_that_are_no_stage_are_left_out_and_named(self, tmp_path: Path) -> None:
        put(tmp_path / "layer-0/attn_norm.bin", aprt(0, VALUES.tobytes()))
        for name in (
            "layer-0/foo.bin",
            "attn_norm.bin",
            "layer-0/lm_head.bin",
            "layer-x/ffn_up.bin",
        ):
            put(tmp_path / name, b"not a stage file")
        put(tmp_path / "layer-0/ffn_up.txt", b"")
        (tmp_path / "layer-0/ffn_gate.bin").mkdir()
        os.mkfifo(tmp_path / "layer-0/ffn_out.bin")
        directory = TraceDirectory(tmp_path)
        assert directory.keys() == (NORM,)
        assert directory.ignored == (
            "attn_norm", "layer-0/foo", "layer-0/lm_head", "layer-x/ffn_up"
        )  # fmt: skip

    @pytest.mark.parametrize("header", [0, 0xFFFFFFFF])
    def test_the_embedding_may_lie_at_the_top(self, tmp_path: Path, header: int) -> None:
        put(tmp_path / "embedding.bin", aprt(header, VALUES.tobytes()))
        directory = TraceDirectory(tmp_path)
        assert directory.keys() == (EMBEDDING,)
        np.testing.assert_array_equal(directory.read(EMBEDDING), VALUES.reshape(-1))

    def test_layer_output_is_the_residual(self, tmp_path: Path) -> None:
        put(tmp_path / "layer-4/layer_output.bin", aprt(4, VALUES.tobytes()))
        directory = TraceDirectory(tmp_path)
        assert directory.keys() == (StageKey(4, "post_ffn_residual"),)
        assert directory.read(StageKey(4, "post_ffn_residual")).size == 6

    @pytest.mark.parametrize(
        ("alias", "canonical"),
        [("embedding", "layer-0/embedding"),
         ("layer-0/layer_output", "layer-0/post_ffn_residual"),
         ("layer-00/attn_norm", "layer-0/attn_norm")],
    )  # fmt: skip
    def test_the_canonical_place_wins_over_other_spellings(
        self, tmp_path: Path, alias: str, canonical: str
    ) -> None:
        put(tmp_path / f"{alias}.bin", aprt(0, (VALUES + 1).tobytes()))
        put(tmp_path / f"{canonical}.bin", aprt(0, VALUES.tobytes()))
        directory = TraceDirectory(tmp_path)
        (key,) = directory.keys()
        np.testing.assert_array_equal(directory.read(key), VALUES.reshape(-1))

    def test_what_is_no_directory_of_stages_is_refused(self, tmp_path: Path) -> None:
        put(tmp_path / "file", b"")
        (tmp_path / "empty").mkdir()
        put(tmp_path / "foreign/readme.bin", b"")
        cases = {
            "none": "does not exist", "file": "is not a directory", "empty": "holds no stage files",
            "foreign": "holds no stage files", "x" * 300: "cannot be read",
        }  # fmt: skip
        for name, words in cases.items():
            with pytest.raises(TraceError, match=words) as caught:
                TraceDirectory(tmp_path / name)
            assert name in str(caught.value)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_an_unreadable_directory_is_refused(self, tmp_path: Path) -> None:
        inside = put(tmp_path / "closed/layer-0/attn_norm.bin", b"").parent
        (tmp_path / "closed").chmod(0)
        try:
            for path in (tmp_path / "closed", inside):
                with pytest.raises(TraceError, match="Permission denied"):
                    TraceDirectory(path)
        finally:
            (tmp_path / "closed").chmod(0o700)

    def test_files_of_an_earlier_run_are_not_read(self, tmp_path: Path) -> None:
        write_stages(tmp_path, {NORM: VALUES, StageKey(5, "ffn_up"): VALUES})
        write_stages(tmp_path, {NORM: VALUES + 1})
        assert (tmp_path / "layer-5/ffn_up.bin").exists()  # never cleaned
        directory = TraceDirectory(tmp_path)
        assert directory.keys() == (NORM,)
        assert directory.read(NORM)[0] == 1

    def test_a_file_that_shrinks_or_vanishes_after_listing_is_an_error(
        self, tmp_path: Path
    ) -> None:
        big = np.zeros(1 << 20, np.float32)
        write_stages(tmp_path, {NORM: big, LOGITS: VALUES})
        directory = TraceDirectory(tmp_path)
        os.truncate(directory.file(NORM), 4096)
        with pytest.raises(TruncatedError):
            directory.read(NORM)
        directory.file(NORM).unlink()
        with pytest.raises(TraceError, match="No such file"):
            directory.read(NORM)
        assert directory.read(LOGITS).size == 6

    def test_a_file_that_shrinks_while_it_is_read_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = put(tmp_path / "x.bin", aprt(0, np.zeros(1 << 20, np.float32).tobytes()))
        status = path.stat()
        monkeypatch.setattr(os, "fstat", lambda _: status)  # as it was a moment ago
        os.truncate(path, 4096)
        with pytest.raises(TruncatedError, match="ends 4190220 bytes early"):
            read_stage_file(path)


class TestSidecar:
    SIDECAR = Sidecar(
        tokens=(3838, 374), prompt="What\nis [b]?", positions=(0, 1),
        model={"file": "m.apr", "sha256": "00", "size_bytes": 5, "architecture": "qwen2"},
        backend="numpy", device="cpu", driver="d", arithmetic="f32", dtype="float32",
        attention="eager", versions={"numpy": "2"}, created_utc="2026-01-01T00:00:00+00:00",
    )  # fmt: skip

    def test_round_trips_with_the_shapes_of_what_was_written(self, tmp_path: Path) -> None:
        with TraceWriter(tmp_path, self.SIDECAR) as writer:
            writer.write(LOGITS, np.zeros(5, np.float64))
            writer.write(NORM, VALUES)
        found = TraceDirectory(tmp_path)
        stages = {
            "layer-0/attn_norm": {"shape": [2, 3], "dtype": "float32"},
            "lm_head": {"shape": [5], "dtype": "float32"},
        }
        assert found.sidecar.stages == stages
        assert list(found.sidecar.stages) == list(stages)
        assert found.shape(NORM) == (2, 3)
        record = json.loads((tmp_path / "_trace.json").read_text())
        assert set(record) == {
            "schema", "tokens", "prompt", "positions", "model", "backend", "device", "driver",
            "arithmetic", "dtype", "attention", "versions", "created_utc", "stages",
        }  # fmt: skip
        assert record["schema"] == "aprtui-trace-v1"
        assert record["created_utc"] == "2026-01-01T00:00:00+00:00"
        assert Sidecar(**{**vars_of(found.sidecar), "stages": None}) == self.SIDECAR

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "null", '{"schema": "other"}', "{}", '{"schema": 1}', "\ufeff{}",
         '{"schema": "aprtui-trace-v1", "tokens": "1,2"}',
         '{"schema": "aprtui-trace-v1", "tokens": [1, -2]}',
         '{"schema": "aprtui-trace-v1", "tokens": [1.0]}',
         '{"schema": "aprtui-trace-v1", "tokens": [true]}',
         '{"schema": "aprtui-trace-v1", "positions": {}}',
         '{"schema": "aprtui-trace-v1", "tokens": [' + "9" * 5000 + "]}",
         "[" * 100_000],
    )  # fmt: skip
    def test_a_malformed_sidecar_is_refused(self, tmp_path: Path, text: str) -> None:
        put(tmp_path / "layer-0/attn_norm.bin", aprt(0, VALUES.tobytes()))
        put(tmp_path / "_trace.json", text.encode())
        with pytest.raises(FormatError, match=r"_trace\.json"):
            TraceDirectory(tmp_path)

    def test_a_sidecar_that_is_not_utf8_is_refused(self, tmp_path: Path) -> None:
        put(tmp_path / "_trace.json", b'{"schema": "aprtui-trace-v1\xff"}')
        with pytest.raises(FormatError, match=r"_trace\.json"):
            read_sidecar(tmp_path)

    @pytest.mark.parametrize(
        "shape", [[-2, -3], [2], "23", [2.0, 3.0], [True, 6], None, {}, [2**70, 0], [10**30, 1]]
    )
    def test_a_recorded_shape_that_does_not_fit_is_not_believed(
        self, tmp_path: Path, shape: Any
    ) -> None:
        write_stages(tmp_path, {NORM: VALUES})
        record = json.loads((tmp_path / "_trace.json").read_text())
        record["stages"]["layer-0/attn_norm"]["shape"] = shape
        (tmp_path / "_trace.json").write_text(json.dumps(record))
        assert TraceDirectory(tmp_path).shape(NORM) is None

    def test_provenance_of_the_other_project(self, tmp_path: Path) -> None:
        put(tmp_path / "_PROVENANCE.txt",
            b"Model: Qwen2.5\nprompt: 'What is 2+2?'\ntokens: [3838, 374, 220]\ndtype: float16\n"
            b"no colon here\nurl: http://x:80/\n\xff\n")  # fmt: skip
        found = read_sidecar(tmp_path)
        assert found.tokens == (3838, 374, 220)
        assert found.prompt == "What is 2+2?"
        assert found.dtype == "float16"

    @pytest.mark.parametrize(
        "tokens", ["", "[]", "3838 374", "[1, x]", "[-1]", "[" + "9" * 5000 + "]"]
    )
    def test_provenance_that_cannot_be_understood_records_nothing(
        self, tmp_path: Path, tokens: str
    ) -> None:
        put(tmp_path / "_PROVENANCE.txt", f"tokens: {tokens}\n".encode())
        assert read_sidecar(tmp_path) == Sidecar()

    @given(text=st.text(max_size=60))
    def test_any_text_is_some_provenance(
        self, tmp_path_factory: pytest.TempPathFactory, text: str
    ) -> None:
        directory = tmp_path_factory.mktemp("provenance")
        (directory / "_PROVENANCE.txt").write_bytes(text.encode())
        assert isinstance(read_sidecar(directory), Sidecar)

    def test_our_sidecar_comes_first(self, tmp_path: Path) -> None:
        put(tmp_path / "_PROVENANCE.txt", b"tokens: [1]\n")
        write_stages(tmp_path, {NORM: VALUES}, tokens=(2,))
        assert read_sidecar(tmp_path).tokens == (2,)


def vars_of(sidecar: Sidecar) -> dict[str, Any]:
    return {name: getattr(sidecar, name) for name in Sidecar.__dataclass_fields__}


class TestWriter:
    """All of it or nothing, whatever happens."""

    def test_two_runs_give_identical_files(self, tmp_path: Path) -> None:
        for name in "ab":
            write_stages(tmp_path / name, {NORM: VALUES, LOGITS: VALUES}, created_utc="then")
        for name in ("layer-0/attn_norm.bin", "lm_head.bin", "_trace.json"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_creates_missing_folders_and_leaves_only_its_files(self, tmp_path: Path) -> None:
        write_stages(tmp_path / "x/y", {NORM: VALUES})
        assert leftovers(tmp_path) == [
            "x", "x/y", "x/y/_trace.json", "x/y/layer-0", "x/y/layer-0/attn_norm.bin"
        ]  # fmt: skip

    @pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit, TraceError])
    @pytest.mark.parametrize("is_new", [True, False])
    def test_an_error_inside_leaves_everything_as_it_was(
        self, tmp_path: Path, fault: type[BaseException], is_new: bool
    ) -> None:
        target = tmp_path / "deep/er"
        if not is_new:
            write_stages(target, {NORM: VALUES})
        before = snapshot(tmp_path)
        with pytest.raises(fault), TraceWriter(target, Sidecar()) as writer:
            writer.write(NORM, VALUES + 1)
            writer.write(StageKey(1, "ffn_up"), VALUES)
            raise fault("stop")
        assert snapshot(tmp_path) == before

    def test_a_full_disk_is_reported_and_nothing_remains(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = Path.open

        def open_full(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
            # A device that is always full stands in for the second file.
            full = Path("/dev/full")
            is_second = path.name == "lm_head.bin" and "w" in mode
            return opened(full if is_second else path, mode, *rest, **options)

        monkeypatch.setattr(Path, "open", open_full)
        with pytest.raises(TraceError, match="No space left on device") as caught:
            write_stages(tmp_path / "new", {NORM: VALUES, LOGITS: np.zeros(1 << 20)})
        assert str(tmp_path / "new") in str(caught.value)
        assert leftovers(tmp_path) == []

    def test_an_unusable_target_is_reported(self, tmp_path: Path) -> None:
        put(tmp_path / "file", b"kept")
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere/else")
        for name in ("file", "file/below", "dangling", "x" * 300):
            with pytest.raises(TraceError, match="cannot be written"):
                write_stages(tmp_path / name, {NORM: VALUES})
        assert leftovers(tmp_path) == ["dangling", "file"]
        assert (tmp_path / "file").read_bytes() == b"kept"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_read_only_folder_is_reported(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(TraceError, match="Permission denied"):
            write_stages(tmp_path / "new", {NORM: VALUES})
        tmp_path.chmod(0o700)
        assert leftovers(tmp_path) == []

    def test_the_folder_may_vanish_meanwhile(self, tmp_path: Path) -> None:
        with (
            pytest.raises(AprError, match="cannot be written"),
            TraceWriter(tmp_path / "new", Sidecar()) as writer,
        ):
            for hidden in tmp_path.iterdir():
                shutil.rmtree(hidden)
            writer.write(NORM, VALUES)
        assert leftovers(tmp_path) == []


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {name: (root / name).read_bytes() if (root / name).is_file() else None
            for name in leftovers(root)}  # fmt: skip
