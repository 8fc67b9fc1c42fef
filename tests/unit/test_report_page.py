"""A finished run as an HTML page."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aprcore.ground.visible import visible
from aprcore.judging.verdict import Verdict
from aprcore.network.graph import known_stages
from aprcore.network.stages import StageKey
from aprcore.records.report import (
    Report,
    RunHeader,
    StageReport,
)
from aprcore.records.telling import GLYPHS, MEANINGS, finding_of
from aprcore.reports import page
from aprcore.reports.maps import (
    StageMap,
)
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from aprtui.demo import demo_path, load_faults
from report_runs import (
    COMMAND,
    HOSTILE,
    NAMES,
    Page,
    found_in,
    grid_of,
    hostile,
    on_a_device,
    reports,
    two_dumps,
    without_model,
    written,
)


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


@pytest.mark.parametrize("name", known_stages())
def test_every_stage_can_be_told(tmp_path: Path, name: str) -> None:
    header: RunHeader = found_in("none").header
    key = StageKey(None if name in ("final_norm", "lm_head") else 0, name)
    report = Report(header, (StageReport(key, None, Verdict.FAIL, "why"),), 0.0)
    assert known_stages()[name].title in Page(written(report, ".html", tmp_path)).text


def deep(report: Report, count: int) -> Report:
    """The run of a model with so many layers, each like the last one of this run."""
    last = max(stage.key.layer or 0 for stage in report.stages)
    like = [stage for stage in report.stages if stage.key.layer == last]
    rest = [stage for stage in report.stages if stage.key.layer is None]
    layers = [
        replace(stage, key=stage.key._replace(layer=layer))
        for layer in range(count)
        for stage in like
    ]
    stages = (*layers, *rest)
    keys = tuple(stage.key for stage in stages)
    return replace(
        report, header=replace(report.header, keys=keys, num_layers=count), stages=stages
    )


class TestManyLayers:
    def test_sound_layers_have_a_line_each(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(page, "LAYERS_TOLD", 6)
        sound = found_in("none")
        like = deep(sound, 9).stages
        wrong = replace(like[40], verdict=Verdict.FAIL, reason="kernel: no known cause")
        report = replace(deep(sound, 9), stages=(*like[:40], wrong, *like[41:]))
        text = written(report, ".html", tmp_path)
        Page(text)
        layer = wrong.key.layer
        assert layer is not None and 0 < layer < 8
        titles = re.findall(r"<summary><strong>([^<]*)</strong>", text)
        assert titles == [
            f"layer 0 to {layer - 1}", f"layer {layer}", f"layer {layer + 1} to 8", "whole model",
        ]  # fmt: skip
        assert "whose stages are in the JSON of this run" in text
        for number in range(9):
            rows = re.findall(rf">layer {number}</th>", text)
            assert len(rows) == (number != layer)

    def test_a_model_with_fewer_has_all_of_them(self, tmp_path: Path) -> None:
        text = written(deep(found_in("none"), 9), ".html", tmp_path)
        titles = re.findall(r"<summary><strong>([^<]*)</strong>", text)
        assert titles == [*(f"layer {number}" for number in range(9)), "whole model"]

    def test_where_every_layer_diverges_some_are_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(page, "LAYERS_TOLD", 3)
        like = [replace(stage, verdict=Verdict.FAIL) for stage in deep(found_in("none"), 9).stages]
        text = written(replace(deep(found_in("none"), 9), stages=tuple(like)), ".html", tmp_path)
        titles = re.findall(r"<summary><strong>([^<]*)</strong>", text)
        assert titles == ["layer 0", "layer 1", "layer 2", "layer 3 to 8", "whole model"]
        told = set(re.findall(r'href="#(fault-[^"]*)"', text))
        assert told == set(re.findall(r'id="(fault-[^"]*)"', text))

    @pytest.mark.slow  # 34,000 stages, four times
    def test_two_thousand_layers(self, tmp_path: Path) -> None:
        for fault in ("none", "kv-tiled"):
            report = deep(found_in(fault), 2000)
            began = time.process_time()
            for suffix, most_mb in ((".html", 4), (".md", 0.1), (".json", 150)):
                folder = tmp_path / f"{fault}{suffix}"
                folder.mkdir()
                assert len(written(report, suffix, folder)) < most_mb * 1e6
            assert time.process_time() - began < 30
