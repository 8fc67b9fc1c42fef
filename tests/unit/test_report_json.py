"""A finished run as JSON, against its schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from aprcore.judging.verdict import Verdict
from aprcore.records.report_json import format_json, to_json
from aprcore.records.sharing import shareable
from report_runs import COMMAND, NAMES, found_in, reports, written

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


class TestJson:
    def test_the_schema_is_one(self) -> None:
        jsonschema.Draft202012Validator.check_schema(SCHEMA)
        assert SCHEMA["$defs"]["verdict"]["enum"] == [verdict.value for verdict in Verdict]

    @pytest.mark.parametrize("name", NAMES)
    def test_a_report_is_what_the_schema_says_and_nothing_else(
        self, tmp_path: Path, name: str
    ) -> None:
        record = json.loads(written(reports()[name], ".json", tmp_path, command=COMMAND))
        jsonschema.Draft202012Validator(closed(SCHEMA)).validate(record)
        printed = to_json(reports()[name])
        VALIDATOR.validate(printed)
        assert record.keys() - printed.keys() == {"command", "environment"}
        shared = to_json(shareable(reports()[name]))
        assert record["stages"] == json.loads(json.dumps(shared["stages"]))

    def test_every_part_of_the_schema_is_used(self) -> None:
        """Else a definition could say anything and no test would notice."""
        used = set()
        for report in reports().values():
            for stage in to_json(report)["stages"]:
                used |= {key for key, value in stage.items() if value is not None}
        parts = set(SCHEMA["$defs"]["stage"]["properties"])
        # Reference weights and budgets are asked for; parity comes with its own stages.
        assert parts - used <= {"quantisation", "budget_relative_l2", "symptom"}

    @pytest.mark.parametrize(
        "change",
        [
            {"schema": "aprtui-report-v2"},
            {"diverges": "yes"},
            {"first_divergence": "../etc/passwd"},
            {"counts": {"WRONG": 1}},
            {"trace": None},
            {"tokens": [-1]},
            {"bound_relative_l2": "tiny"},
            {"stages": [{"path": "lm_head"}]},
            {"environment": {}},
        ],
        ids=str,
    )
    def test_what_is_wrong_is_refused(self, change: dict[str, Any]) -> None:
        record = json.loads(json.dumps(to_json(found_in("kv-tiled"))))
        VALIDATOR.validate(record)
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate(record | change)


def closed(schema: Any) -> Any:
    """A schema under which a key that it does not describe is an error."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        inner["additionalProperties"] = False
    return inner


def test_a_stage_is_a_line(tmp_path: Path) -> None:
    report = found_in("kv-tiled")
    text = written(report, ".json", tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("  {")]
    assert [json.loads(line.rstrip(","))["path"] for line in lines] == [
        stage.key.path for stage in report.stages
    ]
    empty = {"schema": "x", "stages": [], "elapsed_s": 1.5}
    assert json.loads(format_json(empty)) == empty
