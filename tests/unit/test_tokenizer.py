"""Tokenizers from `tokenizer.json` and from bare vocabularies, against transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprcore.ground.errors import AprError, TokenizerError
from aprcore.tokenization.tokenizer import Tokenizer, TokenizerData, check_token_ids
from aprcore.tokenization.tokenizer_json import read_tokenizer_json
from aprcore.tokenization.vocabulary import PATTERNS

CORPUS = [
    "Once upon a time there was a dog. It's 12345 o'clock, isn't it? We'll see!",
    "def f(x):\n    return x + 1\n\n\n  # naïve café – 你好 🙂",
    "the the there then 2024 3.14159 ... !!! \t\ttabs",
] * 3

TEXTS = ["Once upon a time", "It's 12345!", "  two  blanks ", "naïve 你好 🙂", "a\n\n b", "",
         "<|im_start|>user\nhi<|im_end|>", "e\u0301", "don't DON'T"]  # fmt: skip


def train(pattern: str, *, bos: bool = False) -> Any:
    """A small byte-level tokenizer as the models of that pattern have it."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    backend = Tokenizer(models.BPE())
    if PATTERNS[pattern] is None:
        step: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if pattern == "smollm":
            step = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), step])
        backend.pre_tokenizer = step
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    if pattern == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    marks = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
        )
    return backend


def save(folder: Path, backend: Any, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>",
                "eos_token": "<|im_end|>", **settings}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("bos", [False, True])
def test_ids_are_those_of_transformers(tmp_path: Path, pattern: str, bos: bool) -> None:
    from transformers import AutoTokenizer

    # The setting contradicts the file on purpose: transformers follows the file.
    folder = save(tmp_path / "m", train(pattern, bos=bos), add_bos_token=not bos)
    theirs = AutoTokenizer.from_pretrained(folder)
    from_file = Tokenizer.from_file(folder / "tokenizer.json")
    data = read_tokenizer_json(folder)
    assert data is not None and (data.pre_type, data.add_bos) == (pattern, bos)
    stored = json.loads(json.dumps(data.to_apr_metadata()))
    again = TokenizerData.from_apr_metadata(stored)
    assert again == data
    from_data = Tokenizer.from_data(again)
    for text in [*CORPUS, *TEXTS]:
        expected = theirs(text)["input_ids"]
        assert from_file.encode(text) == expected
        assert from_data.encode(text) == expected
    assert from_file.vocab_size == from_data.vocab_size == len(theirs)


def test_patterns_cut_differently() -> None:
    """Else the test above would pass with any one of them."""
    text = "DON'T 123 \n a/b!/ camelCase"
    cuts = {tuple(train(pattern).pre_tokenizer.pre_tokenize_str(text)) for pattern in PATTERNS}
    assert len(cuts) == len(PATTERNS)


def test_an_unknown_pattern_is_not_guessed(tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    backend = train("gpt-2")
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("x+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    data = read_tokenizer_json(save(tmp_path / "m", backend))
    assert data is not None
    with pytest.raises(TokenizerError, match="pre-tokenizer 'unknown'"):
        Tokenizer.from_data(data, "m.apr")


def test_token_texts() -> None:
    byte_level = Tokenizer(train("qwen2"))
    ids = byte_level.encode("the café\n")
    assert "".join(byte_level.token_text(token) for token in ids) == "the café\n"
    assert byte_level.token_text(byte_level.encode("<|im_end|>")[0]) == "<|im_end|>"
    first = byte_level.encode("龍")[0]
    assert byte_level.token_text(first).startswith("\\x")
    for unknown in (-1, 10**6, 2**40):
        assert byte_level.token_text(unknown) == f"<token {unknown}>"


SPM_VOCABULARY = [
    "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁", "o", "n", "c", "e", "a", "t", "on", "▁on", "ce", "▁once", "▁a", "at", "▁t", "one",
]  # fmt: skip
SPM_SCORES = [0.0] * 259 + [-50.0] * 7 + [-1.0, -3.0, -2.0, -6.0, -4.0, -5.0, -7.0, -0.5]
SPM = TokenizerData(SPM_VOCABULARY, [], SPM_SCORES, "llama", bos_token_id=1, eos_token_id=2,
                    token_type=[2, 3, 3] + [6] * 256 + [1] * 15)  # fmt: skip


def spm_pieces(text: str) -> list[str]:
    """SentencePiece's algorithm: merge the neighbours whose union has the best score."""
    scores = dict(zip(SPM_VOCABULARY, SPM_SCORES, strict=True))
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces))
                 if a + b in scores]  # fmt: skip
        if not pairs:
            return pieces
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@pytest.mark.parametrize("text", ["once", "once a cat tone", "on one", "  ", "attached ée", "a"])
def test_scores_merge_as_in_sentencepiece(text: str) -> None:
    tokenizer = Tokenizer.from_data(SPM)
    expected = [1]
    for piece in spm_pieces(text):
        known = piece in SPM_VOCABULARY
        names = [piece] if known else [f"<0x{byte:02X}>" for byte in piece.encode()]
        expected += [SPM_VOCABULARY.index(name) for name in names]
    assert tokenizer.encode(text) == expected
    # The best score wins, not the longest piece or the first pair.
    assert spm_pieces("one") == ["▁", "one"]


def test_sentencepiece_switches_and_texts() -> None:
    once = SPM_VOCABULARY.index("▁once")
    assert Tokenizer.from_data(replace(SPM, add_bos=False)).encode("a")[0] != 1
    assert Tokenizer.from_data(replace(SPM, add_space_prefix=False)).encode("c") == [
        1, SPM_VOCABULARY.index("c"),
    ]  # fmt: skip
    tokenizer = Tokenizer.from_data(SPM)
    assert [tokenizer.token_text(i) for i in (1, once, 13, 255)] == ["<s>", " once", "\n", "\\xfc"]
    assert tokenizer.encode("a</s>")[-1] == 2


def test_gguf_keys() -> None:
    keys = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"], "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3], "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "{{ x }}",
    }  # fmt: skip
    data = TokenizerData.from_gguf(keys, "m.gguf")
    assert data == TokenizerData(["a", "b", "ab", "<e>"], ["a b"], None, "gpt2", "qwen2",
                                 [1, 1, 1, 3], None, 3, False, "{{ x }}")  # fmt: skip
    assert data is not None and Tokenizer.from_data(data).encode("ab<e>b") == [2, 3, 1]
    assert TokenizerData.from_gguf({}) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocabulary": "abc"}, "tokenizer.vocabulary is 'abc', not a list"),
        ({"vocabulary": ["a", 3]}, "tokenizer.vocabulary[1] is 3, not a text"),
        ({"merges": ["ab"]}, "merge 'ab' is not two tokens"),
        ({"merges": [""]}, "merge '' is not two tokens"),
        ({"merges": ["a zz"]}, "malformed"),
        ({"token_type": [1]}, "tokenizer.token_type has 1 items for 3 tokens"),
        ({"bos_token_id": 3}, "tokenizer.bos_token_id 3 is outside the vocabulary of 3"),
        ({"eos_token_id": "x"}, "tokenizer.eos_token_id is 'x', not an integer"),
        ({"model_type": "unigram"}, "'unigram' is not supported"),
        ({"pre_type": "gibberish"}, "'gibberish' is not supported"),
        ({"model_type": "llama", "merges": []}, "neither scores nor merges"),
    ],
)
def test_malformed_metadata_names_the_file(changes: dict[str, Any], said: str) -> None:
    values = {"vocabulary": ["a", "b", "ab"], "merges": ["a b"], "model_type": "gpt2", **changes}
    metadata = {f"tokenizer.{key}": value for key, value in values.items()}
    with pytest.raises(TokenizerError) as caught:
        data = TokenizerData.from_apr_metadata(metadata, "m.apr")
        assert data is not None
        Tokenizer.from_data(data, "m.apr")
    assert said in str(caught.value) and str(caught.value).startswith("m.apr: ")


def test_qwen_without_a_pattern_gets_its_own() -> None:
    metadata = {"architecture": "qwen2", "tokenizer.vocabulary": ["a"]}
    data = TokenizerData.from_apr_metadata(metadata)
    assert data is not None and data.pre_type == "qwen2"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"{}", b'{"model": {"type": "WordPiece"}}',
                b'{"version":"1.0","model":{"type":"BPE","vocab":[],"merges":[]}}'],
)  # fmt: skip
def test_malformed_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    for read in (
        lambda: Tokenizer.from_file(path),
        lambda: read_tokenizer_json(tmp_path),
    ):
        with pytest.raises(TokenizerError) as caught:
            read()
        assert str(path) in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_fuzzed_tokenizer_data(tmp_path_factory: Any, data: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    whole = json.loads(train_once())
    part = whole if data.draw(st.booleans()) else whole["model"]
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    for read in (lambda: Tokenizer.from_file(folder / "tokenizer.json"),
                 lambda: read_tokenizer_json(folder)):  # fmt: skip
        try:
            read()
        except AprError as error:
            assert isinstance(error, TokenizerError) and str(folder) in str(error)


def train_once() -> str:
    if not _TRAINED:
        _TRAINED.append(train("qwen2", bos=True).to_str())
    return _TRAINED[0]


_TRAINED: list[str] = []


def test_token_ids_are_checked() -> None:
    check_token_ids([0, 511], 512)
    for bad in (600, 512, -1):
        with pytest.raises(TokenizerError, match=f"{bad} is outside the vocabulary of 512"):
            check_token_ids([3, bad], 512)
    with pytest.raises(TokenizerError, match="no tokens"):
        check_token_ids([], 512)


def test_stories260k(shared: Path) -> None:
    from transformers import AutoTokenizer

    folder = shared / "data" / "stories260k"
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    data = read_tokenizer_json(folder)
    assert data is not None
    embedded = Tokenizer.from_data(data)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("Once upon a time") == [1, 403, 407, 261, 378]
    for text in [*CORPUS, *TEXTS]:
        assert tokenizer.encode(text) == embedded.encode(text) == theirs(text)["input_ids"]
    texts = [embedded.token_text(token) for token in (1, 403, 407, 261, 378)]
    assert texts == ["<s>", " Once", " upon", " a", " time"]


def library_file(folder: Path, change: Any = None, **model: Any) -> Path:
    """A `tokenizer.json` of a trained tokenizer, changed."""
    held = json.loads(train("qwen2").to_str())
    held["model"].update(model)
    if change is not None:
        change(held)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(held))
    return path


class TestLibrary:
    """What the library is given: it prints over the screen and ends processes."""

    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize("bos", [False, True])
    def test_usual_files_are_not_tried_apart(
        self, tmp_path: Path, pattern: str, bos: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("aprcore.tokenization.library._try_apart", _fail)
        folder = save(tmp_path / "m", train(pattern, bos=bos))
        assert Tokenizer.from_file(folder / "tokenizer.json").encode("a b")

    def test_unusual_files_are_tried_apart_and_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def strange(held: Any) -> None:
            held["normalizer"] = {"type": "Lowercase"}

        path = library_file(tmp_path, strange)
        found = Tokenizer.from_file(path)
        assert found.encode("THE") == found.encode("the")
        monkeypatch.setattr("aprcore.tokenization.library._try_apart", _fail)
        with pytest.raises(AssertionError):
            Tokenizer.from_file(path)

    @pytest.mark.parametrize("part", [
        {"post_processor": {"type": "TemplateProcessing", "special_tokens": {},
                            "single": [{"Sequence": {"id": "B", "type_id": 0}}],
                            "pair": [{"Sequence": {"id": "A", "type_id": 0}}]}},
        {"decoder": {"type": "Strip", "content": "a", "start": 1, "stop": 9}},
        {"truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 9,
                        "direction": "Right"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    ], ids=lambda part: next(iter(part)))  # fmt: skip
    def test_what_the_library_panics_on_is_one_line(
        self, tmp_path: Path, part: dict[str, Any], capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = library_file(tmp_path, lambda held: held.update(part))
        try:
            Tokenizer.from_file(path).encode("What is 2+2?")
        except TokenizerError as error:
            assert "tokenizer" in str(error) and "\n" not in str(error)
        assert capfd.readouterr() == ("", "")

    def test_a_trial_that_does_not_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("aprcore.tokenization.library.TRIAL_S", 0.01)
        monkeypatch.setattr("aprcore.tokenization.library.TRIAL_BYTES_A_SECOND", 1 << 40)
        with pytest.raises(TokenizerError, match="not within"):
            Tokenizer.from_file(library_file(tmp_path, lambda held: held.pop("version")))

    @pytest.mark.parametrize("last", [10**6, 2**24, 2**31 - 1, 2**32 - 1])
    def test_ids_with_holes_without_end(self, tmp_path: Path, last: int) -> None:
        def leap(held: Any) -> None:
            held["model"]["vocab"]["far"] = last

        path = library_file(tmp_path, leap)
        with pytest.raises(TokenizerError):
            Tokenizer.from_file(path)
        with pytest.raises(TokenizerError, match="ids out of range"):
            read_tokenizer_json(tmp_path)


def _fail(*_: Any) -> None:
    raise AssertionError("tried apart")


def test_a_token_of_a_whole_file_is_not_merged() -> None:
    """A token of n characters has n ways to be put together, each of n characters."""
    vocabulary = ["<unk>", *"ab", "a" * 60_000]
    data = TokenizerData(vocabulary, [], [0.0] * len(vocabulary), "llama")
    with pytest.raises(TokenizerError, match="token 3 has 60000 characters"):
        Tokenizer.from_data(data, "m.gguf")


def test_tokens_that_can_be_merged_in_every_way() -> None:
    vocabulary = ["<unk>", *("a" * n for n in range(1, 250)), *("b" * n for n in range(1, 250))]
    data = TokenizerData(vocabulary, [], [0.0] * len(vocabulary), "llama")
    with pytest.raises(TokenizerError, match="can be merged in more than"):
        Tokenizer.from_data(data, "m.gguf")
