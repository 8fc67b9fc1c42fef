"""Differences of two stage files, two directories of stage files, or two models.

A plain comparison of stored values: nothing is permuted, masked or judged. The JSON of two files
is `apr-stage-diff-v1` of docs/formats.md; directories and models hold one such record per tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.directory import TraceDirectory
from aprcore.dumps.stage_file import read_stage_file
from aprcore.ground.errors import AprError, FormatError
from aprcore.judging.compare import Comparison, compare, compare_pieces
from aprcore.judging.verdict import Verdict
from aprcore.network.graph import computation_order
from aprcore.network.weights import Weight, row_chunks, row_values
from aprcore.records.report_json import json_ready

DIFF_SCHEMA = "apr-stage-diff-v1"


@dataclass(frozen=True, slots=True)
class DiffRow:
    """One tensor on both sides.

    Attributes:
        name: The stage's path, or the weight's name.
        layer: The layer of a stage; None for whole-model stages and weights.
        verdict: PASS or FAIL for compared values, SHAPE or MISSING where nothing is compared.
        detail: What differs, for SHAPE and MISSING.
        comparison: The figures, where values were compared.
    """

    name: str
    layer: int | None
    verdict: Verdict
    detail: str
    comparison: Comparison | None = None


@dataclass(frozen=True, slots=True)
class Diff:
    """Two files, directories or models, compared tensor by tensor."""

    path_a: Path
    path_b: Path
    rows: tuple[DiffRow, ...]

    def differs(self, *, strict: bool = False) -> bool:
        """Whether values or sizes differ; with `strict` also when one side lacks a tensor."""
        bad = {Verdict.FAIL, Verdict.SHAPE} | ({Verdict.MISSING} if strict else set())
        return any(row.verdict in bad for row in self.rows)


def diff_paths(a: Path, b: Path, *, tolerance: float = 0.0, top_k: int = 10) -> Diff:
    """Compare two paths of one kind.

    Args:
        a: The side under test.
        b: The reference.
        tolerance: Largest relative L2 that still counts as equal; 0 asks for equal values.
        top_k: How many of the largest differences to keep per tensor.

    Raises:
        AprError: A side cannot be read, the two are of different kinds, have nothing in common,
            or are two files of different sizes or layers.
    """
    kinds = [_kind(path) for path in (a, b)]
    if kinds[0] != kinds[1]:
        raise AprError(f"is {kinds[1]}, but {a} is {kinds[0]}", where=b,
                       hint="compare two files, two directories or two models")  # fmt: skip
    if kinds[0] == STAGE_FILE:
        return Diff(a, b, (_diff_files(a, b, tolerance, top_k),))
    make_rows = _diff_directories if kinds[0] == STAGE_DIRECTORY else _diff_models
    rows = tuple(make_rows(a, b, tolerance, top_k))
    if all(row.verdict is Verdict.MISSING for row in rows):
        raise AprError(f"has no tensor in common with {a}", where=b)
    return Diff(a, b, rows)


def to_json(diff: Diff) -> dict[str, Any]:
    """A diff as JSON-ready values: flat for two files, else a record per tensor under `tensors`."""
    head: dict[str, Any] = {
        "schema": DIFF_SCHEMA,
        "path_a": str(diff.path_a),
        "path_b": str(diff.path_b),
    }
    if _kind(diff.path_a) == STAGE_FILE:
        head |= _figures(diff.rows[0])
    else:
        head["tensors"] = [
            {
                "name": row.name,
                "verdict": row.verdict.value,
                "detail": row.detail,
                **_figures(row),
                **_judgment(row),
            }
            for row in diff.rows
        ]
    cleaned: dict[str, Any] = json_ready(head)
    return cleaned


STAGE_FILE, STAGE_DIRECTORY, MODEL = "a stage file", "a directory of stage files", "a model"


def _kind(path: Path) -> str:
    try:
        if path.is_dir():
            return MODEL if (path / "config.json").exists() else STAGE_DIRECTORY
        if not path.exists():
            raise FormatError("does not exist", where=path, hint="check the path")
    except OSError as error:  # a name too long, a folder that may not be entered
        raise FormatError(f"cannot be read ({error.strerror})", where=path) from error
    return STAGE_FILE if path.suffix == ".bin" else MODEL


def _diff_files(a: Path, b: Path, tolerance: float, top_k: int) -> DiffRow:
    (layer_a, values_a), (layer_b, values_b) = read_stage_file(a), read_stage_file(b)
    for what, x, y in (("layer", layer_a, layer_b), ("size", values_a.size, values_b.size)):
        if x != y:
            raise FormatError(
                f"its {what} is {_word(y)}, that of {a} is {_word(x)}", where=b,
                hint="two files must hold the same tensor",
            )  # fmt: skip
    return _row(a.stem, layer_a, compare(values_a, values_b, top_k), tolerance)


def _word(value: int | None) -> str:
    return "whole-model" if value is None else str(value)


def _diff_directories(a: Path, b: Path, tolerance: float, top_k: int) -> Iterator[DiffRow]:
    side_a, side_b = TraceDirectory(a), TraceDirectory(b)
    for key in sorted({*side_a.keys(), *side_b.keys()}, key=computation_order):
        if key not in side_a or key not in side_b:
            lacking = "A" if key not in side_a else "B"
            yield DiffRow(key.path, key.layer, Verdict.MISSING, f"{lacking} lacks it")
            continue
        values_a, values_b = side_a.read(key), side_b.read(key)
        if values_a.size != values_b.size:
            detail = f"A has {values_a.size} values, B {values_b.size}"
            yield DiffRow(key.path, key.layer, Verdict.SHAPE, detail)
            continue
        yield _row(key.path, key.layer, compare(values_a, values_b, top_k), tolerance)


def _diff_models(a: Path, b: Path, tolerance: float, top_k: int) -> Iterator[DiffRow]:
    from aprcore.models.model import open_model

    with open_model(a) as model_a, open_model(b) as model_b:
        names = dict.fromkeys([*model_a.weights, *model_b.weights])
        for name in names:
            weight_a, weight_b = model_a.weights.get(name), model_b.weights.get(name)
            if weight_a is None or weight_b is None:
                lacking = "A" if weight_a is None else "B"
                yield DiffRow(name, None, Verdict.MISSING, f"{lacking} lacks it")
            elif weight_a.shape != weight_b.shape:
                detail = f"A has shape {list(weight_a.shape)}, B {list(weight_b.shape)}"
                yield DiffRow(name, None, Verdict.SHAPE, detail)
            else:
                found = compare_pieces(_row_pieces(weight_a, weight_b), top_k)
                yield _row(name, None, found, tolerance)


def _row_pieces(a: Weight, b: Weight) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Both weights, dequantised, a cache-sized piece at a time."""
    chunks = list(row_chunks(a))
    largest = max((stop - start for start, stop in chunks), default=0) * row_values(a)
    buffers = np.empty(largest, np.float32), np.empty(largest, np.float32)
    for start, stop in chunks:
        yield (
            a.read(start, stop, buffers[0]).reshape(-1),
            b.read(start, stop, buffers[1]).reshape(-1),
        )


def _row(name: str, layer: int | None, found: Comparison, tolerance: float) -> DiffRow:
    close = found.identical or (found.unequal_nonfinite == 0 and found.relative_l2 <= tolerance)
    return DiffRow(name, layer, Verdict.PASS if close else Verdict.FAIL, "", found)


def _figures(row: DiffRow) -> dict[str, Any]:
    found = row.comparison
    figures: dict[str, Any] = {"layer": "whole-model" if row.layer is None else row.layer}
    if found is None:
        return figures
    return figures | {
        "dim_product": found.count,
        "max_abs_diff": found.max_abs_diff,
        "max_abs_diff_index": found.max_index,
        "rms_diff": found.rms_diff,
        "cosine_sim": found.cosine,
        "top_diffs": [
            {"index": d.index, "a": d.a, "b": d.b, "abs_diff": d.abs_diff} for d in found.top
        ],
    }


def _judgment(row: DiffRow) -> dict[str, Any]:
    """What decided the verdict; the record of two files has a fixed set of keys without it."""
    found = row.comparison
    if found is None:
        return {}
    return {"relative_l2": found.relative_l2, "unequal_nonfinite": found.unequal_nonfinite}
