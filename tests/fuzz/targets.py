"""The readers: how a file is made for each, and what is called on it.

A reader is called as the commands call it, and what it opened is used: tensors are read, texts
tokenized, saved tensors opened.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import formats
from tests.fuzz.chaos import Chaos
from tests.fuzz.formats import gguf_keys, gguf_scaling, gguf_tokenizer

Files = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """A reader.

    Attributes:
        name: What it reads.
        make: Files by their path below a folder; the first is the one that is opened, unless
            `opens` names another.
        read: Opens it, and uses what it finds.
        opens: What is opened: a path below the folder, "" for the folder itself.
        per_second: About how many inputs of it a core reads in a second.
    """

    name: str
    make: Callable[[Chaos], Files]
    read: Callable[[Path], object]
    opens: str = ""
    per_second: int = 1000


def make_input(target: Target, seed: int, index: int) -> Files:
    """Input `index` of a seed: the same each time."""
    return target.make(Chaos(random.Random(f"{seed}/{target.name}/{index}")))


def make_sound(target: Target, index: int = 0) -> Files:
    """An input that nothing is wrong with."""
    return target.make(Chaos(random.Random(f"sound/{target.name}/{index}"), sound=True))


def _one(name: str, build: Callable[[Chaos], bytes]) -> Callable[[Chaos], Files]:
    """One file of that name, damaged at last."""

    def make(c: Chaos) -> Files:
        data = build(c)
        return {name: c.bytes(data, data[::-1])}

    return make


def _apr(c: Chaos) -> bytes:
    data = formats.apr(c, tokenizer=c.random.random() < 0.2)
    damaged = c.bytes(data)
    return formats.with_sums(damaged) if damaged != data and c.random.random() < 0.7 else damaged


def _gguf(c: Chaos) -> bytes:
    keys = gguf_keys(c.odd("llama", ("qwen2", "qwen3", "gemma2", "mistral3")))
    if c.random.random() < 0.3:
        keys |= gguf_scaling()
    if c.strikes():
        keys |= {"split.count": 2, "split.no": 0, "split.tensors.count": 3}
    if c.strikes():
        keys |= {"general.alignment": c.number(32, 32)}
    return formats.gguf(c, keys)


def _gguf_tokenizer(c: Chaos) -> bytes:
    return formats.gguf(c, gguf_tokenizer(c.random.choice(("gpt2", "gpt2", "llama"))),
                        with_tensors=False)  # fmt: skip


def _hf_directory(c: Chaos) -> Files:
    weights = formats.safetensors(c, formats.WEIGHTS, {"format": "pt"})
    files = {"config.json": c.json(formats.config(c))}
    if c.random.random() < 0.5:
        return files | {"model.safetensors": c.bytes(weights)}
    half = len(formats.WEIGHTS) // 2
    parts = [dict(list(formats.WEIGHTS.items())[:half]), dict(list(formats.WEIGHTS.items())[half:])]
    index = {}
    for number, part in enumerate(parts):
        name = f"model-{number}.safetensors"
        files[name] = formats.safetensors(c, part)
        index |= dict.fromkeys(part, name)
    held = {"metadata": {"total_size": 1}, "weight_map": index}
    return files | {"model.safetensors.index.json": c.bytes(c.json(held))}


def _config(c: Chaos) -> Files:
    sound = Chaos(random.Random(0), sound=True)
    return {"config.json": c.bytes(c.json(formats.config(c))),
            "model.safetensors": formats.safetensors(sound, formats.WEIGHTS)}  # fmt: skip


def _read_model(path: Path) -> None:
    from aprcore.models.model import open_model

    with open_model(path) as model:
        for weight in model.weights.values():
            weight.read(0, min(2, weight.shape[0]) if weight.shape else 1)
        _ = model.graph.keys
        _ = model.tokenizer_data


def _read_apr(path: Path) -> None:
    from aprcore.formats.apr import verify_apr

    verify_apr(path).close()
    _read_model(path)


def _use_tokenizer(tokenizer: object) -> None:
    from aprcore.tokenization.tokenizer import Tokenizer

    assert isinstance(tokenizer, Tokenizer)
    for token in tokenizer.encode("ab c"):
        tokenizer.token_text(token)


def _read_gguf_tokenizer(path: Path) -> None:
    from aprcore.formats.gguf import read_gguf
    from aprcore.tokenization.tokenizer import Tokenizer
    from aprcore.tokenization.vocabulary import TokenizerData

    data = TokenizerData.from_gguf(read_gguf(path).metadata, path)
    if data is not None:
        _use_tokenizer(Tokenizer.from_data(data, path))


def _read_tokenizer_data(path: Path) -> None:
    from aprcore.tokenization.tokenizer_json import read_tokenizer_json

    read_tokenizer_json(path)


def _read_tokenizer(path: Path) -> None:
    from aprcore.tokenization.tokenizer import Tokenizer

    _use_tokenizer(Tokenizer.from_file(path / "tokenizer.json"))


def _read_dump(path: Path) -> None:
    from aprcore.dumps.directory import TraceDirectory
    from aprcore.dumps.open import open_ranks
    from aprcore.dumps.position_tree import PositionTree

    for dump in open_ranks(path):
        if isinstance(dump, TraceDirectory | PositionTree):
            dump.check_headers()
        _ = dump.num_layers
        for key in dump.keys():
            dump.shape(key)
            dump.read(key)


def _read_sidecar(path: Path) -> None:
    from aprcore.dumps.sidecar import read_sidecar

    read_sidecar(path)


def _read_name_map(path: Path) -> None:
    from aprcore.dumps.name_map import read_name_map

    read_name_map(path)


def _read_budget(path: Path) -> None:
    from aprcore.runs.budget import parse_budgets

    parse_budgets([], path)


def _read_sweep(path: Path) -> None:
    from aprcore.sweep.plan import read_sweep

    read_sweep(path)


def _read_results(path: Path) -> None:
    from aprcore.sweep.results import ResultsFile

    with ResultsFile(path):
        pass


def _read_settings(path: Path) -> None:
    from aprtui.settings_file import read_settings

    read_settings(path)


def _read_saved_run(path: Path) -> None:
    from aprcore.ground.errors import AprError
    from aprcore.records.report_json import to_json
    from aprcore.records.saved_run import SavedRun

    with closing(SavedRun(path)) as run:
        to_json(run.report, top_k=3)
        for stage in run.report.stages:
            try:
                run.open(stage)
            except AprError:
                pass


TARGETS = (
    Target("apr", _one("m.apr", _apr), _read_apr, "m.apr"),
    Target("gguf", _one("m.gguf", _gguf), _read_model, "m.gguf"),
    Target("gguf-tokenizer", _one("m.gguf", _gguf_tokenizer), _read_gguf_tokenizer, "m.gguf"),
    Target("config", _config, _read_model),
    Target("huggingface", _hf_directory, _read_model),
    Target("tokenizer-json", formats.tokenizer_files, _read_tokenizer_data),
    Target("tokenizer", formats.usual_tokenizer, _read_tokenizer, per_second=50),
    Target("stage-files", formats.stage_files, _read_dump),
    Target("position-tree", formats.position_tree, _read_dump),
    Target("trace-json", _one("_trace.json", formats.trace_json), _read_sidecar),
    Target("provenance", _one("_PROVENANCE.txt", formats.provenance), _read_sidecar),
    Target("safetensors", _one("d.safetensors", lambda c: formats.safetensors(
        c, formats.MODULES, {"tokens": "[1, 2, 3]", "prompt": "hi", "dtype": "float16"})),
        _read_dump, "d.safetensors"),
    Target("npz", _one("d.npz", formats.npz), _read_dump, "d.npz"),
    Target("pt", _one("d.pt", formats.pt), _read_dump, "d.pt"),
    Target("file-folder", formats.file_folder, _read_dump),
    Target("polygraphy", _one("d.json", formats.polygraphy), _read_dump, "d.json"),
    Target("llama-debug", formats.llama_debug, _read_dump, "llamacpp-m.bin"),
    Target("divergence-base", _one("d.kld", formats.divergence_base), _read_dump, "d.kld"),
    Target("name-map", _one("n.toml", lambda c: formats.toml(c, formats.NAME_MAP)),
           _read_name_map, "n.toml"),
    Target("budget", _one("t.toml", lambda c: formats.toml(c, formats.BUDGET)),
           _read_budget, "t.toml"),
    Target("sweep", _one("s.toml", lambda c: formats.toml(c, formats.SWEEP)),
           _read_sweep, "s.toml"),
    Target("sweep-results", _one("r.jsonl", formats.sweep_results), _read_results, "r.jsonl"),
    Target("settings", _one("s.toml", lambda c: formats.toml(c, formats.SETTINGS)),
           _read_settings, "s.toml"),
    Target("aprx", _one("r.aprx", formats.aprx), _read_saved_run, "r.aprx"),
)  # fmt: skip
