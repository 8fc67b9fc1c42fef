"""Runs the engine in a worker thread and posts what it finds as messages.

Nothing here touches a widget; `post_message` is what a thread may call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from textual.message import Message

if TYPE_CHECKING:
    from collections.abc import Generator

    from aprcore.records.parity import StageParity
    from aprcore.records.report import (
        CauseSought,
        DeviceOpened,
        PathRejected,
        Report,
        RunEvent,
        RunHeader,
        StageReport,
    )
    from aprcore.records.tensor_source import TensorSource
    from aprcore.runs.request import Request

    Engine = Callable[[Request], Iterator[RunEvent]]
    Post = Callable[[Message], Any]


@dataclass
class RunOpened(Message):
    """The files are open: every row is known and pending.

    Attributes:
        header: What will be judged.
        tensors: Gives the tensors of its stages; whoever takes the message closes it.
    """

    header: RunHeader
    tensors: TensorSource


@dataclass
class StageJudged(Message):
    """A stage has its figures, or its cause is being looked for, or the second side has some."""

    stage: StageReport | StageParity | CauseSought


@dataclass
class DeviceTold(Message):
    """The device of the second side is open, or its path was given up and the CPU carries on."""

    event: DeviceOpened | PathRejected


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
        engine: Yields the events; default: `aprcore.runs.bisect.bisect`.
    """
    try:
        # The engine's own imports (numpy) happen here, after the first screen is painted.
        from aprcore.records import report as records
        from aprcore.runs.tensors import LayerInputs, open_tensors

        kept = LayerInputs()
        if engine is None:
            from aprcore.runs.bisect import bisect

            engine = partial(bisect, kept=kept)
        # Closing the generator ends the run: files are closed and nothing half written remains.
        with closing(cast("Generator[RunEvent]", engine(request))) as events:
            for event in events:
                if is_cancelled():
                    return
                match event:
                    case records.RunHeader():
                        post(RunOpened(event, open_tensors(request, kept)))
                    case records.DeviceOpened() | records.PathRejected():
                        post(DeviceTold(event))
                    case records.Report():
                        post(RunFinished(event))
                    case _:
                        post(StageJudged(event))
    # Anything that escapes would take the terminal down and the partial result with it.
    except Exception as error:
        if not is_cancelled():
            post(RunFailed(error))
