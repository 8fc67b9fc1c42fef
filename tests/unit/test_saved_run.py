"""A run in one file: what is read back is what was saved, and broken files are refused."""

from __future__ import annotations

import json
import math
import os
import zipfile
from contextlib import closing
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprcore.ground.errors import AprError, FormatError
from aprcore.judging.layouts import Layout
from aprcore.judging.ranking import Ranking
from aprcore.network.stages import StageKey
from aprcore.records import saved_run
from aprcore.records.report import Report, Side
from aprcore.records.report_json import to_json
from aprcore.records.saved_run import ABOUT, REPORT, SCHEMA, SavedRun, save_run
from aprcore.records.sharing import shareable
from aprcore.runs.bisect import bisect, run
from aprcore.runs.request import Request
from aprcore.runs.tensors import TensorStore, open_tensors
from aprtui.demo import demo_path, load_faults
from aprtui.exporting import export

ROOT = StageKey(2, "attn_scores")


def demo_request(fault: str = "kv-tiled") -> Request:
    found = load_faults()[fault]
    return Request(model=found.model, trace=found.trace, oracle=demo_path() / "oracle")


@pytest.fixture(scope="module")
def report() -> Report:
    return run(demo_request())


@pytest.fixture
def saved(report: Report, tmp_path: Path) -> Path:
    path = tmp_path / "run.aprx"
    save_run(path, report, TensorStore(demo_request()), ["aprtui", "model.apr"])
    return path


class TestRoundTrip:
    def test_every_figure_comes_back(self, saved: Path, report: Report) -> None:
        found = SavedRun(saved).report
        assert to_json(found, top_k=1000) == to_json(shareable(report), top_k=1000)
        assert found.first_divergence is not None
        assert found.first_divergence.explanation == report.stages[[
            s.key for s in report.stages].index(ROOT)].explanation  # fmt: skip

    def test_a_request_for_it_streams_the_same_events(self, saved: Path, report: Report) -> None:
        header, *stages, last = bisect(Request(saved=saved))
        assert header == shareable(report).header
        assert [stage.key for stage in stages] == list(report.header.keys)
        assert last.summary() == report.summary()

    def test_tensors_of_diverging_stages_come_back(self, saved: Path, report: Report) -> None:
        store, found = TensorStore(demo_request()), open_tensors(Request(saved=saved))
        diverging = [s for s in report.stages if s.verdict and s.verdict.is_divergence]
        assert diverging
        for stage in diverging:
            ours, theirs = store.open(stage), found.open(stage)
            for side in ("trace", "oracle"):
                a, b = getattr(ours, side), getattr(theirs, side)
                assert a.layout == b.layout
                count = a.shape[0] * a.shape[1]
                np.testing.assert_array_equal(a.read_flat(0, count), b.read_flat(0, count))

    def test_other_stages_say_that_they_were_not_saved(self, saved: Path, report: Report) -> None:
        with pytest.raises(AprError, match="not saved"):
            SavedRun(saved).open(report.stages[0])

    def test_without_model_and_oracle(self, saved: Path, tmp_path: Path) -> None:
        # Nothing but the file: paths in the report are only names.
        elsewhere = saved.rename(tmp_path / "elsewhere.aprx")
        assert run(Request(saved=elsewhere)).diverges()

    def test_nan_and_infinity_come_back(self, report: Report, tmp_path: Path) -> None:
        stage = report.stages[3]
        assert stage.comparison is not None
        odd_figures = replace(stage.comparison, cosine=np.nan, relative_l2=np.inf)
        odd = replace(stage, comparison=odd_figures)
        save_run(tmp_path / "odd.aprx", replace(report, stages=(odd,)))
        found = SavedRun(tmp_path / "odd.aprx").report.stages[0].comparison
        assert found is not None
        assert np.isnan(found.cosine)
        assert found.relative_l2 == np.inf

    def test_what_it_says_of_itself(self, saved: Path) -> None:
        about = SavedRun(saved).about
        assert about["command"] == ["aprtui", "model.apr"]
        assert dict(about["environment"]["versions"])["numpy"] == np.__version__

    def test_what_made_it_is_said_again_by_all_that_is_made_of_it(
        self, saved: Path, tmp_path: Path
    ) -> None:
        """A report of it reproduces the run, and not the reading of a file."""
        with closing(SavedRun(saved)) as found:
            made = found.environment
            here = replace(made, platform="elsewhere", processors=made.processors + 1)
            found.about["environment"] = asdict(here)
            save_run(tmp_path / "again.aprx", found.report, found, ["aprtui", "bisect", "run.aprx"])
        with closing(SavedRun(tmp_path / "again.aprx")) as again:
            assert again.command == ("aprtui", "model.apr")
            assert again.environment == here
            assert again.about["made"] == found.about["made"]
            for name in ("r.html", "r.md", "r.json"):
                export(tmp_path / name, again.report, again, ["aprtui", "again.aprx"], None)
                text = (tmp_path / name).read_text()
                assert "aprtui model.apr" in text and "again.aprx" not in text
                assert "elsewhere" in text

    def test_large_tensors_are_left_out(
        self, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(saved_run, "MOST_SAVED_VALUES", 1000)
        save_run(tmp_path / "run.aprx", report, TensorStore(demo_request()))
        with zipfile.ZipFile(tmp_path / "run.aprx") as archive:
            sizes = [i.file_size for i in archive.infolist() if i.filename.startswith("tensors/")]
        assert sum(sizes) < 4 * 1000 + 2 * 256


class TestSharing:
    """What is made here under one name, and opened elsewhere under another."""

    HOME = "/home/secret-name"

    @pytest.fixture
    def made(self, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Saved by somebody who has everything below their home directory."""
        monkeypatch.setenv("HOME", self.HOME)
        header = replace(
            report.header, trace=Side(f"{self.HOME}/dump", "F32"), notes=(f"from {self.HOME}/x",),
            oracle=Side(f"{self.HOME}/o", "F32"), prompt=f"what is in {self.HOME}/x?",
        )  # fmt: skip
        command = [f"{self.HOME}/bin/aprtui", "--trace", f"{self.HOME}/a dump", "--save", "r.aprx"]
        path = tmp_path / "r.aprx"
        save_run(path, replace(report, header=header), command=command)
        return path

    def everything(self, path: Path) -> str:
        with zipfile.ZipFile(path) as archive:
            return b"\0".join(map(archive.read, archive.namelist())).decode("utf-8", "replace")

    def test_the_home_directory_is_nowhere_in_it_but_in_the_prompt(self, made: Path) -> None:
        text = self.everything(made)
        assert text.count("secret-name") == 1
        assert "what is in /home/secret-name/x?" in text
        assert "~/dump" in text and "from ~/x" in text

    def test_it_opens_under_another_name_and_is_passed_on(
        self, made: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", "/home/other")
        with closing(SavedRun(made)) as found:
            header = next(iter(found.events()))
            assert header.trace.path == "~/dump"
            assert found.command == ("aprtui", "--trace", "/home/other/a dump", "--save", "r.aprx")
            save_run(made.with_name("again.aprx"), found.report, found)
            for name in ("r.html", "r.md", "r.json"):
                export(made.with_name(name), found.report, found, ["aprtui", str(made)], None)
                text = unescape(made.with_name(name).read_text())
                assert "/home/other" not in text
                assert "aprtui --trace ~/'a dump' --save r.aprx" in text
        assert "/home/other" not in self.everything(made.with_name("again.aprx"))

    def test_a_file_of_before_is_passed_on_without_it(self, made: Path) -> None:
        """Older files have the command line as it was."""
        with closing(SavedRun(made)) as found:
            found.command = ("aprtui", f"{self.HOME}/m.apr")
            found.about["command"] = list(found.command)
            save_run(made.with_name("again.aprx"), found.report, found)
        with zipfile.ZipFile(made.with_name("again.aprx")) as archive:
            assert json.loads(archive.read(ABOUT))["command"] == ["aprtui", ["", "/m.apr"]]


class TestWriting:
    def test_an_unwritable_place(self, report: Report, tmp_path: Path) -> None:
        with pytest.raises(AprError, match="cannot be written"):
            save_run(tmp_path / "nowhere" / "run.aprx", report)

    def test_nothing_half_written(self, report: Report, tmp_path: Path) -> None:
        class Broken:
            def open(self, _: object) -> None:
                raise RuntimeError

            def close(self) -> None: ...

        (tmp_path / "run.aprx").write_bytes(b"before")
        with pytest.raises(RuntimeError):
            save_run(tmp_path / "run.aprx", report, Broken())  # type: ignore[arg-type]
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("run.aprx", b"before")]


class TestBroken:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match="no such file"):
            SavedRun(tmp_path / "run.aprx")

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match="is a directory"):
            SavedRun(tmp_path)

    def test_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "run.aprx")
        with pytest.raises(FormatError, match="is not a regular file"):
            SavedRun(tmp_path / "run.aprx")

    @pytest.mark.parametrize("content", [b"x", b"PK", b"no archive at all" * 100], ids=len)
    def test_no_archive(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "run.aprx").write_bytes(content)
        with pytest.raises(FormatError, match="not a saved run"):
            SavedRun(tmp_path / "run.aprx")

    @pytest.mark.parametrize("about", ["[", "[]", "{}", '{"schema": "aprtui-run-v9"}', "9" * 9999])
    def test_of_another_kind(self, tmp_path: Path, about: str) -> None:
        with zipfile.ZipFile(tmp_path / "run.aprx", "w") as archive:
            archive.writestr(ABOUT, about)
        with pytest.raises(FormatError, match="saved run"):
            SavedRun(tmp_path / "run.aprx")

    @pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"\x91" * 100_000])
    def test_no_report(self, tmp_path: Path, data: bytes) -> None:
        with zipfile.ZipFile(tmp_path / "run.aprx", "w") as archive:
            archive.writestr(ABOUT, json.dumps({"schema": SCHEMA}))
            archive.writestr(REPORT, data)
        with pytest.raises(FormatError, match="saved run"):
            SavedRun(tmp_path / "run.aprx")

    @pytest.mark.parametrize(
        "layout",
        [((1,), (1,), ()), ((1,), (1,), ("index",)), ((11, 48), (11, 47), ("token", "dim"))],
    )
    def test_sizes_that_contradict_each_other(
        self, report: Report, tmp_path: Path, layout: Any
    ) -> None:
        odd = replace(report.stages[1], layout=Layout(*layout))
        save_run(tmp_path / "odd.aprx", replace(report, stages=(odd,)))
        with pytest.raises(FormatError, match="sizes of layer-0/attn_norm"):
            SavedRun(tmp_path / "odd.aprx")

    @pytest.mark.parametrize("key", [StageKey(0, "\x1b[31m"), StageKey(9, "attn_norm"),
                                     StageKey(-1, "attn_norm"), StageKey(None, "attn_norm"),
                                     StageKey(0, "lm_head")])  # fmt: skip
    @pytest.mark.parametrize("place", ["header", "stage", "span"])
    def test_stages_that_are_none(
        self, report: Report, tmp_path: Path, key: StageKey, place: str
    ) -> None:
        """Everything that shows a run looks its stages up by name."""
        match place:
            case "header":
                odd = replace(report, header=replace(report.header, keys=(key,)))
            case "stage":
                odd = replace(report, stages=(replace(report.stages[0], key=key),))
            case _:
                stage = next(s for s in report.stages if s.kernel is not None)
                assert stage.kernel is not None
                kernel = replace(stage.kernel, span=(key,))
                odd = replace(report, stages=(replace(stage, kernel=kernel),))
        save_run(tmp_path / "odd.aprx", odd)
        with pytest.raises(FormatError, match=r"no stage of this version|of layer"):
            SavedRun(tmp_path / "odd.aprx")

    @pytest.mark.parametrize("change", [
        {"max_index": 1 << 40}, {"first_nonfinite": 1 << 40}, {"count": 3},
        {"top": Ranking(np.array([1 << 40]), np.ones(1), np.ones(1))},
        {"top": Ranking(np.array([0]), np.ones(2), np.ones(1))},
    ], ids=str)  # fmt: skip
    def test_places_beyond_the_tensor(
        self, report: Report, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        stage = next(s for s in report.stages if s.comparison is not None)
        assert stage.comparison is not None
        odd = replace(stage, comparison=replace(stage.comparison, **change))
        save_run(tmp_path / "odd.aprx", replace(report, stages=(odd,)))
        with pytest.raises(FormatError, match="not a saved run, or broken"):
            SavedRun(tmp_path / "odd.aprx")

    def test_an_error_beyond_all_numbers(self, report: Report, tmp_path: Path) -> None:
        """Its square is infinite, and is told as that."""
        stage = next(s for s in report.stages if s.comparison is not None)
        assert stage.comparison is not None
        odd = replace(stage, comparison=replace(stage.comparison, relative_l2=1e300))
        save_run(tmp_path / "odd.aprx", replace(report, stages=(odd,)))
        assert SavedRun(tmp_path / "odd.aprx").report.stages[0].comparison.nmse == math.inf

    def test_a_path_that_is_no_unicode(self, report: Report, tmp_path: Path) -> None:
        odd = replace(report.header, trace=replace(report.header.trace, path="/a/\udcff"))
        save_run(tmp_path / "odd.aprx", replace(report, header=odd), None, ["x", "/b/\udcff"])
        saved = SavedRun(tmp_path / "odd.aprx")
        assert (saved.report.header.trace.path, saved.command) == (r"/a/\udcff",
                                                                   ("x", r"/b/\udcff"))  # fmt: skip

    @pytest.mark.parametrize("key", ["command", "environment"])
    def test_what_made_it_is_no_such_thing(self, saved: Path, tmp_path: Path, key: str) -> None:
        with zipfile.ZipFile(saved) as archive:
            about, data = json.loads(archive.read(ABOUT)), archive.read(REPORT)
        with zipfile.ZipFile(tmp_path / "odd.aprx", "w") as archive:
            archive.writestr(ABOUT, json.dumps(about | {key: 3}))
            archive.writestr(REPORT, data)
        with pytest.raises(FormatError, match="not a saved run"):
            SavedRun(tmp_path / "odd.aprx")

    def test_a_member_that_unpacks_to_too_much(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(saved_run, "HARMLESS_REPORT_BYTES", 1000)
        monkeypatch.setattr(saved_run, "REPORT_EXPANSION_LIMIT", 0)
        with pytest.raises(FormatError, match="larger than any run"):
            SavedRun(saved)

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_a_flipped_byte_is_refused_or_harmless(
        self, data: st.DataObject, report: Report, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = tmp_path_factory.mktemp("flip") / "run.aprx"
        save_run(path, replace(report, stages=report.stages[:3]))
        content = bytearray(path.read_bytes())
        # The time is in the file, so its length is no bound to draw by.
        place = data.draw(st.integers(0, 1 << 30)) % len(content)
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            found = SavedRun(path)
        except FormatError:
            return
        assert to_json(found.report) is not None
