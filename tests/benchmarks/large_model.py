"""Writes a model of the size of Qwen2.5-7B in Q4_K, made of random blocks: 4.3 GB.

The blocks decode to weights of mean 0 and deviation 1 / sqrt(inputs), so that the tensors of a pass
stay in the range of a trained model's. Run as a script: `large_model.py OUT.apr [--layers N]`.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aprcore.formats.apr_writer import AprWriter, TensorEntry
from aprcore.ground.errors import AprError

PIECE_BLOCKS = 1 << 17
BLOCK_BYTES, BLOCK_VALUES = 144, 256
# Deviation of a four-bit code drawn evenly, times the root mean square of a six-bit scale.
CODE_DEVIATION = math.sqrt((16**2 - 1) / 12) * math.sqrt(63 * 127 / 6)
MEAN_CODE = 7.5


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; by default those of Qwen2.5-7B."""

    num_layers: int = 28
    hidden: int = 3584
    ffn: int = 18944
    heads: int = 28
    kv_heads: int = 4
    vocab: int = 152064

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.hidden // self.heads

    def metadata(self) -> dict[str, object]:
        """What the file says of itself."""
        return {
            "architecture": "qwen2", "model_type": "qwen2", "name": "random blocks",
            "hidden_size": self.hidden, "num_layers": self.num_layers, "num_heads": self.heads,
            "num_kv_heads": self.kv_heads, "head_dim": self.head_dim, "vocab_size": self.vocab,
            "intermediate_size": self.ffn, "max_position_embeddings": 32768, "rope_theta": 1e6,
            "rope_type": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        }  # fmt: skip

    def entries(self) -> list[TensorEntry]:
        """Matrices in Q4_K, gains and biases in F32."""
        kv = self.kv_heads * self.head_dim
        matrices = {"model.embed_tokens.weight": (self.vocab, self.hidden),
                    "lm_head.weight": (self.vocab, self.hidden)}  # fmt: skip
        vectors = {"model.norm.weight": self.hidden}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, shape in (
                ("self_attn.q_proj", (self.hidden, self.hidden)),
                ("self_attn.k_proj", (kv, self.hidden)),
                ("self_attn.v_proj", (kv, self.hidden)),
                ("self_attn.o_proj", (self.hidden, self.hidden)),
                ("mlp.gate_proj", (self.ffn, self.hidden)),
                ("mlp.up_proj", (self.ffn, self.hidden)),
                ("mlp.down_proj", (self.hidden, self.ffn)),
            ):
                matrices[f"{prefix}{name}.weight"] = shape
            for name, size in (("q_proj", self.hidden), ("k_proj", kv), ("v_proj", kv)):
                vectors[f"{prefix}self_attn.{name}.bias"] = size
            for name in ("input_layernorm", "post_attention_layernorm"):
                vectors[f"{prefix}{name}.weight"] = self.hidden
        return [TensorEntry(name, "Q4_K", shape) for name, shape in matrices.items()] + [
            TensorEntry(name, "F32", (size,)) for name, size in vectors.items()
        ]


def main() -> int:
    """Write the file; one line and exit code 2 if that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, metavar="OUT.apr")
    parser.add_argument("--layers", type=int, default=Shape.num_layers)
    args = parser.parse_args()
    try:
        write_large_model(args.path, Shape(num_layers=args.layers))
    except AprError as error:
        print(f"large_model.py: {error}", file=sys.stderr)
        return 2
    return 0


def write_large_model(path: Path, shape: Shape, seed: int = 0) -> None:
    """Write a model of random blocks. The file appears when it is complete.

    Raises:
        AprError: The disk has no room for it, or the folder cannot be written.
    """
    writer = AprWriter(path, shape.metadata(), shape.entries())
    if not path.parent.is_dir():
        raise AprError("there is no such folder", where=path.parent, hint="create it first")
    free = shutil.disk_usage(path.parent).free
    if free < writer.size_bytes:
        raise AprError(
            f"takes {writer.size_bytes >> 20} MiB, and {free >> 20} MiB are free",
            where=path, hint="free space or write elsewhere",
        )  # fmt: skip
    random = np.random.default_rng(seed)
    with writer:
        for entry in writer.entries:
            if entry.dtype == "F32":
                is_gain = entry.name.endswith("norm.weight")
                spread = random.normal(1.0 if is_gain else 0.0, 0.1, entry.shape)
                writer.write(entry.name, spread.astype(np.float32))
                continue
            rows, width = entry.shape
            count = rows * -(-width // BLOCK_VALUES)
            for blocks in random_blocks(random, count, 1 / math.sqrt(width)):
                writer.write(entry.name, blocks)


def random_blocks(
    random: np.random.Generator, count: int, deviation: float
) -> Iterator[NDArray[np.uint8]]:
    """Pieces of Q4_K blocks, uint8 [n, 144], whose values have mean 0 and a given deviation."""
    unit = np.float16(deviation / CODE_DEVIATION)
    units = np.array([unit, np.float16(MEAN_CODE) * unit], "<f2").view(np.uint8)
    for start in range(0, count, PIECE_BLOCKS):
        rows = min(PIECE_BLOCKS, count - start)
        raw = random.bytes(rows * BLOCK_BYTES)
        blocks = np.frombuffer(raw, np.uint8).reshape(rows, BLOCK_BYTES).copy()
        blocks[:, :4] = units
        # The codes of the minima are those of the scales, so that values lie about 0.
        blocks[:, 8:12] = blocks[:, 4:8]
        low = blocks[:, 12:16] & 0x0F
        blocks[:, 12:16] = low | low << 4
        yield blocks


if __name__ == "__main__":
    sys.exit(main())
