"""The hunt in docs/engines.md, on the real llama.cpp, goes as it is told."""

from __future__ import annotations

from pathlib import Path

from guides import walk

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


def test_the_commands_print_what_the_page_says(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "stories260k.gguf").symlink_to(models["stories"])
    walk(PAGE, tmp_path)
