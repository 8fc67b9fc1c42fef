"""The recipes of docs/architecture.md, walked: each touches the files that it names, and no other.

A copy of the sources gets what a recipe says, and nothing else. What it then can do is tested by
`tests/recipes/walk_*.py`, in a process that imports the copy.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
RECIPES = TESTS / "recipes"
OPERATIONS = "aprcore/network/operations.py"  # where one is new
PAGE = ROOT / "docs" / "architecture.md"


class Sources:
    """A copy of `src` with what a recipe adds.

    Attributes:
        path: Where it is.
        touched: The files that were added or edited, as the documentation calls them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.touched: set[str] = set()
        shutil.copytree(ROOT / "src", path / "src")

    def add(self, name: str, source: str) -> None:
        """Add a file of `tests/recipes`."""
        target = self._touch(name)
        assert not target.exists()
        shutil.copy(RECIPES / source, target)

    def edit(self, name: str, *, before: str, text: str) -> None:
        """Put text in front of what occurs once in a file."""
        target = self._touch(name)
        found = target.read_text("utf-8")
        assert found.count(before) == 1, f"{before!r} occurs {found.count(before)} times in {name}"
        target.write_text(found.replace(before, text + before), "utf-8")

    def end(self, name: str, text: str) -> None:
        """Put text at the end of a file."""
        target = self._touch(name)
        target.write_text(f"{target.read_text('utf-8')}\n\n{text}", "utf-8")

    def _touch(self, name: str) -> Path:
        self.touched.add(name)
        return self.path / "src" / name


def an_architecture(sources: Sources) -> None:
    sources.add("aprcore/network/architectures/parallel.py", "parallel.py")
    sources.end(OPERATIONS, '''@dataclass(frozen=True, slots=True)
class AddScaled(Operation):
    """The residual stream and a branch times a factor."""

    factor: float = 1.0

    def __call__(self, op: Backend, at: Site, *inputs: Array) -> Array:
        """Compute it."""
        x, y = inputs
        return op.add(x, op.scale(y, self.factor))
''')  # fmt: skip


def a_conditional_stage(sources: Sources) -> None:
    file = "aprcore/network/architectures/llama.py"
    sources.edit(file, before="ARCHITECTURE = Architecture(", text='''\
def _layer(b: Builder) -> None:
    assert b.input is not None
    x = b.input
    normed = blocks.norm(b, "attn_norm", "input_layernorm", x, "RMSNorm before attention")
    mixed = blocks.attention(b, normed)
    sub_norm = Stage("attn_sub_norm", Scope.LAYER, "T,E",
                     Norm("attn_sub_norm.weight", b.config.rms_norm_eps), "RMSNorm after attention",
                     shown=(("attn_sub_norm",),), conditional=True)
    if b.has(sub_norm):
        mixed = b.add(sub_norm, mixed)
    x = blocks.residual_after_attention(b, x, mixed, "post_attention_layernorm")
    normed = blocks.norm(b, "ffn_norm", "post_attention_layernorm", x, "RMSNorm before the network")
    blocks.residual_after_layer(b, x, blocks.gated_mlp(b, normed))


''')  # fmt: skip
    sources.edit(file, before="from aprcore.network.architectures.family import", text=(
        "from aprcore.network.architectures import blocks\n"
        "from aprcore.network.stages import Builder, Scope, Stage\n"
        "from aprcore.network.operations import Norm\n"
    ))  # fmt: skip
    sources.edit(file, before="    defaults={", text="    layer=_layer,\n")


def a_stored_type(sources: Sources) -> None:
    types, steps = "aprcore/quant/types.py", "aprcore/quant/steps.py"
    sources.edit(types, before="FORMATS: Mapping[str, BlockFormat] = {", text='''\
def _expand_toy(blocks: Bytes, out: Float32) -> None:
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    np.multiply(blocks[:, 2:].view(np.int8), scales, out=out.reshape(-1, 16))


''')  # fmt: skip
    sources.edit(types, before='        BlockFormat("AprQ4",', text=(
        '        BlockFormat("TOY8", 16, 18, BlockLayout.ROWS, expand=_expand_toy),\n'
    ))  # fmt: skip
    sources.edit(steps, before='    "Q2_K": _super', text=(
        '    "TOY8": _BlockSteps(16, lambda b: _halves(b, 0).astype(np.float32)[:, None] ** 2),\n'
    ))  # fmt: skip


def a_cause(sources: Sources) -> None:
    file = "aprcore/causes/residual.py"
    sources.edit(file, before="ENTRIES = (", text='''def _cubed(scene: Scene) -> Float64:
    return scene.inputs[0] + scene.inputs[1] ** 3


''')  # fmt: skip
    sources.edit(file, before='    Entry("sum is {}"', text=(
        '    Entry("block\'s output cubed", RESIDUALS, single(_cubed), "where it is cubed"),\n'
    ))  # fmt: skip


def a_dump_dialect(sources: Sources) -> None:
    file = "aprcore/dumps/names.py"
    sources.edit(file, before="def _parse_own(", text='''\
_TOY = re.compile(r"L(\\d+):(\\w+)", re.ASCII)
_TOY_RULES = (Rule("attn_norm", ("input",)), Rule("attention", ("mixed",)),
              Rule("attn_out", ("out",)))


def _parse_toy(name: str) -> Place | None:
    match = _TOY.fullmatch(name)
    return None if match is None else (int(match[1]), match[2])


''')  # fmt: skip
    sources.edit(file, before="        Dialect(modules",
                 text="        Dialect(_parse_toy, _TOY_RULES),\n")  # fmt: skip


def a_backend(sources: Sources) -> None:
    sources.add("aprcore/engines/toy.py", "toy_backend.py")
    file = "aprcore/engines/engine.py"
    sources.edit(file, before='"opencl", "reference")', text='"toy", ')
    sources.edit(file, before='        case "opencl":', text='''        case "toy":
            from aprcore.engines.toy import ToyBackend

            yield Engine(ToyBackend())
''')  # fmt: skip


def a_tab(sources: Sources) -> None:
    sources.add("aprtui/widgets/first_values.py", "toy_view.py")
    sources.edit("aprtui/widgets/tabs.py", before='    WHY = "6"', text=(
        '    FIRST = "7", "First", "1st", "first values", "how many values were read", '
        '"first_values.FirstValues"\n'
    ))  # fmt: skip


WALKS: dict[str, tuple[Callable[[Sources], None], str]] = {
    "an architecture": (an_architecture, "walk_architecture.py"),
    "a conditional stage": (a_conditional_stage, "walk_stage.py"),
    "a stored type": (a_stored_type, "walk_type.py"),
    "a cause": (a_cause, "walk_cause.py"),
    "a dump dialect": (a_dump_dialect, "walk_dialect.py"),
    "a backend": (a_backend, "walk_backend.py"),
    "a tab": (a_tab, "walk_tab.py"),
}


def documented() -> dict[str, tuple[int, list[str]]]:
    """The table of recipes: how many files each opens, and which."""
    section = PAGE.read_text("utf-8").split("\n## To add", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (.+?) \| (\d)(?: \+ operations)? \| (.+?) \|", section, re.MULTILINE)
    return {name: (int(count), re.findall(r"`(\S+\.py)`", files)) for name, count, files in rows}


def test_the_documentation_has_every_recipe() -> None:
    assert documented().keys() == WALKS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", WALKS)
def test_a_recipe_is_all_that_it_takes(recipe: str, tmp_path: Path) -> None:
    add, walk = WALKS[recipe]
    sources = Sources(tmp_path)
    add(sources)
    count, named = documented()[recipe]
    assert len(sources.touched - {OPERATIONS}) == count == len({*named} - {OPERATIONS})
    patterns = {re.escape(name).replace("NAME", "[a-z_0-9]+") for name in named}
    assert all(any(re.fullmatch(p, file) for p in patterns) for file in sources.touched), named
    walk_in(sources, walk)


def walk_in(sources: Sources, walk: str) -> None:
    path = os.pathsep.join(map(str, (sources.path / "src", TESTS, TESTS / "tui")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(RECIPES / walk)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("recipe", WALKS)
def test_without_it_the_walk_fails(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        walk_in(Sources(tmp_path), WALKS[recipe][1])
