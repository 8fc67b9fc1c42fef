"""Files of a sweep, wherever they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from aprcore.ground.errors import AprError, FormatError
from aprcore.sweep.files import NEIGHBOURS, fetch, fingerprint
from aprcore.sweep.plan import read_sweep
from aprcore.sweep.worker import run_case
from sweep_cases import write
from tiny import leftovers


class TestFiles:
    """Against fsspec's own stores: in memory, and local files as if they were remote."""

    @pytest.fixture
    def store(self, tiny: Path) -> Iterator[Any]:
        system = fsspec.filesystem("memory")
        system.put(str(tiny / "m.apr"), "/s/m.apr")
        system.put(str(tiny / "oracle"), "/s/oracle", recursive=True)
        system.pipe("/s/tokenizer.json", b"{}")
        yield system
        system.rm("/s", recursive=True)

    def test_a_file_is_copied_once_with_its_tokenizer(
        self, store: Any, tiny: Path, tmp_path: Path
    ) -> None:
        mark = fingerprint("memory://s/m.apr", is_model=True)
        path = fetch("memory://s/m.apr", mark, tmp_path, is_model=True)
        assert path.read_bytes() == (tiny / "m.apr").read_bytes()
        assert (path.parent / NEIGHBOURS[0]).read_bytes() == b"{}"
        before = path.stat().st_ino
        assert fetch("memory://s/m.apr", mark, tmp_path, is_model=True) == path
        assert path.stat().st_ino == before

    def test_a_directory_is_copied(self, store: Any, tiny: Path, tmp_path: Path) -> None:
        path = fetch("memory://s/oracle", fingerprint("memory://s/oracle"), tmp_path)
        assert leftovers(path) == leftovers(tiny / "oracle")
        for name in leftovers(path):
            if (path / name).is_file():
                assert (path / name).read_bytes() == (tiny / "oracle" / name).read_bytes()

    def test_a_fingerprint_follows_the_content(self, store: Any, tmp_path: Path) -> None:
        first = fingerprint("memory://s/m.apr", is_model=True)
        assert first is not None
        assert fingerprint("memory://s/m.apr", is_model=True) == first
        store.pipe("/s/tokenizer.json", b"{ }")
        second = fingerprint("memory://s/m.apr", is_model=True)
        assert second != first
        assert fingerprint("memory://s/gone") is None
        held = fetch("memory://s/m.apr", first, tmp_path, is_model=True)
        assert fetch("memory://s/m.apr", second, tmp_path, is_model=True) != held

    def test_what_is_not_there(self, store: Any, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match=r"memory://s/gone: no such file"):
            fetch("memory://s/gone", None, tmp_path)
        with pytest.raises(AprError, match="bogus"):
            fetch("bogus://x", None, tmp_path)
        kept = (".lock", ".partial")
        assert [name for name in leftovers(tmp_path) if not name.endswith(kept)] == []

    def test_a_copy_that_was_cut_off_is_made_again(
        self, store: Any, tiny: Path, tmp_path: Path
    ) -> None:
        path = fetch("memory://s/oracle", "1", tmp_path)
        folder = path.parent
        partial = folder.with_suffix(".partial")
        folder.rename(partial)
        (partial / "oracle/final_norm.bin").unlink()
        (partial / "oracle/stray").write_text("x")
        assert fetch("memory://s/oracle", "1", tmp_path) == path
        assert leftovers(path) == leftovers(tiny / "oracle")

    def test_threads_that_want_one_file_make_one_copy(self, tiny: Path, tmp_path: Path) -> None:
        url = f"file://{tiny}/oracle"
        found: list[Path] = []
        threads = [threading.Thread(target=lambda: found.append(fetch(url, "1", tmp_path)))
                   for _ in range(8)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8 and len(set(found)) == 1
        assert leftovers(found[0]) == leftovers(tiny / "oracle")

    def test_a_case_of_urls_gives_what_one_of_paths_gives(
        self, store: Any, tiny: Path, tmp_path: Path
    ) -> None:
        text = f"""
            [[case]]
            model = "memory://s/m.apr"
            oracle = "memory://s/oracle"
            [[case]]
            model = "{tiny}/m.apr"
            oracle = "{tiny}/oracle"
        """
        there, here = read_sweep(write(tmp_path, text)).cases
        found = [run_case(case, tmp_path / "cache", 1) for case in (there, here)]
        assert [result.verdict for result in found] == ["PASS", "PASS"]
        assert found[0].counts == found[1].counts
        assert found[0].worst_relative_l2 == found[1].worst_relative_l2

    def test_a_fingerprint_does_not_walk_the_disk(self, tmp_path: Path) -> None:
        """`model = "/"` is a slip of the hand; a model's and a dump's files are near the top."""
        (tmp_path / "layer-0").mkdir()
        (tmp_path / "other" / "deep").mkdir(parents=True)
        before = fingerprint(str(tmp_path))
        (tmp_path / "other" / "deep" / "x").write_text("x")
        (tmp_path / "other" / "y").write_text("x")
        assert fingerprint(str(tmp_path)) == before
        (tmp_path / "layer-0" / "a.bin").write_text("x")
        inside = fingerprint(str(tmp_path))
        assert inside != before
        (tmp_path / "layer-0" / "a.bin").write_text("xy")
        assert fingerprint(str(tmp_path)) != inside
        began = time.perf_counter()
        fingerprint("/")
        assert time.perf_counter() - began < 1
