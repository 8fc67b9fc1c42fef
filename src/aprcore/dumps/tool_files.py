"""Single files that other tools write: Polygraphy's results, logits of llama.cpp's tools."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.sidecar import LOG_PROBABILITIES, Sidecar
from aprcore.dumps.tensor_files import StoredArray, StoredIntegers, TensorFile, store_npy
from aprcore.ground.data_file import DataFile
from aprcore.ground.errors import FormatError, TraceError
from aprcore.ground.fields import read_object
from aprcore.ground.npy import NpyArray

JSON_LIMIT_BYTES = 4 * 1024**3
_CLASS = "polygraphy_class"
_LOGITS_NAME = "logits"


def read_polygraphy_dump(path: Path) -> TensorFile:
    """A RunResults file of Polygraphy: the outputs of one runner in one iteration.

    Source: `polygraphy/json/serde.py`, `polygraphy/comparator/struct.py`. Each array is a .npy file
    in base64.

    Raises:
        FormatError: It is no such file, or an array is damaged.
        TraceError: It holds several runners or iterations.
    """
    data = read_object(path, limit_bytes=JSON_LIMIT_BYTES)
    runs = data.get("lst")
    if data.get(_CLASS) != "RunResults" or not isinstance(runs, list):
        raise FormatError("is no RunResults file of Polygraphy", where=path,
                          hint="write one with --save-outputs")  # fmt: skip
    found = [(runner, outputs) for runner, outputs in map(_runner, runs) if outputs]
    if len(found) != 1 or len(found[0][1]) != 1:
        names = ", ".join(str(runner) for runner, _ in found) or "none"
        raise TraceError(
            f"holds {len(found)} runners ({names}) and"
            f" {sum(len(outputs) for _, outputs in found)} iterations", where=path,
            hint="save one iteration of one runner",
        )  # fmt: skip
    arrays: dict[str, StoredArray] = {}
    integers: dict[str, StoredIntegers] = {}
    ignored = []
    for name, held in found[0][1][0].items():
        array = _decode(path, name, held)
        stored = None if array is None else store_npy(array)
        if isinstance(stored, StoredArray):
            arrays[name] = stored
        elif isinstance(stored, StoredIntegers):
            integers[name] = stored
        else:
            ignored.append(name)
    return TensorFile(arrays, integers, Sidecar(), tuple(ignored))


def _runner(entry: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A runner's name, and the outputs of each of its iterations."""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
        return None, []
    results = [x.get("outputs") for x in entry[1] if isinstance(x, dict)]
    return entry[0], [x for x in results if isinstance(x, dict)]


def _decode(path: Path, name: str, held: Any) -> NpyArray | None:
    def broken(fault: str) -> FormatError:
        return FormatError(f"{name!r} {fault}", where=path, hint="dump it again")

    while isinstance(held, dict) and "values" in held:
        held = held["values"]
    text = held.get("array") if isinstance(held, dict) else None
    if not isinstance(text, str):
        raise broken("is no array")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise broken(f"is damaged: {error}") from error
    return NpyArray.in_bytes(data, broken)


def read_llama_debug_dump(path: Path) -> TensorFile:
    """The logits that llama-debug saves, `llamacpp-STEM.bin`: float32, of the last token.

    The ids are in `llamacpp-STEM-tokens.bin` beside it, as int32.

    Raises:
        FormatError: It is no whole number of values.
    """
    values = _read_values(path, np.dtype("<f4"))
    beside = path.with_name(f"{path.stem}-tokens.bin")
    integers: dict[str, StoredIntegers] = {}
    if beside.is_file():
        ids = _read_values(beside, np.dtype("<i4"))
        integers["tokens"] = StoredIntegers(ids.shape, lambda: ids)
    logits = StoredArray(values.shape, "float32", lambda start, stop: values[start:stop])
    return TensorFile({_LOGITS_NAME: logits}, integers, Sidecar(backend="llama.cpp"), ())


def _read_values(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    file = DataFile(path)
    try:
        count, rest = divmod(file.size_bytes, dtype.itemsize)
        if rest:
            raise FormatError(f"is {file.size_bytes} bytes long, no whole number of {dtype.name}",
                              where=path)  # fmt: skip
        values = np.empty(count, dtype)
        file.read_into(0, values)
    finally:
        file.close()
    return values


# The magic, then n_ctx, n_vocab and n_chunk; the ids of all chunks; of each chunk the rows of its
# later half, with two floats in front: the step, and the smallest value.
_MAGIC = b"_logits_"
_SIZES = np.dtype("<i4")


def is_divergence_base(path: Path) -> bool:
    """Whether a file begins as those of `llama-perplexity --kl-divergence-base` do."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:  # what is wrong with it is said by who opens it
        return False


def read_divergence_base(path: Path) -> TensorFile:
    """The base file of llama-perplexity: log-probabilities of every token's successor.

    Its first chunk is read: the last row, and the tokens before it. Values are rounded to 65536
    steps from the largest down to 16 below it, and what is less is stored as that.
    Source: llama-perplexity of llama.cpp.

    Raises:
        FormatError: It has not the size that its header takes.
    """
    head_bytes = len(_MAGIC) + 3 * _SIZES.itemsize
    with DataFile(path) as file:
        sizes = np.frombuffer(file.read_bytes(len(_MAGIC), head_bytes - len(_MAGIC)), _SIZES)
        context, vocabulary, chunks = (int(size) for size in sizes)
        rows = context - 1 - context // 2
        row_bytes = 2 * (2 * ((vocabulary + 1) // 2) + 4)
        tokens_bytes = _SIZES.itemsize * context * chunks
        due = head_bytes + tokens_bytes + row_bytes * rows * chunks
        if min(context, vocabulary, chunks, rows) < 1 or file.size_bytes != due:
            raise FormatError(
                f"is {file.size_bytes} bytes long where {chunks} chunks of {context} tokens take"
                f" {due}", where=path, hint="let llama-perplexity finish it",
            )  # fmt: skip
        # The last row is of the last token but one: the last one's successor is not asked for.
        ids = np.frombuffer(file.read_bytes(head_bytes, _SIZES.itemsize * (context - 1)), _SIZES)
        at = head_bytes + tokens_bytes + row_bytes * (rows - 1)
        words = np.frombuffer(file.read_bytes(at, row_bytes), "<u2")
    step, smallest = words[:4].view("<f4")
    values = words[4 : 4 + vocabulary].astype(np.float32) * step + smallest
    logits = StoredArray(values.shape, "float16", lambda start, stop: values[start:stop])
    tokens = {"tokens": StoredIntegers(ids.shape, lambda: ids)}
    sidecar = Sidecar(backend="llama.cpp", logits=LOG_PROBABILITIES)
    return TensorFile({_LOGITS_NAME: logits}, tokens, sidecar, ())
