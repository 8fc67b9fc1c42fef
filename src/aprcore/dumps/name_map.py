"""`--names map.toml`: a user's table of what an engine calls the stages.

```toml
[names]
"blk.{layer}.attn_normed" = "attn_norm"          # their name = stage
qkv_matmul = ["blk.{layer}.q", "blk.{layer}.k", "blk.{layer}.v"]  # stage = their names, joined
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from aprcore.dumps.names import Dialect, mapped_dialect
from aprcore.ground.errors import PlanError
from aprcore.ground.fields import convert, read_toml
from aprcore.network.graph import find_stage
from aprcore.network.stages import Scope

LAYER = "{layer}"

# A stage, or the names whose tensors are joined to one.
_Entry: Any = str | Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


def read_name_map(path: Path) -> Dialect:
    """The names of a file such as the one above; the table's header may be left out.

    Raises:
        FormatError: The file cannot be read or is not TOML.
        PlanError: An entry names no stage, or its names cannot be told from layer to layer.
    """
    data = read_toml(path)
    table = data.get("names", data)
    if not isinstance(table, dict) or ("names" in data and len(data) > 1):
        raise PlanError("expected one table, [names]", where=path, hint="see docs/formats.md")
    if not table:
        raise PlanError("names no tensor", where=path, hint='write "their.{layer}.name" = "stage"')
    choices: dict[str, list[tuple[str, ...]]] = {}
    for key, value in table.items():
        stage, patterns = _read_entry(path, key, value)
        choices.setdefault(stage, []).append(patterns)
    return mapped_dialect(choices)


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
        if pattern.count(LAYER) > 1:
            raise PlanError(f"{key!r}: {pattern!r} has {LAYER} twice", where=path)
        if row.scope is not Scope.FIRST_LAYER and (LAYER in pattern) != (row.scope is Scope.LAYER):
            wrong = "has a {layer}, but" if LAYER in pattern else "has no {layer}, and"
            kind = "is of every layer" if row.scope is Scope.LAYER else "is of the whole model"
            raise PlanError(f"{key!r}: {pattern!r} {wrong} {row.name} {kind}", where=path)
    return row.name, patterns
