"""Folders in which other tools write a file for each tensor, and what they call the files.

A tool's way is an entry in `TOOLS`: it turns the path of a file below the folder into a stored name
such as `aprcore.dumps.names` reads. Files that no tool knows are named by their path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aprcore.dumps.called_modules import name_called_modules
from aprcore.dumps.sidecar import SIDECAR_NAME, read_sidecar
from aprcore.dumps.tensor_files import StoredArray, StoredIntegers, TensorFile, read_npy_dump
from aprcore.ground.errors import TraceError
from aprcore.network.graph import parse_path

Readers = Mapping[str, Callable[[Path], TensorFile]]

NPY = ".npy"
_SUFFIXES = frozenset({NPY, ".pt", ".pth", ".safetensors", ".npz"})
# A pass of a deep model has tens of thousands of tensors; a home directory has more, and deeper.
FILES_LIMIT = 100_000
DEEPEST = 6
# What a run is called by its rank.
_RANK = re.compile(r"rank[=_]?\d+|TP_\d+", re.ASCII)
# Names of the only tensor in a file that say nothing.
_ANONYMOUS = frozenset({"", "data", "tensor", "value", "output", "arr_0", "0"})


@dataclass(frozen=True, slots=True)
class Tool:
    """How a tool names its files.

    Attributes:
        pattern: A path below the folder, without its suffix.
        identify: What tells steps, ranks and calls apart ("" where there is one), and the stored
            name.
    """

    pattern: re.Pattern[str]
    identify: Callable[[re.Match[str]], tuple[str, str]]


def _debugger(match: re.Match[str]) -> tuple[str, str]:
    port = match["port"].replace("inputs_args_", "input.")
    port = port.replace("inputs_kwargs_hidden_states", "input")
    port = port.replace("inputs_kwargs_", "kwargs.").replace("outputs_", "output.")
    return "", f"{match['name']}.{port.replace('outputs', 'output')}"


def _msprobe(match: re.Match[str]) -> tuple[str, str]:
    run = [match["run"].strip("/"), f"call {match['call']}"]
    return "/".join(filter(None, run)), f"{match['name']}.{match['port']}"


def _sglang(match: re.Match[str]) -> tuple[str, str]:
    """The name that the engine gave, in the layer that it named beside it."""
    fields = dict(part.split("=", 1) for part in match["fields"].split("___") if "=" in part)
    name = fields.pop("name").removeprefix("non_intrusive__").replace(".inputs", ".input")
    run = " ".join(f"{x}={fields[x]}" for x in ("forward_pass_id", "step", "rank") if x in fields)
    layer = fields.get("layer_id")
    if layer is None or ".layers." in f".{name}":
        return run, name
    ours = f"layer-{layer}/{name}"
    return run, f"layers.{layer}.{name}" if parse_path(ours) is None else ours


def _tensorrt_llm(match: re.Match[str]) -> tuple[str, str]:
    return match["run"], match["name"]


TOOLS: tuple[Tool, ...] = (
    # transformers' model_addition_debugger: CLASS.NAME_outputs, _inputs_args_0
    Tool(re.compile(r"(?:\w+\.)?(?P<name>.+?)_(?P<port>(?:inputs|outputs)(?:_\w+)?)"), _debugger),
    # msprobe: Module.NAME.CLASS.forward.CALL.output.0
    Tool(re.compile(r"(?P<run>(?:step\d+/)?(?:rank\d*|proc\d+)?)(?:/?dump_tensor_data)?/?"
                    r"(?:Module|Cell)\.(?P<name>.+?)\.\w+\.forward\.(?P<call>\d+)\.(?P<port>.+)"),
         _msprobe),
    # SGLang's dumper: step=0___rank=0___dump_index=1___name=NAME___layer_id=3, in any order
    Tool(re.compile(r"(?:.*/)?(?P<fields>(?:[^/]*___)?name=[^/]+)"), _sglang),
    # TensorRT-LLM: PP_0/TP_0/iteration_0/NAME
    Tool(re.compile(r"(?:.*/)?(?P<run>PP_\d+/TP_\d+(?:/CP_\d+)?(?:/iteration_\d+)?)/(?P<name>[^/]+)"),
         _tensorrt_llm),
)  # fmt: skip


def is_file_folder(path: Path) -> bool:
    """Whether a directory holds files of tensors, and no directory of our stage files."""
    if (path / SIDECAR_NAME).exists():
        return False
    has_tensors = False
    for folder, name in _files(path):
        if folder.startswith("layer-") and name.endswith(".bin"):
            return False
        if Path(name).suffix.lower() in _SUFFIXES:
            has_tensors = True
    return has_tensors


def _files(root: Path) -> Iterator[tuple[str, str]]:
    """Folder below the root, and name, of every file.

    Raises:
        TraceError: There are more than any dump has.
    """
    count = 0
    for folder, folders, names in os.walk(root):
        folders.sort()
        below = os.path.relpath(folder, root)
        if below.count(os.sep) + 1 >= DEEPEST:
            folders.clear()
        for name in sorted(names):
            count += 1
            if count > FILES_LIMIT:
                raise TraceError(f"holds more than {FILES_LIMIT} files", where=root,
                                 hint="give the folder of one dump")  # fmt: skip
            yield "" if below == "." else f"{below}{os.sep}".replace(os.sep, "/"), name


def runs_of_folder(root: Path) -> tuple[str, ...]:
    """What tells the steps, ranks and calls of a folder apart, in order; "" for what is of all."""
    runs = {run for _, _, run, _ in _tensor_files(root)}
    return tuple(sorted(runs, key=lambda run: [int(n) for n in re.findall(r"\d+", run)]))


def read_file_folder(root: Path, readers: Readers, chosen: str | None = None) -> TensorFile:
    """The tensors of a folder, under the names that its tool means.

    Args:
        root: The folder.
        readers: By a file's suffix.
        chosen: Which of its runs, where it holds several; None where it must be one.

    Raises:
        TraceError: It holds several runs, ranks or calls.
        FormatError: A file is malformed.
    """
    files = [entry for entry in _tensor_files(root) if chosen is None or entry[2] in (chosen, "")]
    runs = dict.fromkeys(run for _, _, run, _ in files if run)
    if len(runs) > 1:
        first, second = [*runs][:2]
        hint = "give the folder of one of them"
        if len({_RANK.sub("", run) for run in runs}) == 1:
            hint = f"join the ranks of a tensor-parallel run with --shards {root}"
        raise TraceError(f"holds several runs: {first}, {second} and so on", where=root, hint=hint)
    arrays: dict[str, StoredArray] = {}
    integers: dict[str, StoredIntegers] = {}
    ignored: list[str] = []
    for file, suffix, _, stem in files:
        held = read_npy_dump(file) if suffix == NPY else readers[suffix](file)
        is_only = len(held.arrays) + len(held.integers) == 1
        told = (name for name in held.ignored if not name.startswith("meta."))
        for member, array in held.arrays.items():
            arrays[_unused(_full_name(stem, member, is_only), arrays, file)] = array
        for member, stored in held.integers.items():
            integers[_unused(_full_name(stem, member, is_only), integers, file)] = stored
        ignored += [_full_name(stem, name, False) for name in told]
    return TensorFile(arrays, integers, read_sidecar(root), tuple(ignored))


def _tensor_files(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Every file of tensors with its suffix, its run, and the name of its tensor."""
    found: list[tuple[str, Path, str]] = []
    by_folder: dict[str, list[str]] = {}
    for folder, name in _files(root):
        suffix = Path(name).suffix.lower()
        if suffix in _SUFFIXES:
            stem = f"{folder}{name[: -len(suffix)]}"
            found.append((stem, root / folder / name, suffix))
            by_folder.setdefault(folder.rstrip("/"), []).append(stem)
    called = {stem: (folder, name) for folder, stems in by_folder.items()
              for stem, name in name_called_modules(stems).items()}  # fmt: skip
    for stem, file, suffix in found:
        run, name = called.get(stem) or _identify(stem)
        yield file, suffix, run, name


def _identify(path: str) -> tuple[str, str]:
    """What tells a file's run from others, and the name of its tensor."""
    for tool in TOOLS:
        if match := tool.pattern.fullmatch(path):
            return tool.identify(match)
    return "", path.replace("/", ".")


def _unused(name: str, held: Container[str], file: Path) -> str:
    """A name that no other file has taken.

    Raises:
        TraceError: One has.
    """
    if name in held:
        raise TraceError(f"has a tensor {name!r}, as another file of the folder has", where=file,
                         hint="leave one of them out")  # fmt: skip
    return name


def _full_name(stem: str, name: str, is_only: bool) -> str:
    return stem if is_only and name in _ANONYMOUS else f"{stem}.{name}"
