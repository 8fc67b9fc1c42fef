"""`aprtui import`: a GGUF file or a Hugging Face directory -> one .apr file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

# As `DTYPES` and `QUANTIZED` of `aprcore.models.import_types`, which costs the import of numpy:
# `--help` must not pay for that.
DTYPES = ("keep", "f32", "f16", "bf16")
QUANTIZED = ("q8_0", "q4_0", "q4_k", "q6_k")


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "import",
        help="convert a GGUF file or a Hugging Face directory to .apr",
        description="Convert a model to one .apr file, with its tokenizer. The file appears under "
        "its name only when it is complete.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="GGUF file or model directory")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="X.apr", help="the file to write"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="keep",
        help="type of the weights that are not quantised (default: keep each tensor's own)",
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZED,
        help="quantise the matrices; norms, biases, embedding and head stay float",
    )
    parser.add_argument(
        "--quantize-embeddings", action="store_true", help="quantise embedding and head, too"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and print what became of the tensors.

    Raises:
        AprError: The source or the target cannot be used.
    """
    from aprcore.models.convert import ConvertProgress, import_model
    from aprtui.progress import byte_progress
    from aprtui.text import byte_count, visible

    with byte_progress("importing") as bar:

        def show(now: ConvertProgress) -> None:
            if bar is not None:
                bar(now.done_bytes, now.total_bytes, visible(now.tensor, 60))

        plan = import_model(
            args.source,
            args.output,
            dtype=args.dtype,
            quantize=args.quantize,
            quantize_embeddings=args.quantize_embeddings,
            overwrite=args.force,
            progress=show,
        )
    size = byte_count(args.output.stat().st_size)
    print(f"{visible(str(args.output))}: {len(plan.tensors)} tensors, {size}")
    for line in (*plan.summary(), *plan.notes):
        print(f"  {visible(line)}")
    return 0
