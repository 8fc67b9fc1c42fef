"""The headless table: one line per stage, printed as it is judged."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from aprcore.judging.compare import Comparison
from aprcore.judging.verdict import Judgment, Verdict
from aprcore.records import telling
from aprcore.records.parity import StageParity
from aprcore.records.report import Report, RunEvent, RunHeader, StageReport
from aprtui.drawing import VisibleConsole
from aprtui.text import visible
from aprtui.theme import VARIABLES, mark_of_verdict

# Wide enough for "layer-127/post_attn_residual"; shapes and figures follow in fixed columns.
PATH_WIDTH = 28
SHAPE_WIDTH = 14
FIGURE_WIDTH = 12
JUDGMENT_WIDTH = 16  # "✗2.4e-04/3.3e-04"


class StageTable:
    """Prints a run to stdout. Whole runs of rows that one side lacks become one line."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or VisibleConsole()
        self._missing: list[StageReport] = []
        self._judged = self._replayed = True
        self._has_second = self._on_device = False
        self._waiting: StageReport | None = None

    def take(self, event: RunEvent) -> None:
        """Print what an event of `aprcore.runs.bisect.bisect` says."""
        match event:
            case RunHeader():
                self.open(event)
            case StageReport():
                self._flush_waiting()
                if self._has_second:
                    self._waiting = event
                else:
                    self.add(event)
            case StageParity() if self._waiting is not None:
                stage, self._waiting = self._waiting, None
                self.add(stage, event)
            case Report():
                self._flush_waiting()
                self.close(event)

    def _flush_waiting(self) -> None:
        """Print a stage that the second side has nothing to say to."""
        stage, self._waiting = self._waiting, None
        if stage is not None:
            self.add(stage)

    def open(self, header: RunHeader) -> None:
        """Print what is compared."""
        against = "no oracle" if header.oracle is None else f"{header.oracle.path}"
        self._line(f"trace   {header.trace.path} ({header.trace.label})")
        label = "" if header.oracle is None else f" ({header.oracle.label})"
        self._line(f"oracle  {against}{label}")
        if header.trusted is not None and header.backend is None:
            self._line(f"against {header.trusted.path} ({header.trusted.label})")
        if header.tokens is not None:
            self._line(f"tokens  {_tokens(header)}")
        for note in header.notes:
            self._line(f"note    {note}")
        self._judged = header.oracle is not None
        self._replayed = header.model is not None and header.judged
        names = ["cosine", "cumulative"] if self._judged else ["RMS", "min", "max"]
        judgments = ["kernel L2/bound"] if self._replayed else []
        if self._replayed and self._judged:
            judgments.insert(0, "model L2/bound")
        self._has_second = header.tested is not None
        self._on_device = header.backend is not None
        second = []
        if self._has_second:
            second = ["GPU cosine", "GPU L2"] if self._on_device else ["pair cosine", "pair L2"]
            if self._replayed:
                second.append("GPU kernel" if self._on_device else "other's kernel")
        self._line("")
        self._line(_row("stage", "shape", names, judgments, "verdict", second))

    def add(self, stage: StageReport, parity: StageParity | None = None) -> None:
        """Print one stage, with what the second side shows of it."""
        is_lost = parity is None or parity.verdict is Verdict.MISSING
        if stage.verdict is Verdict.MISSING and is_lost:
            if self._missing and self._missing[-1].reason != stage.reason:
                self._flush_missing()
            self._missing.append(stage)
            return
        self._flush_missing()
        self._print_row(stage, parity)

    def close(self, report: Report) -> None:
        """Print the finding."""
        self._flush_missing()
        self._line("")
        logits = telling.logits_of(report)
        if logits is not None:
            found = logits.comparison
            ours, theirs = (
                _token(token, logits.texts.get(token)) for token in (found.argmax_a, found.argmax_b)
            )
            tie = f", {'a' if found.near_tie else 'not a'} near-tie (gap {found.gap:.3f})"
            verdict = "the same" if found.agree else f"the oracle says {theirs}{tie}"
            self._line(f"next token: {ours}, {verdict}; KL {found.kl:.3g}")
        if report.device is not None:
            self._line(f"device {report.device.label}, driver {report.device.driver}")
        self._line(report.summary())

    def _print_row(self, stage: StageReport, parity: StageParity | None = None) -> None:
        shape = "-" if stage.layout is None else "x".join(map(str, stage.layout.shape))
        lone = stage.trace or stage.oracle
        figures = _pair(stage.comparison) if self._judged else ["-"] * 3
        if stage.comparison is None and lone is not None and not self._judged:
            figures = [f"{x:.4g}" for x in (lone.rms, lone.minimum, lone.maximum)]
        made = [stage.model, stage.kernel] if self._judged else [stage.kernel]
        judgments = [_judgment(judgment) for judgment in made] if self._replayed else []
        second = self._second(parity) if self._has_second else []
        line = Text(_row(visible(stage.key.path), shape, figures, judgments, "", second))
        if stage.verdict is None:
            if lone is not None and lone.nonfinite:
                line.append(f"{lone.nonfinite} non-finite")
        else:
            line.append_text(_verdict(stage.verdict))
            if stage.verdict is not Verdict.PASS:
                line.append(f"  {visible(stage.reason)}")
            if stage.passes_at is not None:
                line.append(f"; passes at {telling.format_tolerance(stage.passes_at)}")
        if parity is not None and parity.verdict is not Verdict.PASS:
            line.append("; GPU " if self._on_device else "; pair ")
            line.append_text(_verdict(parity.verdict))
            line.append(f"  {visible(parity.reason)}")
        self._console.print(line, soft_wrap=True)

    def _second(self, parity: StageParity | None) -> list[str]:
        """The columns of the second side: a pair's figures, and the side's own kernel."""
        if parity is None:
            return ["-"] * (3 if self._replayed else 2)
        side = parity.tested if self._on_device else parity.trusted
        own = [_judgment(side.kernel)] if self._replayed else []
        return [*_pair(parity.comparison), *own]

    def _flush_missing(self) -> None:
        rows, self._missing = self._missing, []
        if len(rows) <= 3:
            for row in rows:
                self._print_row(row)
            return
        first, last = rows[0].key, rows[-1].key
        span = f"{visible(first.path)} … {visible(last.path)}"
        line = Text(f"{span:<{PATH_WIDTH}} {len(rows)} stages  ")
        line.append_text(_verdict(Verdict.MISSING))
        line.append(f"  {visible(rows[0].reason)}")
        self._console.print(line, soft_wrap=True)

    def _line(self, text: str) -> None:
        self._console.print(Text(visible(text, limit=4000)), soft_wrap=True)


def _row(
    path: str, shape: str, figures: Sequence[str], judgments: Sequence[str], verdict: str,
    second: Sequence[str] = (),
) -> str:  # fmt: skip
    columns = [f"{figure:>{FIGURE_WIDTH}}" for figure in figures]
    columns += [f"{judgment:>{JUDGMENT_WIDTH}}" for judgment in judgments]
    columns += [f"{figure:>{FIGURE_WIDTH}}" for figure in second[:2]]
    columns += [f"{judgment:>{JUDGMENT_WIDTH}}" for judgment in second[2:]]
    return f"{path:<{PATH_WIDTH}} {shape:<{SHAPE_WIDTH}} {' '.join(columns)}  {verdict}"


def _judgment(judgment: Judgment | None) -> str:
    """As reports have it, without the spaces: "✓1.2e-07/3.0e-07"."""
    return "-" if judgment is None else telling.judgment_text(judgment).replace(" ", "")


def _pair(found: Comparison | None) -> list[str]:
    """The figures of two sides: cosine and relative L2."""
    if found is None:
        return ["-", "-"]
    cosine, relative_l2 = telling.figures_of(found)
    return [f"{cosine:.7f}", f"{relative_l2:.3e}"]


def _tokens(header: RunHeader) -> str:
    assert header.tokens is not None
    ids = ",".join(map(str, header.tokens))
    if header.token_texts is None:
        return ids
    return f"{ids}  {' '.join(repr(text) for text in header.token_texts)}"


def _token(token: int, text: str | None) -> str:
    return f"{token}" if text is None else f"{token} {text!r}"


def _verdict(verdict: Verdict) -> Text:
    mark = mark_of_verdict(verdict)
    return Text(f"{mark.glyph} {mark.word}", style=VARIABLES[mark.ink])
