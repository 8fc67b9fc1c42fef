"""Files that shrink, vanish or are replaced while they are open.

Each test runs in a process of its own: a mapped file that shrinks would end it with SIGBUS, which
no `except` sees.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aprcore.network.stages import StageKey
from models import build, save, small_model, write_gguf
from tiny import TOKENS, trace_model, write_model, write_stages

PRELUDE = """
import os, sys
from pathlib import Path
from aprcore.runs.bisect import bisect, run
from aprcore.runs.request import Request
from aprcore.ground.errors import AprError
from aprcore.models.model import open_model
from aprcore.dumps.trace import record_trace
from aprcore.dumps.directory import TraceDirectory
from aprcore.network.weights import read_all

def cut(path, size=100):
    os.truncate(path, size)

def replace(path):
    new = Path(f"{path}.new")
    new.write_bytes(b"x" * 50)
    os.replace(new, path)

def refused(action):
    try:
        action()
    except AprError as error:
        print(str(error))
    else:
        sys.exit("nothing was refused")
"""


def in_process(code: str, *arguments: str | Path) -> str:
    """What `code` prints; fails if the process dies, by a signal or otherwise."""
    done = subprocess.run([sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


@pytest.fixture
def apr(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.apr")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GGUF file and a safetensors directory of the same model."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("formats")
    model = build(small_model("qwen2"))
    return write_gguf(model, root / "m.gguf"), save(model, root / "hf")


READ_ALL = """
with open_model(sys.argv[1]) as model:
    cut(sys.argv[2])
    names = list(model.weights)
    for name in (names[0], names[-1]):
        try:
            read_all(model.weights[name])
        except AprError as error:
            print(str(error))
"""


def test_a_model_that_shrinks_while_open(apr: Path) -> None:
    assert "m.apr: the file ends" in in_process(READ_ALL, apr, apr)


@pytest.mark.slow  # imports torch and transformers
def test_a_gguf_or_safetensors_file_that_shrinks_while_open(
    weights: tuple[Path, Path], tmp_path: Path
) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(weights[0].read_bytes())
    assert "m.gguf: the file ends" in in_process(READ_ALL, gguf, gguf)
    for file in weights[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "model.safetensors"
    assert "model.safetensors: the file ends" in in_process(READ_ALL, tmp_path, shard)


def test_a_model_that_shrinks_during_a_pass_leaves_no_half_written_trace(
    apr: Path, tmp_path: Path
) -> None:
    code = """
with open_model(sys.argv[1]) as model:
    def shrink(key):
        if key.stage == "attn_out":
            cut(sys.argv[1])
    refused(lambda: record_trace(model, (1, 2), directory=Path(sys.argv[2]), progress=shrink))
"""
    assert "m.apr: the file ends" in in_process(code, apr, tmp_path / "trace")
    assert not (tmp_path / "trace").exists()


def test_a_model_that_is_replaced_is_read_to_its_end(apr: Path, tmp_path: Path) -> None:
    """The old file stays whole for those who have it open."""
    oracle = write_stages(tmp_path / "o", trace_model(apr))
    code = """
events = bisect(Request(model=Path(sys.argv[1]), oracle=Path(sys.argv[2])))
next(events)
replace(sys.argv[1])
*_, report = events
print(report.summary())
"""
    assert "no divergence in 54 stages" in in_process(code, apr, oracle)


@pytest.mark.parametrize("action", ["cut(file)", "cut(file, 0)", "replace(file)", "os.unlink(file)",
                                    "os.unlink(file); os.mkfifo(file)"])  # fmt: skip
def test_a_stage_file_that_changes_after_listing(tmp_path: Path, action: str) -> None:
    key = StageKey(0, "attn_norm")
    oracle = write_stages(tmp_path / "o", {key: np.ones((len(TOKENS), 4000))})
    code = f"""
directory = TraceDirectory(sys.argv[1])
(key,) = directory.keys()
file = directory.file(key)
{action}
refused(lambda: directory.read(key))
"""
    assert f"{key.path}.bin" in in_process(code, oracle)


def test_a_stage_file_that_shrinks_under_the_reader(tmp_path: Path) -> None:
    """Truncated again and again from another process, while it is read again and again."""
    key = StageKey(0, "attn_norm")
    oracle = write_stages(tmp_path / "o", {key: np.ones(1 << 20)})
    file = oracle / f"{key.path}.bin"
    whole = file.read_bytes()
    code = """
directory = TraceDirectory(sys.argv[1])
(key,) = directory.keys()
print("ready", flush=True)
outcomes = set()
for _ in range(300):
    try:
        values = directory.read(key)
        outcomes.add("whole" if values.size == 1 << 20 and (values == 1).all() else "wrong")
    except AprError:
        outcomes.add("refused")
print(*outcomes)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, oracle],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    while process.poll() is None:
        os.truncate(file, 1 << 20)
        with file.open("r+b") as out:
            out.write(whole)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    # A file that is being written may hold zeros for a while; none of that is a crash.
    assert set(output.split()) <= {"whole", "refused", "wrong"}
    assert output.strip()
