"""A run as it may be passed on to strangers: every path below the home directory begins with "~".

Prompts and the texts of tokens are what was run, and stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

from aprcore.records.environment import as_unicode, without_home
from aprcore.records.report import Report, RunHeader, Side


def shareable(report: Report) -> Report:
    """The report without the user's name in its paths, notes and reasons.

    Whatever is written to be shared is made of this: HTML, Markdown, JSON and .aprx alike.
    """
    device, rejected = report.device, report.rejected
    return replace(
        report,
        header=_header(report.header),
        stages=tuple(replace(s, reason=without_home(s.reason)) for s in report.stages),
        parity=tuple(replace(s, reason=without_home(s.reason)) for s in report.parity),
        # What a driver says of itself and of its errors may name its files.
        device=device and replace(device, label=without_home(device.label)),
        rejected=rejected and replace(rejected, line_reason=without_home(rejected.line_reason)),
    )


def _header(header: RunHeader) -> RunHeader:
    trace = _side(header.trace)
    assert trace is not None
    return replace(
        header,
        trace=trace,
        model=header.model and as_unicode(header.model),
        prompt=header.prompt and as_unicode(header.prompt),
        oracle=_side(header.oracle),
        tested=_side(header.tested),
        trusted=_side(header.trusted),
        notes=tuple(map(without_home, header.notes)),
    )


def _side(side: Side | None) -> Side | None:
    return side and replace(side, path=without_home(side.path))
