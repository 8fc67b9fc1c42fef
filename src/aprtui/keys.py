"""The keys of the explorer. Help, footer, palette and the settings file all go by this list."""

from __future__ import annotations

from textual.binding import Binding, BindingType

EXPLORER_KEYS: tuple[BindingType, ...] = (
    # Where to look
    Binding("n", "next_divergence", "next", id="explorer.next",
            tooltip="Go to the next divergence"),
    Binding("p", "previous_divergence", "prev", id="explorer.previous",
            tooltip="Go to the previous divergence"),
    Binding("u", "upstream", "up to the cause", id="explorer.upstream", show=False,
            tooltip="Go to the input that this stage's error came from, up to the one to blame"),
    Binding("d", "downstream", "down", id="explorer.downstream", show=False,
            tooltip="Go down to what this stage spoils, or back where u came from"),
    Binding("b", "blame", "blame", id="explorer.blame", show=False,
            tooltip="Go to the stage to blame for this one and show why"),
    Binding("slash", "filter", "filter", id="explorer.filter", key_display="/",
            tooltip="Show only stages with these words: a name, a layer, a verdict"),
    Binding("escape", "clear_filter", "all stages", id="explorer.clear-filter",
            tooltip="Show all stages again; where only one pane fits, go back to them"),
    Binding("s", "sort", "sort", id="explorer.sort",
            tooltip="Sort by computation, cosine, relative L2, model or kernel error"),
    Binding("t", "measure", "figures", id="explorer.measure",
            tooltip="Show the cumulative, the model or the kernel judgment in the tree"),
    Binding("o", "profile", "depth", id="explorer.profile", show=False,
            tooltip="The depth profile: every judgment over all layers, as curves"),
    # What to see of it
    Binding("w", "why", "why", id="explorer.why",
            tooltip="Why this stage has its verdict, and back"),
    Binding("k", "top_k", "top-K", id="explorer.top-k",
            tooltip="Show 5, 10, 20, 50, 100 or 200 of the largest differences"),
    Binding("left_square_bracket", "tab(-1)", "previous tab", id="explorer.previous-tab",
            key_display="[", show=False, tooltip="The previous tab of the detail pane"),
    Binding("right_square_bracket", "tab(1)", "next tab", id="explorer.next-tab",
            key_display="]", show=False, tooltip="The next tab of the detail pane"),
    Binding("tab", "next_pane", "next pane", id="explorer.next-pane", show=False,
            tooltip="Go to the next pane: stages, figures, differences"),
    Binding("question_mark", "help", "help", id="explorer.help", key_display="?",
            tooltip="Every key, and what the verdicts mean"),
)  # fmt: skip
