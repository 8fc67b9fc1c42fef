"""The command palette of the explorer: every action, and every stage by its name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

from rich.text import Text
from textual.command import DiscoveryHit, Hit, Hits, Provider

from aprcore.stages import BY_NAME
from aprtui.rows import Filter
from aprtui.theme import mark_of

if TYPE_CHECKING:
    from aprtui.screens.explorer import ExplorerScreen

# Stages offered for one search; more could not be read anyway.
STAGES_OFFERED = 50


class ExplorerCommands(Provider):
    """Actions of the screen and jumps to stages."""

    @property
    def explorer(self) -> ExplorerScreen:
        """The screen that the palette was opened on."""
        return cast("ExplorerScreen", self.screen)

    async def discover(self) -> Hits:
        """What is offered before anything is typed: the actions."""
        for name, tooltip, action in self.explorer.palette_actions():
            yield DiscoveryHit(name, partial(self.explorer.run_action, action), help=tooltip)

    async def search(self, query: str) -> Hits:
        """Actions whose name is like the query, then stages: "layer 3 q_post_rope"."""
        matcher = self.matcher(query)
        for name, tooltip, action in self.explorer.palette_actions():
            score = matcher.match(name)
            if score > 0:
                callback = partial(self.explorer.run_action, action)
                yield Hit(score, matcher.highlight(name), callback, help=tooltip)
        # The filter's reading of the query, so that "layer 3" is layer 3 and not layer 30 too.
        filter, state = Filter.parse(query), self.explorer.state
        accepted = (key for key in state.keys if filter.accepts(key, state.reports.get(key)))
        for number, key in zip(range(STAGES_OFFERED), accepted):
            mark = mark_of(state.reports.get(key))
            name = f"{key}  {mark.glyph} {mark.word}".rstrip()
            # A sound stage is found by its place in the pass; a stage whose name is given whole
            # stands before those that only contain it.
            score = 0.5 + 0.4 * (key.stage in query.lower().split()) - number / 1000
            yield Hit(
                score, Text(name), partial(self.explorer.go_to, key),
                text=str(key), help=BY_NAME[key.stage].title,
            )  # fmt: skip
