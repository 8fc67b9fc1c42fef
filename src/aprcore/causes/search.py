"""Going through the catalogue for one failed stage, and settling which causes to name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from aprcore.causes.experiment import Experiment, Outcome
from aprcore.causes.file_evidence import find_evidence
from aprcore.causes.precision import ADVICE, coarser_arithmetics
from aprcore.causes.projections import Part, Variants, try_variant
from aprcore.causes.records import CauseTried
from aprcore.causes.scene import Entry, Scene
from aprcore.causes.span import span_outputs
from aprcore.judging.replay import Expectation, RecordedSide

# Causes that do not explain are listed up to this many, the nearest first.
LISTED = 8
# Tokens from which on the start of a text is tried before the whole.
LONG_TEXT = 256
ARITHMETIC: Final = "arithmetic"


@dataclass(frozen=True, slots=True)
class Tried:
    """An alternative and how it fared.

    Attributes:
        name, advice: As in `CauseTried`; `{}` stands for the weight it belongs to.
        outcome: How it fared.
        is_fallback: As in `Entry`.
        part: The weight's short name, for products by several.
        is_evidence: As in `CauseTried`.
        origin: The row of the catalogue that it comes from, or that it is a coarser arithmetic;
            None for what is read off the file.
        is_span: Whether it stands for a stage inside a span.
    """

    name: str
    advice: str
    outcome: Outcome
    is_fallback: bool = False
    part: str = ""
    is_evidence: bool = False
    origin: Entry | Variants | Literal["arithmetic"] | None = None
    is_span: bool = False

    @property
    def level(self) -> int:
        """Lower is preferred where several explain: plain ones, solved ones, then mere signs."""
        return 2 if self.is_evidence else int(self.is_fallback)

    @property
    def rank(self) -> tuple[int, bool]:
        """Lower is simpler, when two explain equally."""
        return self.level, self.outcome.region is not None

    def described(self) -> str:
        """The name with the region that it is confined to."""
        region = self.outcome.region
        return self.name if region is None else f"{self.name}, in {region.name} only"


class Origins(NamedTuple):
    """The rows of the catalogue that explained a stage.

    Attributes:
        entries, variants: The rows.
        is_span: Whether they are of a stage inside a span.
        is_arithmetic: Whether a coarser arithmetic did, too.
    """

    entries: frozenset[Entry]
    variants: frozenset[Variants]
    is_span: bool
    is_arithmetic: bool


def origins_of(tried: Iterable[Tried], causes: Iterable[CauseTried]) -> Origins | None:
    """Where the named causes come from; None where one of them is no row of the catalogue."""
    names = {cause.name for cause in causes if cause.explains}
    found = [
        t for t in tried
        if t.outcome.explains and names & {t.described(), t.described().replace("{}", t.part)}
    ]  # fmt: skip
    # What is solved for may come to the same as a row that is plain; that row is enough.
    levels = {name: min(t.level for t in found if t.described() == name)
              for name in {t.described() for t in found}}  # fmt: skip
    found = [t for t in found if t.level == levels[t.described()]]
    if not found or any(t.origin is None for t in found):
        return None
    origins = [t.origin for t in found]
    return Origins(
        frozenset(x for x in origins if isinstance(x, Entry)),
        frozenset(x for x in origins if callable(x)),
        any(t.is_span for t in found),
        ARITHMETIC in origins,
    )


def try_entries(experiment: Experiment, catalogue: Iterable[Entry]) -> Iterator[Tried]:
    """Every entry that applies; of an entry's variants that cannot be told apart, the first."""
    scene = experiment.scene
    start = _start_of(scene)
    for entry in catalogue:
        title = entry.title(scene)
        if title is None:
            continue
        if start is None or not entry.is_causal:
            yield from _distinct(_try_entry(experiment, entry, title))
            continue
        tried = list(_try_entry(start, entry, title))
        hits = {t.name for t in tried if t.outcome.explains}
        yield from _distinct(t for t in tried if t.name not in hits)
        if hits:
            whole = _try_entry(experiment, entry, title)
            yield from _distinct(t for t in whole if entry.is_fallback or t.name in hits)


def _start_of(scene: Scene) -> Experiment | None:
    """The start of a long text, to where it goes wrong: what fails there need not be run whole."""
    is_short = "token" not in scene.layout.axes or scene.num_tokens <= LONG_TEXT
    if is_short or not scene.config.is_causal:
        return None
    count = max(LONG_TEXT // 2, scene.first_wrong_token + LONG_TEXT // 4)
    return Experiment(scene.prefix(count)) if 2 * count <= scene.num_tokens else None


def _try_entry(experiment: Experiment, entry: Entry, title: str) -> Iterator[Tried]:
    advice = entry.advice_for(experiment.scene)
    for name, value in entry.outputs(experiment.scene):
        outcome = experiment.hold(value, is_solved=entry.is_fallback)
        if outcome is not None:
            yield Tried(
                title.format(name), advice, outcome, entry.is_fallback, origin=entry
            )  # fmt: skip


def try_projections(parts: Iterable[Part], catalogue: Iterable[Variants]) -> Iterator[Tried]:
    """Every variant of a product, for each weight whose share of the output is wrong."""
    for part in parts:
        for variants in catalogue:
            outcomes = ((variant, try_variant(part, variant)) for variant in variants(part))
            yield from _distinct(
                Tried(v.name, v.advice, outcome, v.is_fallback, part.short_name, origin=variants)
                for v, outcome in outcomes
                if outcome is not None
            )


def _distinct(tried: Iterable[Tried]) -> Iterator[Tried]:
    """Variants of one entry without those that say the same as a simpler one."""
    found: dict[tuple[float, float], Tried] = {}
    for t in tried:
        figures = t.outcome.misfit, t.outcome.relative_l2
        if figures not in found or t.rank < found[figures].rank:
            found[figures] = t
    yield from found.values()


def try_arithmetics(experiment: Experiment) -> Iterator[Tried]:
    """Coarser arithmetic, which explains the size of an error and not its values."""
    for name, outcome in coarser_arithmetics(experiment):
        yield Tried(
            name, ADVICE, outcome, is_fallback=True, is_evidence=True, origin=ARITHMETIC
        )  # fmt: skip


def try_span(
    side: RecordedSide, experiment: Experiment, expected: Expectation, catalogue: Iterable[Entry]
) -> Iterator[Tried]:
    """The stages that a judgment spans besides its last, each replaced in turn."""
    for name, advice, value, entry in span_outputs(side, experiment, expected, catalogue):
        outcome = experiment.hold(value)
        if outcome is not None:
            yield Tried(name, advice, outcome, origin=entry, is_span=True)


def try_evidence(scene: Scene, experiment: Experiment) -> Iterator[Tried]:
    """What the model file shows of itself; there is no output to hold against the observed one."""
    figures = experiment.figures(scene.plain.value)
    for name, part in find_evidence(scene, experiment):
        advice = "the conversion of this weight: compare it with the original's"
        outcome = Outcome(*figures, True, 0.0)
        yield Tried(name, advice, outcome, is_fallback=True, part=part, is_evidence=True)


def settle(experiment: Experiment, tried: list[Tried]) -> Iterator[CauseTried]:
    """The causes, best first: those that explain, as few as the evidence allows, then the rest."""
    explaining = [t for t in tried if t.outcome.explains]
    whole = [t for t in explaining if not t.part]
    parts = list(dict.fromkeys(t.part for t in explaining if t.part))
    if any(t.rank == (0, False) for t in whole) or not parts:
        named = _best(experiment, whole)
    else:
        named = [t for part in parts for t in _best(experiment, _of(explaining, part))]
    yield from _merged(named, explains=True)
    chosen = {t.described() for t in named}
    rest = [t for t in tried if not t.outcome.explains and t.described() not in chosen]
    rest.sort(key=lambda t: t.outcome.relative_l2)
    yield from _merged(rest[: 2 * LISTED], explains=False)[:LISTED]


def _of(tried: list[Tried], part: str) -> list[Tried]:
    return [t for t in tried if t.part == part]


def _best(experiment: Experiment, explaining: list[Tried]) -> list[Tried]:
    """Those that explain as well as any other, the simplest of them."""
    if not explaining:
        return []
    level = min(t.level for t in explaining)
    preferred = [t for t in explaining if t.level == level]
    ranked = sorted(preferred, key=lambda t: (t.outcome.misfit, t.rank))
    best = ranked[0].outcome.misfit
    equal = [t for t in ranked if not experiment.tells_apart(best, t.outcome.misfit)]
    simplest = min(t.rank for t in equal)
    return [t for t in equal if t.rank == simplest]


def _merged(tried: list[Tried], *, explains: bool) -> list[CauseTried]:
    """As records; the same cause in several weights is one: "q_proj and k_proj rows ..."."""
    groups: dict[str, list[Tried]] = {}
    for t in tried:
        groups.setdefault(t.described(), []).append(t)
    causes = []
    for name, group in groups.items():
        parts = " and ".join(dict.fromkeys(t.part for t in group if t.part))
        worst = max(group, key=lambda t: t.outcome.relative_l2)
        figures = worst.outcome.relative_l2, worst.outcome.cosine
        texts = [text.replace("{}", parts) if parts else text for text in (name, worst.advice)]
        causes.append(CauseTried(texts[0], texts[1], *figures, explains, parts, worst.is_evidence))
    return causes
