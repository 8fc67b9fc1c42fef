"""A finished run as Markdown."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.reports.markdown import MOST_CHARACTERS, code, escape, paragraph
from report_runs import COMMAND, NAMES, reports, without_model, written


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
