"""The bundled demo: a tiny model that answers sums, its oracle, planted faults, and one non-fault.

Made by `tools/train_demo.py`. Nothing here is computed, and neither torch nor transformers is
needed to open it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

SOUND_MODEL = "sound.apr"
ORACLE = "oracle"
MANIFEST = "faults.json"


@dataclass(frozen=True, slots=True)
class DemoFault:
    """A planted fault, or sound quantised weights to hold beside it.

    Attributes:
        name: What the command line calls it.
        kind: "model" (a wrong .apr), "kernel" (the dump of a wrong engine over the sound .apr) or
            "sound" (nothing wrong but rounding).
        model: The model to open.
        trace: The dump to judge in place of tracing, for kind "kernel".
        layer: Where the fault is; None for kind "sound".
        stage: The first stage that it spoils; None for kind "sound".
        description: One line for people.
    """

    name: str
    kind: str
    model: Path
    trace: Path | None
    layer: int | None
    stage: str | None
    description: str


def demo_path() -> Path:
    """The directory of the demo's files."""
    return Path(str(files(__name__)))


def load_faults() -> dict[str, DemoFault]:
    """The planted faults by name, the most telling one first."""
    root = demo_path()
    manifest = json.loads((root / MANIFEST).read_text("utf-8"))
    return {
        entry["name"]: DemoFault(
            name=entry["name"],
            kind=entry["kind"],
            model=root / entry.get("model", SOUND_MODEL),
            trace=root / entry["trace"] if "trace" in entry else None,
            layer=entry["layer"],
            stage=entry["stage"],
            description=entry["description"],
        )
        for entry in manifest["faults"]
    }
