"""A tokenizer's data as model files carry it: the vocabulary, how to merge it, what is special.

Source: FORMATS.md, "Metadata keys"; GGUF's `tokenizer.ggml.*`; the `tokenizers` library's JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from aprcore.ground.errors import AprError, TokenizerError, Where
from aprcore.ground.fields import read_object

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_LIMIT_BYTES = 256 * 1024 * 1024

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
        values = _Values(metadata, where, "tokenizer.")
        pre_type = values.text("pre_type")
        architecture = metadata.get("architecture") or metadata.get("model_type")
        if pre_type is None and str(architecture).lower().startswith(("qwen2", "qwen3")):
            pre_type = "qwen2"
        return _read_data(values, "vocabulary", "model_type", pre_type, "token_type",
                          metadata.get("chat_template"))  # fmt: skip

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: Where = None) -> TokenizerData | None:
        """The tokenizer in the key-values of a GGUF file, or None if it has none.

        Raises:
            TokenizerError: A value is malformed.
        """
        values = _Values(metadata, where, "tokenizer.ggml.")
        return _read_data(values, "tokens", "model", values.text("pre"), "token_type",
                          metadata.get("tokenizer.chat_template"))  # fmt: skip

    @classmethod
    def from_huggingface(cls, directory: Path) -> TokenizerData | None:
        """The tokenizer of a Hugging Face directory, or None if it has no `tokenizer.json`.

        Raises:
            TokenizerError: A file is malformed, or the tokenizer is of another kind than BPE.
        """
        from aprcore.tokenization.tokenizer_json import read_tokenizer_json

        if not (directory / TOKENIZER_NAME).exists():
            return None
        try:
            return read_tokenizer_json(directory)
        except TokenizerError:
            raise
        except AprError as error:
            raise TokenizerError(error.what, where=error.where, hint=error.hint) from error

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


@dataclass(frozen=True, slots=True)
class _Values:
    """Typed look-ups under a common prefix."""

    values: Mapping[str, Any]
    where: Where
    prefix: str

    def _find(self, key: str, kind: type, what: str) -> Any:
        value = self.values.get(self.prefix + key)
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if value is not None and not right:
            raise TokenizerError(f"{self.prefix}{key} is not {what}", where=self.where)
        return value

    def text(self, key: str) -> str | None:
        value: str | None = self._find(key, str, "a string")
        return value

    def flag(self, key: str) -> bool | None:
        value: bool | None = self._find(key, bool, "true or false")
        return value

    def token_id(self, key: str, vocab_size: int) -> int | None:
        value: int | None = self._find(key, int, "an integer")
        if value is not None and not 0 <= value < vocab_size:
            raise TokenizerError(
                f"{self.prefix}{key} {value} is outside the vocabulary of {vocab_size}",
                where=self.where,
            )
        return value

    def items(self, key: str, kinds: tuple[type, ...], size: int | None = None) -> list[Any] | None:
        """A list of one kind, of `size` items if that is given; an empty one counts as absent."""
        value: list[Any] | None = self._find(key, list, "a list")
        if not value:
            return None
        if not all(type(item) in kinds for item in value):
            raise TokenizerError(f"{self.prefix}{key} is not a list of {kinds[0].__name__}",
                                 where=self.where)  # fmt: skip
        if size is not None and len(value) != size:
            raise TokenizerError(
                f"{self.prefix}{key} has {len(value)} items for {size} tokens", where=self.where
            )
        return value


def _read_data(
    values: _Values,
    vocabulary_key: str,
    model_key: str,
    pre_type: str | None,
    kind_key: str,
    chat_template: Any,
) -> TokenizerData | None:
    """What `.apr` and GGUF have in common.

    Raises:
        TokenizerError: A value is malformed.
    """
    vocabulary = values.items(vocabulary_key, (str,))
    if vocabulary is None:
        return None
    size = len(vocabulary)
    scores = values.items("scores", (float, int), size)
    return TokenizerData(
        vocabulary=vocabulary,
        merges=values.items("merges", (str,)) or [],
        scores=None if scores is None else [float(score) for score in scores],
        model_type=_find_model_type(values.text(model_key), vocabulary, values.where),
        pre_type=pre_type,
        token_type=values.items(kind_key, (int,), size),
        bos_token_id=values.token_id("bos_token_id", size),
        eos_token_id=values.token_id("eos_token_id", size),
        add_bos=values.flag("add_bos_token"),
        chat_template=chat_template if isinstance(chat_template, str) else None,
        add_space_prefix=values.flag("add_space_prefix"),
    )


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the tokenizer, or an empty object if it does not exist.

    Raises:
        FormatError: It is malformed.
    """
    return read_object(path, limit_bytes=TOKENIZER_LIMIT_BYTES) if path.exists() else {}
