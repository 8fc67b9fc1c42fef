"""Files that were found to crash, to hang or to take the machine: one a kind in `../shared`.

Each ends as one line, with exit code 2, within the memory and the time of docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from aprcore.dumps.stage_file import write_stage_file
from limited import Outcome, run_limited

FOUND = Path(__file__).parents[3] / "shared" / "cases" / "broken"
pytestmark = pytest.mark.skipif(not FOUND.is_dir(), reason=f"{FOUND} is absent")
PROMPT = ("--prompt", "What is 2+2?")

# Commands for which a file is odd and harmless: it is told or taken as what it is.
HARMLESS = {
    "fuzz-aprx-ae47cba8": ("bisect",),  # an error of 1e300, whose square is infinite
    "05-gguf-long-token": (
        "import",
    ),  # the vocabulary is passed on, and refused by whoever uses it
    "18-tokenizer": ("import",),  # a model may be without a tokenizer, and a line says why it is
}


def commands_on(path: Path, folder: Path) -> Iterator[Sequence[str | Path]]:
    """What reads a file or directory; `folder` takes what is written."""
    out = folder / path.parent.name
    match path.suffix:
        case ".npz" | ".pt":
            yield "bisect", "--trace", path, "--oracle", path
            yield "diff", path, path
        case ".aprx":
            yield "bisect", path
            yield "bisect", path, "--save", f"{out}.aprx", "--report", f"{out}.html"
            yield "bisect", path, "--json"
        case ".toml":
            sound = FOUND / "14-pt-tokens-crash"
            yield "bisect", "--trace", sound, "--oracle", sound, "--tolerances", path
        case ".apr" | ".gguf":
            yield "bisect", path, *PROMPT
            yield "import", path, "-o", f"{out}.apr"
        case _ if path.name == "tokenizer.json":
            model = with_tokenizer(path, folder / path.parent.name)
            yield "bisect", model, *PROMPT
            yield "run", model, *PROMPT
        case _ if (path / "config.json").exists():
            yield "bisect", path, *PROMPT
            yield "import", path, "-o", f"{out}.apr"
        case _ if path.is_dir():
            yield "bisect", "--trace", path, "--oracle", path


def with_tokenizer(path: Path, folder: Path) -> Path:
    """A sound model with this tokenizer."""
    shutil.copytree(FOUND / "13-yarn" / "hf_yarnneg", folder)
    shutil.copy(path, folder / "tokenizer.json")
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_scaling", None)
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def found_files() -> list[Path]:
    paths = []
    for folder in sorted(FOUND.glob("*/")):
        if folder.name == "15-t4096":
            continue  # a sound model: what a long text of it takes is in tests/unit/test_blocks.py
        inside = sorted(folder.iterdir())
        is_dump = any(path.name.startswith("layer-") for path in inside)
        paths += [folder] if is_dump else inside
    return paths


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, list[Outcome]]:
    """How every command line on every found file ended."""
    folder = tmp_path_factory.mktemp("broken")
    asked = [(path, command) for path in found_files() for command in commands_on(path, folder)]
    found: dict[Path, list[Outcome]] = {path: [] for path, _ in asked}
    ended = run_limited([(command, size_of(path)) for path, command in asked])
    for (path, _), outcome in zip(asked, ended, strict=True):
        found[path].append(outcome)
    return found


@pytest.mark.parametrize("path", found_files(), ids=lambda p: str(p.relative_to(FOUND)))
def test_a_found_file_ends_as_one_line(path: Path, outcomes: dict[Path, list[Outcome]]) -> None:
    assert outcomes[path]
    for outcome in outcomes[path]:
        assert not outcome.fault, outcome
        if outcome.arguments[0] not in HARMLESS.get(path.parent.name, ()):
            assert outcome.code == 2, outcome


def test_a_pipe_or_an_endless_device_in_place_of_a_file(tmp_path: Path) -> None:
    """Each is refused by name, and none is read or waited for."""
    asked: list[tuple[Sequence[str | Path], int]] = []
    for kind in ("pipe", "device"):
        for name in ("_trace.json", "_PROVENANCE.txt", "run.aprx", "a.npz", "a.pt",
                     "a.safetensors", "m.apr", "m.gguf", "tokenizer.json", "chat_template.jinja",
                     "config.json", "t.toml", "layer-0/attn_norm.bin"):  # fmt: skip
            folder = tmp_path / kind / name.replace("/", "-")
            if name in ("tokenizer.json", "chat_template.jinja", "config.json"):
                with_tokenizer(FOUND / "13-yarn" / "hf_yarnneg" / "tokenizer.json", folder)
            elif name != "layer-0/attn_norm.bin":
                (folder / "layer-0").mkdir(parents=True)
                write_stage_file(folder / "layer-0" / "ffn_norm.bin", 0, np.ones(3))
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if kind == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to("/dev/zero")
            match path.suffix:
                case ".json" | ".txt" | ".bin" if (folder / "layer-0").exists():
                    command = ("bisect", "--trace", folder, "--oracle", folder)
                case ".aprx":
                    command = ("bisect", path)
                case ".npz" | ".pt" | ".safetensors":
                    command = ("bisect", "--trace", path, "--oracle", path)
                case ".toml":
                    command = ("bisect", "--trace", folder, "--oracle", folder, "--tolerances",
                               path)  # fmt: skip
                case ".jinja":
                    command = ("import", folder, "-o", f"{folder}.apr")
                case ".apr" | ".gguf":
                    command = ("bisect", path, *PROMPT)
                case _:
                    command = ("bisect", folder, *PROMPT)
            asked.append((command, 0))
    for outcome in run_limited(asked):
        assert not outcome.fault, outcome
        assert outcome.code == (0 if outcome.arguments[0] == "import" else 2), outcome
        said = outcome.out + outcome.err
        assert "regular file" in said or "holds no stage files" in said, outcome


@pytest.mark.slow  # 20,000 files are written
@pytest.mark.parametrize("stage", ["post_ffn_residual", "k_post_rope"])
def test_ten_thousand_stage_files_take_linear_time(tmp_path: Path, stage: str) -> None:
    """With and without the residual stream, which leads from every layer to all before it.

    The processor's time: a machine may be busy otherwise.
    """
    seconds = []
    for count in (2_500, 10_000):
        folder = tmp_path / str(count)
        for number in range(count):
            (folder / f"layer-{number}").mkdir(parents=True)
            write_stage_file(folder / f"layer-{number}" / f"{stage}.bin", number, np.ones(4))
        command = ("bisect", "--trace", folder, "--oracle", folder)
        (outcome,) = run_limited([(command, 40 * count)], seconds=60)
        assert outcome.code == 0, outcome
        seconds.append(outcome.cpu_s)
    assert seconds[1] < 15
    assert seconds[1] < 8 * seconds[0]
