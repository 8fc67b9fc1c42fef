"""`aprtui inspect` and `aprtui import`, as a user runs them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aprcore.formats.apr import read_apr
from aprcore.formats.apr_writer import AprWriter, TensorEntry
from aprtui.text import byte_count, visible

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
HOSTILE = sorted((GOLDEN / "hostile").glob("*.apr"))

ESCAPE = "a\x1b[2J[red]b[/red]\u202ec\nd"
ESCAPE_SHOWN = r"a\x1b[2J[red]b[/red]\u202ec\nd"


def aprtui(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aprtui", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def hostile_name(tmp_path: Path) -> Path:
    """A file whose tensor and metadata carry escape sequences and markup."""
    path = tmp_path / "m.apr"
    metadata = {"architecture": "none", "no[te]": ESCAPE, "tokenizer.vocabulary": ["x"] * 99}
    with AprWriter(path, metadata, [TensorEntry(ESCAPE, "F16", (2, 3))]) as writer:
        writer.write(ESCAPE, np.zeros(6, np.float16))
    return path


def test_inspect_shows_what_is_stored(hostile_name: Path) -> None:
    done = aprtui("inspect", hostile_name)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert f"{ESCAPE_SHOWN} F16 2x3 12" in lines
    assert f"no[te] {ESCAPE_SHOWN}" in lines
    assert "tokenizer.vocabulary 99 items" in lines
    assert 'flags ["HAS_VOCAB", "ROW_MAJOR"]' in lines
    assert (
        "cannot be run architecture 'none' is not supported; supported are llama, gemma2, "
        "mistral, qwen2, qwen3"
    ) in lines
    assert "\x1b" not in done.stdout


def test_inspect_on_a_narrow_terminal_sends_no_escapes_of_the_file(hostile_name: Path) -> None:
    reader, writer = pty.openpty()
    environment = os.environ | {"COLUMNS": "60", "TERM": "xterm-256color"}
    subprocess.run([sys.executable, "-m", "aprtui", "inspect", hostile_name], stdout=writer,
                   check=True, timeout=60, env=environment)  # fmt: skip
    os.close(writer)
    shown = b""
    while piece := _read_terminal(reader):
        shown += piece
    os.close(reader)
    assert b"\x1b[2J" not in shown
    assert rb"a\x1b[2J[red]b[/red]" in shown


def _read_terminal(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # the other side is closed
        return b""


def test_inspect_json_is_strict(hostile_name: Path) -> None:
    content = hostile_name.read_bytes().replace(
        b'"architecture": "none"', b'"a": [NaN, -Infinity] '
    )
    hostile_name.write_bytes(content)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads(aprtui("inspect", "--json", hostile_name).stdout, parse_constant=refuse)
    assert record["schema"] == "apr-inspect-v1"
    assert record["metadata"]["a"] == ["nan", "-inf"]
    assert record["tensors"] == [{"name": ESCAPE, "dtype": "F16", "shape": [2, 3],
                                  "offset_bytes": record["header"]["data_offset_bytes"],
                                  "size_bytes": 12}]  # fmt: skip


def test_verify_prints_one_line(hostile_name: Path) -> None:
    done = aprtui("inspect", "--verify", hostile_name)
    assert done.stdout == (
        f"OK {hostile_name}: 1 tensors, {byte_count(hostile_name.stat().st_size)}, "
        "every checksum and extent is right\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not HOSTILE, reason="../shared is absent")
def test_every_hostile_file_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    from aprtui.cli import main

    for path in HOSTILE:
        assert main(["inspect", str(path), "--verify"]) == 2, path.name
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith(f"aprtui: {path}: ")


@pytest.mark.skipif(not HOSTILE, reason="../shared is absent")
def test_a_damaged_weight_fails_only_verification() -> None:
    path = GOLDEN / "hostile" / "flipped_weight_bit.apr"
    assert aprtui("inspect", path).returncode == 0
    done = aprtui("inspect", "--verify", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the file's checksum is" in done.stderr


def test_import_then_inspect(shared: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.apr"
    source = shared / "data" / "stories260k"
    done = aprtui("import", source, "-o", target, "--quantize", "q8_0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{target}: 47 tensors, {byte_count(target.stat().st_size)}",
        "  1 tensor: F32 kept (embedding and head stay float)",
        "  5 tensors: F32 kept (rows of 172 are not whole blocks)",
        "  11 tensors: F32 kept (vectors stay float)",
        "  30 tensors: F32 -> Q8_0",
        "  Q8_0: relative RMSE 0.0052, error energy 0.97 of what its steps predict",
    ]
    assert aprtui("inspect", target, "--verify").stdout.startswith("OK ")
    record = json.loads(aprtui("inspect", "--json", target).stdout)
    assert record["config"]["num_layers"] == 5
    assert record["cannot_run"] is None
    assert record["tokenizer"]["tokenizer.vocabulary"] == "512 items"

    again = aprtui("import", source, "-o", target)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"aprtui: {target}: the file exists; --force overwrites it\n"
    assert aprtui("import", source, "-o", target, "--force").returncode == 0
    assert "QUANTIZED" not in str(read_apr(target).flags)


def test_import_of_nothing_writes_nothing(tmp_path: Path) -> None:
    done = aprtui("import", tmp_path / "none.gguf", "-o", tmp_path / "m.apr")
    assert done.returncode == 2
    assert done.stderr == f"aprtui: {tmp_path / 'none.gguf'}: no such file; check the path\n"
    assert list(tmp_path.iterdir()) == []


def test_declaring_the_commands_costs_no_numpy() -> None:
    code = (
        "import argparse, sys\n"
        "from aprtui.commands import import_model, inspect\n"
        "subparsers = argparse.ArgumentParser().add_subparsers()\n"
        "import_model.add_parser(subparsers); inspect.add_parser(subparsers)\n"
        "print(sorted({'numpy', 'rich', 'gguf', 'aprcore'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_choices_of_types_are_those_of_the_engine() -> None:
    from aprcore.models import import_types
    from aprtui.commands import import_model

    assert import_model.DTYPES == import_types.DTYPES
    assert import_model.QUANTIZED == import_types.QUANTIZED


def test_visible_text() -> None:
    assert visible("Ġwörld [pad] 日本") == "Ġwörld [pad] 日本"
    assert visible(ESCAPE) == ESCAPE_SHOWN
    assert visible("\ud800\x00\x7f\u200b") == r"\ud800\x00\x7f\u200b"
    assert visible("x" * 500) == "x" * 299 + "…"
    assert [byte_count(n) for n in (0, 1023, 1024, 5 << 40)] == ["0 B", "1023 B", "1.0 KiB",
                                                                  "5.0 TiB"]  # fmt: skip
