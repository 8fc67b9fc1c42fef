"""Weights of every stored type in a file, for tests of those who read stored bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from aprcore.formats.apr_writer import AprWriter, TensorEntry
from aprcore.formats.storage import StoredTensor
from aprcore.ground.data_file import DataFile
from aprcore.quant.types import FORMATS, BlockLayout, storage_size

# Where a block has its half-precision scales: any other byte may be anything.
SCALES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,), "AprQ4": (0,), "Q2_K": (80, 82), "IQ4_NL": (0,),
}  # fmt: skip


def fitting_width(dtype: str, width: int) -> int:
    """`width`, or the next one that whole blocks hold where the type demands it."""
    row = FORMATS[dtype]
    return (
        -(-width // row.block_values) * row.block_values
        if row.layout is BlockLayout.ROWS
        else width
    )


def random_bytes(dtype: str, shape: tuple[int, ...], seed: int, *, wild: bool = False) -> bytes:
    """Stored bytes of a random tensor.

    Args:
        dtype: A name in `FORMATS`.
        shape: Rows and columns, or the length of a vector.
        seed: The same one gives the same bytes.
        wild: Leave scales (or values) any bits: infinite, NaN, subnormal.
    """
    rng = np.random.default_rng([seed, *shape])
    size = storage_size(dtype, shape)
    raw = rng.integers(0, 256, size, dtype=np.uint8)
    if dtype in ("F32", "F16", "BF16", "F64"):
        return raw.tobytes() if wild else _numbers(dtype, rng.standard_normal(shape))
    if wild:
        return raw.tobytes()
    if dtype == "AprQ8":
        raw[:4] = np.float32([0.01]).view(np.uint8)
    else:
        blocks = raw.reshape(-1, FORMATS[dtype].block_bytes)
        for offset in SCALES[dtype]:
            scales = rng.uniform(0.001, 0.02, len(blocks)) * rng.choice([-1, 1], len(blocks))
            blocks[:, offset : offset + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    return raw.tobytes()


def _numbers(dtype: str, values: np.ndarray) -> bytes:
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype(FORMATS[dtype].number).tobytes()


def stored_tensor(
    dtype: str, shape: tuple[int, ...], raw: bytes, *, name: str = "w"
) -> StoredTensor:
    """A tensor in a file of its own, somewhere inside it; the file has no name any more."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weights"
        path.write_bytes(b"\xff" * 64 + raw + b"\xff" * 64)
        return StoredTensor(name, shape, dtype, DataFile(path), 64, len(raw))


def random_tensor(
    dtype: str, shape: tuple[int, ...], seed: int, *, wild: bool = False
) -> StoredTensor:
    """A random tensor in a file."""
    return stored_tensor(dtype, shape, random_bytes(dtype, shape, seed, wild=wild))


def write_block_model(
    path: Path, dtype: str, *, hidden: int = 256, ffn: int = 512, vocab: int = 64, heads: int = 8,
    kv_heads: int = 2, head_dim: int = 32, num_layers: int = 1, rope_type: int = 2,
) -> Path:  # fmt: skip
    """Write a llama of random blocks: 2-D weights in one type and everything else float32."""
    metadata = {
        "architecture": "llama", "hidden_size": hidden, "num_layers": num_layers,
        "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
        "intermediate_size": ffn, "max_position_embeddings": 1 << 16, "rope_theta": 1e4,
        "rope_type": rope_type, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    norms = ["model.norm.weight"]
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (heads * head_dim, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, heads * head_dim),
            f"{prefix}mlp.gate_proj.weight": (ffn, hidden),
            f"{prefix}mlp.up_proj.weight": (ffn, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, ffn),
        }
        norms += [f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight"]
    entries = [TensorEntry(name, dtype, shape) for name, shape in shapes.items()]
    entries += [TensorEntry(name, "F32", (hidden,)) for name in norms]
    gain = np.linspace(0.5, 1.5, hidden).astype(np.float32)
    with AprWriter(path, metadata, entries) as writer:
        for seed, entry in enumerate(writer.entries):
            if entry.name in norms:
                writer.write(entry.name, gain)
            else:
                raw = random_bytes(entry.dtype, shapes[entry.name], seed)
                writer.write(entry.name, np.frombuffer(raw, np.uint8))
    return path
