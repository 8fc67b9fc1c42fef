"""A `tokenizer.json` into the `tokenizers` library, without its taking this process along.

On a file that contradicts itself the library panics, which prints over the screen, or aborts,
which ends the process. So a file that has the parts of usual models, in values that they can have,
is given to it as it is; any other is tried in a process of its own first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from aprcore.ground.data_file import read_small
from aprcore.ground.errors import AprError, TokenizerError, Where
from aprcore.tokenization.vocabulary import PATTERNS

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

LIMIT_BYTES = 256 * 1024 * 1024

# Ids may have holes, up to this many and as many as there are tokens: what has an id for each up to
# the highest would only eat memory.
MOST_HOLES = 65_536
LONGEST_ADDED = 1024

# The trial: letters, digits, blanks, signs, and a character of several tokens.
TRIAL_TEXT = "What is 2+2?\n\t  It's 10:45 pm, naïve 東京 \U0001f600 <s>"
TRIAL_S = 5.0  # and a second for each of these many bytes
TRIAL_BYTES_A_SECOND = 1024 * 1024
TRIAL_MEMORY_BYTES, TRIAL_EXPANSION = 512 * 1024 * 1024, 40


def read_text(path: Path) -> str:
    """The text of a `tokenizer.json` or another file of a tokenizer.

    Raises:
        TokenizerError: It cannot be read, is far too large, or is no UTF-8.
    """
    try:
        return read_small(path, LIMIT_BYTES, may_be_empty=True).decode()
    except AprError as error:
        raise TokenizerError(error.what, where=error.where, hint=error.hint) from error
    except UnicodeDecodeError as error:
        raise TokenizerError("is not UTF-8", where=path) from error


def check_ids(ids: Collection[int], where: Where) -> None:
    """Refuse ids that leave holes without end.

    Raises:
        TokenizerError: There is no id, one is negative, or the highest is far beyond their number.
    """
    if not ids or min(ids) < 0:
        raise TokenizerError("model.vocab is empty or has ids out of range", where=where)
    if max(ids) >= 2 * len(ids) + MOST_HOLES:
        raise TokenizerError(
            f"has ids out of range: {len(ids)} tokens have ids up to {max(ids)}", where=where
        )


def check(path: Path) -> str:
    """The text of a file that the library can be given.

    Raises:
        TokenizerError: The file is malformed, or the library cannot work with it.
    """
    text = read_text(path)
    if not _is_usual(text, path):
        _try_apart(path, len(text))
    return text


def load(path: Path) -> Backend:
    """The library's tokenizer of a file.

    Raises:
        TokenizerError: As `check`.
    """
    from tokenizers import Tokenizer as Backend

    text = check(path)
    try:
        return Backend.from_str(text)
    except Exception as error:  # the library raises nothing else
        raise TokenizerError(f"cannot be read as a tokenizer: {error}", where=path) from error


def _try_apart(path: Path, size: int) -> None:
    """Load a file in a process of its own, encode a text and decode it.

    Raises:
        TokenizerError: That process does not come to its end.
    """
    limit_bytes = TRIAL_MEMORY_BYTES + TRIAL_EXPANSION * size
    command = [sys.executable, "-m", __name__, str(path), str(limit_bytes)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    seconds = TRIAL_S + size / TRIAL_BYTES_A_SECOND
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, env=environment,
                              stdin=subprocess.DEVNULL, check=False)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TokenizerError(f"cannot be used as a tokenizer: not within {seconds:.0f} s",
                             where=path) from error  # fmt: skip
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"the library ends with code {done.returncode}"
        raise TokenizerError(f"cannot be read as a tokenizer: {reason}", where=path)


def _trial(path: str, limit_bytes: str) -> int:
    """What `_try_apart` runs."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(limit_bytes), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(Path(path).read_text("utf-8"))
        backend.no_truncation()
        backend.no_padding()
        ids = backend.encode(TRIAL_TEXT).ids
        backend.decode(ids)
        for token in ids:
            backend.id_to_token(token)
    except BaseException as error:  # a panic is one that derives from nothing else
        sys.stderr.write(f"\n{error}".replace("\n", " ").strip() + "\n")
        return 1
    return 0


# What the library reads, as far as usual models have it.


class _Of(msgspec.Struct, tag_field="type", forbid_unknown_fields=True):
    """A part that its type tells from others."""


_Short = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class _String(msgspec.Struct, forbid_unknown_fields=True):
    String: _Short


class _Pattern(msgspec.Struct, forbid_unknown_fields=True):
    Regex: str | None = None
    String: _Short | None = None

    @property
    def is_sound(self) -> bool:
        """Whether it is one of the two, and a regular expression that takes no time."""
        if self.Regex is None:
            return self.String is not None
        return self.String is None and self.Regex in PATTERNS.values()


class _Form(_Of, tag="NFC"):
    pass


class _CompatibilityForm(_Of, tag="NFKC"):
    pass


class _Prepend(_Of, tag="Prepend"):
    prepend: _Short


class _Replace(_Of, tag="Replace"):
    pattern: _String
    content: Annotated[str, msgspec.Meta(max_length=64)]


class _Normalizers(_Of, tag="Sequence"):
    normalizers: list[_Form | _CompatibilityForm | _Prepend | _Replace]


class _ByteLevel(_Of, tag="ByteLevel"):
    add_prefix_space: bool = True
    trim_offsets: bool = True
    use_regex: bool = True


class _Digits(_Of, tag="Digits"):
    individual_digits: bool = False


class _Metaspace(_Of, tag="Metaspace"):
    replacement: Annotated[str, msgspec.Meta(min_length=1, max_length=1)] = "▁"
    prepend_scheme: Literal["always", "never", "first"] = "always"
    split: bool = True
    add_prefix_space: bool | None = None


class _Split(_Of, tag="Split"):
    pattern: _Pattern
    behavior: Literal[
        "Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"
    ]  # fmt: skip
    invert: bool = False


class _PreTokenizers(_Of, tag="Sequence"):
    pretokenizers: list[_ByteLevel | _Digits | _Metaspace | _Split]


class _Place(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    type_id: Literal[0, 1]


class _Piece(msgspec.Struct, forbid_unknown_fields=True):
    Sequence: _Place | None = None
    SpecialToken: _Place | None = None


class _Special(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    ids: list[int]
    tokens: list[str]


class _Template(_Of, tag="TemplateProcessing"):
    single: list[_Piece]
    pair: list[_Piece]
    special_tokens: dict[str, _Special]

    @property
    def is_sound(self) -> bool:
        """Whether each piece is one of the texts that are there, or a token that is listed."""
        listed = all(name == token.id and len(token.ids) == len(token.tokens) > 0
                     for name, token in self.special_tokens.items())  # fmt: skip
        return listed and self._has(self.single, ["A"]) and self._has(self.pair, ["A", "B"])

    def _has(self, pieces: list[_Piece], texts: list[str]) -> bool:
        found = [piece.Sequence.id for piece in pieces if piece.Sequence is not None]
        tokens = [piece.SpecialToken for piece in pieces if piece.Sequence is None]
        both = any(p.Sequence is not None and p.SpecialToken is not None for p in pieces)
        known = all(t is not None and t.id in self.special_tokens for t in tokens)
        return found == texts and known and not both


class _Processors(_Of, tag="Sequence"):
    processors: list[_ByteLevel | _Template]


class _ByteFallback(_Of, tag="ByteFallback"):
    pass


class _Fuse(_Of, tag="Fuse"):
    pass


class _Strip(_Of, tag="Strip"):
    content: Literal[" ", "▁"]
    start: Literal[0, 1]
    stop: Literal[0, 1]


class _Decoders(_Of, tag="Sequence"):
    decoders: list[_Replace | _ByteFallback | _Fuse | _Strip | _ByteLevel | _Metaspace]


_Id = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class _Bpe(_Of, tag="BPE"):
    vocab: dict[str, _Id]
    merges: list[str | tuple[str, str]]
    dropout: None = None
    unk_token: str | None = None
    continuing_subword_prefix: Literal[""] | None = None
    end_of_word_suffix: Literal[""] | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class _AddedToken(msgspec.Struct, forbid_unknown_fields=True):
    id: _Id
    content: Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_ADDED)]
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


class _Usual(msgspec.Struct, forbid_unknown_fields=True):
    model: _Bpe
    version: Literal["1.0"]
    truncation: None = None
    padding: None = None
    added_tokens: list[_AddedToken] = []
    normalizer: _Form | _CompatibilityForm | _Prepend | _Replace | _Normalizers | None = None
    pre_tokenizer: _ByteLevel | _Digits | _Metaspace | _Split | _PreTokenizers | None = None
    post_processor: _ByteLevel | _Template | _Processors | None = None
    decoder: (
        _Replace | _ByteFallback | _Fuse | _Strip | _ByteLevel | _Metaspace | _Decoders | None
    ) = None


def _is_usual(text: str, where: Where) -> bool:
    """Whether a file has the parts of usual models, in values that the library can work with.

    Raises:
        TokenizerError: Its ids have holes without end.
    """
    try:
        held = msgspec.json.decode(text, type=_Usual)
    except (msgspec.MsgspecError, RecursionError):
        return False
    ids = {*held.model.vocab.values(), *(token.id for token in held.added_tokens)}
    check_ids(ids, where)
    before, after = held.pre_tokenizer, held.post_processor
    steps = before.pretokenizers if isinstance(before, _PreTokenizers) else [before]
    ends = after.processors if isinstance(after, _Processors) else [after]
    unknown = held.model.unk_token
    return (
        len(set(held.model.vocab.values())) == len(held.model.vocab)
        and (unknown is None or unknown in held.model.vocab)
        and all(s.pattern.is_sound for s in steps if isinstance(s, _Split))
        and all(end.is_sound for end in ends if isinstance(end, _Template))
    )


if __name__ == "__main__":
    sys.exit(_trial(*sys.argv[1:]))
