"""Take a tour of the explorer in a pseudo-terminal, and draw what there is to see of it.

Every picture of the documentation is a step of this tour (`docs/tour/*.svg`); the recording of all
steps (`docs/tour.cast`) is for `asciinema play`. Each step waits for what the screen must say, so
that the tour is a test as well; tests/integration/test_tour.py holds it against the files.

Run it after the screen has changed: `make tour`.

What is judged are dumps, stored or made by the float64 backend: what float32 products give depends
on the processor, and the pictures shall be the same wherever they are drawn.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from aprcore.dumps.directory import TraceDirectory
from aprcore.dumps.writer import TraceWriter
from aprcore.engines.forward import Floats, forward
from aprcore.engines.reference import ReferenceBackend
from aprcore.models.model import open_model
from aprcore.network.stages import StageKey
from aprtui.demo import ORACLE, SOUND_MODEL, demo_path, load_faults
from pseudo_terminal import Terminal
from screen_files import Cells, draw_screen, look_alike, record_screens

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "tour"
CAST = DOCS / "tour.cast"

COLUMNS, ROWS = 120, 40
ESCAPE, DOWN, END, RETURN = "\x1b", "\x1b[B", "\x1b[F", "\r"
# How long the recording shows a step.
STEP_S = 3


@dataclass(frozen=True)
class Step:
    """Some keys, and what they lead to.

    Attributes:
        told: What happens, in a few words.
        keys: What is typed; nothing where the explorer goes on by itself.
        shows: Texts that the screen must come to show, all of them.
        hides: Texts that it must not show any more, such as a notice that goes away by itself.
        picture: What the picture of it is called; None for a step without.
        moves: Whether part of the screen never rests (a blinking cursor), so that no frame is kept.
        before: What happens outside the terminal first.
    """

    told: str
    keys: str = ""
    shows: tuple[str, ...] = ()
    hides: tuple[str, ...] = ()
    picture: str | None = None
    moves: bool = False
    before: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Scene:
    """One run of the explorer, from its command line to its exit code.

    Attributes:
        command: Its arguments.
        steps: What is done, up to leaving.
        exit_code: What it ends with.
        written: A file that it leaves behind, and a text in it.
    """

    command: str
    steps: tuple[Step, ...]
    exit_code: int
    written: tuple[str, str] | None = None


@dataclass(frozen=True)
class Frame:
    """What is on the screen after a step.

    Attributes:
        step: The step.
        command: The command line of the scene.
        cells: The screen.
    """

    step: Step
    command: str
    cells: Cells


def repair_engine(directory: Path) -> None:
    """What the author of the engine does: mend it, and dump again."""
    write_dump(directory / "sound.apr", directory / "dump")


LEAVE = Step("leave", "q")
BLAMED = "kv heads tiled (head h reads kv head h mod K)"
SCENES = (
    Scene(
        "demo --fault kv-tiled",
        (
            Step("a wrong answer, and the stage to blame for it",
                 shows=("✗ layer 2 · attn_scores", BLAMED, 'ours "7" · oracle "4"', "NMSE"),
                 picture="explorer"),
            Step("n: the next divergence", "n",
                 ("─ layer 2 · attention ─", "token 3, head 1, dim 4", "NMSE")),
            Step("p, w: back, and why", "pw",
                 ("─ layer 2 · attn_scores ─", "[6 Why]", "The engine computes this stage wrongly",
                  "how query heads are mapped to kv heads", "more, further off"),
                 picture="why"),
            Step("2: how far off each token is", "2",
                 ("[2 Tokens]", '10 "="', "0.3433921"), picture="tokens"),
            Step("3: where in the tensor", "3",
                 ("[3 Heat map]", "all heads  44 × 11", "largest 3.0e+01"), picture="heat-map"),
            Step("h, +: one head, down to its values", "hh+", ("every value", "position"),
                 picture="heat-map-values"),
            Step("4: how large the values are", "4", ("[4 Histogram]",), picture="histogram"),
            Step("the logits, which are off", END,
                 ("─ lm_head ─", "INHERITED its own operation is right"),),
            Step("u, u, u: whose input was it?", "1uuu",
                 ("─ layer 3 · post_attn_residual ─", "idual ← ↳ layer 3 · post_attn_residual",
                  "token 6, dim 35"),
                 picture="upstream"),
            Step("b: the stage to blame", "b",
                 ("─ layer 2 · attn_scores ─", "attn_softmax ← ✗ layer 2 · attn_scores", "[6 Why]",
                  "The engine computes this stage wrongly")),
            Step("d: what it spoils", "d", ("─ layer 2 · attn_softmax ─",)),
            Step("o: every judgment over all layers", "o",
                 ("Depth profile all stages", "↳ INHERITED  layer 2 · attn_softmax", "1e-7┤")),
            Step("p: its root", "p",
                 ("✗ FAIL  layer 2 · attn_scores  cumulative 1.2e+00",), picture="depth"),
            Step("enter: go there", RETURN, ("─ layer 2 · attn_scores ─",)),
            Step("e: a report to hand on", "e", ("─ Export ─", "sound-report.html"), moves=True),
            Step("enter: under that name", RETURN, ("wrote sound-report.html",)),
            LEAVE,
        ),
        exit_code=1,
        written=("sound-report.html", "kv heads tiled"),
    ),
    Scene(
        "sound.apr --trace dump --oracle hf-stages --watch",
        (
            Step("the same dump, watched", shows=("✗ layer 2 · attn_scores", 'ours "7"', "NMSE")),
            Step("the engine was mended, and has dumped again", before=repair_engine,
                 shows=("no divergence", 'next token: "4"', "NMSE", "· x shows them"),
                 hides=("running again",)),
            Step("x: what has changed", "x", ("Since the run before", "31 fixed, 40 unchanged"),
                 hides=("x shows them",), picture="changes"),
            Step("back", ESCAPE, ("no divergence",), hides=("Since the run before",)),
            LEAVE,
        ),
        exit_code=0,
    ),
    Scene(
        "quantised.apr --trace quantised --oracle hf-stages",
        (
            Step("sound quantised weights", shows=("no divergence", "≈")),
            Step("noise, and what it leads to", DOWN * 4,
                 ("─ layer 0 · qkv_matmul ─", "≈ NOISE", "NMSE"), picture="quantised"),
            LEAVE,
        ),
        exit_code=0,
    ),
)  # fmt: skip


def take_tour(directory: Path, known: Iterable[Cells] = ()) -> Iterator[Frame]:
    """Take the tour; yields what each step shows.

    Args:
        directory: An empty directory to work in.
        known: What the steps are known to show, one after the other, which saves time.

    Raises:
        AssertionError: A step does not show what it must, or a scene does not end as it must.
    """
    prepare(directory)
    # A user's settings and first use would show.
    (directory / "settings.toml").write_text("hints = false\n", "utf-8")
    variables = {
        "APRTUI_SETTINGS": str(directory / "settings.toml"),
        "XDG_STATE_HOME": str(directory),
        "COLORTERM": "truecolor",
        "TEXTUAL_ANIMATIONS": "none",
    }
    left = iter(known)
    for scene in SCENES:
        terminal = Terminal(
            *scene.command.split(), columns=COLUMNS, rows=ROWS, directory=directory,
            variables=variables,
        )  # fmt: skip
        try:
            yield from play(scene, terminal, directory, left)
        finally:
            terminal.kill()


def play(
    scene: Scene, terminal: Terminal, directory: Path, known: Iterator[Cells]
) -> Iterator[Frame]:
    """One scene; yields what each step shows, and takes from `known` what it should.

    Raises:
        AssertionError: A step does not show what it must, or the scene does not end as it must.
    """
    for step in scene.steps:
        if step.before is not None:
            step.before(directory)
        terminal.press(step.keys)
        if step is LEAVE:
            break
        terminal.wait_for(*step.shows, *map(is_gone, step.hides))
        if not step.moves:
            expected = next(known, None)
            terminal.wait_until_still(None if expected is None else partial(look_alike, expected))
            yield Frame(step, f"aprtui {scene.command}", terminal.cells())
    code = terminal.end()
    assert code == scene.exit_code, f"aprtui {scene.command}: exit code {code}"
    assert b"Traceback" not in terminal.output
    if scene.written is not None:
        name, text = scene.written
        assert text in (directory / name).read_text("utf-8"), f"{name} does not say {text!r}"


def is_gone(text: str) -> Callable[[str], bool]:
    """Whether a text is not on a screen."""
    return lambda screen: text not in screen


def prepare(directory: Path) -> None:
    """Lay out the files of an author of an engine: models, an oracle, dumps."""
    root, faults = demo_path(), load_faults()
    shutil.copy(root / SOUND_MODEL, directory / "sound.apr")
    shutil.copy(faults["quantised"].model, directory / "quantised.apr")
    shutil.copytree(root / ORACLE, directory / "hf-stages")
    dump = faults["kv-tiled"].trace
    assert dump is not None
    shutil.copytree(dump, directory / "dump")
    write_dump(directory / "quantised.apr", directory / "quantised")


def write_dump(model: Path, directory: Path) -> None:
    """The stages of a sound engine: each made of stored ones, in float64, and stored as float32."""
    oracle = TraceDirectory(demo_path() / ORACLE)
    tokens = oracle.sidecar.tokens or ()
    sidecar = replace(
        oracle.sidecar, model=None, dtype="float32", arithmetic="f32", backend="engine",
        attention=None, versions={}, created_utc=None,
    )  # fmt: skip
    with open_model(model) as opened, TraceWriter(directory, sidecar) as writer:
        graph = opened.graph
        sizes = opened.config.sizes(len(tokens))
        stored: dict[StageKey, Floats] = {}
        for key in graph.keys:
            stage = forward(
                graph, opened.weights, ReferenceBackend(), tokens,
                wants={key}.__contains__, given=stored,
            )  # fmt: skip
            x = next(value for _, value in stage).astype(np.float32)
            stored[key] = x.reshape(graph.shape(key, sizes))
            writer.write(key, stored[key])


def make_files(directory: Path, known: Iterable[Cells] = ()) -> dict[Path, str]:
    """Take the tour, in an empty directory, and make every file that comes of it.

    Args:
        directory: As of `take_tour`.
        known: As of `take_tour`.

    Raises:
        AssertionError: The tour does not go as it must.
    """
    frames = list(take_tour(directory, known))
    pictures = {
        PICTURES / f"{frame.step.picture}.svg": draw_screen(frame.cells, frame.command)
        for frame in frames
        if frame.step.picture is not None
    }
    recording = record_screens([(frame.step.told, frame.cells) for frame in frames], STEP_S)
    return {**pictures, CAST: recording}


def main() -> None:
    """Take the tour and write its files; those of steps that are no more are removed."""
    with tempfile.TemporaryDirectory(prefix="aprtui-tour-") as directory:
        made = make_files(Path(directory))
    PICTURES.mkdir(exist_ok=True)
    for old in set(PICTURES.glob("*.svg")) - made.keys():
        old.unlink()
    for path, text in made.items():
        path.write_text(text, "utf-8")
        print(f"{path.relative_to(DOCS)}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
