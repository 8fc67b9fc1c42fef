"""What a directory of stage tensors says of itself: `_trace.json`, or the other project's text.

Source: FORMATS.md, "APRT stage tensor file"; the schema is docs/trace.schema.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aprcore.ground.errors import FormatError, TraceError

SIDECAR_NAME = "_trace.json"
PROVENANCE_NAME = "_PROVENANCE.txt"
SIDECAR_SCHEMA = "aprtui-trace-v1"


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What a directory of stage tensors says of itself. None: not recorded.

    Attributes:
        tokens: Token ids of the pass.
        prompt: The text they came from.
        positions: Their positions.
        history: Tokens before them, in a decoding step: their keys and values were in the cache.
        model: `file`, `sha256`, `size_bytes`, `architecture` and `num_layers` of the model.
        backend, device, driver: What computed the tensors.
        arithmetic: Precision of the arithmetic, a name in `aprcore.ground.precision.ARITHMETICS`.
        dtype: Type of the activations: "float32", "float16", "bfloat16".
        attention: The attention implementation.
        versions: Versions of the software involved.
        created_utc: ISO 8601 time.
        stages: Shape and dtype of every tensor, by its path.
    """

    tokens: tuple[int, ...] | None = None
    prompt: str | None = None
    positions: tuple[int, ...] | None = None
    history: tuple[int, ...] | None = None
    model: Mapping[str, Any] | None = None
    backend: str | None = None
    device: str | None = None
    driver: str | None = None
    arithmetic: str | None = None
    dtype: str | None = None
    attention: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    created_utc: str | None = None
    stages: Mapping[str, Mapping[str, Any]] | None = None

    def to_json(self) -> str:
        """The text of `_trace.json`."""
        data = {"schema": SIDECAR_SCHEMA, **asdict(self)}
        if self.history is None:  # a full pass has none
            del data["history"]
        return json.dumps(data, indent=1, allow_nan=False)


def read_sidecar(root: Path) -> Sidecar:
    """The sidecar of a directory; empty if it has none.

    Raises:
        FormatError: `_trace.json` is there but is not what it should be.
    """
    path = root / SIDECAR_NAME
    try:
        if path.exists():
            return _parse_sidecar(path, path.read_text("utf-8"))
        path = root / PROVENANCE_NAME
        if path.exists():
            return _parse_provenance(path.read_text("utf-8", errors="replace"))
    except OSError as error:
        raise TraceError(f"cannot be read ({error.strerror})", where=path) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or an endless number
        raise FormatError("is not valid JSON", where=path, hint="capture it again") from error
    return Sidecar()


def _parse_sidecar(path: Path, text: str) -> Sidecar:
    data = json.loads(text)
    if not isinstance(data, dict):
        raise FormatError("is not a JSON object", where=path, hint="capture it again")
    schema = data.get("schema")
    if not isinstance(schema, str) or not schema.startswith("aprtui-trace-v"):
        raise FormatError(f"has schema {schema!r}, not {SIDECAR_SCHEMA!r}", where=path)

    def text_or_none(name: str) -> str | None:
        value = data.get(name)
        return value if isinstance(value, str) else None

    def object_or_none(name: str) -> Mapping[str, Any] | None:
        value = data.get(name)
        return value if isinstance(value, dict) else None

    return Sidecar(
        tokens=_integers(data.get("tokens"), "tokens", path),
        prompt=text_or_none("prompt"),
        positions=_integers(data.get("positions"), "positions", path),
        history=_integers(data.get("history"), "history", path),
        model=object_or_none("model"),
        backend=text_or_none("backend"),
        device=text_or_none("device"),
        driver=text_or_none("driver"),
        arithmetic=text_or_none("arithmetic"),
        dtype=text_or_none("dtype"),
        attention=text_or_none("attention"),
        versions={str(k): str(v) for k, v in (object_or_none("versions") or {}).items()},
        created_utc=text_or_none("created_utc"),
        stages=object_or_none("stages"),
    )


def _integers(value: Any, name: str, path: Path) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise FormatError(f"{name!r} is not a list of non-negative integers", where=path)
    return tuple(value)


def _parse_provenance(text: str) -> Sidecar:
    """The other project's `key: value` lines; what cannot be understood is left out."""
    values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    values = {key.strip().lower(): value.strip() for key, value in values.items()}
    listed = values.get("tokens", "")
    tokens = None
    if re.fullmatch(r"\[\s*\d{1,18}(\s*,\s*\d{1,18})*\s*,?\s*\]", listed):
        tokens = tuple(int(number) for number in re.findall(r"\d+", listed))
    prompt = values.get("prompt")
    if prompt is not None and len(prompt) > 1 and prompt[0] == prompt[-1] and prompt[0] in "\"'":
        prompt = prompt[1:-1]
    return Sidecar(tokens=tokens, prompt=prompt, dtype=values.get("dtype"))
