"""Reading a dump in one file: names, types, shapes, and files that are not what they say."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprcore.dumps.directory import TraceDirectory
from aprcore.dumps.name_map import read_name_map
from aprcore.dumps.names import SUM, Reading, known_dialects, mapped_dialect, resolve
from aprcore.dumps.open import ReadingOptions, TensorDump, is_tensor_file, open_dump
from aprcore.ground.errors import AprError, FormatError, PlanError, TraceError
from aprcore.network.graph import Graph, known_stages, outline
from aprcore.network.stages import Scope, StageKey
from dump_files import to_bfloat16, write_safetensors
from tiny import write_stages

NORM = StageKey(3, "attn_norm")
ONES = np.ones((2, 3), np.float32)


def graph(has_qkv_bias: bool = False) -> Graph:
    return outline(9, ("qkv_bias",) if has_qkv_bias else (), "llama")


def resolved(*names: str, has_qkv_bias: bool = False) -> dict[StageKey, tuple[str, ...]]:
    recipes, _ = resolve(names, known_dialects(names, graph(has_qkv_bias)))
    return {key: recipe.names for key, recipe in recipes.items()}


class TestNames:
    @pytest.mark.parametrize("end", ["", ".bin"])
    def test_our_own(self, end: str) -> None:
        for stage in known_stages().values():
            layer = {Scope.LAYER: 3, Scope.FIRST_LAYER: 0, Scope.MODEL: None}[stage.scope]
            key = StageKey(layer, stage.name)
            assert resolved(key.path + end) == {key: (key.path + end,)}
        assert resolved("layer-1/layer_output") == {
            StageKey(1, "post_ffn_residual"): ("layer-1/layer_output",)
        }

    @pytest.mark.parametrize(
        ("name", "stage"),
        [
            ("model.layers.3.input_layernorm", "attn_norm"),
            ("layers.3.input_layernorm.output", "attn_norm"),
            ("model.model.layers.3.input_layernorm.output.0", "attn_norm"),
            ("_orig_mod.model.layers.3.input_layernorm.0", "attn_norm"),
            ("model.layers.3.self_attn.qkv_proj", "qkv_matmul"),
            ("model.layers.3.self_attn", "attn_out"),
            ("model.layers.3.self_attn.output.0", "attn_out"),
            ("model.layers.3.self_attn.output.1", "attn_softmax"),
            ("model.layers.3.self_attn.o_proj", "attn_out"),
            ("model.layers.3.self_attn.o_proj.input", "attention"),
            ("model.layers.3.self_attn.o_proj.inputs.0", "attention"),
            ("model.layers.3.post_attention_layernorm.input", "post_attn_residual"),
            ("model.layers.3.post_attention_layernorm", "ffn_norm"),
            ("model.layers.3.mlp.act_fn", "ffn_silu"),
            ("model.layers.3.mlp.down_proj.input.0", "ffn_swigl"),
            ("model.layers.3.mlp.down_proj", "ffn_out"),
            ("model.layers.3.mlp", "ffn_out"),
            ("model.layers.3", "post_ffn_residual"),
            ("model.layers.3.output", "post_ffn_residual"),
            ("model.layers.3.0", "post_ffn_residual"),
            ("attn_norm-3", "attn_norm"),
            ("Qcur-3", "q_post_rope"),
            ("kq_soft_max_ext-3", "attn_softmax"),
            ("kqv_out-3", "attention"),
            ("kqv_merged_cont-3", "attention"),
            ("attn_out-3", "attn_out"),
            ("ffn_inp-3", "post_attn_residual"),
            ("ffn_gate_par-3", "ffn_swigl"),
            ("ffn_swiglu-3", "ffn_swigl"),
            ("l_out-3", "post_ffn_residual"),
        ],
    )
    def test_of_other_engines(self, name: str, stage: str) -> None:
        assert resolved(name) == {StageKey(3, stage): (name,)}

    @pytest.mark.parametrize(
        ("name", "stage"),
        [
            ("model.embed_tokens", "embedding"), ("inp_embd", "embedding"),
            ("model.norm.output", "final_norm"), ("result_norm", "final_norm"),
            ("lm_head", "lm_head"), ("logits", "lm_head"), ("result_output", "lm_head"),
        ],
    )  # fmt: skip
    def test_of_the_whole_model(self, name: str, stage: str) -> None:
        assert resolved(name) == {StageKey(0 if stage == "embedding" else None, stage): (name,)}

    @pytest.mark.parametrize(
        "name",
        [
            "x", "attn_norm", "attn_norm-", "attn_norm-x", "layer-3/lm_head", "Vcur-3",
            "model.layers.3.mlp.down_proj.weight", "model.layers.x", "attn_norm-3 (view)",
            "model.layers.3.self_attn.q_proj", "vision.layers.3.mlp", "model.layers.0.1",
            "model.layers.9999999999", "attn_norm-٣",
        ],
    )  # fmt: skip
    def test_what_is_no_stage(self, name: str) -> None:
        recipes, ignored = resolve([name], known_dialects([name], graph()))
        assert (recipes, ignored) == ({}, (name,))

    @pytest.mark.parametrize(("biased", "stage"), [(False, "qkv_matmul"), (True, "qkv_bias")])
    def test_projections_are_joined(self, biased: bool, stage: str) -> None:
        names = tuple(f"model.layers.3.self_attn.{x}_proj" for x in "qkv")
        assert resolved(*reversed(names), has_qkv_bias=biased) == {StageKey(3, stage): names}

    def test_the_old_llama_cpp_calls_the_projection_kqv_out(self) -> None:
        assert resolved("kqv_out-3", "kqv_merged_cont-3") == {
            StageKey(3, "attention"): ("kqv_merged_cont-3",),
            StageKey(3, "attn_out"): ("kqv_out-3",),
        }

    def test_a_second_name_for_the_same_is_no_stranger(self) -> None:
        names = ("model.layers.3.self_attn", "model.layers.3.self_attn.o_proj")
        recipes, ignored = resolve(names, known_dialects(names, graph()))
        assert recipes[StageKey(3, "attn_out")].names == names[1:]
        assert ignored == ()

    def test_scores_need_the_queries(self) -> None:
        assert resolved("kq-3") == {}
        names = ("kq-3", "Qcur-3")
        recipes, _ = resolve(names, known_dialects(names, graph()))
        found = recipes[StageKey(3, "attn_scores")]
        assert (found.names, found.reading) == (names, Reading.SCORES)

    @given(st.lists(st.text("abc.-/{}[]()*+0123456789layer", min_size=1), max_size=6))
    def test_any_name_at_all(self, names: list[str]) -> None:
        names = list(dict.fromkeys(names))
        recipes, ignored = resolve(names, known_dialects(names, graph()))
        used = {name for recipe in recipes.values() for name in recipe.names}
        assert used | set(ignored) <= set(names)

    @given(
        st.text(min_size=1).filter(lambda x: "{layer" not in x and SUM not in x),
        st.integers(0, 999),
    )
    def test_a_pattern_is_taken_literally(self, text: str, layer: int) -> None:
        dialect = mapped_dialect({"ffn_out": [(text + "{layer}!",)]})
        assert dialect.parse(f"{text}{layer}!") == (layer, text + "{layer}!")
        assert dialect.parse(f"{text}x!") is None


class TestNameMap:
    def test_both_ways_of_writing_it(self, tmp_path: Path) -> None:
        path = tmp_path / "map.toml"
        path.write_text('"a.{layer}" = "ATTN_NORM"\n"b{layer}" = "ffn_norm"\nlm_head = ["h", "t"]')
        names = ("a.3", "b3", "t", "h", "c")
        recipes, ignored = resolve(names, [read_name_map(path)])
        assert {key: recipe.names for key, recipe in recipes.items()} == {
            NORM: ("a.3",), StageKey(3, "ffn_norm"): ("b3",), StageKey(None, "lm_head"): ("h", "t"),
        }  # fmt: skip
        assert ignored == ("c",)

    def test_parts_sums_and_another_layer(self, tmp_path: Path) -> None:
        path = tmp_path / "map.toml"
        path.write_text(
            """ignore = ["*.cos"]
            [names]
            ffn_gate = ["L{layer}.both[0/2]"]
            ffn_up = ["L{layer}.both[3:]"]
            post_ffn_residual = ["L{layer}.mlp + L{layer}.stream"]
            "L{layer+1}.in" = "ffn_out"
            """
        )
        draw = np.random.default_rng(0)
        both, mlp, stream, after = (draw.random((2, n), np.float32) for n in (6, 3, 3, 3))
        np.savez(tmp_path / "a.npz", **{"L0.both": both, "L0.mlp": mlp, "L0.stream": stream,
                                        "L1.in": after, "L0.in": after, "L0.cos": mlp})  # fmt: skip
        dump = open_dump(tmp_path / "a.npz", ReadingOptions(read_name_map(path)))
        expected = {"ffn_gate": both[:, :3], "ffn_up": both[:, 3:], "ffn_out": after,
                    "post_ffn_residual": mlp + stream}  # fmt: skip
        assert set(dump.keys()) == {StageKey(0, name) for name in expected}
        for name, x in expected.items():
            assert np.array_equal(dump.read(StageKey(0, name)), x.reshape(-1)), name
            assert dump.shape(StageKey(0, name)) == (2, 3)
        assert dump.ignored == ("L0.in",)

    def test_it_comes_before_what_is_known(self, tmp_path: Path) -> None:
        path = tmp_path / "map.toml"
        path.write_text('[names]\n"attn_norm-{layer}" = "ffn_norm"')
        np.savez(tmp_path / "a.npz", **{"attn_norm-3": ONES, "ffn_norm-3": 2 * ONES})
        dump = open_dump(tmp_path / "a.npz", ReadingOptions(read_name_map(path)))
        assert dump.keys() == (StageKey(3, "ffn_norm"),)
        assert dump.read(StageKey(3, "ffn_norm")).tolist() == [1.0] * 6

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[names]\na = 3", r"'a' is 3, not a text or a list"),
            ("[names]\nffn_out = []", r"'ffn_out' is \[\], not a list of length >= 1"),
            ("[names]\nffn_out = ['x{layer}', 3]", r"'ffn_out'\[1\] is 3, not a text"),
            ("[names]\n'a{layer}' = 'nose'", r"'a{layer}': unknown stage 'nose'; stages are emb"),
            ("[names]\nnose = ['a{layer}']", r"'nose': unknown stage 'nose'; stages are emb"),
            ("[names]\n'a' = 'ffn_out'", r"'a' has no {layer}, and ffn_out is of every layer"),
            ("[names]\n'a{layer}' = 'lm_head'", r"has a {layer}, but lm_head is of the whole"),
            ("[names]\n'{layer}{layer}' = 'ffn_out'", "twice"),
            ("[names]\nffn_out = ['a{layer}[0/2] + b']", r"'b' has no {layer}"),
            ("[names]\n[other]", r"expected one table, \[names\]"),
            ("names = 3", r"expected one table, \[names\]"),
            ("[names", r"is not TOML"),
            ("a = " + "[" * 9999, r"is not TOML|nests too deeply"),
            ("\n", r"names no tensor"),
        ],
    )
    def test_faults_are_one_line(self, text: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "map.toml"
        path.write_text(text)
        with pytest.raises((PlanError, FormatError), match=message) as caught:
            read_name_map(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


class TestValues:
    @pytest.fixture(params=["safetensors", "npz", "pt"])
    def kind(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def write(self, path: Path, arrays: dict[str, np.ndarray]) -> Path:
        match path.suffix:
            case ".safetensors":
                write_safetensors(path, arrays)
            case ".npz":
                np.savez_compressed(path, **arrays)
            case _:
                import torch

                torch.save({name: torch.from_numpy(x.copy()) for name, x in arrays.items()}, path)
        return path

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_every_type_becomes_float32(self, kind: str, dtype: str, tmp_path: Path) -> None:
        x = np.array([[1.5, -2.0, np.nan], [np.inf, 1 / 3, 6e-8]], dtype)
        dump = open_dump(self.write(tmp_path / f"a.{kind}", {NORM.path: x}))
        assert isinstance(dump, TensorDump)
        assert np.array_equal(dump.read(NORM), x.astype(np.float32).reshape(-1), equal_nan=True)
        assert dump.sidecar.dtype == {"float64": "float32"}.get(dtype, dtype)
        assert (dump.counts, dump.num_layers, dump.shape(NORM)) == ({NORM: 6}, 4, (2, 3))

    def test_bfloat16(self, tmp_path: Path, kind: str) -> None:
        x = np.array([[1.0, -0.5, 3.140625]], np.float32)
        path = tmp_path / f"a.{kind}"
        if kind == "pt":
            import torch

            torch.save({NORM.path: torch.from_numpy(x).bfloat16()}, path)
        else:
            bits = to_bfloat16(x)
            self.write(path, {NORM.path: bits if kind == "safetensors" else bits.view("V2")})
        dump = open_dump(path)
        assert dump.read(NORM).tolist() == x.reshape(-1).tolist()
        assert dump.sidecar.dtype == "bfloat16"

    def test_batch_axes_parts_and_the_last_row_of_logits(self, kind: str, tmp_path: Path) -> None:
        draw = np.random.default_rng(0)
        q, k, v = (draw.random((1, 3, n), np.float32) for n in (4, 2, 2))
        logits = draw.random((1, 3, 5), np.float32)
        names = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"]
        arrays = {**dict(zip(names, (q, k, v))), "lm_head": logits,
                  "model.layers.0": q, "mask": np.ones(3, bool)}  # fmt: skip
        dump = open_dump(self.write(tmp_path / f"a.{kind}", arrays))
        qkv, head = StageKey(0, "qkv_matmul"), StageKey(None, "lm_head")
        assert dump.keys() == (qkv, StageKey(0, "post_ffn_residual"), head)
        assert np.array_equal(dump.read(qkv).reshape(3, 8), np.concatenate([q, k, v], 2)[0])
        assert np.array_equal(dump.read(head), logits[0, -1])
        assert (dump.shape(qkv), dump.shape(head)) == ((3, 8), (5,))
        assert dump.ignored == ("mask",)

    def test_llama_cpp_scores(self, kind: str, tmp_path: Path) -> None:
        scores = np.zeros((2, 3, 32), np.float32)
        scores[:, :, :3] = 6.0
        arrays = {"kq-0": scores, "Qcur-0": np.ones((3, 2, 4), np.float32),
                  "kq_soft_max-0": scores}  # fmt: skip
        dump = open_dump(self.write(tmp_path / f"a.{kind}", arrays))
        assert dump.read(StageKey(0, "attn_scores")).tolist() == [3.0] * 18
        assert dump.read(StageKey(0, "attn_softmax")).tolist() == [6.0] * 18

    def test_parts_of_other_lengths_are_left_out(self, kind: str, tmp_path: Path) -> None:
        arrays = {f"model.layers.0.self_attn.{x}_proj": np.ones((n, 2), np.float32)
                  for x, n in zip("qkv", (3, 3, 2))}  # fmt: skip
        dump = open_dump(
            self.write(tmp_path / f"a.{kind}", {**arrays, NORM.path: ONES, "l_out-0": ONES[:0]})
        )
        assert dump.keys() == (NORM,)
        assert len(dump.ignored) == 4

    @pytest.mark.parametrize("keep", [0, 1, 20, 100, -1])
    def test_a_cut_file(self, kind: str, keep: int, tmp_path: Path) -> None:
        path = self.write(tmp_path / f"a.{kind}", {NORM.path: ONES})
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(AprError, match=str(path)):
            open_dump(path)

    @given(data=st.binary(max_size=200))
    @pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
    def test_noise_is_refused(
        self, tmp_path_factory: pytest.TempPathFactory, suffix: str, data: bytes
    ) -> None:
        path = tmp_path_factory.getbasetemp() / f"noise{suffix}"
        path.write_bytes(data)
        with pytest.raises(AprError):
            open_dump(path)


class TestSidecar:
    def test_safetensors_metadata(self, tmp_path: Path) -> None:
        metadata = {"tokens": "[3, 1]", "prompt": "hi", "dtype": "torch.float16",
                    "backend": "mine", "other": "x"}  # fmt: skip
        sidecar = open_dump(write_safetensors(tmp_path / "a.safetensors", {NORM.path: ONES},
                                              metadata)).sidecar  # fmt: skip
        assert (sidecar.tokens, sidecar.prompt) == ((3, 1), "hi")
        assert (sidecar.dtype, sidecar.backend) == ("float16", "mine")
        with pytest.raises(FormatError, match="token ids cannot be read"):
            open_dump(write_safetensors(tmp_path / "b.safetensors", {NORM.path: ONES},
                                        {"tokens": "one"}))  # fmt: skip

    def test_npz_members(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", **{
            NORM.path: ONES, "input_ids": np.array([[3, 1]]), "prompt": np.array("hi"),
            "dtype": np.array("bf16"),
        })  # fmt: skip
        sidecar = open_dump(tmp_path / "a.npz").sidecar
        assert (sidecar.tokens, sidecar.prompt, sidecar.dtype) == ((3, 1), "hi", "bfloat16")
        np.savez(tmp_path / "b.npz", **{NORM.path: ONES, "tokens": np.array([-1])})
        with pytest.raises(FormatError, match="not non-negative"):
            open_dump(tmp_path / "b.npz")

    def test_torch_values(self, tmp_path: Path) -> None:
        import torch

        held = {"layers.3": {"input_layernorm": [torch.ones(1, 2, 3)]}, "tokens": [3, 1],
                "prompt": "hi", "step": 4, "mask": torch.ones(2, dtype=torch.bool)}  # fmt: skip
        torch.save(held, tmp_path / "a.pt")
        dump = open_dump(tmp_path / "a.pt")
        assert (dump.keys(), dump.ignored) == ((NORM,), ("mask", "step"))
        assert (dump.sidecar.tokens, dump.sidecar.prompt) == ((3, 1), "hi")


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


class TestHostileFiles:
    def test_pickles_are_not_run(self, tmp_path: Path, capsys: Any) -> None:
        import torch

        torch.save({NORM.path: _Evil()}, tmp_path / "a.pt")
        with pytest.raises(FormatError, match="more than tensors in dicts and lists"):
            open_dump(tmp_path / "a.pt")
        np.savez(tmp_path / "a.npz", **{NORM.path: ONES, "l_out-0": np.array([_Evil()])})
        assert open_dump(tmp_path / "a.npz").ignored == ("l_out-0",)
        assert capsys.readouterr().out == ""

    def test_a_list_within_itself(self, tmp_path: Path) -> None:
        import torch

        held: list[Any] = []
        held.append(held)
        torch.save(held, tmp_path / "a.pt")
        with pytest.raises(FormatError):
            open_dump(tmp_path / "a.pt")

    def member(self, path: Path, shape: tuple[int, ...], data: bytes) -> Path:
        stream = io.BytesIO()
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{NORM.path}.npy", stream.getvalue() + data)
        return path

    def test_a_member_of_another_size(self, tmp_path: Path) -> None:
        for shape in ((2, 3), (1 << 50,), (1, 1)):
            with pytest.raises(FormatError, match=r"where .* are due"):
                open_dump(self.member(tmp_path / "a.npz", shape, bytes(20)))

    def test_a_bomb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("aprcore.ground.archive.HARMLESS_BYTES", 1000)
        monkeypatch.setattr("aprcore.dumps.tensor_files.HARMLESS_BYTES", 1000)
        path = self.member(tmp_path / "a.npz", (1 << 20,), bytes(4 << 20))
        with pytest.raises(FormatError, match="expands from"):
            open_dump(path)
        import torch

        torch.save({NORM.path: torch.ones(1).expand(1 << 20)}, tmp_path / "a.pt")
        with pytest.raises(FormatError, match="repeats 4 stored bytes"):
            open_dump(tmp_path / "a.pt")

    def test_a_member_that_is_there_twice(self, tmp_path: Path) -> None:
        path = self.member(tmp_path / "a.npz", (2,), bytes(8))
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
            warnings.simplefilter("ignore")
            archive.writestr(f"{NORM.path}.npy", b"x")
        with pytest.raises(FormatError, match="is there twice"):
            open_dump(path)

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_a_member_that_is_packed_otherwise(self, tmp_path: Path, method: int) -> None:
        with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
            archive.writestr(f"{NORM.path}.npy", b"x")
        with pytest.raises(FormatError, match="only stored and deflated members are read"):
            open_dump(tmp_path / "a.npz")

    @pytest.mark.parametrize("claimed", [8, 0xFFFFFF])
    def test_a_member_that_is_longer_than_it_says(self, tmp_path: Path, claimed: int) -> None:
        """The directory's size is a claim; what is unpacked must not go beyond it."""
        path = tmp_path / "a.npz"
        size = 10_000_000
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{NORM.path}.npy", bytes(size))
        data = path.read_bytes()
        path.write_bytes(data.replace(size.to_bytes(4, "little"), claimed.to_bytes(4, "little")))
        with pytest.raises(FormatError, match="is no"):
            open_dump(path)

    def test_a_pickle_before_the_zip_format(self, tmp_path: Path) -> None:
        import torch

        torch.save({NORM.path: torch.ones(2)}, tmp_path / "a.pt",
                   _use_new_zipfile_serialization=False)  # fmt: skip
        with pytest.raises(FormatError, match=r"torch before 1\.6"):
            open_dump(tmp_path / "a.pt")

    def test_a_tensor_beyond_its_storage(self, tmp_path: Path) -> None:
        """torch.load would read what lies behind it in memory."""
        import torch

        torch.save({NORM.path: torch.ones(2, 3)}, tmp_path / "a.pt")
        data = (tmp_path / "a.pt").read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(
            tmp_path / "b.pt", "w"
        ) as new:  # fmt: skip
            for name in old.namelist():
                held = old.read(name)
                # The shape (2, 3) is two small integers and the tuple of them.
                new.writestr(name, held.replace(b"K\x02K\x03\x86", b"K\x02K\x09\x86"))
        with pytest.raises(FormatError, match=r"a tensor of \[2, 9\] beyond the 24 bytes"):
            open_dump(tmp_path / "b.pt")


class TestTorchFiles:
    """Without torch: what torch.save wrote is read as torch.load would."""

    def test_views_types_and_parameters(self, tmp_path: Path) -> None:
        import torch

        whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
        module = torch.nn.Linear(3, 2)
        held = {
            "layers.0": {"input_layernorm": whole.t(), "mlp.down_proj": whole[1:3, ::2]},
            "layers.1": {"input_layernorm": torch.nn.Parameter(whole), "mlp": whole.double()},
            "layers.2": {"input_layernorm": whole.half(), "mlp": whole.bfloat16()},
            "layers.3": {"input_layernorm": whole.to_sparse(), "mlp": torch.ones(2).to("meta")},
            "layers.4": {"input_layernorm": whole.to(torch.float8_e4m3fn)},
            "layers.5": {"input_layernorm": torch.zeros(0, 6)},
            "module": module.state_dict(), "tokens": torch.tensor([[3, 1]], dtype=torch.int32),
            "size": whole.shape, "type": torch.float32, "device": torch.device("cpu"),
        }  # fmt: skip
        torch.save(held, tmp_path / "a.pt")
        dump = open_dump(tmp_path / "a.pt")
        for key in dump.keys():
            names = {"attn_norm": "input_layernorm", "ffn_out": "mlp"}
            group = held[f"layers.{key.layer}"]
            name = names[key.stage]
            tensor = group.get(name, group.get("mlp.down_proj"))
            assert dump.read(key).tolist() == tensor.detach().float().reshape(-1).tolist(), key
        assert [key.layer for key in dump.keys()] == [0, 0, 1, 1, 2, 2]
        assert dump.sidecar.tokens == (3, 1)

    @pytest.mark.parametrize("kind", ["bfloat16", "meta", "sparse", "grad", "float8_e4m3fn"])
    def test_tokens_that_are_none(self, tmp_path: Path, kind: str) -> None:
        import torch

        tensor = torch.ones(3)
        match kind:
            case "meta":
                tensor = tensor.long().to("meta")
            case "sparse":
                tensor = tensor.long().to_sparse()
            case "grad":
                tensor.requires_grad_()
            case _:
                tensor = tensor.to(getattr(torch, kind))
        torch.save({"tokens": tensor, NORM.path: torch.ones(2)}, tmp_path / "a.pt")
        with pytest.raises(FormatError, match="token ids"):
            open_dump(tmp_path / "a.pt")

    def test_a_large_tensor_is_read_by_position(self, tmp_path: Path) -> None:
        import torch

        torch.save({"lm_head": torch.arange(64.0).reshape(8, 8)}, tmp_path / "a.pt")
        assert open_dump(tmp_path / "a.pt").read(StageKey(None, "lm_head")).tolist() == [
            float(x) for x in range(56, 64)
        ]

    def test_torch_is_not_needed(self, tmp_path: Path) -> None:
        import torch

        torch.save({NORM.path: torch.ones(2)}, tmp_path / "a.pt")
        code = ("import sys; from aprcore.dumps.open import open_dump; from pathlib import Path\n"
                "dump = open_dump(Path(sys.argv[1])); dump.read(dump.keys()[0])\n"
                "assert 'torch' not in sys.modules")  # fmt: skip
        subprocess.run([sys.executable, "-c", code, tmp_path / "a.pt"], check=True)


def test_what_is_a_file_and_what_a_directory(tmp_path: Path) -> None:
    write_stages(tmp_path / "d.npz", {NORM: ONES})
    assert isinstance(open_dump(tmp_path / "d.npz"), TraceDirectory)
    assert is_tensor_file(tmp_path / "none.NPZ")
    with pytest.raises(AprError, match="no such file"):
        open_dump(tmp_path / "none.npz")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(TraceError, match="is not a directory; give a directory of stage files, or"):
        open_dump(tmp_path / "a.txt")
