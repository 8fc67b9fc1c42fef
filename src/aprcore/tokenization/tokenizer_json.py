"""`TokenizerData` out of a `tokenizer.json` and the files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aprcore.ground.errors import TokenizerError, Where
from aprcore.tokenization.vocabulary import (
    PATTERNS,
    TOKENIZER_NAME,
    UNKNOWN_PATTERN,
    TokenizerData,
    TokenKind,
    read_json,
)

MAX_TOKEN_ID = 2**24  # a hole of ids up to a larger one would only eat memory


def read_tokenizer_json(directory: Path) -> TokenizerData:
    """The BPE tokenizer of a directory.

    Raises:
        FormatError: A file is no JSON object.
        TokenizerError: It is malformed, or no BPE.
    """
    path = directory / TOKENIZER_NAME
    whole = read_json(path)
    settings = read_json(directory / "tokenizer_config.json")
    model = whole.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise TokenizerError(f"a model of type {kind!r} is not supported, only BPE", where=path)
    added = _read_added(whole.get("added_tokens") or [], path)
    vocabulary = _read_vocabulary(model.get("vocab"), added, path)
    ids = {token: token_id for token_id, token in enumerate(vocabulary)}
    sentencepiece = bool(model.get("byte_fallback"))
    bos, eos = (_find_special(settings, name, ids) for name in ("bos_token", "eos_token"))
    return TokenizerData(
        vocabulary=vocabulary,
        merges=_read_merges(model.get("merges"), path),
        scores=None,
        model_type="llama" if sentencepiece else "gpt2",
        pre_type=None if sentencepiece else _find_pattern(whole.get("pre_tokenizer")),
        token_type=_find_kinds(vocabulary, added, model.get("unk_token")),
        bos_token_id=bos,
        eos_token_id=eos,
        add_bos=bos is not None and _adds_token(whole.get("post_processor"), vocabulary[bos]),
        chat_template=_find_template(directory, settings),
        add_space_prefix=_adds_space(whole) if sentencepiece else None,
    )


def _read_added(entries: Any, where: Where) -> dict[int, tuple[str, bool]]:
    """Added tokens by id: their text, and whether they are special."""
    if not isinstance(entries, list):
        raise TokenizerError("added_tokens is not a list", where=where)
    added = {}
    for entry in entries:
        token_id = entry.get("id") if isinstance(entry, dict) else None
        if type(token_id) is not int or not isinstance(entry.get("content"), str):
            raise TokenizerError(f"added token {entry!r} needs an id and content", where=where)
        added[token_id] = entry["content"], bool(entry.get("special"))
    return added


def _read_vocabulary(vocab: Any, added: dict[int, tuple[str, bool]], where: Where) -> list[str]:
    """Tokens by id; an id that no token has becomes "[PAD<id>]", as in GGUF files.

    Raises:
        TokenizerError: The vocabulary is malformed.
    """
    if not isinstance(vocab, dict) or not all(type(token_id) is int for token_id in vocab.values()):
        raise TokenizerError("model.vocab is not an object of tokens and ids", where=where)
    by_id = {token_id: token for token, token_id in vocab.items()}
    by_id.update({token_id: content for token_id, (content, _) in added.items()})
    if not by_id or min(by_id) < 0 or max(by_id) > MAX_TOKEN_ID:
        raise TokenizerError("model.vocab is empty or has ids out of range", where=where)
    return [by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(max(by_id) + 1)]


def _read_merges(merges: Any, where: Where) -> list[str]:
    """Merges as "left right"; newer files store pairs."""
    if not isinstance(merges, list):
        raise TokenizerError("model.merges is not a list", where=where)
    lines = []
    for merge in merges:
        pair = isinstance(merge, list) and len(merge) == 2 and all(type(m) is str for m in merge)
        if not pair and not isinstance(merge, str):
            raise TokenizerError(f"merge {merge!r} is not two tokens", where=where)
        lines.append(" ".join(merge) if pair else merge)
    return lines


def _find_special(settings: dict[str, Any], name: str, ids: dict[str, int]) -> int | None:
    token = settings.get(name)
    content = token.get("content") if isinstance(token, dict) else token
    return ids.get(content) if isinstance(content, str) else None


def _find_kinds(
    vocabulary: list[str], added: dict[int, tuple[str, bool]], unknown: Any
) -> list[int]:
    kinds = [TokenKind.BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">")
             else TokenKind.NORMAL for token in vocabulary]  # fmt: skip
    for token_id, (content, special) in added.items():
        kinds[token_id] = TokenKind.CONTROL if special else TokenKind.USER_DEFINED
        if content == unknown:
            kinds[token_id] = TokenKind.UNKNOWN
    return [int(kind) for kind in kinds]


def _find_pattern(pre_tokenizer: Any) -> str:
    """GGUF's name of a pre-tokenizer, told by its regular expression.

    One that is not known gets a name that no reader accepts: a copy of the vocabulary would
    otherwise cut text in another way than the original.
    """
    steps = _flatten(pre_tokenizer, "pretokenizers")
    regexes = [step.get("pattern") for step in steps if step["type"] == "Split"]
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["Digits", "ByteLevel"]) and not steps[-1].get("add_prefix_space"):
        return "gpt-2" if len(kinds) == 1 else "smollm"
    for name, pattern in PATTERNS.items():
        if (
            pattern is not None
            and regexes == [{"Regex": pattern}]
            and kinds == ["Split", "ByteLevel"]
        ):
            return name
    return UNKNOWN_PATTERN


def _flatten(step: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a Sequence, or the one step there is."""
    if not isinstance(step, dict) or not isinstance(step.get("type"), str):
        return []
    if step["type"] != "Sequence":
        return [step]
    parts = step.get(key)
    if not isinstance(parts, list):
        return []
    return [part for part in parts if isinstance(part, dict) and isinstance(part.get("type"), str)]


def _adds_space(whole: dict[str, Any]) -> bool:
    """Whether a SentencePiece conversion puts a blank in front (by normalizer or Metaspace)."""
    steps = _flatten(whole.get("normalizer"), "normalizers")
    steps += _flatten(whole.get("pre_tokenizer"), "pretokenizers")
    return any(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _adds_token(post_processor: Any, token: str) -> bool:
    """Whether a template begins a single text with `token`."""
    for step in _flatten(post_processor, "processors"):
        template = step.get("single")
        if isinstance(template, list) and template and isinstance(template[0], dict):
            special = template[0].get("SpecialToken")
            if isinstance(special, dict) and special.get("id") == token:
                return True
    return False


def _find_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The chat template; its own file, where there is one, comes first."""
    path = directory / "chat_template.jinja"
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        template = settings.get("chat_template")
        return template if isinstance(template, str) else None
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"cannot be read: {error}", where=path) from error
