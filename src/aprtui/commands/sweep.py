"""`aprtui sweep`: many bisects as one job list, and where they differ."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprtui.commands.run_options import add_thread_option, whole_number

if TYPE_CHECKING:
    from aprcore.sweep.plan import Sweep
    from aprcore.sweep.results import ResultsFile
    from aprcore.sweep.run import CaseFinished, Runner, SweepFinished

# More processes would rather share one memory than have more of it, and each holds a layer of its
# model in float32; a case uses several processors anyway.
MOST_DEFAULT_JOBS = 4

SUFFIXES = (".md", ".json")

# Names of files must fit.
LINE_LIMIT = 1000

# Of a list of files, a line shows some.
MOST_NAMED = 3

# Cells of a name and of a cause in the table; the report has all of them.
NAME_CELLS, CAUSE_CELLS = 28, 60


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "sweep",
        help="bisect prompts x models x backends x layers, and say where they differ",
        description="Run every case of CASES.toml as a bisect, locally or on a Dask cluster, and"
        " say which first divergence comes with which model, prompt and backend. Results are kept"
        " as they come; the same command line goes on where it was stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "cases", type=Path, metavar="CASES.toml",
        help="[[matrix]] tables with models, oracles, prompts, backends, layers; see docs/sweep.md",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, metavar="RESULTS.jsonl",
        help="where results are kept (default: CASES.results.jsonl beside CASES.toml)",
    )  # fmt: skip
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--resume", action="store_true",
        help="go on from the results that are there (the default); cases whose files changed, and"
        " those that ended in an error, are run again",
    )  # fmt: skip
    group.add_argument("--fresh", action="store_true", help="forget the results that are there")
    parser.add_argument(
        "--jobs", type=whole_number("a positive number", least=1), metavar="N",
        help=f"cases at a time (default: one per processor, at most {MOST_DEFAULT_JOBS})",
    )  # fmt: skip
    add_thread_option(parser)
    parser.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS",
        help="end a case that takes longer, count it as an error and go on with the others; in"
        " place of the 'timeout' of CASES.toml (default: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--scheduler", metavar="tcp://HOST:PORT",
        help="run on the workers of this Dask cluster, which see the same paths or URLs",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, metavar="DIR",
        help="where copies of what is behind a URL stay (default: a directory that goes with the"
        " run)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--report", type=Path, metavar="F", help="write the report as .md or .json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run what is left of a sweep and print its table.

    Returns:
        1 if any case diverges, else 2 if any could not be judged, else 0.

    Raises:
        AprError: The arguments or the list of cases are unusable, or the cluster is.
    """
    from aprcore.ground.errors import PlanError
    from aprcore.ground.whole_file import check_writable
    from aprcore.sweep.plan import read_sweep
    from aprcore.sweep.results import ResultsFile

    if args.scheduler is not None and args.jobs is not None:
        raise PlanError("--jobs is for this machine; the workers of a cluster are as they are",
                        hint="leave one out")  # fmt: skip
    if args.report is not None and args.report.suffix.lower() not in SUFFIXES:
        raise PlanError("cannot tell the kind of report", where=args.report,
                        hint=f"end its name in {' or '.join(SUFFIXES)}")  # fmt: skip
    if args.report is not None:
        check_writable(args.report)
    sweep = read_sweep(args.cases, timeout_s=args.timeout)
    output = args.output or args.cases.with_suffix(".results.jsonl")
    with ResultsFile(output, fresh=args.fresh) as results, _make_runner(args, sweep) as runner:
        finished = _run_to_end(sweep, results, runner)
    if args.report is not None:
        _write_report(args.report, sweep, finished)
    if args.json:
        import json

        from aprcore.sweep.report import to_json

        print(json.dumps(to_json(sweep, finished), indent=1, allow_nan=False))
    else:
        _print_table(finished)
    found = [result for _, result in finished.results]
    if any(result.diverges for result in found):
        return 1
    return 2 if any(result.is_error for result in found) else 0


@contextmanager
def _make_runner(args: argparse.Namespace, sweep: Sweep) -> Iterator[Runner]:
    """What runs the cases; its copies of remote files go with it, unless they are to stay."""
    import logging
    import tempfile

    from aprcore.ground.parallel import available_threads

    kept = None if args.cache is None else args.cache.absolute()
    if args.scheduler is not None:
        from aprcore.sweep.cluster import run_on_cluster

        # What becomes of a lost worker's cases is in the results.
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        # A cluster counts one processor per thread of a worker, and that is one case.
        yield partial(run_on_cluster, scheduler=args.scheduler, cache=kept,
                      threads=args.threads or 1, warn=_say)  # fmt: skip
        return
    from aprcore.sweep.pool import run_locally

    processors = available_threads()
    jobs = min(args.jobs or min(processors, MOST_DEFAULT_JOBS), len(sweep.cases))
    threads = args.threads or max(1, processors // jobs)
    with tempfile.TemporaryDirectory(prefix="aprtui-sweep-") as folder:
        yield partial(run_locally, jobs=jobs, cache=kept or Path(folder), threads=threads)


def _run_to_end(sweep: Sweep, results: ResultsFile, runner: Runner) -> SweepFinished:
    """Run what is left, with a bar on stderr where that is a terminal."""
    from aprcore.records.telling import plural
    from aprcore.sweep.run import CaseFinished, pending_cases, run_sweep

    total = len(sweep.cases)
    kept = total - len(pending_cases(sweep, results))
    if sweep.repeated:
        _say(f"{plural(sweep.repeated, 'case')} asked for once more; each is run once")
    if sweep.unseen:
        more = " ..." if len(sweep.unseen) > MOST_NAMED else ""
        _say(f"cannot be seen from here: {', '.join(sweep.unseen[:MOST_NAMED])}{more}")
    if kept:
        _say(f"{kept} of {total} cases have a result in {results.path}")
    try:
        with _bar(total, kept) as advance, closing(run_sweep(sweep, results, runner)) as events:
            for event in events:
                if not isinstance(event, CaseFinished):
                    return event
                advance(event)
    except BaseException:
        done = total - len(pending_cases(sweep, results))
        if done > kept:
            _say(f"stopped: {done} of {total} cases have a result in {results.path};"
                 " the same command goes on from there")  # fmt: skip
        raise
    raise AssertionError("a sweep ends with its report")


def _say(line: str) -> None:
    import sys

    from aprtui.text import visible

    print(f"aprtui: {visible(line, limit=LINE_LIMIT)}", file=sys.stderr)


@contextmanager
def _bar(total: int, kept: int) -> Iterator[Any]:
    """A bar with the time left; nothing where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from aprtui.drawing import VisibleConsole
    from aprtui.text import visible

    console = VisibleConsole(stderr=True)
    if not console.is_terminal:
        yield lambda event: None
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("sweep", total=total, completed=kept, left="")

        def advance(event: CaseFinished) -> None:
            last = f"{event.result.verdict} {event.case.axes['model']}"
            left = "" if event.left_s is None else f"{format_duration(event.left_s)} left"
            bar.update(task, completed=event.done, left=left,
                       description=visible(last, limit=NAME_CELLS))  # fmt: skip

        yield advance


def format_duration(seconds: float) -> str:
    """A time for people, in two units at most: "42 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds


def _print_table(finished: SweepFinished) -> None:
    """A row per case, then where they differ."""
    from aprcore.sweep.report import cases_table, counts_text, shared_values

    results = finished.results
    named = [f"{axis} {_short(value)}" for axis, value in shared_values(results).items()]
    if named:
        print(f"in every case: {', '.join(named)}\n")
    table = cases_table(results)
    rows = [table.headings]
    for (_, result), (*cells, cause) in zip(results, table.rows):
        # An error's reason is what the user has to act on, and is not cut.
        limit = LINE_LIMIT if result.is_error else CAUSE_CELLS
        rows.append((*map(_short, cells), _short(cause, limit)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [
            cell.rjust(width) if i in table.numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        print("  ".join(cells).rstrip())
    _print_differences(finished)
    print(f"\n{counts_text(results)}")


def _short(text: str, limit: int = NAME_CELLS) -> str:
    from aprtui.text import visible

    return visible(text, limit=limit)


def _print_differences(finished: SweepFinished) -> None:
    from aprcore.records.telling import plural
    from aprcore.sweep.report import find_differences
    from aprtui.text import visible

    findings = find_differences(finished.results)
    if not findings:
        return
    print("\nwhere they differ")
    for finding in findings:
        print(f"  {visible(finding.describe())}  ({plural(len(finding.cases), 'case')})")
        for spread in finding.spreads:
            print(f"    {spread.axis + ':':<9}{spread.describe(_short)}")


def _write_report(path: Path, sweep: Sweep, finished: SweepFinished) -> None:
    """Write the report; nothing is left half written.

    Raises:
        AprError: It cannot be written.
    """
    import json

    from aprcore.ground.whole_file import write_whole
    from aprcore.sweep.report import to_json, to_markdown, without_homes

    if path.suffix.lower() == ".json":
        data = without_homes(to_json(sweep, finished))
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    else:
        text = to_markdown(sweep, finished)
    with write_whole(path) as file:
        file.write(text.encode())
