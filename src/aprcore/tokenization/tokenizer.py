"""Text to token ids and back, through the `tokenizers` library.

A model brings either a `tokenizer.json`, which is used as it is, or a bare vocabulary inside its
own file (`TokenizerData`), from which an equivalent tokenizer is built.

Source: docs/formats.md, "Models"; GGUF's specification; the pre-tokenizers as in llama.cpp's
`llm_tokenizer_bpe`; the SentencePiece conversion as in transformers' `LlamaConverter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from aprcore.ground.errors import AprError, TokenizerError, Where
from aprcore.tokenization.library import load
from aprcore.tokenization.vocabulary import PATTERNS, TokenizerData, TokenKind, bpe_pattern

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["Tokenizer", "TokenizerData", "check_token_ids"]

SPACE_MARK = "▁"  # U+2581, SentencePiece's space

# SentencePiece makes tokens of 16 characters at most, if nobody says otherwise; Gemma's blanks are
# 31. A token of n characters may be put together in n ways, and for each both parts are kept.
LONGEST_MERGED = 256
# Ways for each token; Llama 2 has two.
MOST_MERGES = 16

# Models of these pre-tokenizers take a whole piece that is in the vocabulary as it is, without
# walking through the merges.
_IGNORE_MERGES = frozenset({"llama-bpe", "tekken"})


class Tokenizer:
    """Turns text into the ids that the model's own tokenizer gives, and ids into readable text."""

    def __init__(
        self,
        backend: Backend,
        *,
        where: Where = None,
        before: Sequence[int] = (),
        vocabulary: Sequence[str] | None = None,
    ) -> None:
        """Wrap a tokenizer of the `tokenizers` library.

        Args:
            backend: The library's tokenizer.
            where: The file it came from, for errors.
            before: Ids in front of every text, besides those that the backend itself adds.
            vocabulary: Every token by id, where the backend cannot tell (padding, duplicates).
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._where = where
        self._before = list(before)
        self._vocabulary = vocabulary
        self._byte_level = "ByteLevel" in repr(backend.decoder)
        self._verbatim = frozenset(backend.get_added_tokens_decoder())

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """The tokenizer of a `tokenizer.json`, with the special tokens that the file itself adds.

        transformers ignores `add_bos_token` of `tokenizer_config.json` where there is a
        `tokenizer.json`, so nothing else is read.

        Raises:
            TokenizerError: The file is missing or malformed.
        """
        backend = load(path)
        with _as_tokenizer_error("cannot be read as a tokenizer", path):
            return cls(backend, where=path)

    @classmethod
    def from_data(cls, data: TokenizerData, where: Where = None) -> Tokenizer:
        """A tokenizer from a bare vocabulary.

        Raises:
            TokenizerError: The vocabulary is malformed, or of a kind that is not supported.
        """
        with _as_tokenizer_error("the embedded tokenizer is malformed", where):
            build = _build_sentencepiece if data.is_sentencepiece else _build_byte_level
            backend = build(data, where)
            _add_special_tokens(backend, data)
            before = [data.bos_token_id] if data.adds_bos and data.bos_token_id is not None else []
            return cls(backend, where=where, before=before, vocabulary=data.vocabulary)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        if self._vocabulary is not None:
            return len(self._vocabulary)
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model's tokenizer adds.

        Raises:
            TokenizerError: The text is not valid Unicode.
        """
        with _as_tokenizer_error(f"cannot encode {text!r}", self._where):
            return self._before + list(self._backend.encode(text).ids)

    def token_text(self, token_id: int) -> str:
        """A token as text for display; bytes that are no character on their own as \\xNN."""
        return self.token_bytes(token_id).decode(errors="backslashreplace")

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, in UTF-8; a character may come in several tokens."""
        token = self._find_token(token_id)
        if token is None:
            return f"<token {token_id}>".encode()
        if not self._byte_level:
            byte = _byte_token(token)
            if byte is not None and token_id not in self._verbatim:
                return bytes([byte])
            token = token if token_id in self._verbatim else token.replace(SPACE_MARK, " ")
        elif token_id not in self._verbatim:
            table = _byte_level_table()
            if all(char in table for char in token):
                return bytes(table[char] for char in token)
        return token.encode(errors="backslashreplace")

    def _find_token(self, token_id: int) -> str | None:
        if not 0 <= token_id < 2**32:
            return None
        if self._vocabulary is not None:
            return self._vocabulary[token_id] if token_id < len(self._vocabulary) else None
        token: str | None = self._backend.id_to_token(token_id)
        return token


def check_token_ids(tokens: Iterable[int], vocab_size: int) -> None:
    """Refuse ids that a model cannot look up.

    Raises:
        TokenizerError: There is no token, or one is outside the vocabulary.
    """
    count = 0
    for token in tokens:
        count += 1
        if not 0 <= token < vocab_size:
            raise TokenizerError(f"token id {token} is outside the vocabulary of {vocab_size}")
    if not count:
        raise TokenizerError("there are no tokens to run", hint="the prompt must not be empty")


@contextmanager
def _as_tokenizer_error(what: str, where: Where) -> Iterator[None]:
    """Whatever the library raises on malformed data, as one of our errors.

    It raises plain `Exception`, and where its Rust code panics a `BaseException` of its own.
    """
    try:
        yield
    except (AprError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise TokenizerError(f"{what}: {error}", where=where) from error


def _build_byte_level(data: TokenizerData, where: Where) -> Backend:
    """Byte-level BPE, as of GPT-2, with the pattern that `pre_type` names."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    name = bpe_pattern(data.pre_type, where)
    backend = Backend(BPE(
        vocab=_ids_by_token(data), merges=_split_merges(data, where),
        ignore_merges=name in _IGNORE_MERGES,
    ))  # fmt: skip
    pattern = PATTERNS[name]
    steps: list[pre_tokenizers.PreTokenizer]
    if pattern is None:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    else:
        steps = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    if name == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _build_sentencepiece(data: TokenizerData, where: Where) -> Backend:
    """SentencePiece's BPE: characters, merged by score, with bytes for what is not in the list."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, normalizers
    from tokenizers.models import BPE

    ids = _ids_by_token(data)
    if data.merges:
        merges = _split_merges(data, where)
    elif data.scores is not None:
        merges = _merges_from_scores(data, ids, where)
    else:
        raise TokenizerError("the tokenizer has neither scores nor merges", where=where)
    unknown = data.find_kind(TokenKind.UNKNOWN)
    backend = Backend(BPE(
        vocab=ids, merges=merges, fuse_unk=True, byte_fallback=True,
        unk_token=None if unknown is None else data.vocabulary[unknown],
    ))  # fmt: skip
    prefix = data.add_space_prefix is not False
    backend.normalizer = normalizers.Sequence([
        *([normalizers.Prepend(SPACE_MARK)] if prefix else []),
        normalizers.Replace(" ", SPACE_MARK),
    ])  # fmt: skip
    backend.decoder = decoders.Sequence([
        decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(content=" ", left=1)] if prefix else []),
    ])  # fmt: skip
    return backend


def _ids_by_token(data: TokenizerData) -> dict[str, int]:
    """Ids by token; of equal tokens the first, as in llama.cpp."""
    ids: dict[str, int] = {}
    for token_id, token in enumerate(data.vocabulary):
        ids.setdefault(token, token_id)
    return ids


def _split_merges(data: TokenizerData, where: Where) -> list[tuple[str, str]]:
    """Merges as pairs.

    Raises:
        TokenizerError: One is not two tokens with a blank between them.
    """
    pairs = []
    for merge in data.merges:
        # A piece may itself begin with a blank in a vocabulary that is not byte-level.
        left, _, right = merge[1:].partition(" ")
        if not right:
            raise TokenizerError(f"merge {merge!r} is not two tokens", where=where)
        pairs.append((merge[0] + left, right))
    return pairs


def _merges_from_scores(
    data: TokenizerData, ids: dict[str, int], where: Where
) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best score first.

    Source: transformers' `generate_merges`, ties included.

    Raises:
        TokenizerError: A token is longer, or there are more of them, than any text has.
    """
    assert data.scores is not None
    found: list[tuple[float, int, int, str, str]] = []
    for token, token_id in ids.items():
        if data.kind_of(token_id) in (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.BYTE):
            continue
        if len(token) > LONGEST_MERGED:
            raise TokenizerError(f"token {token_id} has {len(token)} characters; merged are at most"
                                 f" {LONGEST_MERGED}", where=where)  # fmt: skip
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        splits = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        splits.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        score = data.scores[token_id]
        found += [(score, len(left), len(right), left, right) for left, right in splits]
        if len(found) > MOST_MERGES * (len(ids) + 64):
            raise TokenizerError(f"its tokens can be merged in more than {len(found)} ways",
                                 where=where)  # fmt: skip
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in found]


def _add_special_tokens(backend: Backend, data: TokenizerData) -> None:
    """Let control and user-defined tokens be recognised in text, as a chat template writes them."""
    from tokenizers import AddedToken

    for kind in (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED):
        special = kind is not TokenKind.USER_DEFINED
        tokens = [
            AddedToken(token, normalized=False, special=special)
            for token_id, token in enumerate(data.vocabulary)
            if token and data.kind_of(token_id) is kind
        ]
        if special:
            backend.add_special_tokens(tokens)
        else:
            backend.add_tokens(tokens)


def _byte_token(token: str) -> int | None:
    """The byte of SentencePiece's "<0x0A>", or None for any other token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


@cache
def _byte_level_table() -> dict[str, int]:
    """The byte of each character of byte-level BPE. Source: GPT-2's `bytes_to_unicode`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]  # fmt: skip
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table
