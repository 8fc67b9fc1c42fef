"""Small sound files of every format, written from its description, through a `Chaos`."""

from __future__ import annotations

import base64
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from tests.fuzz.chaos import Chaos, to_json, to_toml

E, H, K, D, F, V, T = 8, 2, 1, 4, 8, 24, 3  # sizes of a model, and of a text
TOKENS = [3, 1, 2]
FLOATS = np.linspace(-1, 1, 4096, dtype="<f4")

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": E,
    "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": H,
    "num_key_value_heads": K, "head_dim": D, "vocab_size": V, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "max_position_embeddings": 64, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
SCALINGS: Sequence[dict[str, Any]] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
     "beta_slow": 1.0, "attention_factor": 1.1, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
)  # fmt: skip
ODD_SCALINGS: Sequence[dict[str, Any]] = (
    {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "default"},
    {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0],
     "original_max_position_embeddings": 16},
)  # fmt: skip
EXTRAS: Sequence[dict[str, Any]] = (
    {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4},
    {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 4,
     "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 4,
     "hidden_activation": "gelu_pytorch_tanh"},
    {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1},
    {"attention_bias": True, "mlp_bias": True, "layer_types": ["full_attention"]},
)  # fmt: skip
LAYER_SHAPES = {
    "input_layernorm": (E,), "self_attn.q_proj": (H * D, E), "self_attn.k_proj": (K * D, E),
    "self_attn.v_proj": (K * D, E), "self_attn.o_proj": (E, H * D),
    "post_attention_layernorm": (E,), "mlp.gate_proj": (F, E), "mlp.up_proj": (F, E),
    "mlp.down_proj": (E, F),
}  # fmt: skip
WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (V, E), "model.norm.weight": (E,), "lm_head.weight": (V, E),
    **{f"model.layers.0.{name}.weight": shape for name, shape in LAYER_SHAPES.items()},
}  # fmt: skip
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
STAGES = {
    "layer-0/embedding": T * E, "layer-0/attn_norm": T * E, "layer-0/qkv_matmul": T * 16,
    "layer-0/attn_scores": H * T * T, "layer-0/ffn_norm": T * E, "layer-0/ffn_gate": T * F,
    "layer-0/post_ffn_residual": T * E, "layer-1/attn_norm": T * E, "final_norm": T * E,
    "lm_head": V,
}  # fmt: skip
MODULES = {
    "model.layers.0.input_layernorm": (1, T, E), "model.layers.0.self_attn.q_proj": (1, T, H * D),
    "model.layers.0.self_attn.k_proj": (1, T, K * D), "model.layers.0.mlp.down_proj": (1, T, E),
    "model.norm": (1, T, E), "lm_head": (1, T, V),
}  # fmt: skip
VOCABULARY = ["<unk>", "<s>", "</s>", *"abcdefghijkl", "ab", "cd", "abcd", "ef", "Ġ", "Ġa", "Ċ",
              "1", "2"]  # fmt: skip
MERGES = ["a b", "c d", "ab cd", "e f", "Ġ a"]


def float_bytes(count: int) -> bytes:
    """That many float32 values."""
    return np.resize(FLOATS, count).tobytes()


# Models


def config(c: Chaos) -> dict[str, Any]:
    """A `config.json` of some family."""
    found = CONFIG | c.odd({}, EXTRAS)
    if c.random.random() < 0.4:
        key = c.random.choice(("rope_scaling", "rope_parameters"))
        found[key] = {"rope_theta": 10000.0} | c.odd(c.random.choice(SCALINGS), ODD_SCALINGS)
    return found


def safetensors(
    c: Chaos, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any] | None = None
) -> bytes:
    """Source: the README of huggingface/safetensors, "Format"."""
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = c.tree(dict(metadata))
    at = 0
    for name, shape in c.items(list(shapes.items())):
        dtype = c.pick("F32", ("F16", "BF16", "F64", "I64", "I32", "BOOL", "U8", "F8_E4M3", "x"))
        sizes = c.shape(shape)
        size = 4 * int(np.prod(shape, dtype=object))
        header[c.text(name)] = {
            "dtype": dtype, "shape": sizes,
            "data_offsets": [c.number(at, 63), c.number(at + size, 63)],
        }  # fmt: skip
        at += size
    text = c.json(header) + b" " * c.pick(0, (1, 7, 1000))
    return struct.pack("<Q", c.number(len(text))) + text + float_bytes(at // 4)


def _text(c: Chaos, value: str) -> bytes:
    raw = c.text(value).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", c.number(len(raw)) if c.strikes() else len(raw)) + raw


_GGUF_KINDS = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}


def _gguf_value(c: Chaos, value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", c.pick(8, range(14))) + _text(c, value)
    if isinstance(value, list):
        items = c.items(value)
        kind = 8 if isinstance(value[0], str) else _GGUF_KINDS[type(value[0])][0]
        head = struct.pack("<IIQ", 9, c.pick(kind, range(14)), c.number(len(items)))
        if kind == 8:
            return head + b"".join(_text(c, item) for item in items)
        return head + b"".join(_scalar(c, item) for item in items)
    return struct.pack("<I", c.pick(_GGUF_KINDS[type(value)][0], range(14))) + _scalar(c, value)


def _scalar(c: Chaos, value: Any) -> bytes:
    if isinstance(value, float):
        others = (0.0, -1.0, float("nan"), float("inf"), 1e-45)
        return struct.pack("<f", c.pick(value, others))
    if isinstance(value, bool):
        return bytes([c.pick(int(value), (0, 1, 2, 255))])
    return struct.pack("<I", c.number(value, 32))


def gguf_keys(family: str = "llama") -> dict[str, Any]:
    """The key-values of the model."""
    return {
        "general.architecture": family, "general.name": "tiny",
        f"{family}.block_count": 1, f"{family}.embedding_length": E,
        f"{family}.feed_forward_length": F, f"{family}.attention.head_count": H,
        f"{family}.attention.head_count_kv": K, f"{family}.context_length": 64,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-6, f"{family}.rope.freq_base": 10000.0,
        f"{family}.rope.dimension_count": D, f"{family}.vocab_size": V,
    }  # fmt: skip


def gguf_scaling() -> dict[str, Any]:
    """Key-values of a stretched context."""
    return {
        "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
        "llama.rope.scaling.attn_factor": 1.0, "llama.attention.key_length": D,
    }  # fmt: skip


def gguf_tokenizer(kind: str = "gpt2") -> dict[str, Any]:
    """The key-values of a tokenizer."""
    keys = {
        "tokenizer.ggml.model": kind, "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": VOCABULARY, "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 21,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }  # fmt: skip
    if kind == "llama":
        pieces = [word.replace("Ġ", "▁") for word in VOCABULARY]
        return keys | {"tokenizer.ggml.tokens": pieces,
                       "tokenizer.ggml.scores": [-float(i) for i in range(V)]}  # fmt: skip
    return keys | {"tokenizer.ggml.merges": MERGES}


def gguf(c: Chaos, keys: Mapping[str, Any], with_tensors: bool = True) -> bytes:
    """Source: ggml, "GGUF"."""
    pairs = [_text(c, key) + _gguf_value(c, value) for key, value in c.items(list(keys.items()))]
    infos, at = [], 0
    for name, shape in c.items(list(WEIGHTS.items())) if with_tensors else ():
        stem = name.removesuffix(".weight")
        stem = stem.removeprefix("model.layers.0.")
        stem = ("blk.0." if name.startswith("model.layers") else "") + GGUF_NAMES[stem]
        sizes = c.shape(shape[::-1], 64)
        infos.append(
            _text(c, f"{stem}.weight") + struct.pack("<I", c.number(len(sizes), 32))
            + struct.pack(f"<{len(sizes)}Q", *sizes)
            + struct.pack("<IQ", c.pick(0, (*range(42), 1 << 31)), c.number(at))
        )  # fmt: skip
        at += -(-4 * int(np.prod(shape)) // 32) * 32
    front = b"GGUF" + struct.pack(
        "<IQQ", c.pick(3, (0, 1, 2, 4, 1 << 24)), c.number(len(infos)), c.number(len(pairs))
    )
    front += b"".join(pairs) + b"".join(infos)
    return front + bytes(-len(front) % 32) + float_bytes(at // 4)


def apr(c: Chaos, tokenizer: bool = False) -> bytes:
    """Source: docs/formats.md, "Models"."""
    metadata = {
        "architecture": "llama", "hidden_size": E, "num_layers": 1, "num_heads": H,
        "num_kv_heads": K, "head_dim": D, "vocab_size": V, "intermediate_size": F,
        "max_position_embeddings": 64, "rope_theta": 10000.0, "rope_type": 2, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "chat_template": "{{ x }}",
    }  # fmt: skip
    if tokenizer:
        metadata |= {"tokenizer.vocabulary": VOCABULARY, "tokenizer.merges": MERGES,
                     "tokenizer.model_type": "gpt2", "tokenizer.bos_token_id": 1,
                     "tokenizer.eos_token_id": 2, "tokenizer.add_bos_token": True}  # fmt: skip
    text = c.json(metadata)
    index, at = b"", 0
    tensors = sorted(WEIGHTS.items())
    for name, shape in c.items(tensors):
        raw = c.text(name).encode("utf-8", "surrogatepass")
        sizes = c.shape(shape, 64)
        size = 4 * int(np.prod(shape))
        index += struct.pack("<H", c.number(len(raw), 16)) + raw
        index += bytes([c.pick(0, (*range(32), 128, 129, 255)), c.number(len(sizes), 8)])
        index += struct.pack(f"<{len(sizes)}Q", *sizes)
        index += struct.pack("<QQ", c.number(at), c.number(size))
        at += size
    index_at = -(-(64 + len(text)) // 64) * 64
    data_at = -(-(index_at + len(index)) // 64) * 64
    head = b"APR\0" + bytes([c.pick(2, (0, 1, 3)), c.number(0, 8)]) + struct.pack(
        "<HIQIQQ", c.number(1 << 10, 16), c.number(len(tensors), 32), c.number(64),
        c.number(len(text), 32), c.number(index_at), c.number(data_at),
    )  # fmt: skip
    reserved = bytes(20)
    crc = zlib.crc32(reserved, zlib.crc32(head))
    body = head + struct.pack("<I", crc if not c.strikes() else 1) + reserved
    body += text + bytes(index_at - 64 - len(text)) + index
    body += bytes(data_at - len(body)) + float_bytes(at // 4)
    return body + struct.pack("<I", zlib.crc32(body))


def with_sums(data: bytes) -> bytes:
    """A damaged .apr file with checksums that fit the damage."""
    if len(data) < 68:
        return data
    head = data[:40] + struct.pack("<I", zlib.crc32(data[44:64], zlib.crc32(data[:40])))
    body = head + data[44:-4]
    return body + struct.pack("<I", zlib.crc32(body))


# Dumps


def npy(c: Chaos, shape: Sequence[int], descr: str = "<f4", values: bytes | None = None) -> bytes:
    """Source: numpy.lib.format."""
    kinds = ("<f2", "<f8", ">f4", "<i8", "<i4", "|V2", "<U3", "|S4", "|O", "<c8", "|b1", "<M8[s]",
             "[('a', '<f4')]", "<V2000000000", "<U999999999", "f", "")  # fmt: skip
    kind = c.pick(descr, kinds)
    sizes = c.shape(shape)
    stated = "(" + "".join(f"{n}, " for n in sizes) + ")"
    order = c.pick("False", ("True", "None", "0"))
    header = f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {stated}, }}"
    text = c.text(header).encode("latin-1", "replace") + b"\n"
    text = b" " * c.pick(0, (1, 50, 20_000)) + text
    major = c.pick(1, (0, 2, 3, 9))
    size = struct.pack("<I" if major == 2 else "<H", c.number(len(text), 16))
    data = float_bytes(int(np.prod(list(shape), dtype=object))) if values is None else values
    return b"\x93NUMPY" + bytes([major, 0]) + size + text + data


def archive(c: Chaos, members: Sequence[tuple[str, bytes]]) -> bytes:
    """A zip archive; each member maybe deflated, or with a directory that says something else."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, data in c.items(members):
            method = c.pick(zipfile.ZIP_STORED, (8, 8, 12, 14))
            info = zipfile.ZipInfo(c.text(name).encode("utf-8", "replace").decode()[:60_000])
            info.compress_type = method
            file.writestr(info, data)
    data = made.getvalue()
    if c.strikes(4):  # a field of the directory
        at = data.find(b"PK\1\2", c.random.randrange(len(data)))
        if at >= 0:
            place, size = c.random.choice(((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2),
                                           (30, 2), (42, 4)))  # fmt: skip
            old = int.from_bytes(data[at + place : at + place + size], "little")
            new = c.random.choice((0, 1, old + 1, 1 << 31, 0xFFFFFFFF, old * 1000))
            new &= (1 << 8 * size) - 1
            data = data[: at + place] + new.to_bytes(size, "little") + data[at + place + size :]
    return data


def npz(c: Chaos) -> bytes:
    """Modules of transformers, with the tokens and the prompt."""
    members = [(f"{name}.npy", npy(c, shape)) for name, shape in MODULES.items()]
    members.append(("tokens.npy", npy(c, (T,), "<i8", struct.pack("<3q", *TOKENS))))
    members.append(("prompt.npy", npy(c, (), "<U2", "hi".encode("utf-32-le"))))
    if c.strikes():
        members.append(("bomb.npy", npy(c, (1 << 16,), "<f4", bytes(1 << c.pick(18, (20, 24))))))
    return archive(c, members)


def _pickle_text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _pickle_int(number: int) -> bytes:
    if 0 <= number < 256:
        return b"K" + bytes([number])
    raw = number.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + raw


def _pickle_tuple(items: Sequence[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _torch_tensor(c: Chaos, key: str, shape: Sequence[int], kind: str) -> bytes:
    count = int(np.prod(shape))
    kind = c.pick(kind, ("HalfStorage", "BFloat16Storage", "IntStorage", "UntypedStorage", "X"))
    storage = _pickle_tuple([
        _pickle_text("storage"), f"ctorch\n{kind}\n".encode(), _pickle_text(c.text(key)),
        _pickle_text("cpu"), _pickle_int(c.number(count, 63)),
    ]) + b"Q"  # fmt: skip
    strides, step = [], 1
    for n in reversed(shape):
        strides.insert(0, step)
        step *= n
    sizes = c.shape(shape)
    steps = [c.number(step, 63) for step in [*strides, *[1] * len(sizes)][: len(sizes)]]
    ints = [_pickle_tuple([_pickle_int(n) for n in part]) for part in (sizes, steps)]
    name = c.pick("_rebuild_tensor_v2", ("_rebuild_tensor", "_rebuild_tensor_v3",
                  "_rebuild_parameter", "_rebuild_sparse_tensor", "x"))  # fmt: skip
    rest = [b"\x89", b"ccollections\nOrderedDict\n)R"]
    arguments = _pickle_tuple(c.items([storage, _pickle_int(c.number(0, 63)), *ints, *rest]))
    return f"ctorch._utils\n{name}\n".encode() + arguments + b"R"


def pt(c: Chaos) -> bytes:
    """Source: torch.serialization: a pickle of protocol 2, and the storages beside it."""
    items, members = [], []
    for number, (name, shape) in enumerate(c.items(list(MODULES.items()))):
        members.append((f"a/data/{number}", float_bytes(int(np.prod(shape)))))
        items.append(_pickle_text(c.text(name)) + _torch_tensor(c, str(number), shape,
                                                                "FloatStorage"))  # fmt: skip
    members.append(("a/data/tokens", struct.pack("<3q", *TOKENS)))
    items.append(_pickle_text("tokens") + _torch_tensor(c, "tokens", (3,), "LongStorage"))
    if c.strikes(2):
        odd = (b"]r\1\0\0\0h\1a", b"}r\2\0\0\0(X\1\0\0\0ah\2u", b"]" * 3000 + b"a" * 2999,
               b"(" * 500 + b"t" * 500, b"cos\nsystem\n(X\2\0\0\0lst R",
               b"\x8a\xff" + b"\x7f" * 255, b"G\x7f\xf0\0\0\0\0\0\0", b"N",
               b"(lp\n", b"X\xff\xff\xff\x7f")  # fmt: skip
        items.append(_pickle_text("odd") + c.random.choice(odd))
    data = b"\x80\2}(" + b"".join(items) + b"u."
    if c.strikes(2):
        data = c.bytes(data)
    return archive(c, [("a/data.pkl", data), ("a/byteorder", c.pick(b"little", (b"big", b""))),
                       *members])  # fmt: skip


def trace_json(c: Chaos) -> bytes:
    """Source: docs/trace.schema.json."""
    return c.json({
        "schema": "aprtui-trace-v1", "tokens": TOKENS, "prompt": "What is 2+2?",
        "positions": [0, 1, 2], "history": [1], "dtype": "float32", "backend": "numpy",
        "model": {"file": "m.apr", "sha256": "0" * 64, "size_bytes": 1, "architecture": "llama",
                  "num_layers": 2},
        "device": "cpu", "driver": "x", "arithmetic": {"matmul": "float32"}, "attention": "eager",
        "logits": None, "checked": "nothing", "settings": {"kv_type": "f16", "ubatch": 512},
        "versions": {"numpy": "2"}, "created_utc": "2026-01-01T00:00:00Z",
        "stages": {path: {"shape": [count], "dtype": "float32"}
                   for path, count in STAGES.items()},
    })  # fmt: skip


def provenance(c: Chaos) -> bytes:
    """`key: value` lines."""
    lines = ["model: tiny", f"tokens: {c.json(TOKENS).decode('utf-8', 'replace')}",
             'prompt: "What is 2+2?"', "dtype: float16", "note: a: b"]  # fmt: skip
    ending = c.pick("\n", ("\r\n", "\r", "\u2028", "\0"))
    return ending.join(c.text(line) for line in c.items(lines)).encode("utf-8", "surrogatepass")


def stage_file(c: Chaos, path: str, count: int) -> bytes:
    """Source: docs/formats.md, "Stage tensor files"."""
    layer = int(path[6 : path.index("/")]) if "/" in path else 0xFFFFFFFF
    magic = c.pick(b"APRT", (b"APRX", b"\0\0\0\0", b"GGUF"))
    head = magic + struct.pack("<II", c.number(layer, 32), c.number(count, 32))
    return head + c.pick(float_bytes(count), (b"", bytes(3), b"\xff" * 4 * count))


def file_name(c: Chaos, name: str) -> str:
    """A path below the folder, maybe another one, that a file system takes."""
    parts = [part.encode("utf-8", "replace")[:200].decode("utf-8", "ignore").replace("\0", "?")
             for part in c.text(name).split("/")]  # fmt: skip
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:600] or "x"


def stage_files(c: Chaos) -> dict[str, bytes]:
    """A directory of them, with a sidecar or the other project's."""
    files = {file_name(c, f"{path}.bin"): c.bytes(stage_file(c, path, count))
             for path, count in c.items(list(STAGES.items()))}  # fmt: skip
    if c.random.random() < 0.3:
        files["_trace.json"] = trace_json(c)
    elif c.random.random() < 0.3:
        files["_PROVENANCE.txt"] = provenance(c)
    return files


def position_tree(c: Chaos) -> dict[str, bytes]:
    """A directory for each position."""
    files = {}
    for at in range(3):
        for path, count in (("layer-0/attn_norm", E), ("layer-0/attn_scores", H * (at + 1)),
                            ("lm_head", V)):  # fmt: skip
            name = file_name(c, f"pos-{at:04d}/{path}.bin")
            files[name] = stage_file(c, path, count)
    if c.random.random() < 0.3:
        files["_trace.json"] = trace_json(c)
    return files


_TOOL_NAMES = (
    "step0/rank/dump_tensor_data/Module.{}.Linear.forward.0.output.0",
    "dump_tensor_data/Cell.{}.Dense.forward.0.output.0",
    "step=0___rank=0___dump_index=1___name={}___layer_id=0",
    "PP_0/TP_0/iteration_0/{}",
    "Model.{}_outputs",
    "{}",
)
_ODD_NAMES = (
    "TP_1/{}",
    "Model.{}_inputs_args_0",
    "rank0/{}",
    "{}/output",
    "{}__call0/output",
    "rank1/{}",
    "step7/rank2/dump_tensor_data/Module.{}.X.forward.1.output.0",
    "step=1___rank=9___name={}",
    "pos-0001/{}",
    "layer-0/{}",
)


def file_folder(c: Chaos) -> dict[str, bytes]:
    """A file for each tensor, as msprobe, SGLang, TensorRT-LLM and others name them."""
    pattern = c.odd(c.random.choice(_TOOL_NAMES), _ODD_NAMES)
    files = {}
    for name, shape in MODULES.items():
        stem = file_name(c, c.pick(pattern, _TOOL_NAMES + _ODD_NAMES).format(name))
        suffix = c.pick(".npy", (".pt", ".npz", ".safetensors", ".NPY", ".bin", ".txt"))
        data = {".safetensors": lambda shape=shape: safetensors(c, {"data": shape})}.get(
            suffix, lambda shape=shape: npy(c, shape))()  # fmt: skip
        files[f"{stem}{suffix}"] = c.bytes(data) if c.strikes() else data
    return files


def polygraphy(c: Chaos) -> bytes:
    """Source: `polygraphy/json/serde.py`."""
    outputs = {
        name: {"arr": {"array": base64.b64encode(npy(c, shape)).decode(),
                       "polygraphy_class": "ndarray"}, "polygraphy_class": "LazyArray",
               "values": {"array": base64.b64encode(npy(c, shape)).decode(),
                          "polygraphy_class": "ndarray"}}
        for name, shape in MODULES.items()
    }  # fmt: skip
    result = {"outputs": outputs, "runtime": 0.1, "polygraphy_class": "IterationResult"}
    return c.json({"lst": [["trt-runner", [result]]], "polygraphy_class": "RunResults"})


def llama_debug(c: Chaos) -> dict[str, bytes]:
    """Logits, and the ids beside them."""
    return {"llamacpp-m.bin": c.bytes(float_bytes(V)),
            "llamacpp-m-tokens.bin": c.bytes(struct.pack("<3i", *TOKENS))}  # fmt: skip


def divergence_base(c: Chaos) -> bytes:
    """Source: llama-perplexity of llama.cpp."""
    context, chunks = 4, 2
    rows = context - 1 - context // 2
    row = struct.pack("<ff", 0.01, -16.0) + bytes(2 * V)
    head = struct.pack("<III", c.number(context, 32), c.number(V, 32), c.number(chunks, 32))
    ids = struct.pack("<8i", *range(8))
    return b"_logits_" + head + ids + row * rows * chunks


# What people write


def toml(c: Chaos, value: dict[str, Any]) -> bytes:
    """A table as TOML, maybe with a line that is anything."""
    tree = c.tree(value)
    if not isinstance(tree, dict):
        tree = {"x": tree}
    text = to_toml(tree)
    if c.strikes(3):
        odd = (b"a" + b".a" * 150 + b" = 1", b"x = " + b"[" * 300, b"n = " + b"9" * 5000,
               b"[a.b]\n[a]\n[a.b]", b"d = 2026-99-99", b"e = 0xZZ", b"f = 1e9999", b"g = nan",
               b'h = "\\ud800"', b'i = """', b"[[x]]\n[x]", b"=", b"\xff")  # fmt: skip
        text += b"\n" + c.random.choice(odd)
    return text


NAME_MAP = {
    "ignore": ["*.cos", "cache_*"],
    "names": {
        "their.{layer}.norm": "attn_norm", "blk.{layer}.q[0:4]": "q_post_rope",
        "qkv_matmul": ["a.{layer}.q", "a.{layer}.k", "a.{layer}.v"], "out": "lm_head",
        "resid.{layer}.a + resid.{layer}.b": "post_ffn_residual",
    },
}  # fmt: skip
BUDGET = {
    "default": {"float32": 1e-4, "float16": 1e-2, "any": 0.1},
    "stage": {"ffn_out": {"any": 0.05}, "layer3.down_proj": {"bfloat16": 0.1},
              "layer-0/attn_norm": {"float32": 1e-3}, "*": {"any": 1}},
}  # fmt: skip
SWEEP = {
    "defaults": {"stages": "ffn_out,attn_norm", "strict": True, "timeout": 60,
                 "budgets": ["ffn_out=0.1"], "arithmetic": "f32"},
    "matrix": [{
        "models": ["m.apr", {"path": "n.gguf", "name": "n"}],
        "oracles": ["{model}-stages"], "prompts": ["What is 2+2?", [1, 2, 3]],
        "backends": ["numpy"], "layers": ["0..3", "1..2"],
    }],
    "case": [{"model": "m.apr", "tokens": [1, 2], "backend": "numpy", "layers": "0..1"}],
}  # fmt: skip
SETTINGS = {
    "theme": "okabe-ito", "top_k": 20, "hints": False,
    "keys": {"explorer": {"next-fault": ["j", "down"]}, "explorer.quit": "q"},
    "thresholds": {"cosine": [0.99999, 0.999, 0.98], "tolerances": "t.toml"},
}  # fmt: skip


def sweep_results(c: Chaos) -> bytes:
    """Lines of JSON, the last maybe cut off. Source: docs/sweep.schema.json."""
    fault = {"path": "layer-0/ffn_out", "verdict": "FAIL", "blamed": "kernel", "cause": "theta",
             "clause": "theta (cos 1.0)", "relative_l2": 0.5}  # fmt: skip
    lines = [
        c.json({"schema": "aprtui-sweep-case-v1", "id": f"{number:032x}", "verdict": "FAIL",
                "diverges": True, "summary": "first divergence", "faults": [fault],
                "counts": {"FAIL": 1, "PASS": 3}, "worst_relative_l2": 0.5,
                "worst_path": "layer-0/ffn_out", "elapsed_s": 2.0, "notes": ["x"]})
        for number in range(3)
    ]  # fmt: skip
    return b"\n".join(c.items(lines)) + c.pick(
        b"\n", (b"", b'\n{"schema": "aprt', b"\r\n", b"\n\n")
    )


TOKENIZER_JSON: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [{"id": i, "content": VOCABULARY[i], "single_word": False, "lstrip": False,
                      "rstrip": False, "normalized": False, "special": True} for i in range(3)],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": True},
    "post_processor": {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                "use_regex": True},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
              "ignore_merges": False, "vocab": {word: i for i, word in enumerate(VOCABULARY)},
              "merges": MERGES},
}  # fmt: skip


def tokenizer_files(c: Chaos) -> dict[str, bytes]:
    """A Hugging Face tokenizer: three files."""
    files = {"tokenizer.json": c.bytes(c.json(TOKENIZER_JSON))}
    if c.random.random() < 0.5:
        files["tokenizer_config.json"] = c.json({
            "bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>",
            "add_bos_token": True, "chat_template": "{{ messages }}",
        })  # fmt: skip
    if c.random.random() < 0.5:
        template = "{% for m in messages %}{{ m }}{% endfor %}"
        files["chat_template.jinja"] = c.bytes(c.text(template).encode("utf-8", "surrogatepass"))
    return files


_BYTE_LEVEL = TOKENIZER_JSON["decoder"]
_SPACES = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
_NORMALIZERS: Sequence[Any] = (
    None, {"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"},
    {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
)  # fmt: skip
_PRE_TOKENIZERS: Sequence[Any] = (
    None, _SPACES, {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"String": "a"}, "behavior": "MergedWithPrevious",
         "invert": True}, _BYTE_LEVEL]},
)  # fmt: skip
_DECODERS: Sequence[Any] = (
    None, _SPACES, {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
)  # fmt: skip


def usual_tokenizer(c: Chaos) -> dict[str, bytes]:
    """A `tokenizer.json` of known parts, most of which the library gets in our own process."""
    ids = {c.text(word): c.number(i, 32) for i, word in c.items(list(enumerate(VOCABULARY)))}
    merges: list[Any] = [c.text(pair) for pair in c.items(MERGES)]
    if c.odd(0, (1,)):
        merges = [pair.split(" ", 1) for pair in merges]
    model = TOKENIZER_JSON["model"] | {
        "vocab": ids, "merges": merges, "unk_token": c.odd(None, ("<unk>", "zz", "")),
        "fuse_unk": c.odd(0, (1,)) == 1, "byte_fallback": c.odd(0, (1,)) == 1,
        "ignore_merges": c.odd(0, (1,)) == 1,
    }  # fmt: skip
    added = [token | {"id": c.number(token["id"], 32), "content": c.text(token["content"]),
                      **{name: c.pick(False, (True,)) for name in ("single_word", "lstrip",
                         "rstrip", "normalized", "special")}}
             for token in c.items(TOKENIZER_JSON["added_tokens"])]  # fmt: skip
    tree = TOKENIZER_JSON | {
        "model": model, "added_tokens": added,
        "normalizer": c.odd({"type": "NFC"}, _NORMALIZERS),
        "pre_tokenizer": c.odd(TOKENIZER_JSON["pre_tokenizer"], _PRE_TOKENIZERS),
        "decoder": c.odd(_BYTE_LEVEL, _DECODERS),
        "post_processor": c.odd(TOKENIZER_JSON["post_processor"], (None, _BYTE_LEVEL)),
    }  # fmt: skip
    return {"tokenizer.json": c.json(tree) if c.strikes(3) else to_json(tree)}


# Saved runs: of a run that was made once, since its report is a long record of ours.


@cache
def _saved_parts() -> tuple[tuple[tuple[str, bytes], ...], Any]:
    import tempfile
    from pathlib import Path

    import msgspec

    from aprcore.records.saved_run import REPORT, save_run
    from aprcore.runs.bisect import run
    from aprcore.runs.request import Request
    from aprtui.demo import demo_path, load_faults

    fault = load_faults()["kv-tiled"]
    report = run(Request(model=fault.model, trace=fault.trace, oracle=demo_path() / "oracle"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.aprx"
        save_run(path, report)
        with zipfile.ZipFile(path) as held:
            members = tuple((name, held.read(name)) for name in held.namelist())
    tree = msgspec.msgpack.decode(dict(members)[REPORT])
    # A run of a few stages: each input is to take no time.
    for key, value in tree.items():
        if isinstance(value, list):
            tree[key] = value[:6]
        if isinstance(value, dict):
            tree[key] = {one: held[:6] if isinstance(held, list) else held
                         for one, held in value.items()}  # fmt: skip
    return members, tree


def aprx(c: Chaos) -> bytes:
    """Source: `aprcore.records.saved_run`."""
    import msgspec

    members, tree = _saved_parts()
    files = dict(members)
    files["aprx.json"] = c.json(json.loads(files["aprx.json"]))
    try:
        report = msgspec.msgpack.encode(c.tree(tree))
    except (OverflowError, ValueError):  # msgpack has no integers of more than 64 bits
        report = msgspec.msgpack.encode(tree)
    files["report.msgpack"] = c.bytes(report) if c.strikes(2) else report
    files["tensors/layer-0/attn_norm.trace.npy"] = npy(c, (T, E))
    return archive(c, list(files.items()))
