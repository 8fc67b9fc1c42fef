"""`TokenizerData` out of a `tokenizer.json` and the files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from aprcore.ground.errors import AprError, TokenizerError, Where
from aprcore.ground.fields import convert, read_object
from aprcore.tokenization.library import LIMIT_BYTES, check_ids, read_text
from aprcore.tokenization.vocabulary import (
    PATTERNS,
    TOKENIZER_NAME,
    UNKNOWN_PATTERN,
    TokenizerData,
    TokenKind,
)


class _Step(msgspec.Struct):
    """A normaliser, pre-tokenizer or post-processor; which keys it has depends on its type."""

    type: str
    normalizers: list[_Step] = []
    pretokenizers: list[_Step] = []
    processors: list[_Step] = []
    pattern: Any = None
    add_prefix_space: bool = False
    prepend_scheme: str = "always"
    single: list[dict[str, Any]] = []

    @property
    def steps(self) -> list[_Step]:
        """Those of a Sequence, or the one that this is."""
        if self.type != "Sequence":
            return [self]
        return [*self.normalizers, *self.pretokenizers, *self.processors]


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Bpe(msgspec.Struct):
    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]  # newer files store pairs
    byte_fallback: bool | None = None
    unk_token: str | None = None


class _Library(msgspec.Struct):
    """What is read of a `tokenizer.json`."""

    model: _Bpe
    added_tokens: list[_AddedToken] | None = None
    normalizer: _Step | None = None
    pre_tokenizer: _Step | None = None
    post_processor: _Step | None = None


def read_tokenizer_json(directory: Path) -> TokenizerData | None:
    """The BPE tokenizer of a directory, or None if it has no `tokenizer.json`.

    Raises:
        TokenizerError: A file is malformed, or the tokenizer is of another kind than BPE.
    """
    path = directory / TOKENIZER_NAME
    if not path.exists():
        return None
    try:
        whole = read_object(path, limit_bytes=LIMIT_BYTES)
        beside = directory / "tokenizer_config.json"
        exists = beside.exists()
        settings = read_object(beside, limit_bytes=LIMIT_BYTES) if exists else {}
    except AprError as error:
        raise TokenizerError(error.what, where=error.where, hint=error.hint) from error
    model = whole.get("model")
    if isinstance(model, dict) and model.get("type", "BPE") != "BPE":
        kind = model["type"]
        raise TokenizerError(f"a model of type {kind!r} is not supported, only BPE", where=path)
    held = convert(whole, _Library, path, error=TokenizerError)
    added = {token.id: token for token in held.added_tokens or []}
    vocabulary = _list_vocabulary(held.model.vocab, added, path)
    ids = {token: token_id for token_id, token in enumerate(vocabulary)}
    sentencepiece = bool(held.model.byte_fallback)
    bos, eos = (_find_special(settings, name, ids) for name in ("bos_token", "eos_token"))
    return TokenizerData(
        vocabulary=vocabulary,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in held.model.merges],
        scores=None,
        model_type="llama" if sentencepiece else "gpt2",
        pre_type=None if sentencepiece else _find_pattern(held.pre_tokenizer),
        token_type=_find_kinds(vocabulary, added, held.model.unk_token),
        bos_token_id=bos,
        eos_token_id=eos,
        add_bos=bos is not None and _adds_token(held.post_processor, vocabulary[bos]),
        chat_template=_find_template(directory, settings),
        add_space_prefix=_adds_space(held) if sentencepiece else None,
    )


def _list_vocabulary(
    vocab: dict[str, int], added: dict[int, _AddedToken], where: Where
) -> list[str]:
    """Tokens by id; an id that no token has becomes "[PAD<id>]", as in GGUF files.

    Raises:
        TokenizerError: There is none, or an id is out of range.
    """
    by_id = {token_id: token for token, token_id in vocab.items()}
    by_id.update({token_id: token.content for token_id, token in added.items()})
    check_ids(by_id, where)
    return [by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(max(by_id) + 1)]


def _find_special(settings: dict[str, Any], name: str, ids: dict[str, int]) -> int | None:
    token = settings.get(name)
    content = token.get("content") if isinstance(token, dict) else token
    return ids.get(content) if isinstance(content, str) else None


def _find_kinds(
    vocabulary: list[str], added: dict[int, _AddedToken], unknown: str | None
) -> list[int]:
    kinds = [TokenKind.BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">")
             else TokenKind.NORMAL for token in vocabulary]  # fmt: skip
    for token_id, token in added.items():
        kinds[token_id] = TokenKind.CONTROL if token.special else TokenKind.USER_DEFINED
        if token.content == unknown:
            kinds[token_id] = TokenKind.UNKNOWN
    return [int(kind) for kind in kinds]


def _find_pattern(pre_tokenizer: _Step | None) -> str:
    """GGUF's name of a pre-tokenizer, told by its regular expression.

    One that is not known gets a name that no reader accepts: a copy of the vocabulary would
    otherwise cut text in another way than the original.
    """
    steps = [] if pre_tokenizer is None else pre_tokenizer.steps
    kinds = [step.type for step in steps]
    if kinds in (["ByteLevel"], ["Digits", "ByteLevel"]) and not steps[-1].add_prefix_space:
        return "gpt-2" if len(kinds) == 1 else "smollm"
    if kinds == ["Split", "ByteLevel"]:
        for name, pattern in PATTERNS.items():
            if pattern is not None and steps[0].pattern == {"Regex": pattern}:
                return name
    return UNKNOWN_PATTERN


def _adds_space(held: _Library) -> bool:
    """Whether a SentencePiece conversion puts a blank in front (by normalizer or Metaspace)."""
    found = [step for step in (held.normalizer, held.pre_tokenizer) if step is not None]
    return any(
        step.type == "Prepend" or (step.type == "Metaspace" and step.prepend_scheme != "never")
        for part in found for step in part.steps
    )  # fmt: skip


def _adds_token(post_processor: _Step | None, token: str) -> bool:
    """Whether a template begins a single text with `token`."""
    for step in [] if post_processor is None else post_processor.steps:
        special = step.single[0].get("SpecialToken") if step.single else None
        if isinstance(special, dict) and special.get("id") == token:
            return True
    return False


def _find_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The chat template; its own file, where there is one, comes first."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None
