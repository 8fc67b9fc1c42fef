"""Errors that a user can act on: each says where, what is wrong, and what to do.

A divergence is a result, not an error; an `AprError` means that the arguments or a file are
unusable. The command line prints `str(error)` as one line and exits with 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike

from aprcore.ground.visible import visible

# Characters of an error. Two lists of some thousand token ids must fit: a user compares them.
ERROR_LIMIT = 20_000

Where = str | PathLike[str] | None


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like another, which may be a slip of the hand."""
    import difflib

    # Comparing takes the product of the lengths, and a name may be all of a file.
    return difflib.get_close_matches(name[:100], list(known), n=1, cutoff=0.0)[0]


class AprError(Exception):
    """Something the user gave cannot be used.

    Attributes:
        what: The fault, in one clause without a trailing full stop.
        where: The file or argument at fault.
        hint: What the user can do about it.
    """

    def __init__(self, what: str, *, where: Where = None, hint: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        line = self.what if self.where is None else f"{self.where}: {self.what}"
        if self.hint:
            line = f"{line}; {self.hint}"
        # A file name or a token may carry a line break, an escape or a novel; the promise is one
        # line that prints.
        return visible(" ".join(line.splitlines()), ERROR_LIMIT)


class FormatError(AprError):
    """A file does not follow its format."""

    def __init__(
        self,
        what: str,
        *,
        where: Where = None,
        offset_bytes: int | None = None,
        hint: str | None = None,
    ) -> None:
        self.offset_bytes = offset_bytes
        if offset_bytes is not None:
            what = f"{what} (at byte {offset_bytes})"
        super().__init__(what, where=where, hint=hint)


class TruncatedError(FormatError):
    """A file ends before what its header promises."""


class ChecksumError(FormatError):
    """A stored checksum disagrees with the bytes."""


class UnsupportedError(FormatError):
    """A file is well-formed but uses something that this version does not read."""


class ConfigError(AprError):
    """A model's configuration is missing, contradictory or not supported."""


class WeightError(AprError):
    """A model's tensors are missing, misnamed or misshaped."""


class TokenizerError(AprError):
    """Text cannot be turned into token ids, or ids are out of range."""


class PlanError(AprError):
    """The choice of stages, layers or tokens is malformed."""


class BackendError(AprError):
    """A backend cannot run an operation."""


class OracleError(AprError):
    """The reference cannot be captured or does not belong to this run."""


class TraceError(AprError):
    """A directory of stage tensors cannot be read or written."""
