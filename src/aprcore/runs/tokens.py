"""The token ids that the sides of a run have in common.

Two sides that ran different tokens cannot be compared, however alike their tensors look.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aprcore.dumps.plan import DEFAULT_PROMPT
from aprcore.dumps.source import StageSource
from aprcore.ground.errors import OracleError, PlanError, TokenizerError
from aprcore.network.graph import known_stages
from aprcore.runs.embedded import embedded_tokens
from aprcore.runs.request import Request

if TYPE_CHECKING:
    from aprcore.models.model import Model


class Dumps(NamedTuple):
    """The open dumps of a run, each if there is one: see `Request`."""

    trace: StageSource | None
    oracle: StageSource | None
    against: StageSource | None

    @property
    def named(self) -> list[tuple[str, StageSource]]:
        """Those that there are, with what to call them."""
        names = ("the trace", "the oracle", "the dump it is held against")
        return [(name, dump) for name, dump in zip(names, self) if dump is not None]

    @property
    def present(self) -> list[StageSource]:
        """Those that there are."""
        return [dump for dump in self if dump is not None]


def agree_on_tokens(
    request: Request, model: Model | None, dumps: Dumps
) -> tuple[tuple[int, ...] | None, list[str]]:
    """The token ids of all sides.

    Raises:
        OracleError: Two of them recorded different ids, or a token's position is not known.
        TokenizerError: An id is outside the model's vocabulary.
    """
    from aprcore.tokenization.tokenizer import check_token_ids

    notes = [*request.notes]
    claims: list[tuple[str, tuple[int, ...], Path | None]] = []
    if request.tokens is not None:
        claims.append(("--tokens", request.tokens, None))
    elif request.prompt is not None:
        claims.append(("--prompt", _encode(model, request.prompt), None))
    trace, oracle, _ = dumps
    for name, directory in dumps.named:
        if directory.sidecar.tokens is not None:
            claims.append((name, directory.sidecar.tokens, directory.path))
    for (first, a, _), (second, b, path) in pairwise(claims):
        if a != b:
            raise OracleError(
                f"ran token ids {list(b)} ({second}), but {first} gives {list(a)}",
                where=path,
                hint="both sides must run the same tokens; capture one of them again",
            )
    directories = dumps.present
    silent = directories and all(d.sidecar.tokens is None for d in directories)
    if claims:
        tokens = claims[0][1]
        if silent:
            notes.append("the directories do not record their token ids; yours are taken on trust")
    elif model is not None and trace is not None and (ran := embedded_tokens(trace, model)):
        if len(ran) == 1 and not trace.sidecar.positions:
            raise OracleError(
                f"has one token, {ran[0]}, and does not say at which position", where=trace.path,
                hint="give it with those before it: --tokens ...; alone if it is the first",
            )  # fmt: skip
        tokens = ran
        notes.append("the trace does not record its token ids; its rows of the embedding tell them")
    elif trace is not None or model is None:
        notes.append(
            "neither side recorded token ids: nothing shows that both ran the same tokens"
            if len(directories) > 1
            else "the trace does not record its token ids"
        )
        return None, notes
    else:
        recorded = None if oracle is None else oracle.sidecar.prompt
        prompt, whose = (DEFAULT_PROMPT, "default") if recorded is None else (recorded, "recorded")
        tokens = _encode(model, prompt)
        if oracle is not None:
            notes.append(
                f"the oracle does not record its token ids; the {whose} prompt {prompt!r}"
                " is assumed (give --tokens or --prompt)"
            )
    if model is not None:
        try:
            check_token_ids(tokens, model.config.vocab_size)
        except TokenizerError as error:
            source = claims[0][2] if claims else None
            hint = None if source is None else f"was it captured from {model.path.name}?"
            raise TokenizerError(error.what, where=source, hint=hint) from None
        for directory in directories:
            _check_length(directory, model, len(tokens), "were given" if silent else "are recorded")
    return tokens, notes


def count_tokens(dump: StageSource, model: Model) -> int | None:
    """How many tokens a dump holds: the rows of the residual stream; one may be the last alone."""
    width = model.config.hidden_size
    counts = [n for key, n in dump.counts.items() if known_stages()[key.stage].shape == "T,E"]
    return max((n // width for n in counts if n and n % width == 0), default=None)


def _check_length(dump: StageSource, model: Model, num_tokens: int, whose: str) -> None:
    """Hold the number of tokens against what a dump holds, whatever ids it records.

    Raises:
        OracleError: It holds another number of tokens (one alone may be the last of them).
    """
    found = count_tokens(dump, model)
    if found in (None, 1, num_tokens):
        return
    ran = embedded_tokens(dump, model)
    hint = "give the token ids that it was made from with --tokens"
    if ran is not None:
        hint = f"its embedding is that of --tokens {','.join(map(str, ran))}"
    raise OracleError(f"has {found} tokens where {num_tokens} {whose}", where=dump.path, hint=hint)


def _encode(model: Model | None, prompt: str) -> tuple[int, ...]:
    if model is None:
        raise PlanError("a prompt needs a model's tokenizer", hint="give --tokens instead")
    tokens = tuple(model.tokenizer().encode(prompt))
    if not tokens:
        raise TokenizerError(f"the prompt {prompt!r} is empty", hint="give at least one token")
    return tokens
