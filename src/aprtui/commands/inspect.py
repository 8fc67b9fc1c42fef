"""`aprtui inspect`: what is in a model file, without running it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aprtui.inspection import Inspection


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "inspect",
        help="show the header, configuration and tensors of a model",
        description="Show what is in a .apr file, a GGUF file or a Hugging Face directory.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the model")
    parser.add_argument(
        "--verify", action="store_true", help="check every checksum and extent instead"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what the file holds, or one line if all its checksums are right.

    Raises:
        AprError: The file cannot be read or is damaged.
    """
    import json

    from aprtui.inspection import inspect_model

    verified = _verify(args.file) if args.verify else None
    inspection = inspect_model(args.file)
    if args.json:
        record = inspection.as_json()
        if verified is not None:
            record["verified"] = verified
        print(json.dumps(record, indent=1, allow_nan=False, default=str))
    elif verified is not None:
        from aprtui.text import byte_count, visible

        size = byte_count(inspection.size_bytes)
        print(
            f"OK {visible(str(args.file))}: {len(inspection.tensors)} tensors, {size}, {verified}"
        )
    else:
        _print(inspection)
    return 0


def _verify(path: Path) -> str:
    """Check everything that can be checked; says what that was."""
    from aprcore.formats.apr import verify_apr
    from aprtui.inspection import find_format
    from aprtui.progress import byte_progress

    if find_format(path) != "apr":
        return "every extent is right (the format has no checksums)"
    with byte_progress("verifying") as bar:

        def show(done: int, total: int) -> None:
            if bar is not None:
                bar(done, total, "")

        verify_apr(path, show).close()
    return "every checksum and extent is right"


def _print(inspection: Inspection) -> None:
    from rich.text import Text

    from aprtui.listing import field_table, print_parts
    from aprtui.text import visible

    parts: list[RenderableType] = [Text(visible(inspection.path), style="bold")]
    for title, fields in inspection.sections():
        shown = {name: _shown(value) for name, value in fields.items()}
        parts += [Text(f"\n{title}", style="bold"), field_table(shown)]
    print_parts(*parts, Text("\nTensors", style="bold"), _tensor_table(inspection))


def _tensor_table(inspection: Inspection) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    from aprtui.text import visible

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("name", overflow="fold")
    table.add_column("type", no_wrap=True)
    table.add_column("shape", justify="right")
    table.add_column("bytes", justify="right", no_wrap=True)
    for tensor in inspection.tensors:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        table.add_row(Text(visible(tensor.name)), Text(tensor.dtype), shape, str(tensor.size_bytes))
    return table


def _shown(value: Any) -> str:
    import json

    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
