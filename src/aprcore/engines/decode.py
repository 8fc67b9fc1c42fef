"""Greedy text: one pass over the prompt, then one token at a time against cached keys and values.

The graph serves both: a decoding step is a pass of one token whose attention reads the
cache as well (`aprcore.network.backend.Site.with_past`).
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.engine import Engine
from aprcore.engines.forward import AHEAD, everything, trace
from aprcore.ground.errors import TokenizerError
from aprcore.network.backend import KeyValueCache
from aprcore.network.graph import Graph
from aprcore.network.stages import StageKey, Wants
from aprcore.network.weights import Weight
from aprcore.tokenization.tokenizer import Tokenizer, check_token_ids

if TYPE_CHECKING:
    from aprcore.models.model import Model

Floats = NDArray[np.floating[Any]]


def nothing(key: StageKey) -> bool:
    """Wants no stage."""
    return False


@dataclass(frozen=True, slots=True)
class PassOutcome:
    """What a pass gave.

    Attributes:
        logits: Of the last token, [V].
        stages: The tensors that were asked for, in the order of computation.
    """

    logits: Floats
    stages: Mapping[StageKey, Floats] = field(default_factory=dict)

    @property
    def choice(self) -> int:
        """The greedy token, the first of equals; NaN is never chosen while there is a number."""
        return int(np.argmax(np.where(np.isnan(self.logits), -np.inf, self.logits)))


class StepSource(Protocol):
    """Runs the next tokens of one text."""

    @property
    def engine(self) -> Engine:
        """What ran the last tokens."""
        ...

    def feed(self, tokens: Sequence[int], wants: Wants = nothing) -> PassOutcome:
        """Run the next tokens, keeping the stages that are wanted."""
        ...


class Decoder:
    """One text in the making on one backend: tokens go in, logits come out.

    Attributes:
        graph, weights: The model.
        engine: Where it computes.
        tokens: What was fed so far.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, Weight], engine: Engine) -> None:
        self.graph = graph
        self.weights = weights
        self.engine = engine
        self.tokens: tuple[int, ...] = ()
        self._cache = KeyValueCache()

    def fresh(self) -> Decoder:
        """A decoder of the same model on the same backend that was fed nothing."""
        return Decoder(self.graph, self.weights, self.engine)

    def copy(self) -> Decoder:
        """A decoder that goes its own way from here; costs no memory until it is fed."""
        other = self.fresh()
        other.tokens, other._cache = self.tokens, self._cache.copy()
        return other

    def feed(self, tokens: Sequence[int], wants: Wants = nothing) -> PassOutcome:
        """Run the next tokens. An error leaves the decoder where it was.

        Args:
            tokens: Ids within the vocabulary, at least one.
            wants: Stages to keep.

        Raises:
            AprError: As `aprcore.engines.forward.forward`.
        """
        cache = self._cache.copy()
        kept = {}
        logits: Floats = np.empty(0)
        last = self.graph.logits
        stream = self._pass(tokens, lambda key: key == last or wants(key), cache)
        for key, tensor in stream:
            if key == last:
                logits = tensor
            if wants(key):
                kept[key] = tensor
        self._cache = cache
        self.tokens += tuple(tokens)
        return PassOutcome(logits, kept)

    def stages(self, tokens: Sequence[int]) -> Iterator[tuple[StageKey, Floats]]:
        """Every stage of the pass that `feed` would run, without advancing.

        Each is computed when it is asked for, so that callers can tell what it takes.
        """
        return self._pass(tokens, everything, self._cache.copy(), ahead=0)

    def past(self) -> KeyValueCache:
        """The cached keys and values on the host."""
        return self._cache.converted(self.engine.backend.to_host)

    def _pass(
        self, tokens: Sequence[int], wants: Wants, cache: KeyValueCache, ahead: int = AHEAD
    ) -> Iterator[tuple[StageKey, Floats]]:
        return trace(self.graph, self.weights, self.engine.backend, tokens, wants, cache, ahead)


class Ending(Enum):
    """Why a text ends."""

    END_OF_TEXT = "the model ended the text"
    MAX_TOKENS = "the largest number of tokens was reached"


@dataclass(frozen=True, slots=True)
class TokenChosen:
    """A token of the text. Step 0 runs the prompt and chooses the first, step S the next."""

    step: int
    token: int


@dataclass(frozen=True, slots=True)
class StepTraced:
    """The stages of one step.

    Attributes:
        step: Its number.
        history: Tokens whose keys and values were in the cache.
        tokens: Tokens of the pass.
        stages: Tensors in canonical shape.
        engine: What computed them.
    """

    step: int
    history: tuple[int, ...]
    tokens: tuple[int, ...]
    stages: Mapping[StageKey, Floats]
    engine: Engine


@dataclass(frozen=True, slots=True)
class TextEnded:
    """The last event: why, and after how many tokens."""

    ending: Ending
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepRequest:
    """A step to trace, and which of its stages to keep."""

    step: int
    wants: Wants = everything


def generate(
    source: StepSource,
    tokens: Sequence[int],
    max_tokens: int,
    *,
    stop_tokens: Collection[int] = (),
    traced: StepRequest | None = None,
) -> Iterator[TokenChosen | StepTraced | TextEnded]:
    """Continue a text greedily.

    Args:
        source: A decoder that was fed nothing.
        tokens: The prompt, at least one id.
        max_tokens: How many tokens to choose at most.
        stop_tokens: Ids that end the text; they are not part of it.
        traced: A step to keep the stages of.

    Yields:
        `TokenChosen` as soon as each is known, `StepTraced` once if it was asked for and the text
        gets there, and `TextEnded`.

    Raises:
        AprError: As `aprcore.engines.forward.forward`.
    """
    history: tuple[int, ...] = ()
    fed = tuple(tokens)
    for step in range(max_tokens):
        wants = traced.wants if traced is not None and traced.step == step else nothing
        outcome = source.feed(fed, wants)
        if outcome.stages:
            yield StepTraced(step, history, fed, outcome.stages, source.engine)
        chosen = outcome.choice
        if chosen in stop_tokens:
            yield TextEnded(Ending.END_OF_TEXT, step)
            return
        yield TokenChosen(step, chosen)
        history, fed = (*history, *fed), (chosen,)
    yield TextEnded(Ending.MAX_TOKENS, max_tokens)


def find_stop_tokens(model: Model) -> frozenset[int]:
    """The ids that end a text, as far as the model says."""
    found = set()
    try:
        data = model.tokenizer_data
        if data is not None and data.eos_token_id is not None:
            found.add(data.eos_token_id)
    except TokenizerError:  # damaged: the model still runs on token ids
        pass
    declared = model.metadata.get("eos_token_id")  # config.json: one id or several
    listed = declared if isinstance(declared, list) else [declared]
    return frozenset(found.union(token for token in listed if type(token) is int))


def prompt_tokens(model: Model, prompt: str, tokens: Sequence[int] | None) -> tuple[int, ...]:
    """The ids to begin with: `tokens` if they are given, else those of the prompt.

    Raises:
        TokenizerError: There are none, one is not in the vocabulary, or there is no tokenizer.
    """
    ids = tuple(model.tokenizer().encode(prompt) if tokens is None else tokens)
    check_token_ids(ids, model.config.vocab_size)
    return ids


class TextStream:
    """Turns tokens into text as they come; a character in several tokens waits for its last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def add(self, token: int) -> str:
        r"""The text that is complete with this token; bytes that are no text as "\xNN"."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left of a character that was never completed."""
        return self._decoder.decode(b"", final=True)
