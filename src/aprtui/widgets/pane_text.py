"""What the detail pane says above its tabs and below them, as renderables for any room it has."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from aprtui.description import (
    describe_figures,
    describe_judgments,
    describe_layer,
    describe_pending,
    describe_run,
    describe_shortly,
    describe_verdict,
)
from aprtui.rows import Row
from aprtui.run_state import RunState
from aprtui.theme import Paint
from aprtui.why import explain_run, explain_stage
from aprtui.widgets.tabs import DetailTab

# Lines from which the table gets a title of its own, and the Why tab leaves the judgments in view.
ROOMY_LINES = 24
# Lines below which the Why tab has one line above it.
SHORT_LINES = 14


def describe_pane(
    state: RunState, row: Row, tab: DetailTab, paint: Paint, width: int, height: int
) -> tuple[RenderableType, RenderableType | None]:
    """Describe a row of the tree in a pane of `width` by `height` cells.

    Returns:
        The verdict and the judgments, or the run, or the layer; and what the tab says, if it is
        made of text.
    """
    is_why = tab is DetailTab.WHY
    if row.key is None and tab.is_picture:
        return Text(row.title, "bold"), None
    if row.key is None:
        why = explain_run(state, row.layer, paint) if is_why and state.header else None
        if row.layer is not None:
            return describe_layer(state, row.layer, paint), why
        return describe_run(state, paint), why
    report = state.reports.get(row.key)
    if report is None or state.header is None:
        return describe_pending(row.key.stage, paint), None
    above, is_roomy = [describe_verdict(report, paint)], height >= ROOMY_LINES
    needs_room = is_why or tab.is_picture
    if is_roomy or not needs_room:
        above.append(describe_judgments(report, state, paint, width))
    if not needs_room:
        return Group(*above), describe_figures(report, state.header, paint)
    why = explain_stage(report, state, paint, figures=not is_roomy) if is_why else None
    is_short = height < (SHORT_LINES if is_why else ROOMY_LINES)
    return (describe_shortly(report, paint) if is_short else Group(*above)), why
