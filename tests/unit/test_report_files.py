"""A finished run as HTML, Markdown and JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import struct
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from markdown_it import MarkdownIt

from aprcore.ground.errors import AprError
from aprcore.judging.compare import compare, describe
from aprcore.judging.layouts import layout_of
from aprcore.judging.logits import compare_logits
from aprcore.judging.verdict import Verdict
from aprcore.network.graph import BY_NAME, StageKey
from aprcore.pictures import Grid, MapKind
from aprcore.records.environment import (
    format_command,
    read_environment,
    with_home_in_command,
    without_home,
    without_home_in_command,
)
from aprcore.records.parity import SideJudgment, StageParity
from aprcore.records.report import (
    DeviceOpened,
    LogitsReport,
    PathRejected,
    Report,
    RunHeader,
    Side,
    StageReport,
)
from aprcore.records.report_json import to_json
from aprcore.records.wording import GLYPHS, MEANINGS, SEVERITY, finding_of, visible
from aprcore.reports.collect import collect_maps
from aprcore.reports.files import check_report_path, write_report
from aprcore.reports.maps import (
    DECADES,
    SHADES,
    StageMap,
    describe_map,
    encode_png,
    lost_text,
    row_labels,
)
from aprcore.reports.markdown import MOST_CHARACTERS, code, escape, paragraph
from aprcore.reports.profile import curves_of, draw_profile
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from aprcore.runs.tensors import TensorStore
from aprtui.cli import main
from aprtui.demo import demo_path, load_faults
from aprtui.theme import MARKS
from aprtui.theme import SEVERITY as SEVERITY_ON_SCREEN

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SUFFIXES = (".html", ".md", ".json")
HOSTILE = (
    "</td><script>alert(1)</script> ]]> \u202e | `` ``` \"'&amp; @nobody #1 \x1b[31m\ud800\n# x"
)
COMMAND = ("aprtui", "bisect", "my model.apr", "--prompt", HOSTILE)


def request(fault: str) -> Request:
    oracle = demo_path() / "oracle"
    if fault == "none":
        return Request(model=demo_path() / "sound.apr", oracle=oracle)
    found = load_faults()[fault]
    return Request(model=found.model, trace=found.trace, oracle=oracle)


@cache
def found_in(fault: str) -> Report:
    return run(request(fault))


@cache
def without_model() -> Report:
    trace = load_faults()["kv-tiled"].trace
    return run(Request(trace=trace, oracle=demo_path() / "oracle"))


@cache
def without_oracle() -> Report:
    found = load_faults()["kv-tiled"]
    return run(Request(model=found.model, trace=found.trace))


@cache
def two_dumps() -> Report:
    faults = load_faults()
    found, other = faults["kv-tiled"], faults["residual-normed"].trace
    oracle = demo_path() / "oracle"
    return run(Request(model=found.model, trace=found.trace, against=other, oracle=oracle))


def broken(key: StageKey, verdict: Verdict | None, **parts: Any) -> StageReport:
    return StageReport(key, layout_of(key, {"T": 2, "E": 3}, 6), verdict, HOSTILE, **parts)


def hostile() -> Report:
    """Every text that comes from a file is out to break the report; no figure is finite."""
    found = found_in("kv-tiled")
    nan, values = np.full(6, np.nan, np.float32), np.arange(6, dtype=np.float32)
    logits = LogitsReport(compare_logits(values, values[::-1].copy()), {5: HOSTILE, 0: HOSTILE})
    header = replace(
        found.header, trace=Side(HOSTILE, HOSTILE, HOSTILE), oracle=Side(HOSTILE, HOSTILE),
        model=HOSTILE, architecture=HOSTILE, prompt=HOSTILE, tokens=(1, 2),
        token_texts=(HOSTILE, HOSTILE), backend=HOSTILE, notes=(HOSTILE, HOSTILE),
    )  # fmt: skip
    stages = (
        broken(StageKey(0, "attn_norm"), Verdict.NONFINITE, comparison=compare(nan, values, 4)),
        broken(StageKey(0, "ffn_norm"), Verdict.SHAPE, trace=describe(nan), oracle=describe(nan)),
        broken(StageKey(0, "attn_out"), Verdict.MISSING, oracle=describe(values)),
        StageReport(StageKey(0, "ffn_out"), None, Verdict.MISSING, HOSTILE),
        broken(StageKey(None, "final_norm"), None, trace=describe(values)),
        broken(StageKey(None, "lm_head"), Verdict.FAIL, comparison=compare(values, nan, 4),
               logits=logits),
    )  # fmt: skip
    return Report(header, (*found.stages, *stages), 1.0)


def on_a_device() -> Report:
    """The CPU's run with a device held against it, whose softmax is wrong."""
    found = found_in("none")
    key = StageKey(0, "attn_norm")
    x, y = np.arange(6, dtype=np.float32), np.full(6, np.nan, np.float32)
    layout = layout_of(key, {"T": 2, "E": 3}, 6)
    parity = (
        StageParity(0, key, layout, compare(x, x, 4), SideJudgment(), SideJudgment(),
                    Verdict.PASS, "equal"),
        StageParity(0, StageKey(0, "ffn_norm"), layout, compare(x, y, 4),
                    SideJudgment(oracle=compare(x, x, 4)), SideJudgment(fault=HOSTILE),
                    Verdict.FAIL, HOSTILE),
        StageParity(0, StageKey(1, "ffn_norm"), None, None, SideJudgment(), SideJudgment(),
                    Verdict.MISSING, "the device has gone"),
    )  # fmt: skip
    header = replace(
        found.header, tested=Side("sound.apr", HOSTILE), trusted=Side("sound.apr", "numpy")
    )
    rejected = PathRejected(HOSTILE, parity[1].key, by_gate=True)
    return replace(
        found, header=header, parity=parity, device=DeviceOpened(HOSTILE, None), rejected=rejected
    )


def reports() -> dict[str, Report]:
    return {
        **{name: found_in(name) for name in ("none", *load_faults())},
        "without model": without_model(),
        "without oracle": without_oracle(),
        "hostile": hostile(),
        "on a device": on_a_device(),
        "two dumps": two_dumps(),
        "empty": Report(replace(found_in("none").header, keys=(), tokens=None), (), 0.0),
    }


NAMES = (
    "none", *load_faults(), "without model", "without oracle", "hostile", "on a device",
    "two dumps", "empty",
)  # fmt: skip


def written(report: Report, suffix: str, folder: Path, **more: Any) -> str:
    path = folder / f"report{suffix}"
    write_report(path, report, **more)
    assert [entry.name for entry in folder.iterdir()] == [path.name]
    return path.read_text("utf-8")


def grid_of(values: Any, nonfinite: Any = 0, **parts: Any) -> Grid:
    x = np.asarray(values, dtype=np.float32)
    lost = np.broadcast_to(np.asarray(nonfinite, dtype=np.int64), x.shape)
    largest = float(np.abs(x).max()) if x.size else 0.0
    told = {"rows": "token", "columns": "dim", "cell_rows": 1, "cell_columns": 1} | parts
    told = {"nonfinite": lost, "nan": lost} | told
    return Grid(MapKind.DIFF, top=0, left=0, values=x, largest=largest, **told)


class Page(HTMLParser):
    """Every element of a page, and that each is closed where it should be."""

    VOID = frozenset({"meta", "input", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


class TestThePath:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_the_suffix_says_what_to_write(self, tmp_path: Path, suffix: str) -> None:
        text = written(found_in("kv-tiled"), suffix.upper(), tmp_path)
        assert text[:2] == {".html": "<!", ".md": "##", ".json": "{\n"}[suffix]

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("screen.svg", "takes the explorer"),
            ("report.pdf", ".pdf is no kind of report"),
            ("report", "needs a suffix"),
            ("absent/report.html", "no such directory"),
            ("folder.html", "not a regular file"),
            (f"{'x' * 300}.html", "cannot be written"),
        ],
    )
    def test_what_cannot_be_written_is_known_before_the_run(
        self, tmp_path: Path, name: str, said: str
    ) -> None:
        (tmp_path / "folder.html").mkdir()
        for attempt in (check_report_path, lambda path: write_report(path, found_in("none"))):
            with pytest.raises(AprError, match=re.escape(said)) as caught:
                attempt(tmp_path / name)
            assert len(str(caught.value).splitlines()) == 1
            assert ".md" in str(caught.value) or caught.value.hint
        assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]

    def test_an_older_report_is_replaced_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "report.md"
        path.write_text("older")
        check_report_path(path)
        assert path.read_text() == "older"
        write_report(path, found_in("kv-tiled"))
        assert "attn_scores" in path.read_text("utf-8")

    def test_a_report_that_cannot_be_made_leaves_the_older_one(self, tmp_path: Path) -> None:
        path = tmp_path / "report.html"
        path.write_text("older")
        flat = replace(grid_of([[1]]), values=np.ones(3, np.float32))
        with pytest.raises(ValueError):
            write_report(
                path, found_in("kv-tiled"), maps=[StageMap(StageKey(2, "attn_scores"), flat)]
            )
        assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [
            ("report.html", "older")
        ]


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
        assert record["stages"] == json.loads(json.dumps(printed["stages"]))

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


class TestHtml:
    @pytest.mark.parametrize("name", NAMES)
    def test_a_page_is_well_formed_and_holds_no_script_and_no_address(
        self, tmp_path: Path, name: str
    ) -> None:
        report = reports()[name]
        maps = [
            StageMap(stage.key, grid_of(np.ones((2, 3)), 1), (HOSTILE, HOSTILE))
            for stage in report.stages
        ]
        page = Page(written(report, ".html", tmp_path, maps=maps, command=COMMAND))
        assert page.tags() <= {
            "html", "head", "meta", "title", "style", "body", "header", "main", "section",
            "article", "h1", "h2", "h3", "h4", "p", "strong", "span", "a", "dl", "dt", "dd", "pre",
            "code", "figure", "figcaption", "svg", "desc", "line", "text", "g", "polyline", "div",
            "details", "summary", "table", "thead", "tbody", "tr", "th", "td", "img", "br",
            "fieldset", "legend", "label", "input",
        }  # fmt: skip
        anchors = {attributes.get("id") for _, attributes in page.elements}
        for tag, attributes in page.elements:
            assert not [key for key in attributes if key.startswith("on")]
            assert (attributes.get("src") or "data:image/png;").startswith("data:image/png;")
            if tag == "a":
                assert (attributes["href"] or "")[1:] in anchors
            if tag == "img":
                assert attributes["alt"]
        assert "\u202e" not in page.text
        assert "\x1b" not in page.text
        policies = [a.get("content") for t, a in page.elements if a.get("http-equiv")]
        assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]

    def test_text_from_a_file_is_shown_as_it_is(self, tmp_path: Path) -> None:
        page = Page(written(hostile(), ".html", tmp_path, command=COMMAND))
        assert page.text.count(visible(HOSTILE)) > 10
        assert "<script>alert(1)</script>" in page.text

    @pytest.mark.parametrize("fault", [name for name in load_faults() if name != "quantised"])
    def test_it_says_what_the_explorer_says(self, tmp_path: Path, fault: str) -> None:
        report = found_in(fault)
        text = Page(written(report, ".html", tmp_path)).text
        first = report.first_divergence
        assert first is not None and first.explanation is not None and first.blamed is not None
        assert f"{GLYPHS['FAIL']} {first.key}  {finding_of(first)}" in text
        assert MEANINGS[first.blamed] in text
        for cause in first.explanation.causes:
            assert cause.name in text
        for cause in first.explanation.named:
            assert f"look at: {cause.advice}" in text
        for stage in report.stages:
            assert stage.key.stage in text

    def test_every_stage_has_a_row_under_its_layer(self, tmp_path: Path) -> None:
        report = found_in("kv-tiled")
        page = Page(written(report, ".html", tmp_path))
        captions = [a["aria-label"] or "" for _, a in page.elements if "aria-label" in a]
        layers = [caption for caption in captions if caption.startswith("Stages of")]
        assert layers == [f"Stages of layer {n}" for n in range(4)] + ["Stages of whole model"]
        summaries = re.findall(r"layer (\d) ([^·]+) · 1[78] stages · lowest cosine", page.text)
        assert [word for _, word in summaries] == ["✓ PASS", "✓ PASS", "✗ FAIL", "↳ INHERITED"]

    def test_without_faults_it_says_so(self, tmp_path: Path) -> None:
        text = Page(written(found_in("none"), ".html", tmp_path)).text
        assert f"✓ no divergence in {len(found_in('none').stages)} stages" in text
        assert "to blame" not in text.replace("Nothing is to blame.", "")

    def test_without_an_oracle_no_weights_are_praised(self, tmp_path: Path) -> None:
        sound = run(Request(model=demo_path() / "sound.apr", tokens=(1, 2, 3)))
        text = Page(written(sound, ".html", tmp_path)).text
        assert "no kernel fault" in text
        assert "weights are taken on trust" in text

    def test_two_dumps_alone_leave_it_open_which_stage_it_is(self, tmp_path: Path) -> None:
        text = Page(written(without_model(), ".html", tmp_path)).text
        assert "cannot be told from two dumps alone" in text
        assert "and " in text and "more: see the stages above" in text

    def test_a_device_is_held_against_the_cpu(self, tmp_path: Path) -> None:
        text = Page(written(on_a_device(), ".html", tmp_path)).text
        assert "GPU against CPU: first fault at layer 0 · ffn_norm FAIL" in text
        assert "CPU kernel / bound" in text

    def test_two_dumps_are_held_against_each_other(self, tmp_path: Path) -> None:
        text = Page(written(two_dumps(), ".html", tmp_path)).text
        assert "Against the other dump" in text
        assert text.count("the trusted side is wrong") == 1
        assert "first fault at layer 2 · attn_scores FAIL" in text
        assert "✗ FAIL" in text


class TestMarkdown:
    @pytest.mark.parametrize("name", NAMES)
    def test_it_fits_into_an_issue_and_every_table_is_whole(
        self, tmp_path: Path, name: str
    ) -> None:
        text = written(reports()[name], ".md", tmp_path, command=COMMAND)
        assert len(text) <= MOST_CHARACTERS
        assert text.count("<details>") == text.count("</details>")
        assert text.count("<details><summary>") == text.count("<details>")
        assert "\u202e" not in text
        for block in text.split("\n\n"):
            lines = [line for line in block.split("\n") if line.startswith("| ")]
            pipes = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
            assert len(pipes) <= 1

    @pytest.mark.parametrize("name", NAMES)
    def test_a_reader_finds_no_markup_but_our_own(self, tmp_path: Path, name: str) -> None:
        text = written(reports()[name], ".md", tmp_path, command=COMMAND)
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        inline = [child for token in tokens for child in token.children or ()]
        html = {t.content.strip() for t in (*tokens, *inline) if t.type.startswith("html_")}
        ours = re.compile(r"<details><summary>[\w ,-]+</summary>|</details>|<!-- -->")
        assert not [found for found in html if not ours.fullmatch(found)]
        kinds = {token.type for token in (*tokens, *inline)}
        assert kinds & {"link_open", "image", "em_open", "blockquote_open", "hr"} == set()
        assert {token.tag for token in tokens if token.type == "heading_open"} <= {"h2", "h3", "h4"}

    def test_a_long_run_is_cut_and_says_by_how_much(self, tmp_path: Path) -> None:
        found = without_model()
        stages = tuple(
            replace(stage, key=StageKey(layer, stage.key.stage))
            for layer in range(80)
            for stage in found.stages
            if stage.key.layer == 2
        )
        text = written(replace(found, stages=stages), ".md", tmp_path)
        assert len(text) <= MOST_CHARACTERS
        left = re.search(r"and (\d+) more rows", text)
        assert left is not None
        shown = len(re.findall(r"^\| layer \d+ · ", text, re.MULTILINE))
        failing = sum(stage.verdict is not Verdict.PASS for stage in stages)
        assert shown + int(left[1]) == failing

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("a|b", r"a\|b"),
            ("attn_norm", "attn_norm"),
            ("_x_ *y*", r"\_x\_ \*y\*"),
            ("[/INST]", r"\[/INST\]"),
            ("@user, #12", "@<!-- -->user, #<!-- -->12"),
            ("https://a.b", "https:<!-- -->//a.b"),
            ("a\nb", r"a\\nb"),
            ("$x$", r"\$x\$"),
        ],
    )
    def test_markup_is_escaped(self, text: str, shown: str) -> None:
        assert escape(text) == shown

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("- a", r"\- a"),
            ("1. a", r"1\. a"),
            ("# a", r"\# a"),
            ("1e-3", "1e-3"),
            ("> a", r"\> a"),
        ],
    )
    def test_a_paragraph_stays_one(self, text: str, shown: str) -> None:
        assert paragraph(text) == shown

    @pytest.mark.parametrize(
        ("text", "shown"),
        [("a", "`a`"), ("`a", "`` `a ``"), ("a``b", "```a``b```"), (" a", "`  a `"), ("", "`  `")],
    )
    def test_code_holds_any_text(self, text: str, shown: str) -> None:
        assert code(text) == shown


def decoded(png: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [rows, columns] and palette [n, 3] of a PNG, its checksums verified."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    rest = png[8:]
    while rest:
        size, name = struct.unpack(">I4s", rest[:8])
        assert struct.unpack(">I", rest[8 + size : 12 + size])[0] == zlib.crc32(rest[4 : 8 + size])
        chunks[name], rest = rest[8 : 8 + size], rest[12 + size :]
    width, height, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, kind, list(chunks)[-1]) == (8, 3, b"IEND")
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:], np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)


class TestMaps:
    def test_brightness_is_the_logarithm_of_the_magnitude(self) -> None:
        values = [[-1000, 100, 10], [1, 0.1, 0.05], [0, 0, 0]]
        pixels, palette = decoded(encode_png(grid_of(values, [[0] * 3, [0] * 3, [0, 3, 0]])))
        steps = (SHADES - 1) / DECADES
        expected = [[4 * steps, 3 * steps, 2 * steps], [steps, 0, 0], [0, SHADES, 0]]
        np.testing.assert_array_equal(pixels, np.round(expected))
        assert len(palette) == 256
        lightness = palette[:SHADES] @ np.array([0.2126, 0.7152, 0.0722])
        assert (np.diff(lightness) > -1).all()
        assert lightness[-1] - lightness[0] > 150
        # What is not finite is a colour that no magnitude has.
        assert np.abs(palette[:SHADES].astype(int) - palette[SHADES]).sum(axis=1).min() > 60

    def test_all_zero_is_all_dark(self) -> None:
        pixels, _ = decoded(encode_png(grid_of(np.zeros((2, 5)))))
        assert pixels.shape == (2, 5)
        assert not pixels.any()

    def test_the_map_of_a_fault_keeps_its_largest_difference(self) -> None:
        report = found_in("kv-tiled")
        store = TensorStore(request("kv-tiled"))
        maps = collect_maps(report, store)
        faults = {s.key: s for s in report.stages if s.verdict and s.verdict.is_divergence}
        assert [shown.key for shown in maps] == list(faults)
        for shown in maps:
            found = faults[shown.key].comparison
            assert found is not None
            assert shown.grid.largest == pytest.approx(found.max_abs_diff, rel=1e-6)
            assert np.abs(shown.grid.values).max() == pytest.approx(shown.grid.largest, rel=1e-6)
        assert [shown.key for shown in collect_maps(report, store, limit=1)] == [maps[0].key]
        assert maps[0].heads == 4
        assert [name for name, _ in row_labels(maps[0])] == [f"head {n}" for n in range(4)]
        assert row_labels(maps[1])[0][0] == '0 "What"'

    def test_files_that_are_gone_have_no_map(self, tmp_path: Path) -> None:
        absent = replace(request("kv-tiled"), trace=tmp_path / "absent")
        assert collect_maps(found_in("kv-tiled"), TensorStore(absent)) == ()

    def test_a_map_is_told_in_words(self) -> None:
        values = np.zeros((2, 3))
        values[1, 2] = -4
        grid = grid_of(values, [[0, 2, 0], [0, 0, 0]], cell_columns=14)
        said = describe_map(StageMap(StageKey(3, "attn_norm"), grid))
        assert "layer 3 · attn_norm" in said
        assert "the largest is 4.0e+00 at token 1, dim 28 to 41" in said
        assert "1 of 6 cells are above a tenth of it" in said
        assert said.endswith("2 values NaN")
        mixed = grid_of(values, [[0, 2, 0], [0, 0, 9]], nan=np.array([[0, 1, 0], [0, 0, 0]]))
        assert lost_text(mixed) == "1 value NaN, 10 infinite"
        assert lost_text(grid_of(values, 1, nan=np.zeros((2, 3)))) == "6 values infinite"
        assert lost_text(grid_of(values)) == ""

    def test_a_folded_vector_says_its_own_indices(self) -> None:
        values = np.zeros((3, 4))
        values[2, 1] = 1
        grid = grid_of(values, rows="", columns="token id", fold=64, cell_rows=2, cell_columns=16)
        said = describe_map(StageMap(StageKey(None, "lm_head"), grid))
        assert "at token id 272 to 351" in said  # row 4, column 16 and the row below it


class TestProfile:
    def test_it_has_the_judgments_that_were_made(self) -> None:
        names = {
            name: [curve.name for curve in curves_of(report)] for name, report in reports().items()
        }
        assert names["kv-tiled"] == ["cumulative", "model", "kernel"]
        assert names["without model"] == ["cumulative"]
        assert names["without oracle"] == ["kernel"]
        assert names["empty"] == []
        assert draw_profile(reports()["empty"]) is None

    def test_a_curve_has_a_point_per_stage_and_rises_where_the_error_does(self) -> None:
        report = found_in("kv-tiled")
        text = str(draw_profile(report))
        points = re.search(r'<g class="curve kernel"><polyline points="([^"]+)"', text)
        assert points is not None
        heights = [float(point.split(",")[1]) for point in points[1].split()]
        assert len(heights) == len(report.stages)
        errors = [stage.kernel.relative_l2 for stage in report.stages if stage.kernel]
        assert np.argmin(heights) == np.argmax(errors)
        clipped = np.clip(errors, 1e-9, 10)
        order = np.argsort(clipped, kind="stable")
        assert (np.diff(np.array(heights)[order]) <= 0.11).all()  # rounded to a tenth

    def test_a_deep_run_has_all_of_its_points(self) -> None:
        found = found_in("kv-tiled")
        stages = tuple(
            replace(stage, key=StageKey(layer, stage.key.stage))
            for layer in range(80)
            for stage in found.stages
            if stage.key.layer == 2
        )
        text = str(draw_profile(replace(found, stages=stages)))
        drawn = re.findall(r'<polyline points="([\d., -]+)"></polyline>', text)
        assert [len(points.split()) for points in drawn[:3]] == [len(stages)] * 3
        numbers = re.findall(r'text-anchor="middle">(\d+)</text>', text)
        assert len(numbers) <= 16
        assert text.count('class="fault"') >= 80

    def test_what_is_not_finite_is_at_the_top_and_a_gap_is_a_gap(self) -> None:
        keys = [StageKey(n, "attn_norm") for n in range(4)]
        nan, ones = np.full(6, np.nan, np.float32), np.ones(6, np.float32)
        found = [compare(ones, ones, 1), compare(nan, ones, 1), None, compare(ones, ones, 1)]
        stages = tuple(broken(k, Verdict.PASS, comparison=c) for k, c in zip(keys, found))
        text = str(draw_profile(Report(found_in("none").header, stages, 0.0)))
        curve = re.search(r'<g class="curve cumulative">(.*?)</g>', text)
        assert curve is not None
        lines = [
            [tuple(map(float, p.split(","))) for p in points.split()]
            for points in re.findall(r'points="([^"]+)"', curve[1])
        ]
        assert [len(line) for line in lines] == [2, 2]  # the lone point is drawn twice
        assert lines[0][0][1] > lines[0][1][1]
        assert lines[1][0] == lines[1][1]


class TestEnvironment:
    def test_it_gives_away_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/secret-name")
        monkeypatch.setenv("HF_TOKEN", "hf_secret-token")
        header = replace(
            found_in("kv-tiled").header, trace=Side("/home/secret-name/dump", "F32"),
            notes=("read from /home/secret-name/dump",), model=None,
            trusted=Side("/home/secret-name/cpu", "F32"), tested=Side("/home/secret-name/gpu", "F"),
        )  # fmt: skip
        report = replace(
            found_in("kv-tiled"), header=header,
            device=DeviceOpened("pocl of /home/secret-name/icd", None),
            rejected=PathRejected("/home/secret-name/.cache/pocl/k.cl: does not build"),
        )  # fmt: skip
        for suffix in SUFFIXES:
            command = ("aprtui", "bisect", "--trace", "/home/secret-name/dump")
            text = written(report, suffix, tmp_path, command=command)
            (tmp_path / f"report{suffix}").unlink()
            assert "secret-token" not in text
            assert "~/dump" in text
            assert "secret-name" not in text
        assert platform.node() not in str(read_environment())

    def test_versions_are_those_installed(self) -> None:
        found = read_environment()
        assert dict(found.versions)["numpy"] == np.__version__
        assert found.python.endswith(platform.python_version())
        assert found.processors == os.cpu_count()

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("/home/ann", "~"),
            ("/home/ann/x", "~/x"),
            ("read /home/ann/x, then", "read ~/x, then"),
            ("/home/anna/x", "/home/anna/x"),
            ("/srv/home/ann/x", "/srv/home/ann/x"),
            ("/home/ann.old", "/home/ann.old"),
        ],
    )
    def test_home_is_a_tilde(self, monkeypatch: pytest.MonkeyPatch, text: str, shown: str) -> None:
        monkeypatch.setenv("HOME", "/home/ann")
        assert without_home(text) == shown

    def test_home_by_its_other_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "ann").symlink_to(tmp_path / "disk")
        monkeypatch.setenv("HOME", str(tmp_path / "ann"))
        for name in ("ann", "disk"):
            assert without_home(f"{tmp_path}/{name}/x") == "~/x"
            assert format_command(["aprtui", f"{tmp_path}/{name}/x y"]) == "aprtui ~/'x y'"

    @pytest.mark.parametrize(
        "arguments",
        [
            ["aprtui", "bisect", "m.apr"],
            ["aprtui", "--prompt", "What's 2+2?", "--oracle", "/home/ann/my dir/x"],
            ["aprtui", "", "~", "$HOME", "/home/ann", "/home/ann/", "~/x"],
            ["aprtui", "--oracle=/home/ann/a b/c", "/home/ann x", "a\nb"],
        ],
    )
    def test_a_shell_reads_the_command_back(
        self, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
    ) -> None:
        monkeypatch.setenv("HOME", "/home/ann")
        line = format_command(arguments)
        assert "/home/ann" not in line
        read = subprocess.run(
            ["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
        )
        assert read.stdout.split("\0")[:-1] == arguments

    def test_a_saved_command_is_read_back_below_the_readers_home(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arguments = [
            "/home/ann/bin/aprtui",
            "/home/ann",
            "--oracle=/home/ann/x",
            "/srv/~x",
            "a ~ b",
        ]
        monkeypatch.setenv("HOME", "/home/ann")
        saved = without_home_in_command(arguments)
        assert saved == ["aprtui", ["", ""], ["--oracle=", "/x"], "/srv/~x", "a ~ b"]
        line = format_command(arguments)
        assert format_command(with_home_in_command(saved)) == line
        monkeypatch.setenv("HOME", "/home/bob")
        assert with_home_in_command(saved)[1:3] == ("/home/bob", "--oracle=/home/bob/x")
        assert format_command(with_home_in_command(saved)) == line
        monkeypatch.setenv("HOME", "/")
        assert with_home_in_command(saved)[2] == "--oracle=/x"

    def test_a_tilde_of_the_users_own_stays_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/ann")
        arguments = ("aprtui", "--prompt", "ls ~/", "~")
        assert with_home_in_command(without_home_in_command(arguments)) == arguments
        assert format_command(arguments) == "aprtui --prompt 'ls ~/' '~'"

    def test_a_user_without_a_home_has_none_to_hide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])  # as in a container, by number alone
        assert without_home("/home/ann/x and ~") == "/home/ann/x and ~"
        assert with_home_in_command([["--oracle=", "/x"]]) == ("--oracle=~/x",)

    @pytest.mark.parametrize(
        ("text", "written"),
        [
            ("file:///home/ann/m.apr", "file://~/m.apr"),
            ("cannot read /home/ann.", "cannot read ~."),
            ("/home/ann.old/x", "/home/ann.old/x"),
            ("/home/anna", "/home/anna"),
            ("https://host/home/ann/x", "https://host/home/ann/x"),
        ],
    )
    def test_the_home_directory_is_found_where_it_begins_a_path(
        self, monkeypatch: pytest.MonkeyPatch, text: str, written: str
    ) -> None:
        monkeypatch.setenv("HOME", "/home/ann")
        assert without_home(text) == written

    @pytest.mark.parametrize("program", ["/opt/x y/bin/aprtui", "/lib/aprtui/__main__.py"])
    def test_where_the_program_is_installed_is_left_out(self, program: str) -> None:
        assert format_command([program, "demo"]) == "aprtui demo"
        assert format_command([]) == ""


class TestTheCommand:
    def arguments(self) -> list[str]:
        found, oracle = load_faults()["kv-tiled"], demo_path() / "oracle"
        return ["bisect", str(found.model), "--trace", str(found.trace), "--oracle", str(oracle)]

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_it_writes_the_report_and_says_where(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
    ) -> None:
        path = tmp_path / f"out{suffix}"
        assert main([*self.arguments(), "--json", "--report", str(path)]) == 1
        printed = capsys.readouterr()
        assert json.loads(printed.out)["first_divergence"] == "layer-2/attn_scores"
        assert printed.err == f"wrote {path}\n"
        assert "attn_scores" in path.read_text("utf-8")
        if suffix == ".html":
            assert path.read_text("utf-8").count('src="data:image/png;base64,') == 2

    def test_it_writes_as_many_as_are_asked_for(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = [tmp_path / f"out{suffix}" for suffix in SUFFIXES]
        options = [word for path in paths for word in ("--report", str(path))]
        assert main([*self.arguments(), *options]) == 1
        assert capsys.readouterr().err == "".join(f"wrote {path}\n" for path in paths)
        assert all(path.stat().st_size for path in paths)

    def test_a_report_that_cannot_be_written_stops_the_run_before_it_starts(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*self.arguments(), "--report", str(tmp_path / "screen.svg")]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1
        assert "takes the explorer" in printed.err


def test_the_screen_and_reports_use_the_same_marks() -> None:
    assert {word: mark.glyph for word, mark in MARKS.items()} == GLYPHS
    assert set(GLYPHS) == {verdict.value for verdict in Verdict}
    assert SEVERITY == SEVERITY_ON_SCREEN


def test_every_stage_of_the_table_can_be_told(tmp_path: Path) -> None:
    header: RunHeader = found_in("none").header
    stages = tuple(
        StageReport(StageKey(None if name in ("final_norm", "lm_head") else 0, name), None,
                    Verdict.FAIL, "why")
        for name in BY_NAME
    )  # fmt: skip
    text = Page(written(Report(header, stages, 0.0), ".html", tmp_path)).text
    told: Mapping[str, str] = {name: stage.title for name, stage in BY_NAME.items()}
    assert all(title in text for title in told.values())
