"""The published schema of `_trace.json`, held against sidecars that this project writes."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from aprcore.dumps.plan import Plan
from aprcore.dumps.sidecar import SIDECAR_NAME, SIDECAR_SCHEMA, Sidecar
from aprcore.dumps.trace import record_trace
from aprcore.dumps.writer import TraceWriter
from aprcore.engines.arithmetic import ANGLES, PARTS, PRODUCTS, RESULTS, words_for
from aprcore.models.model import open_model
from aprcore.network.graph import known_stages
from aprcore.network.stages import StageKey
from aprtui.demo import demo_path, load_faults

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "trace.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def sidecar_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / SIDECAR_NAME).read_text("utf-8"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The sidecar of a trace of the demo model."""
    directory = tmp_path_factory.mktemp("trace")
    with open_model(demo_path() / "sound.apr") as model:
        record_trace(model, (1, 2, 3), prompt="abc", plan=Plan(), directory=directory)
    return sidecar_of(directory)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_field_is_described() -> None:
    assert set(SCHEMA["properties"]) == {"schema", *(field.name for field in fields(Sidecar))}
    assert SCHEMA["properties"]["schema"]["const"] == SIDECAR_SCHEMA
    named = {word for option in SCHEMA["properties"]["arithmetic"]["oneOf"] if "enum" in option
             for word in option["enum"]}  # fmt: skip
    assert named == {*RESULTS, *PRODUCTS} == set(words_for("all"))
    parts = SCHEMA["properties"]["arithmetic"]["oneOf"][1]["propertyNames"]["enum"]
    assert set(parts) == {"all", "kv_cache", "angles", *PARTS}
    assert all(words_for(part) for part in parts) and words_for("angles") == ANGLES


def test_a_trace_of_ours_is_valid(recorded: dict[str, Any]) -> None:
    VALIDATOR.validate(recorded)
    assert recorded["tokens"] == [1, 2, 3]
    assert recorded["model"]["sha256"]


def test_the_captured_oracle_and_the_demo_dumps_are_valid() -> None:
    dumps = [fault.trace for fault in load_faults().values() if fault.trace is not None]
    for directory in (demo_path() / "oracle", *dumps):
        VALIDATOR.validate(sidecar_of(directory))


def test_a_sidecar_that_records_nothing_is_valid(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, Sidecar()) as writer:
        writer.write(StageKey(None, "lm_head"), np.zeros(3, dtype=np.float32))
    VALIDATOR.validate(sidecar_of(tmp_path))


def test_every_stage_has_a_valid_path() -> None:
    paths = [StageKey(12, name).path for name in known_stages()] + list(known_stages())
    VALIDATOR.validate(
        {
            "schema": SIDECAR_SCHEMA,
            "stages": {path: {"shape": [1], "dtype": "float32"} for path in paths},
        }
    )


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "aprtui-trace-v2"},
        {"schema": None},
        {"tokens": "3838, 374"},
        {"tokens": [1, -2]},
        {"tokens": [1.5]},
        {"positions": {"0": 0}},
        {"prompt": 7},
        {"model": "model.apr"},
        {"model": {"sha256": "abc"}},
        {"model": {"size_bytes": -1}},
        {"arithmetic": "fp32"},
        {"dtype": "F16"},
        {"versions": {"numpy": 2.4}},
        {"created_utc": "yesterday"},
        {"stages": ["lm_head"]},
        {"stages": {"layer-01/attn_norm": {"shape": [1], "dtype": "float32"}}},
        {"stages": {"../lm_head": {"shape": [1], "dtype": "float32"}}},
        {"stages": {"lm_head": {"shape": [1]}}},
        {"stages": {"lm_head": {"shape": [1], "dtype": "float16"}}},
        {"stages": {"lm_head": {"shape": "1", "dtype": "float32"}}},
    ],
    ids=str,
)
def test_what_is_wrong_is_refused(recorded: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(recorded | change)


def test_the_schema_is_needed() -> None:
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate({})


def test_keys_of_a_later_version_are_no_error(recorded: dict[str, Any]) -> None:
    VALIDATOR.validate(recorded | {"later": 1})
