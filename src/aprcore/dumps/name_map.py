"""`--names map.toml`: a user's table of what an engine calls the stages.

```toml
ignore = ["*.cos", "*.sin"]                      # no stages, and worth no note

[names]
"blk.{layer}.attn_normed" = "attn_norm"          # their name = stage
qkv_matmul = ["blk.{layer}.q", "blk.{layer}.k", "blk.{layer}.v"]  # stage = their names, joined
ffn_gate = ["blk.{layer}.gate_up[0/2]"]          # the first half of its columns; [64:96]: those
post_ffn_residual = ["blk.{layer}.ffn + blk.{layer}.stream"]      # a sum
"blk.{layer+1}.input" = "post_ffn_residual"      # shown a layer later
```
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import msgspec

from aprcore.dumps.names import Dialect, mapped_dialect, parse_term
from aprcore.ground.errors import PlanError
from aprcore.ground.fields import convert, read_toml
from aprcore.network.graph import find_stage
from aprcore.network.stages import Scope, Stage

LAYER = re.compile(r"\{layer(?:[+-]\d{1,9})?\}", re.ASCII)
IGNORE = "ignore"

# A stage, or the names whose tensors are joined to one.
_Entry: Any = str | Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


def read_name_map(path: Path) -> Dialect:
    """The names of a file such as the one above; the table's header may be left out.

    Raises:
        FormatError: The file cannot be read or is not TOML.
        PlanError: An entry names no stage, or its names cannot be told from layer to layer.
    """
    data = read_toml(path)
    ignored: tuple[str, ...] = ()
    if IGNORE in data:
        ignored = convert(data.pop(IGNORE), tuple[str, ...], path, prefix=repr(IGNORE),
                          error=PlanError, hint='write ignore = ["*.cos"]')  # fmt: skip
    table = data.get("names", data)
    if not isinstance(table, dict) or ("names" in data and len(data) > 1):
        raise PlanError("expected one table, [names]", where=path, hint="see docs/formats.md")
    if not table:
        raise PlanError("names no tensor", where=path, hint='write "their.{layer}.name" = "stage"')
    choices: dict[str, list[tuple[str, ...]]] = {}
    for key, value in table.items():
        stage, patterns = _read_entry(path, key, value)
        choices.setdefault(stage, []).append(patterns)
    return mapped_dialect(choices, ignored)


def _read_entry(path: Path, key: str, value: Any) -> tuple[str, tuple[str, ...]]:
    names = convert(
        value, _Entry, path, prefix=repr(key), error=PlanError,
        hint='write "their.{layer}.name" = "stage", or stage = ["name", "name"]',
    )  # fmt: skip
    stage, patterns = (names, (key,)) if isinstance(names, str) else (key, names)
    try:
        row = find_stage(stage)
    except PlanError as error:
        raise PlanError(f"{key!r}: {error.what}", where=path, hint=error.hint) from None
    for pattern in patterns:
        for operand in parse_term(pattern):
            _check_layer(path, f"{key!r}: {operand.name!r}", operand.name, row)
    return row.name, patterns


def _check_layer(path: Path, what: str, name: str, row: Stage) -> None:
    count = len(LAYER.findall(name))
    if count > 1:
        raise PlanError(f"{what} has {{layer}} twice", where=path)
    if row.scope is not Scope.FIRST_LAYER and bool(count) != (row.scope is Scope.LAYER):
        wrong = "has a {layer}, but" if count else "has no {layer}, and"
        kind = "is of every layer" if row.scope is Scope.LAYER else "is of the whole model"
        raise PlanError(f"{what} {wrong} {row.name} {kind}", where=path)
