"""The architectures, one module each: adding one is adding a module with an `ARCHITECTURE`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from aprcore.network.architectures.family import Architecture
from aprcore.network.config import ModelConfig
from aprcore.network.rope import Rope
from aprcore.network.stages import Builder, Row


def _load() -> Mapping[str, Architecture]:
    """Every architecture by name; the plainest first, then by name."""
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    found = [m.ARCHITECTURE for m in modules if hasattr(m, "ARCHITECTURE")]
    found.sort(key=lambda a: (a.name != DEFAULT, not a.is_computed, a.name))
    return {architecture.name: architecture for architecture in found}


DEFAULT = "llama"  # what a dump is taken for that shows nothing else
ARCHITECTURES = _load()
COMPUTED = tuple(name for name, found in ARCHITECTURES.items() if found.is_computed)


def find_architecture(name: str) -> Architecture:
    """The architecture of that name."""
    return ARCHITECTURES[name]


def known_rows() -> Iterator[list[Row]]:
    """The rows of one layer of each architecture with what is around it, in order."""
    for name, architecture in ARCHITECTURES.items():
        config = outline_config(name, 1)
        builder = Builder(config, None, also=_Everything())
        builder.input = architecture.begin(builder)
        builder.layer = 0
        architecture.layer(builder)
        builder.layer, builder.input = None, builder.rows[-1].key
        architecture.end(builder)
        yield builder.rows


@cache
def known_names(architecture: str) -> frozenset[str]:
    """The names of its stages, conditional ones too."""
    all_rows = dict(zip(ARCHITECTURES, known_rows()))
    return frozenset(row.stage.name for row in all_rows[architecture])


class _Everything(frozenset[str]):
    """A set that holds every conditional stage."""

    def __contains__(self, name: object) -> bool:
        return True


def outline_config(architecture: str, num_layers: int) -> ModelConfig:
    """A configuration whose sizes mean nothing, for the stages that an architecture has."""
    return ModelConfig(
        architecture=architecture, hidden_size=2, num_layers=num_layers, num_heads=1,
        num_kv_heads=1, head_dim=2, intermediate_size=1, vocab_size=1, rms_norm_eps=1e-6,
        rope=Rope(10000.0, 2),
    )  # fmt: skip
