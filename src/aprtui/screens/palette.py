"""The command palette: every action; in the explorer every fault, layer and stage as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from rich.text import Text
from textual.actions import parse
from textual.binding import Binding
from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.dom import DOMNode
from textual.markup import escape

from aprcore.network.graph import known_stages
from aprcore.network.stages import StageKey
from aprtui.rows import Filter, summarise_layer
from aprtui.text import visible
from aprtui.theme import mark_of, mark_of_verdict

if TYPE_CHECKING:
    from aprcore.records.report import StageReport
    from aprtui.run_state import RunState
    from aprtui.screens.navigation import Navigation

# Of a kind offered for one search; more could not be read anyway.
MOST_OFFERED = 50
# Before anything is typed: the first faults, of which the others mostly follow.
FAULTS_FIRST = 5


class Offer(NamedTuple):
    """Something that a key does, or somewhere to go in a run.

    Attributes:
        name: As it is shown and found.
        help: What it does, or what is known of it.
        run: Does it.
    """

    name: str
    help: str
    run: Callable[[], Any]


class HasNavigation(Protocol):
    """A screen with stages to go to."""

    navigation: Navigation


class ScreenCommands(Provider):
    """What the keys of a screen, of what has the focus on it, and of the program do."""

    async def discover(self) -> Hits:
        """What is offered before anything is typed."""
        for command in self.commands():
            yield DiscoveryHit(Text(command.name), command.run, command.name, command.help)

    async def search(self, query: str) -> Hits:
        """Actions whose name is like the query."""
        matcher = self.matcher(query)
        for command in self.commands():
            score = matcher.match(command.name)
            if score > 0:
                shown = matcher.highlight(command.name)
                yield Hit(score, shown, command.run, help=command.help)

    def commands(self) -> Iterator[Offer]:
        """Every action that works now, once: of the screen, the program, then the focus."""
        inside = [] if self.focused is None else list(self.focused.ancestors_with_self)
        nodes = [self.screen, self.app, *(n for n in inside if n not in (self.screen, self.app))]
        seen = set()
        for node in nodes:
            for binding in _bindings_of(node):
                space, action, parameters = parse(binding.action)
                owner = self.app if space == "app" else node
                if (owner, action, parameters) in seen or action == "command_palette":
                    continue
                if owner.check_action(action, parameters):
                    seen.add((owner, action, parameters))
                    run = partial(self.app.run_action, binding.action, node)
                    yield Offer(binding.description, escape(binding.tooltip), run)
        yield Offer("theme", "Change the colours", partial(self.app.run_action, "change_theme"))


class ExplorerCommands(ScreenCommands):
    """Faults, layers and stages to go to, besides the actions."""

    @property
    def _navigation(self) -> Navigation:
        """Of the screen that the palette was opened on."""
        return cast("HasNavigation", self.screen).navigation

    async def discover(self) -> Hits:
        """The first faults, then the actions."""
        for fault, _ in zip(self._faults(), range(FAULTS_FIRST)):
            yield DiscoveryHit(Text(fault.name), fault.run, fault.name, fault.help)
        async for hit in super().discover():
            yield hit

    async def search(self, query: str) -> Hits:
        """Actions, faults ("fault rope"), layers ("layer 12"), stages ("layer 3 q_post_rope")."""
        async for hit in super().search(query):
            yield hit
        # The best is 1; a place that is asked for by its kind stands before stages, these before
        # actions whose letters happen to be in the query.
        words = query.lower().split()
        kinds = ((1.0, self._find_faults(words)), (0.95, self._find_layers(query)))
        for best, places in kinds:
            for number, place in zip(range(MOST_OFFERED), places):
                score = best - number / 1000
                yield Hit(score, Text(place.name), place.run, place.name, place.help)
        for number, (key, place) in zip(range(MOST_OFFERED), self._find_stages(query)):
            # A sound stage is found by its place in the pass; a stage whose name is given whole
            # stands before those that only contain it.
            score = 0.5 + 0.4 * (key.stage in words) - number / 1000
            yield Hit(score, Text(place.name), place.run, place.name, place.help)

    # What there is to go to

    def _faults(self) -> Iterator[Offer]:
        """Every stage that diverges, in the order of computation, then those of a second side."""
        state = self._navigation.state
        for key in state.divergences:
            yield self._fault(key, state.reports[key])
        tested, _ = state.side_names
        for key in state.parity_faults:
            parity = state.parity[key]
            name = f"{tested} fault: {key}  {mark_of_verdict(parity.verdict).word}"
            yield Offer(name, escape(visible(parity.reason)), partial(self._navigation.go_to, key))

    def _fault(self, key: StageKey, report: StageReport) -> Offer:
        words = filter(None, (report.blamed, mark_of(report).word))
        name = f"fault: {key}  {' '.join(words)}"
        return Offer(name, escape(visible(report.reason)), partial(self._navigation.go_to, key))

    def _find_faults(self, words: list[str]) -> Iterator[Offer]:
        """Those that have the words, if the word "fault" or how it begins is one of them."""
        if any(len(word) > 1 and "faults".startswith(word) for word in words):
            asked = [word.removesuffix("s") if word == "faults" else word for word in words]
            for fault in self._faults():
                if all(word in fault.name.lower() for word in asked):
                    yield fault

    def _find_layers(self, query: str) -> Iterator[Offer]:
        """The layer of that number, or all for the word alone."""
        # The filter's reading of the query, so that "layer 3" is layer 3 and not layer 30 too.
        filter, state = Filter.parse(query), self._navigation.state
        if any(not "layers".startswith(word) for word in filter.words):
            return
        for layer in state.layers:
            if layer in filter.layers or (filter.words and not filter.layers):
                yield Offer(*_describe_layer(state, layer),
                            partial(self._navigation.go_to_layer, layer))  # fmt: skip

    def _find_stages(self, query: str) -> Iterator[tuple[StageKey, Offer]]:
        filter, state = Filter.parse(query), self._navigation.state
        for key in state.keys:
            report = state.reports.get(key)
            if filter.accepts(key, report):
                mark = mark_of(report)
                name = f"{key}  {mark.glyph} {mark.word}".rstrip()
                yield (
                    key,
                    Offer(
                        name,
                        known_stages()[key.stage].title,
                        partial(self._navigation.go_to, key),
                    ),
                )


def _describe_layer(state: RunState, layer: int) -> tuple[str, str]:
    """A layer with its gravest verdict, and how many stages it has."""
    found = summarise_layer(state, layer)
    name = f"layer {layer}"
    if found.worst is not None:
        mark = mark_of_verdict(found.worst)
        name += f"  {mark.glyph} {mark.word}"
    return name, f"{found.done} of {found.total} stages judged"


def _bindings_of(node: DOMNode) -> Iterator[Binding]:
    """What this program binds on a node; the toolkit's own have neither id nor tooltip."""
    for owner in type(node).__mro__:
        for binding in vars(owner).get("BINDINGS", ()):
            if isinstance(binding, Binding) and binding.id and binding.tooltip:
                yield binding
