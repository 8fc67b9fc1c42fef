"""A tokenizer's data as model files carry it: the vocabulary, how to merge it, what is special.

Source: docs/formats.md, "Models"; GGUF's `tokenizer.ggml.*`; the `tokenizers` library's JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import msgspec

from aprcore.ground.errors import TokenizerError, Where
from aprcore.ground.fields import convert

TOKENIZER_NAME = "tokenizer.json"

UNKNOWN_PATTERN = "unknown"

# How text is cut before merging, by GGUF's name; None is the pattern inside the library's
# ByteLevel (GPT-2's). Source: llama.cpp's `llm_tokenizer_bpe` and the models' tokenizer.json.
PATTERNS: Mapping[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

# A file that names no pattern, or "default", means GPT-2's: llama.cpp's own default.
_PATTERN_ALIASES = {"": "gpt-2", "default": "gpt-2", "gpt2": "gpt-2", "llama3": "llama-bpe",
                    "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}  # fmt: skip

# Models whose files may lack the pattern's name.
_QWEN = ("qwen2", "qwen3")

_SENTENCEPIECE_TYPES = frozenset({"llama", "spm", "sentencepiece"})
_BYTE_LEVEL_TYPES = frozenset({"gpt2", "bpe", "bytelevel", "byte_level", "byte-level"})


class TokenKind(IntEnum):
    """GGUF's and SentencePiece's kinds of token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class TokenizerData:
    """A tokenizer as plain data.

    Attributes:
        vocabulary: Tokens by id, as stored ("Ġthe", "▁the", "<0x0A>").
        merges: "left right", in order of rank; may be empty where there are scores.
        scores: SentencePiece's score of each token.
        model_type: GGUF's name: "gpt2" (byte-level BPE) or "llama" (SentencePiece's BPE).
        pre_type: GGUF's name of the pattern that cuts text, for byte-level BPE.
        token_type: `TokenKind` of each token.
        bos_token_id, eos_token_id: Beginning and end of a text.
        add_bos: Whether encoding puts the former in front; None leaves it to the kind.
        chat_template: Jinja source.
        add_space_prefix: Whether SentencePiece puts a blank in front; None means yes.
    """

    vocabulary: list[str]
    merges: list[str]
    scores: list[float] | None
    model_type: str
    pre_type: str | None = None
    token_type: list[int] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    add_bos: bool | None = None
    chat_template: str | None = None
    add_space_prefix: bool | None = None

    @property
    def is_sentencepiece(self) -> bool:
        """Whether this is SentencePiece's BPE rather than a byte-level one."""
        return self.model_type == "llama"

    @property
    def adds_bos(self) -> bool:
        """Whether encoding puts the beginning-of-text token in front.

        Source: llama.cpp, which does so for SentencePiece and Llama 3 unless the file says.
        """
        if self.add_bos is not None:
            return self.add_bos
        pattern = _PATTERN_ALIASES.get(self.pre_type or "", self.pre_type)
        return self.is_sentencepiece or pattern == "llama-bpe"

    def kind_of(self, token_id: int) -> int:
        """The `TokenKind` of a token."""
        if self.token_type is not None:
            return _KINDS.get(self.token_type[token_id], TokenKind.NORMAL)
        if token_id in (self.bos_token_id, self.eos_token_id):
            return TokenKind.CONTROL
        unknown = self.is_sentencepiece and self.vocabulary[token_id] == "<unk>"
        return TokenKind.UNKNOWN if unknown else TokenKind.NORMAL

    def find_kind(self, kind: TokenKind) -> int | None:
        """The first token of a kind."""
        ids = range(len(self.vocabulary))
        return next((token_id for token_id in ids if self.kind_of(token_id) == kind), None)

    @classmethod
    def from_apr_metadata(
        cls, metadata: Mapping[str, Any], where: Where = None
    ) -> TokenizerData | None:
        """The tokenizer in the metadata of a `.apr` file, or None if it has none.

        Raises:
            TokenizerError: A value is malformed.
        """
        held = _read_stored(_TokenizerKeys, metadata, "tokenizer.", where)
        architecture = str(metadata.get("architecture") or metadata.get("model_type")).lower()
        if held is not None and held.pre_type is None and architecture.startswith(_QWEN):
            held.pre_type = "qwen2"
        return None if held is None else held.to_data(metadata.get("chat_template"), where)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: Where = None) -> TokenizerData | None:
        """The tokenizer in the key-values of a GGUF file, or None if it has none.

        Raises:
            TokenizerError: A value is malformed.
        """
        held = _read_stored(_GgufKeys, metadata, "tokenizer.ggml.", where)
        template = metadata.get("tokenizer.chat_template")
        return None if held is None else held.to_data(template, where)

    def to_apr_metadata(self) -> dict[str, Any]:
        """The keys of a `.apr` file's metadata; those without a value are left out."""
        values = {
            "tokenizer.vocabulary": self.vocabulary,
            "tokenizer.merges": self.merges,
            "tokenizer.scores": self.scores,
            "tokenizer.model_type": self.model_type,
            "tokenizer.pre_type": self.pre_type,
            "tokenizer.token_type": self.token_type,
            "tokenizer.bos_token_id": self.bos_token_id,
            "tokenizer.eos_token_id": self.eos_token_id,
            "tokenizer.add_bos_token": self.add_bos,
            "tokenizer.add_space_prefix": self.add_space_prefix,
            "chat_template": self.chat_template,
        }
        return {key: value for key, value in values.items() if value is not None}


_KINDS: Mapping[int, TokenKind] = {int(kind): kind for kind in TokenKind}


def bpe_pattern(pre_type: str | None, where: Where = None) -> str:
    """The key in `PATTERNS` of a file's `pre_type`.

    Raises:
        TokenizerError: It is not known. Guessing would give ids that differ from the model's.
    """
    name = _PATTERN_ALIASES.get(pre_type or "", pre_type or "")
    if name not in PATTERNS:
        raise TokenizerError(f"the pre-tokenizer {pre_type!r} is not supported", where=where,
                             hint=f"put the model's {TOKENIZER_NAME} beside it")  # fmt: skip
    return name


class _TokenizerKeys(msgspec.Struct):
    """The keys of a `.apr` file, below "tokenizer."."""

    vocabulary: list[str] = []
    merges: list[str] = []
    scores: list[float] | None = None
    model_type: str | None = None
    pre_type: str | None = None
    token_type: list[int] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    add_bos_token: bool | None = None
    add_space_prefix: bool | None = None

    def to_data(self, chat_template: Any, where: Where) -> TokenizerData:
        """The tokenizer.

        Raises:
            TokenizerError: It is of another kind than BPE.
        """
        return TokenizerData(
            vocabulary=self.vocabulary,
            merges=self.merges,
            scores=self.scores or None,
            model_type=_find_model_type(self.model_type, self.vocabulary, where),
            pre_type=self.pre_type,
            token_type=self.token_type or None,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            add_bos=self.add_bos_token,
            chat_template=chat_template if isinstance(chat_template, str) else None,
            add_space_prefix=self.add_space_prefix,
        )


class _GgufKeys(
    _TokenizerKeys, rename={"vocabulary": "tokens", "model_type": "model", "pre_type": "pre"}
):
    """The keys of a GGUF file, below "tokenizer.ggml."."""

    # Renaming is for a class's own fields, not for those of its base.
    vocabulary: list[str] = []
    model_type: str | None = None
    pre_type: str | None = None


def _read_stored(
    schema: type[_TokenizerKeys], metadata: Mapping[str, Any], prefix: str, where: Where
) -> _TokenizerKeys | None:
    """A tokenizer's keys, null counting as absent; None if there is no vocabulary.

    Raises:
        TokenizerError: A value is malformed.
    """
    values = {key.removeprefix(prefix): value for key, value in metadata.items()
              if key.startswith(prefix) and value is not None}  # fmt: skip
    held = convert(values, schema, where, prefix=prefix, error=TokenizerError)
    size = len(held.vocabulary)
    for key, items in (("scores", held.scores), ("token_type", held.token_type)):
        if items and size and len(items) != size:
            raise TokenizerError(f"{prefix}{key} has {len(items)} items for {size} tokens",
                                 where=where)  # fmt: skip
    for key, token in (("bos_token_id", held.bos_token_id), ("eos_token_id", held.eos_token_id)):
        if token is not None and size and not 0 <= token < size:
            raise TokenizerError(f"{prefix}{key} {token} is outside the vocabulary of {size}",
                                 where=where)  # fmt: skip
    return held if size else None


def _find_model_type(named: str | None, vocabulary: list[str], where: Where) -> str:
    """GGUF's name of the kind of model, told by its byte tokens where the file is silent.

    Raises:
        TokenizerError: It is of another kind (Unigram, WordPiece).
    """
    if named is None:
        return "llama" if "<0x0A>" in vocabulary else "gpt2"
    if named.lower() in _SENTENCEPIECE_TYPES:
        return "llama"
    if named.lower() in _BYTE_LEVEL_TYPES:
        return "gpt2"
    raise TokenizerError(f"tokenizer of type {named!r} is not supported", where=where,
                         hint=f"put the model's {TOKENIZER_NAME} beside it")  # fmt: skip
