"""Runs the engine in a worker thread and posts what it finds as messages.

Nothing here touches a widget; `post_message` is what a thread may call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from textual.message import Message

if TYPE_CHECKING:
    from collections.abc import Generator

    from aprcore.report import Report, RunHeader, StageReport
    from aprcore.request import Request

    Event = RunHeader | StageReport | Report
    Engine = Callable[[Request], Iterator[Event]]
    Post = Callable[[Message], Any]


@dataclass
class RunOpened(Message):
    """The files are open: every row is known and pending."""

    header: RunHeader


@dataclass
class StageJudged(Message):
    """A stage has its figures."""

    report: StageReport


@dataclass
class RunFinished(Message):
    """The last stage has been judged."""

    report: Report


@dataclass
class RunFailed(Message):
    """The run ended early: something given is unusable, or the engine has a bug."""

    error: Exception


def stream_run(
    request: Request,
    post: Post,
    is_cancelled: Callable[[], bool],
    engine: Engine | None = None,
) -> None:
    """Run a request to its end, or until it is cancelled; call it from a thread.

    Args:
        request: What to run.
        post: Takes the messages.
        is_cancelled: Asked after every stage.
        engine: Yields the events; default: `aprcore.bisect.bisect`.
    """
    try:
        # The engine's own imports (numpy) happen here, after the first screen is painted.
        from aprcore.report import Report, RunHeader, StageReport

        if engine is None:
            from aprcore.bisect import bisect

            engine = bisect
        # Closing the generator ends the run: files are closed and nothing half written remains.
        with closing(cast("Generator[Event]", engine(request))) as events:
            for event in events:
                if is_cancelled():
                    return
                match event:
                    case RunHeader():
                        post(RunOpened(event))
                    case StageReport():
                        post(StageJudged(event))
                    case Report():
                        post(RunFinished(event))
    # Anything that escapes would take the terminal down and the partial result with it.
    except Exception as error:
        if not is_cancelled():
            post(RunFailed(error))
