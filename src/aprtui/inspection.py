"""What `aprtui inspect` says about a model, gathered from the readers.

The file is shown as it is stored, so that a model of an architecture that cannot be run can be
looked at too; whether it can be run is one of the things to show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aprcore.formats.apr import AprFlag, AprHeader, read_apr
from aprcore.formats.storage import StoredTensor
from aprcore.ground.data_file import DataFile
from aprcore.ground.errors import AprError
from aprcore.models.convert import describe_config
from aprcore.models.model import open_model
from aprcore.network.config import ModelConfig
from aprcore.records.report_json import json_ready, picked

SCHEMA = "apr-inspect-v1"

# Longer lists (vocabularies, merges) are counted, not shown.
LIST_LIMIT = 32

_TOKENIZER_PREFIXES = ("tokenizer.", "chat_template", "special_tokens")


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model file as stored.

    Attributes:
        path: As given.
        format: "apr", "gguf" or "huggingface".
        size_bytes: Of all its files.
        header: The fixed part of a .apr file; empty for others.
        metadata: Without the tokenizer; long lists are counted.
        tokenizer: The tokenizer's part of the metadata; long lists are counted.
        config: The configuration that it would run with, or None.
        cannot_run: Why it cannot be run, if so.
        tensors: As stored.
    """

    path: str
    format: str
    size_bytes: int
    header: dict[str, Any]
    metadata: dict[str, Any]
    tokenizer: dict[str, Any]
    config: dict[str, Any] | None
    cannot_run: str | None
    tensors: tuple[StoredTensor, ...]

    def sections(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Everything but the tensors, under titles; a section without fields is left out."""
        file = {"format": self.format, "bytes": self.size_bytes, "tensors": len(self.tensors)}
        yield "File", {**file, **self.header}
        if self.config is None:
            yield "Configuration", {"cannot be run": self.cannot_run}
        else:
            yield "Configuration", self.config
        for title, fields in (("Tokenizer", self.tokenizer), ("Metadata", self.metadata)):
            if fields:
                yield title, fields

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values; non-finite numbers are strings."""
        names = ("path", "format", "size_bytes", "header", "metadata", "tokenizer", "config",
                 "cannot_run")  # fmt: skip
        of_tensors = ("name", "dtype", "shape", "offset_bytes", "size_bytes")
        tensors = [picked(tensor, *of_tensors) for tensor in self.tensors]
        record = {"schema": SCHEMA, **picked(self, *names), "tensors": tensors}
        plain: dict[str, Any] = json_ready(record)
        return plain


def find_format(path: Path) -> str:
    """The format of a model, by its first bytes.

    Raises:
        FormatError: The file is missing or empty.
    """
    if path.is_dir():
        return "huggingface"
    with DataFile(path) as file:
        magic = file.read_bytes(0, min(4, file.size_bytes))
    # Whatever is neither is for the .apr reader to refuse, which says how it begins.
    return "gguf" if magic == b"GGUF" and path.suffix != ".apr" else "apr"


def inspect_model(path: Path) -> Inspection:
    """Read everything but weights.

    Raises:
        AprError: The file cannot be read.
    """
    kind = find_format(path)
    header: dict[str, Any] = {}
    metadata: Mapping[str, Any]
    files: tuple[DataFile, ...]
    if kind == "apr":
        apr = read_apr(path)
        metadata, tensors, files = apr.metadata, apr.tensors, (apr.file,)
        header = _describe_header(apr.header)
    elif kind == "gguf":
        from aprcore.formats.gguf import read_gguf

        gguf = read_gguf(path)
        metadata, tensors, files = gguf.metadata, gguf.tensors, gguf.files
    else:
        from aprcore.formats.huggingface import read_huggingface

        held = read_huggingface(path)
        metadata, tensors, files = held.config, held.tensors, held.files
    config, cannot_run = _find_config(path)
    is_tokenizer = {key: key.startswith(_TOKENIZER_PREFIXES) for key in metadata}
    return Inspection(
        path=str(path),
        format=kind,
        size_bytes=sum(file.size_bytes for file in files),
        header=header,
        metadata={k: _short(v) for k, v in metadata.items() if not is_tokenizer[k]},
        tokenizer={k: _short(v) for k, v in metadata.items() if is_tokenizer[k]},
        config=config,
        cannot_run=cannot_run,
        tensors=tuple(tensors.values()),
    )


def _describe_header(header: AprHeader) -> dict[str, Any]:
    fields = asdict(header)
    fields["version"] = ".".join(map(str, header.version))
    known = [flag.name or "" for flag in AprFlag if flag in header.flags]
    unknown = int(header.flags) & ~sum(AprFlag)
    fields["flags"] = [*known, f"{unknown:#06x}"] if unknown else known
    fields["crc32"] = f"{header.crc32:08x}"
    return fields


def _find_config(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The configuration that the model would run with, or why it cannot."""
    try:
        with open_model(path) as model:
            return _describe_run(model.config), None
    except AprError as error:
        return None, f"{error.what}; {error.hint}" if error.hint else error.what


def _describe_run(config: ModelConfig) -> dict[str, Any]:
    fields = describe_config(config)
    # How files store rows is undone on opening; what runs has one order.
    del fields["rope_type"], fields["model_type"]
    fields |= config.found_in_tensors
    if config.rope.divisors is not None:
        fields["rope_divisors"] = list(config.rope.divisors)
    return fields


def _short(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and len(value) > LIST_LIMIT:
        return f"{len(value)} items"
    return value
