"""The file of a sweep's results: it remembers, and is nobody else's."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest

from aprcore.ground.errors import AprError, FormatError, PlanError
from aprcore.sweep.cases import CASE_SCHEMA
from aprcore.sweep.results import (
    ResultsFile,
    error_result,
)
from sweep_cases import make_case, make_result


class TestResultsFile:
    def test_it_remembers(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        a, b = make_result(make_case("a"), "layer-0/attn_norm"), make_result(make_case("b"))
        with ResultsFile(path) as file:
            assert file.add(a) and file.add(b)
        with ResultsFile(path) as file:
            assert (file.get(a.id), file.get(b.id), file.get("x")) == (a, b, None)

    def test_a_result_counts_once(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        result = make_result(make_case())
        with ResultsFile(path) as file:
            assert file.add(result)
            assert not file.add(replace(result, summary="another time"))
            assert not file.add(error_result(result.id, "lost"))
        assert len(path.read_text().splitlines()) == 1

    def test_an_error_gives_way_to_a_result(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        result = make_result(make_case())
        with ResultsFile(path) as file:
            assert file.add(error_result(result.id, "lost\ntwice"))
            assert file.add(result)
        with ResultsFile(path) as file:
            assert file.get(result.id) == result

    def test_a_torn_last_line_is_forgotten(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        a, b = make_result(make_case("a")), make_result(make_case("b"))
        with ResultsFile(path) as file:
            file.add(a)
            first = path.read_bytes()
            file.add(b)
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with ResultsFile(path) as file:
                assert (file.get(a.id) is not None) == (size >= len(first))
                assert file.get(b.id) is None
                file.add(b)
            with ResultsFile(path) as file:
                assert file.get(b.id) == b

    @pytest.mark.parametrize("fresh", [False, True])
    @pytest.mark.parametrize(
        "text", ["# notes\n", "notes", "{}\n", '{"schema": "other"}\n', "[" * 9999 + "\n"]
    )
    def test_somebody_elses_file_is_left_alone(
        self, tmp_path: Path, text: str, fresh: bool
    ) -> None:
        path = tmp_path / "r.jsonl"
        path.write_text(text)
        with pytest.raises(FormatError, match=r"r\.jsonl"):
            ResultsFile(path, fresh=fresh)
        assert path.read_text() == text

    def test_a_damaged_line_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        result = make_result(make_case())
        with ResultsFile(path) as file:
            file.add(result)
        good = path.read_text()
        damaged = (
            "\n",
            good.replace(CASE_SCHEMA, "x"),
            good.replace('"diverges": false', '"diverges": 3'),
            good.replace('"summary": "fine", ', ""),
        )
        for bad in damaged:
            assert bad != good
            path.write_text(good + bad + good)
            with pytest.raises(FormatError, match="line 2"):
                ResultsFile(path)
        with ResultsFile(path, fresh=True) as file:
            assert file.get(result.id) is None
        assert not path.exists()

    def test_two_sweeps_do_not_share_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        with ResultsFile(path), pytest.raises(PlanError, match="another sweep"):
            ResultsFile(path)
        ResultsFile(path).__exit__(None, None, None)

    @pytest.mark.parametrize("name", [".", "gone/r.jsonl"])
    def test_a_file_that_cannot_be_written(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(AprError, match="cannot be written"):
            ResultsFile(tmp_path / name)

    @pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
    def test_a_device_is_no_file(self, name: str) -> None:
        with pytest.raises(AprError, match="is no regular file"):
            ResultsFile(Path(name))

    def test_a_line_that_did_not_fit_is_forgotten(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        a, b = make_result(make_case("a")), make_result(make_case("b"))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with ResultsFile(path) as file:
            file.add(a)
            room = path.stat().st_size + 20
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            try:
                with pytest.raises(AprError, match="cannot be written"):
                    file.add(b)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.stat().st_size == room
        with ResultsFile(path) as file:
            assert (file.get(a.id), file.get(b.id)) == (a, None)
