"""Makes pictures of a run's tensors when the screen asks for one; called from a worker's thread.

Nothing here touches a widget. What the screen wants is an `Ask`, small and hashable: the picture
that answers it is kept for a while, and comes at once when it is asked for again.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from textual.message import Message

if TYPE_CHECKING:
    from aprcore.network.stages import StageKey
    from aprcore.pictures import TensorPair
    from aprcore.records.report import StageReport
    from aprcore.records.tensor_source import TensorSource

# Pictures kept. The largest is a map of a large terminal: half a megabyte.
PICTURES_KEPT = 48

T = TypeVar("T")


class OpenTensor:
    """The tensor of a stage while its pictures are made.

    Attributes:
        report: What is known of the stage.
        pair: Both sides.
    """

    def __init__(self, report: StageReport, pair: TensorPair) -> None:
        self.report = report
        self.pair = pair
        self._kept: tuple[Hashable, Any] | None = None

    def keep(self, name: Hashable, make: Callable[[], T]) -> T:
        """What was made for the last picture, if it goes by the same name, else what is made now.

        The last one only: what several pictures are made from takes memory.
        """
        if self._kept is None or self._kept[0] != name:
            self._kept = None
            self._kept = name, make()
        found: T = self._kept[1]
        return found


class Ask(ABC):
    """What a view wants of a stage's tensor. A frozen dataclass, of little but numbers."""

    @abstractmethod
    def make(self, tensor: OpenTensor, is_cancelled: Callable[[], bool]) -> Any:
        """The picture that answers it.

        Raises:
            Cancelled: Nobody wants it any more.
        """

    def waits_for(self, before: Ask) -> bool:
        """Whether what is being made is finished first; else it is given up for this."""
        return type(self) is type(before)


@dataclass
class PictureMade(Message):
    """A picture is ready, or cannot be made; perhaps nobody wants it any more."""

    stage: StageKey
    ask: Ask
    picture: Any = None
    error: Exception | None = None


class PictureMaker:
    """Makes the pictures of one run, and keeps the last ones.

    May be used from several threads; one makes a picture at a time.
    """

    def __init__(self, tensors: TensorSource) -> None:
        self._tensors = tensors
        self._made: OrderedDict[tuple[StageKey, Ask], Any] = OrderedDict()
        self._lock = threading.Lock()
        # The last one only: a tensor that was made again from its layer, or read, takes memory.
        self._open: OpenTensor | None = None

    def find(self, stage: StageKey, ask: Ask) -> Any | None:
        """A picture that was made before."""
        picture = self._made.get((stage, ask))
        if picture is not None:
            with suppress(KeyError):  # another thread may have dropped it just now
                self._made.move_to_end((stage, ask))
        return picture

    def make(
        self,
        report: StageReport,
        ask: Ask,
        is_cancelled: Callable[[], bool],
        post: Callable[[Message], Any],
    ) -> None:
        """Make a picture and post it, or why it cannot be made; nothing if it is cancelled."""
        from aprcore.pictures import Cancelled

        made = PictureMade(report.key, ask)
        try:
            with self._lock:
                if is_cancelled():
                    return
                if self._open is None or self._open.report.key != report.key:
                    self._open = None
                    self._open = OpenTensor(report, self._tensors.open(report))
                self._open.report = report
                made.picture = self._made[report.key, ask] = ask.make(self._open, is_cancelled)
                while len(self._made) > PICTURES_KEPT:
                    self._made.popitem(last=False)
        except Cancelled:
            return
        # Anything that escapes would take the terminal down.
        except Exception as error:
            made.error = error
        if not is_cancelled():
            post(made)
