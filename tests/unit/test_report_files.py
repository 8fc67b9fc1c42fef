"""Which file a finished run is written to, and the command that asks for it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aprcore.ground.errors import AprError
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.records.telling import GLYPHS, SEVERITY
from aprcore.reports.files import check_report_path, write_report
from aprcore.reports.maps import (
    StageMap,
)
from aprtui.cli import main
from aprtui.demo import demo_path, load_faults
from aprtui.theme import MARKS
from report_runs import SUFFIXES, found_in, grid_of, written


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
    assert set(SEVERITY) == set(GLYPHS)
