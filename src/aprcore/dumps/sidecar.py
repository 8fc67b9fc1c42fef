"""What a directory of stage tensors says of itself: `_trace.json`, or the other project's text.

See docs/formats.md, "Sidecar"; the schema is docs/trace.schema.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from aprcore.ground.data_file import read_small
from aprcore.ground.errors import FormatError, TraceError
from aprcore.ground.fields import MAX_SIZE, convert, read_object

SIDECAR_NAME = "_trace.json"
PROVENANCE_NAME = "_PROVENANCE.txt"
SIDECAR_SCHEMA = "aprtui-trace-v1"
# Tokens of the longest context take a tenth of it.
SIDECAR_LIMIT_BYTES = 256 * 1024 * 1024

PROVENANCE_LIMIT_BYTES = 16 * 1024 * 1024
LOG_PROBABILITIES: Literal["log probabilities"] = "log probabilities"

Integers = tuple[Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)], ...]


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
        arithmetic: What its engine rounds: a word for all of it, or words by operation; see
            `aprcore.engines.arithmetic`.
        dtype: Type of the activations: "float32", "float16", "bfloat16".
        attention: The attention implementation.
        logits: `LOG_PROBABILITIES` where it holds those in place of logits.
        checked: What an oracle was checked for when it was captured: "logits and stages", that
            both are what the model computes, or "nothing".
        settings: What an engine was run with: {"kv_type": "f16", "ubatch": 512}.
        versions: Versions of the software involved.
        created_utc: ISO 8601 time.
        stages: Shape and dtype of every tensor, by its path.
    """

    tokens: Integers | None = None
    prompt: str | None = None
    positions: Integers | None = None
    history: Integers | None = None
    model: Mapping[str, Any] | None = None
    backend: str | None = None
    device: str | None = None
    driver: str | None = None
    arithmetic: str | Mapping[str, str] | None = None
    dtype: str | None = None
    attention: str | None = None
    logits: Literal["log probabilities"] | None = None
    checked: str | None = None
    settings: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    created_utc: str | None = None
    stages: Mapping[str, Mapping[str, Any]] | None = None

    def to_json(self) -> str:
        """The text of `_trace.json`."""
        data = {"schema": SIDECAR_SCHEMA, **asdict(self)}
        # A full pass has no history, only oracles are checked, only captures have settings.
        for name in ("history", "logits", "checked", "settings"):
            if data[name] is None:
                del data[name]
        return json.dumps(data, indent=1, allow_nan=False)


def read_sidecar(root: Path) -> Sidecar:
    """The sidecar of a directory; empty if it has none.

    Raises:
        FormatError: `_trace.json` is there but is not what it should be.
    """
    path = root / SIDECAR_NAME
    try:
        if path.exists():
            return _parse_sidecar(path)
        path = root / PROVENANCE_NAME
        if path.exists():
            data = read_small(path, PROVENANCE_LIMIT_BYTES, may_be_empty=True)
            return _parse_provenance(data.decode(errors="replace"))
    except OSError as error:
        raise TraceError(f"cannot be read ({error.strerror})", where=path) from error
    return Sidecar()


def _parse_sidecar(path: Path) -> Sidecar:
    data = read_object(path, limit_bytes=SIDECAR_LIMIT_BYTES)
    schema = data.get("schema")
    if not str(schema).startswith("aprtui-trace-v"):
        raise FormatError(f"has schema {schema!r}, not {SIDECAR_SCHEMA!r}", where=path)
    recorded = {key: value for key, value in data.items() if value is not None}
    return convert(recorded, Sidecar, path, hint="capture it again")


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
