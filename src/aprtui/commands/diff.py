"""`aprtui diff A B`: stage files, directories of them, or models."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprtui.commands.run_options import whole_number

if TYPE_CHECKING:
    from aprcore.runs.diff import Diff, DiffRow


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "diff",
        help="compare two stage files, two directories or two models",
        description="Compare stored values. Exit 0 when all are equal or within the tolerance.",
        allow_abbrev=False,
    )
    parser.add_argument("a", type=Path, metavar="A", help="the side under test")
    parser.add_argument("b", type=Path, metavar="B", help="the reference")
    parser.add_argument(
        "--tolerance", type=_tolerance, default=0.0, metavar="X",
        help="largest relative L2 that still counts as equal (default: 0, equal values)",
    )  # fmt: skip
    parser.add_argument(
        "--top", type=whole_number("a number of rows"), default=10, metavar="K",
        help="differences to list",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON (apr-stage-diff-v1)")
    parser.add_argument(
        "--strict", action="store_true", help="count a tensor that one side lacks as a difference"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare and print.

    Raises:
        AprError: The two sides cannot be compared.
    """
    from aprcore.runs.diff import diff_paths, to_json

    diff = diff_paths(args.a, args.b, tolerance=args.tolerance, top_k=args.top)
    if args.json:
        import json

        print(json.dumps(to_json(diff), indent=1, allow_nan=False))
    else:
        _print(diff, strict=args.strict)
    return int(diff.differs(strict=args.strict))


def _print(diff: Diff, *, strict: bool) -> None:
    from aprtui.text import visible

    width = max(28, *(len(visible(row.name)) for row in diff.rows))
    print(f"A {visible(str(diff.path_a))}\nB {visible(str(diff.path_b))}\n")
    print(
        f"{'tensor':<{width}} {'values':>11} {'cosine':>12} {'relative L2':>12} {'max|diff|':>12}"
    )
    for row in diff.rows:
        print(_line(row, width))
    if len(diff.rows) == 1 and diff.rows[0].comparison is not None:
        for rank, d in enumerate(diff.rows[0].comparison.top, 1):
            print(f"  {rank:>3}  [{d.index}]  A {d.a:.6e}  B {d.b:.6e}  |diff| {d.abs_diff:.3e}")
    missing = sum(row.verdict.value == "MISSING" for row in diff.rows)
    if missing and not strict:
        print(f"\n{missing} tensors are on one side only and were not counted (see --strict)")
    print("\ndifferent" if diff.differs(strict=strict) else "\nequal within the tolerance")


def _line(row: DiffRow, width: int) -> str:
    from aprtui.text import visible

    name = f"{visible(row.name):<{width}}"
    found = row.comparison
    if found is None:
        return f"{name} {row.verdict.value}  {visible(row.detail)}"
    figures = f"{found.cosine:>12.7f} {found.relative_l2:>12.3e} {found.max_abs_diff:>12.3e}"
    word = "" if row.verdict.value == "PASS" else "  DIFFERS"
    if found.unequal_nonfinite:
        word += f"  {found.unequal_nonfinite} unequal non-finite"
    return f"{name} {found.count:>11} {figures}{word}"


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a non-negative number")
    return value
