"""Arrows point one way: the engine knows no terminal, and heavy libraries come late."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TERMINAL = {"textual", "rich", "aprtui"}
ON_DEMAND = {
    "torch",
    "transformers",
    "pyopencl",
    "ml_dtypes",
}  # imported inside the functions that need them


def modules_of(package: str) -> list[str]:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    names = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join((package, *parts)).removesuffix(".__init__"))
    return names


# Each import in turn in one fresh interpreter, noting what it brought along for the first time.
PROBE = """
import importlib, json, sys
watched, names = json.loads(sys.argv[1])
found = {}
for name in names:
    importlib.import_module(name)
    found[name] = sorted(sys.modules.keys() & set(watched))
    if found[name]:
        break
print(json.dumps(found))
"""


def brought_along(names: list[str], watched: set[str]) -> dict[str, list[str]]:
    arguments = json.dumps([sorted(watched), names])
    done = subprocess.run([sys.executable, "-c", PROBE, arguments], capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return {name: modules for name, modules in found.items() if modules}


def test_the_probe_sees_what_is_imported() -> None:
    assert brought_along(["aprtui.text", "aprtui.theme"], {"textual"}) == {
        "aprtui.theme": ["textual"]
    }


def test_no_module_of_the_engine_knows_the_terminal_or_loads_a_heavy_library() -> None:
    names = modules_of("aprcore")
    assert "aprcore.runs.bisect" in names
    assert brought_along(names, TERMINAL | ON_DEMAND) == {}


def test_no_module_of_the_terminal_loads_a_heavy_library() -> None:
    names = modules_of("aprtui")
    assert "aprtui.app" in names
    assert brought_along(names, ON_DEMAND) == {}


def test_the_first_screen_is_painted_without_what_shows_a_stage() -> None:
    names = ("widgets.pane_text", "why", "lineage", "pictures", "screens.help", "screens.error",
             "widgets.divergence_table", "widgets.picture_pane", "widgets.stage_row",
             "widgets.tensor_map")  # fmt: skip
    later = {f"aprtui.{name}" for name in names}
    assert later <= set(modules_of("aprtui"))
    assert brought_along(["aprtui.app"], later) == {}


@pytest.mark.parametrize(
    "name", ["aprcore.ground.errors", "aprcore.network.graph", "aprcore.dumps.plan"]
)
def test_what_checks_arguments_does_not_pay_for_numpy(name: str) -> None:
    assert brought_along([name], {"numpy"}) == {}


ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder in ("tests/benchmarks", "tests/zoo", "tools")
    for path in (ROOT / folder).glob("*.py")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_scripts_import_what_there_is(script: Path) -> None:
    """Benchmarks and tools are not run by the tests: a name that moved must not wait for that."""
    for node in ast.walk(ast.parse((ROOT / script).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("apr"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
