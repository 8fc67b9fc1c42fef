"""Where the cases of a sweep differ, how that is reported, and how long the rest takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from aprcore.sweep.report import Spread, find_differences, to_json, to_markdown
from aprcore.sweep.results import (
    error_result,
)
from aprcore.sweep.run import TimeEstimate
from aprtui.cli import main
from aprtui.commands.sweep import format_duration
from sweep_cases import make_case, make_result, write


class TestDifferences:
    def test_cases_are_grouped_by_stage_and_cause(self) -> None:
        cases = [make_case(m, b) for m in ("q4", "q8") for b in ("numpy", "opencl")]
        results = [
            (case, make_result(case, "layer-1/ffn_up" if case.axes["model"] == "q4" else None))
            for case in cases
        ]
        (finding,) = find_differences(results)
        assert finding.describe() == "layer-1/ffn_up FAIL kernel: theta"
        spreads = {spread.axis: spread for spread in finding.spreads}
        assert spreads.keys() == {"model", "backend"}
        assert spreads["model"].describe() == "always with q4; never with q8"
        assert spreads["backend"].describe() == "makes no difference"

    def test_other_causes_are_other_findings_and_the_most_frequent_is_first(self) -> None:
        cases = [make_case(prompt=p) for p in "abcd"]
        stages = ["layer-1/ffn_up", "layer-1/ffn_up", "layer-1/ffn_up", None]
        causes = ["theta", None, None, None]
        results = [(c, make_result(c, s, x)) for c, s, x in zip(cases, stages, causes)]
        found = find_differences(results)
        assert [(f.cause, [c.prompt.name for c in f.cases]) for f in found] == [
            (None, ["b", "c"]), ("theta", ["a"])]  # fmt: skip
        assert found[0].describe().endswith("None (cos 1.0)")  # the clause of the first case

    def test_an_error_says_nothing_either_way(self) -> None:
        a, b, c = (make_case(m) for m in "abc")
        lost = error_result(c.id, "x")
        results = [(a, make_result(a, "lm_head")), (b, make_result(b)), (c, lost)]
        (finding,) = find_differences(results)
        assert finding.spreads[0].found == {"a": (1, 1), "b": (0, 1)}
        assert find_differences([(c, lost)]) == ()

    def test_shares_that_differ_matter(self) -> None:
        assert Spread("model", {"a": (1, 2), "b": (2, 4)}).describe() == "makes no difference"
        assert Spread("model", {"a": (1, 2), "b": (2, 3), "c": (0, 1)}).describe() == (
            "1 of 2 with a; 2 of 3 with b; never with c"
        )


class TestReport:
    def test_text_from_files_is_not_markup(self) -> None:
        from aprcore.sweep.plan import Sweep
        from aprcore.sweep.run import SweepFinished

        nasty = "<script>|**x**\n`[a](b)\x1b"
        cases = (make_case(nasty), make_case("b"))
        results = tuple((case, make_result(case, "layer-1/ffn_up", nasty)) for case in cases)
        sweep = Sweep(Path("c.toml"), cases)
        text = to_markdown(sweep, SweepFinished(results, 0, 1.0))
        outside = text.split("## Again")[0]
        assert "\x1b" not in text
        assert "<script" not in outside.replace("\\<", "")
        rows = [line for line in outside.splitlines() if line.startswith("| ")]
        assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
        assert len(rows) == 4

    def test_it_gives_away_no_home_directory(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = tmp_path / "secret-name"
        home.mkdir()
        monkeypatch.setenv("HOME", str(home))
        cases = write(home, f"""
            [[matrix]]
            models = ["{tiny}/m.apr", "gone/m.apr", "gone too/gone/m.apr"]
            oracles = ["{tiny}/oracle"]
        """)  # fmt: skip
        for suffix in (".json", ".md"):
            report = tmp_path / f"r{suffix}"
            assert main(["sweep", str(cases), "--report", str(report)]) == 2
            text = report.read_text()
            assert "secret-name" not in text
            assert "aprtui bisect ~/gone/m.apr --oracle" in text
            assert "aprtui bisect ~/'gone too/gone/m.apr' --oracle" in text
        # Where it stays, a path is the path.
        assert str(home / "gone/m.apr") in cases.with_suffix(".results.jsonl").read_text()

    def test_the_json_is_as_published(self) -> None:
        from aprcore.sweep.plan import Sweep
        from aprcore.sweep.run import SweepFinished

        cases = (make_case("a"), make_case("b"), make_case("c"))
        results = (
            (cases[0], replace(make_result(cases[0], "lm_head"), worst_relative_l2="nan")),
            (cases[1], make_result(cases[1])),
            (cases[2], error_result(cases[2].id, "gone")),
        )
        data = to_json(Sweep(Path("c.toml"), cases), SweepFinished(results, 1, 2.0))
        schema = json.loads(
            (Path(__file__).parents[2] / "docs/sweep.schema.json").read_text("utf-8")
        )
        jsonschema.Draft202012Validator.check_schema(schema)
        printed = json.loads(json.dumps(data, allow_nan=False))
        jsonschema.Draft202012Validator(schema).validate(printed)
        assert data["counts"] == {"FAIL": 1, "PASS": 1, "ERROR": 1}
        assert data["diverges"] and data["differences"][0]["spread"]["model"]["always"] == ["a"]


class TestEstimate:
    def test_the_rest_costs_what_its_like_cost(self) -> None:
        small, large, other = make_case("small"), make_case("large"), make_case("other")
        estimate = TimeEstimate([small, small, large, large, large, other])
        assert estimate.left_s(1.0) is None
        estimate.add(small, replace(make_result(small), elapsed_s=1.0))
        estimate.add(large, replace(make_result(large), elapsed_s=9.0))
        # Left: a small one, two large ones, and one that is taken for the average of five; two
        # workers did ten seconds' work in five.
        assert estimate.left_s(5.0) == pytest.approx((1 + 9 + 9 + 5) / 2)
        for case in (small, large, large, other):
            estimate.add(case, make_result(case))
        assert estimate.left_s(9.0) == 0

    def test_errors_and_earlier_runs(self) -> None:
        case = make_case()
        earlier = [(case, replace(make_result(case), elapsed_s=4.0))]
        estimate = TimeEstimate([case] * 3, earlier)
        assert estimate.left_s(1.0) is None  # how fast this machine is, is not known
        estimate.add(case, error_result(case.id, "x"))
        assert estimate.left_s(1.0) is None
        estimate.add(case, replace(make_result(case), elapsed_s=2.0))
        assert estimate.left_s(2.0) == pytest.approx(3.0)

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "0 s"),
            (59.4, "59 s"),
            (59.6, "1 min 00 s"),
            (3599.7, "1 h 00 min"),
            (8000, "2 h 13 min"),
        ],
    )
    def test_durations(self, seconds: float, text: str) -> None:
        assert format_duration(seconds) == text
