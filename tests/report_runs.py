"""Finished runs to be reported, some of them out to break a report."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from aprcore.judging.compare import compare, describe
from aprcore.judging.layouts import layout_of
from aprcore.judging.logits import compare_logits
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.pictures import Grid, MapKind
from aprcore.records.parity import SideJudgment, StageParity
from aprcore.records.report import (
    DeviceOpened,
    LogitsReport,
    PathRejected,
    Report,
    Side,
    StageReport,
)
from aprcore.reports.files import write_report
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from aprtui.demo import demo_path, load_faults

SUFFIXES = (".html", ".md", ".json")
HOSTILE = (
    "</td><script>alert(1)</script> ]]> \u202e | `` ``` \"'&amp; @nobody #1 \x1b[31m\ud800\n# x"
)
COMMAND = ("aprtui", "bisect", "my model.apr", "--prompt", HOSTILE)


def request(fault: str) -> Request:
    oracle = demo_path() / "oracle"
    if fault == "none":
        return Request(model=demo_path() / "sound.apr", oracle=oracle)
    found = load_faults()[fault]
    return Request(model=found.model, trace=found.trace, oracle=oracle)


@cache
def found_in(fault: str) -> Report:
    return run(request(fault))


@cache
def without_model() -> Report:
    trace = load_faults()["kv-tiled"].trace
    return run(Request(trace=trace, oracle=demo_path() / "oracle"))


@cache
def without_oracle() -> Report:
    found = load_faults()["kv-tiled"]
    return run(Request(model=found.model, trace=found.trace))


@cache
def two_dumps() -> Report:
    faults = load_faults()
    found, other = faults["kv-tiled"], faults["residual-normed"].trace
    oracle = demo_path() / "oracle"
    return run(Request(model=found.model, trace=found.trace, against=other, oracle=oracle))


def broken(key: StageKey, verdict: Verdict | None, **parts: Any) -> StageReport:
    return StageReport(key, layout_of(key, {"T": 2, "E": 3}, 6), verdict, HOSTILE, **parts)


def hostile() -> Report:
    """Every text that comes from a file is out to break the report; no figure is finite."""
    found = found_in("kv-tiled")
    nan, values = np.full(6, np.nan, np.float32), np.arange(6, dtype=np.float32)
    logits = LogitsReport(compare_logits(values, values[::-1].copy()), {5: HOSTILE, 0: HOSTILE})
    header = replace(
        found.header, trace=Side(HOSTILE, HOSTILE, HOSTILE), oracle=Side(HOSTILE, HOSTILE),
        model=HOSTILE, architecture=HOSTILE, prompt=HOSTILE, tokens=(1, 2),
        token_texts=(HOSTILE, HOSTILE), backend=HOSTILE, notes=(HOSTILE, HOSTILE),
    )  # fmt: skip
    stages = (
        broken(StageKey(0, "attn_norm"), Verdict.NONFINITE, comparison=compare(nan, values, 4)),
        broken(StageKey(0, "ffn_norm"), Verdict.SHAPE, trace=describe(nan), oracle=describe(nan)),
        broken(StageKey(0, "attn_out"), Verdict.MISSING, oracle=describe(values)),
        StageReport(StageKey(0, "ffn_out"), None, Verdict.MISSING, HOSTILE),
        broken(StageKey(None, "final_norm"), None, trace=describe(values)),
        broken(StageKey(None, "lm_head"), Verdict.FAIL, comparison=compare(values, nan, 4),
               logits=logits),
    )  # fmt: skip
    return Report(header, (*found.stages, *stages), 1.0)


def on_a_device() -> Report:
    """The CPU's run with a device held against it, whose softmax is wrong."""
    found = found_in("none")
    key = StageKey(0, "attn_norm")
    x, y = np.arange(6, dtype=np.float32), np.full(6, np.nan, np.float32)
    layout = layout_of(key, {"T": 2, "E": 3}, 6)
    parity = (
        StageParity(0, key, layout, compare(x, x, 4), SideJudgment(), SideJudgment(),
                    Verdict.PASS, "equal"),
        StageParity(0, StageKey(0, "ffn_norm"), layout, compare(x, y, 4),
                    SideJudgment(oracle=compare(x, x, 4)), SideJudgment(fault=HOSTILE),
                    Verdict.FAIL, HOSTILE),
        StageParity(0, StageKey(1, "ffn_norm"), None, None, SideJudgment(), SideJudgment(),
                    Verdict.MISSING, "the device has gone"),
    )  # fmt: skip
    header = replace(
        found.header, tested=Side("sound.apr", HOSTILE), trusted=Side("sound.apr", "numpy")
    )
    rejected = PathRejected(HOSTILE, parity[1].key, by_gate=True)
    return replace(
        found, header=header, parity=parity, device=DeviceOpened(HOSTILE, None), rejected=rejected
    )


def reports() -> dict[str, Report]:
    return {
        **{name: found_in(name) for name in ("none", *load_faults())},
        "without model": without_model(),
        "without oracle": without_oracle(),
        "hostile": hostile(),
        "on a device": on_a_device(),
        "two dumps": two_dumps(),
        "empty": Report(replace(found_in("none").header, keys=(), tokens=None), (), 0.0),
    }


NAMES = (
    "none", *load_faults(), "without model", "without oracle", "hostile", "on a device",
    "two dumps", "empty",
)  # fmt: skip


def written(report: Report, suffix: str, folder: Path, **more: Any) -> str:
    path = folder / f"report{suffix}"
    write_report(path, report, **more)
    assert [entry.name for entry in folder.iterdir()] == [path.name]
    return path.read_text("utf-8")


def grid_of(values: Any, nonfinite: Any = 0, **parts: Any) -> Grid:
    x = np.asarray(values, dtype=np.float32)
    lost = np.broadcast_to(np.asarray(nonfinite, dtype=np.int64), x.shape)
    largest = float(np.abs(x).max()) if x.size else 0.0
    told = {"rows": "token", "columns": "dim", "cell_rows": 1, "cell_columns": 1} | parts
    told = {"nonfinite": lost, "nan": lost} | told
    return Grid(MapKind.DIFF, top=0, left=0, values=x, largest=largest, **told)


class Page(HTMLParser):
    """Every element of a page, and that each is closed where it should be."""

    VOID = frozenset({"meta", "input", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}
