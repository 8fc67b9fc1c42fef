"""`aprtui capture` without an engine: what is refused before one is run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from aprtui.cli import main


def test_a_missing_library_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    output = tmp_path / "dump"
    assert main(["capture", "llama.cpp", "m.gguf", "--tokens", "1,2", "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "needs llama-cpp-python" in error
    assert "pip install 'aprtui[engines]'" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["vllm", "m.gguf"], "invalid choice: 'vllm'"),
        (["llama.cpp", "m.gguf", "--set", "rope_freq_base"], "is not NAME=X"),
        (["llama.cpp", "m.gguf", "--set", "rope_freq_base=high"], "'high' is not a number"),
        (["llama.cpp", "m.gguf", "--override-kv", "llama.rope.freq_base=5"], "is not KEY=TYPE:X"),
        (["llama.cpp", "m.gguf", "--override-kv", "a=int:x"], "is none of int:1"),
        (["llama.cpp", "m.gguf", "--ubatch", "0"], "is not a positive number"),
        (["llama.cpp", "m.gguf", "--tokens", "1,x"], "is not a token id"),
    ],
)
def test_a_malformed_argument_is_named(
    arguments: list[str], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "dump"
    assert main(["capture", *arguments, "-o", str(output)]) == 2
    assert fault in capsys.readouterr().err
    assert not output.exists()
