"""The keys of the explorer. Help, footer, palette and the settings file all go by this list."""

from __future__ import annotations

from textual.binding import Binding, BindingType

from aprtui.widgets.tabs import DetailTab

EXPLORER_KEYS: tuple[BindingType, ...] = (
    # Where to look
    Binding("n", "do('next')", "next", id="explorer.next",
            tooltip="Go to the next divergence"),
    Binding("p", "do('previous')", "prev", id="explorer.previous",
            tooltip="Go to the previous divergence"),
    Binding("u", "do('upstream')", "up to the cause", id="explorer.upstream", show=False,
            tooltip="Go to the input that this stage's error came from, up to the one to blame"),
    Binding("d", "do('downstream')", "down", id="explorer.downstream", show=False,
            tooltip="Go down to what this stage spoils, or back where u came from"),
    Binding("b", "blame", "blame", id="explorer.blame", show=False,
            tooltip="Go to the stage to blame for this one and show why"),
    Binding("slash", "filter", "filter", id="explorer.filter", key_display="/",
            tooltip="Show only stages with these words: a name, a layer, a verdict"),
    Binding("escape", "clear_filter", "all stages", id="explorer.clear-filter",
            tooltip="Show all stages again; where only one pane fits, go back to them"),
    Binding("s", "do('sort')", "sort", id="explorer.sort",
            tooltip="Sort by computation, cosine, relative L2, model or kernel error"),
    Binding("t", "do('measure')", "figures", id="explorer.measure",
            tooltip="Colour the tree by another judgment: cumulative, model, kernel, CPU vs GPU"),
    Binding("o", "do('profile')", "depth", id="explorer.profile", show=False,
            tooltip="The depth profile: every judgment over all layers, as curves"),
    Binding("g", "do('parity')", "CPU|GPU", id="explorer.parity",
            tooltip="Hold the GPU against the CPU, or one dump against another, stage by stage"),
    Binding("v", "do('devices')", "devices", id="explorer.devices", show=False,
            tooltip="The OpenCL devices of this machine, to run on one of them"),
    # What to see of it
    Binding("w", "why", "why", id="explorer.why",
            tooltip="Why this stage has its verdict, and back"),
    Binding("k", "top_k", "top-K", id="explorer.top-k",
            tooltip="Show 5, 10, 20, 50, 100 or 200 of the largest differences"),
    *(
        Binding(tab.key, f"open_tab('{tab.name}')", tab.label, id=f"explorer.tab-{tab.key}",
                show=False, tooltip=f"Show {tab.subject}")
        for tab in DetailTab
    ),
    Binding("left_square_bracket", "tab(-1)", "previous tab", id="explorer.previous-tab",
            key_display="[", show=False, tooltip="The previous tab of the detail pane"),
    Binding("right_square_bracket", "tab(1)", "next tab", id="explorer.next-tab",
            key_display="]", show=False, tooltip="The next tab of the detail pane"),
    Binding("tab", "next_pane", "next pane", id="explorer.next-pane", show=False,
            tooltip="Go to the next pane: stages, figures, differences"),
    # What to see of a picture
    Binding("m", "picture('kind')", "kind of picture", id="picture.kind", show=False,
            tooltip="Heat map: |diff|, a side or the ratio; values: both sides, or one in lines"),
    Binding("a", "picture('axes')", "axes", id="picture.axes", show=False,
            tooltip="Heat map: other axes"),
    Binding("h", "picture('next-head')", "heads", id="picture.next-head", show=False,
            tooltip="Heat map: the next head; tokens: all heads of each"),
    Binding("H", "picture('previous-head')", "previous head", id="picture.previous-head",
            show=False, tooltip="Heat map: the previous head"),
    Binding("l", "picture('next-largest')", "next largest difference", id="picture.next-largest",
            show=False, tooltip="Heat map, values: the next of the largest differences"),
    Binding("plus,equals_sign", "picture('nearer')", "nearer", id="picture.nearer", show=False,
            key_display="+", tooltip="Heat map: nearer, down to single values"),
    Binding("minus", "picture('farther')", "farther", id="picture.farther", show=False,
            key_display="-", tooltip="Heat map: farther"),
    Binding("0", "picture('whole')", "whole tensor", id="picture.whole", show=False,
            tooltip="Heat map: the whole tensor"),
    Binding("colon", "place", "go to", id="picture.place", show=False, key_display=":",
            tooltip="Go to an index, or to token, head, dim, in the picture"),
    # What to do with it
    Binding("r", "do('rerun')", "re-run", id="explorer.rerun", show=False,
            tooltip="Run again; the files are read again"),
    Binding("x", "do('changes')", "changes", id="explorer.changes", show=False,
            tooltip="What has changed since the run before: fixed, worse, unchanged"),
    Binding("e", "do('export')", "export", id="explorer.export",
            tooltip="Write a report (.html, .md, .json), a picture (.svg) or the run (.aprx)"),
    Binding("y", "do('copy')", "copy", id="explorer.copy", show=False,
            tooltip="Copy what is known of this row to the clipboard, over ssh too"),
    Binding("question_mark", "do('help')", "help", id="explorer.help", key_display="?",
            tooltip="Every key, and what the verdicts mean"),
)  # fmt: skip
