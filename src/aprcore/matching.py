"""Do the two sides belong together? What a run compares is settled here, before the first stage.

Everything that can make a comparison meaningless is found out in one place: both sides must have
run the same tokens at the same positions, and each tensor must be known to be there or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dump_names import Dialect
from aprcore.dumps import is_tensor_file, open_dump
from aprcore.errors import OracleError, PlanError, TokenizerError
from aprcore.judge import cumulative_bound
from aprcore.layouts import infer_sizes
from aprcore.name_map import read_name_map
from aprcore.plan import DEFAULT_PROMPT, Plan, check_layers
from aprcore.precision import ARITHMETICS, Arithmetic, arithmetic_of_dtype
from aprcore.reference_weights import open_reference
from aprcore.report import RunHeader, Side
from aprcore.request import Request
from aprcore.sides import Sides, token_texts
from aprcore.stages import BY_NAME, StageKey, computation_order, parse_path, stage_keys
from aprcore.trace import StageSource, TraceDirectory

if TYPE_CHECKING:
    from aprcore.model import Model

Floats = NDArray[np.floating[Any]]


@contextmanager
def open_sides(request: Request) -> Iterator[Sides]:
    """Open what a request names and check that the two sides belong together.

    Raises:
        AprError: Something cannot be opened, or the sides ran different tokens.
    """
    _check_options(request)
    with ExitStack() as stack:
        model = reference = None
        if request.model is not None:
            from aprcore.model import open_model

            model = stack.enter_context(open_model(request.model))
            if request.reference_weights is not None:
                reference = stack.enter_context(open_reference(request.reference_weights, model))
        trace, oracle = _open_dumps(request, model)
        yield replace(_match(request, model, trace, oracle), reference=reference)


def _check_options(request: Request) -> None:
    """Hold what a request names against each other.

    Raises:
        PlanError: Something is missing that another part needs.
    """
    if request.model is None and request.trace is None:
        raise PlanError("nothing to run", hint="name a model, or a directory with --trace")
    given = [path for path in (request.trace, request.oracle) if path is not None]
    if request.names is not None and not any(map(is_tensor_file, given)):
        raise PlanError("--names is for dumps in one file; directories hold files of fixed names")
    if request.reference_weights is None:
        return
    if request.model is None or request.oracle is None or request.cumulative_only:
        raise PlanError("--reference-weights needs a model, --oracle and the model judgment",
                        hint="the reference weights are run on the oracle's inputs")  # fmt: skip


def _open_dumps(
    request: Request, model: Model | None
) -> tuple[StageSource | None, StageSource | None]:
    """The trace and the oracle, as far as a request names them."""
    names = None if request.names is None else read_name_map(request.names)
    has_bias = model is not None and "qkv_bias" in model.config.features
    paths = [path for path in (request.oracle, request.trace) if path is not None]
    opened: dict[Path, StageSource] = {}
    for path in sorted(paths, key=is_tensor_file):
        opened[path] = _open_full_pass(path, names, has_bias)
        if model is None:  # directories come first: they tell whether projections have a bias
            has_bias = has_bias or any(key.stage == "qkv_bias" for key in opened[path].keys())
    trace, oracle = request.trace, request.oracle
    return None if trace is None else opened[trace], None if oracle is None else opened[oracle]


def _open_full_pass(path: Path, names: Dialect | None, has_bias: bool) -> StageSource:
    directory = open_dump(path, names, has_qkv_bias=has_bias)
    if isinstance(directory, TraceDirectory):
        directory.check_headers()
    positions = directory.sidecar.positions
    if positions is not None and positions != tuple(range(len(positions))):
        raise OracleError(
            f"was captured at positions {list(positions)}; only a full pass from position 0 can be"
            " compared",
            where=path,
            hint="capture it again",
        )
    return directory


def _match(
    request: Request, model: Model | None, trace: StageSource | None,
    oracle: StageSource | None,
) -> Sides:  # fmt: skip
    tokens, notes = _agree_on_tokens(request, model, trace, oracle)
    num_layers, features = _depth(model, trace, oracle)
    if request.plan is not None:
        check_layers(request.plan.layers, num_layers)
    keys = _rows(request.plan, model, trace, oracle)
    if not keys:
        raise PlanError("the plan selects no stage of this run", hint="widen --stages or --layers")
    dtypes = set()
    for directory, name in ((trace, "trace"), (oracle, "oracle")):
        if directory is None:
            continue
        dtypes.add(directory.sidecar.dtype or "float32")
        if directory.sidecar.dtype is None:
            notes.append(f"the {name} does not record its dtype; float32 is assumed")
        if directory.ignored:
            names = ", ".join(directory.ignored[:3])
            more = f" and {len(directory.ignored) - 3} more" if len(directory.ignored) > 3 else ""
            notes.append(f"parts of the {name} that name no stage are left out: {names}{more}")
    types = dtypes if model is None else dtypes | model.weight_types
    prompt = request.prompt
    for directory in (oracle, trace):
        if prompt is None and request.tokens is None and directory is not None:
            prompt = directory.sidecar.prompt
    is_silent = oracle is None or oracle.sidecar.tokens is None
    if model is not None and trace is None and is_silent and request.tokens is None:
        prompt = DEFAULT_PROMPT if prompt is None else prompt
    header = RunHeader(
        trace=_trace_side(model, trace),
        oracle=None if oracle is None else _directory_side(oracle),
        model=None if model is None else model.path.name,
        architecture=None if model is None else model.config.architecture,
        num_layers=num_layers,
        prompt=prompt,
        tokens=tokens,
        token_texts=None,
        keys=keys,
        bound=cumulative_bound(types if request.cumulative_only else dtypes),
        backend="numpy" if trace is None else None,
        judged=model is not None and not request.cumulative_only,
        notes=(),
    )
    missing = frozenset(k for k in keys if oracle is not None and k not in oracle)
    sides = Sides(
        header=header,
        model=model,
        trace=trace,
        oracle=oracle,
        sizes=_sizes(model, trace, oracle, tokens),
        features=features,
        not_computed=missing if trace is None else frozenset(),
        arithmetic=_arithmetic(request, trace),
        bound_alone=cumulative_bound(types),
        cumulative_only=request.cumulative_only,
        threads=request.threads,
    )
    if _must_detect(request, sides):
        sides, note = _detect(sides)
        notes.append(note)
    texts = None
    if tokens is not None and model is not None:
        found = token_texts(model, tokens)
        texts = tuple(found[token] for token in tokens) if found else None
        if not found:
            notes.append("the model has no usable tokenizer; token ids are shown without text")
    return replace(sides, header=replace(header, token_texts=texts, notes=tuple(notes)))


def _arithmetic(request: Request, trace: StageSource | None) -> Arithmetic:
    """What the engine behind the trace computes in, as stated or recorded."""
    if trace is None:
        return ARITHMETICS["f32"]  # the CPU path
    stated = request.arithmetic or trace.sidecar.arithmetic
    if stated in ARITHMETICS:
        return ARITHMETICS[stated]
    return arithmetic_of_dtype(trace.sidecar.dtype)


def _must_detect(request: Request, sides: Sides) -> bool:
    """Whether the arithmetic of a dump matters and nobody says what it is."""
    if sides.trace is None or sides.model is None or request.cumulative_only:
        return False
    stated = request.arithmetic or sides.trace.sidecar.arithmetic
    return stated not in ARITHMETICS and "T" in sides.sizes


def _detect(sides: Sides) -> tuple[Sides, str]:
    """Sides with the arithmetic that explains the dump, and a note that says so."""
    from aprcore.detection import detect_arithmetic

    assert sides.model is not None and sides.trace is not None
    arithmetic, explained, judged = detect_arithmetic(
        sides.model.config, sides.model.weights, sides.header.tokens, sides.sizes["T"],
        sides.trace.keys(), sides.features, sides.reader(sides.trace),
    )  # fmt: skip
    if not explained:
        note = "the trace does not record its arithmetic, and none explains it; see --arithmetic"
        return sides, note
    note = (
        f"the trace does not record its arithmetic; {arithmetic.name} explains {explained} of"
        f" {judged} stages of one layer"
    )
    return replace(sides, arithmetic=arithmetic), note


def _agree_on_tokens(
    request: Request, model: Model | None, trace: StageSource | None,
    oracle: StageSource | None,
) -> tuple[tuple[int, ...] | None, list[str]]:  # fmt: skip
    """The token ids of both sides.

    Raises:
        OracleError: Two sides recorded different ids.
        TokenizerError: An id is outside the model's vocabulary.
    """
    from aprcore.tokenizer import check_token_ids

    notes: list[str] = []
    claims: list[tuple[str, tuple[int, ...], Path | None]] = []
    if request.tokens is not None:
        claims.append(("--tokens", request.tokens, None))
    elif request.prompt is not None:
        claims.append(("--prompt", _encode(model, request.prompt), None))
    for name, directory in (("the trace", trace), ("the oracle", oracle)):
        if directory is not None and directory.sidecar.tokens is not None:
            claims.append((name, directory.sidecar.tokens, directory.path))
    for (first, a, _), (second, b, path) in pairwise(claims):
        if a != b:
            raise OracleError(
                f"ran token ids {list(b)} ({second}), but {first} gives {list(a)}",
                where=path,
                hint="both sides must run the same tokens; capture one of them again",
            )
    directories = [d for d in (trace, oracle) if d is not None]
    silent = directories and all(d.sidecar.tokens is None for d in directories)
    if claims:
        tokens = claims[0][1]
        if silent:
            notes.append("the directories do not record their token ids; yours are taken on trust")
    elif trace is not None or model is None:
        notes.append(
            "neither side recorded token ids: nothing shows that both ran the same tokens"
            if oracle is not None
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
            _check_length(directory, model, len(tokens))
    return tokens, notes


def _check_length(directory: StageSource, model: Model, num_tokens: int) -> None:
    """Hold the number of tokens against a directory that does not record its ids.

    Raises:
        OracleError: It holds another number of tokens (one alone may be the last of them).
    """
    if directory.sidecar.tokens is not None:
        return
    width = model.config.hidden_size
    for key, count in directory.counts.items():
        if BY_NAME[key.stage].shape == "T,E" and count % width == 0:
            found = count // width
            if found not in (1, num_tokens):
                raise OracleError(
                    f"holds {found} tokens, and {num_tokens} would be run",
                    where=directory.path,
                    hint="give the token ids that it was made from with --tokens",
                )
            return


def _encode(model: Model | None, prompt: str) -> tuple[int, ...]:
    if model is None:
        raise PlanError("a prompt needs a model's tokenizer", hint="give --tokens instead")
    tokens = tuple(model.tokenizer().encode(prompt))
    if not tokens:
        raise TokenizerError(f"the prompt {prompt!r} is empty", hint="give at least one token")
    return tokens


def _depth(
    model: Model | None, trace: StageSource | None, oracle: StageSource | None
) -> tuple[int, frozenset[str]]:
    """Layers and features of the model, or those that the directories show."""
    if model is not None:
        return model.config.num_layers, model.config.features
    directories = [d for d in (trace, oracle) if d is not None]
    stages = {key.stage for directory in directories for key in directory.keys()}
    features = {"dense"} if "moe_ffn_out" not in stages else {"experts"}
    if "qkv_bias" in stages:
        features.add("qkv_bias")
    return max(directory.num_layers for directory in directories), frozenset(features)


def _rows(
    plan: Plan | None, model: Model | None, trace: StageSource | None,
    oracle: StageSource | None,
) -> tuple[StageKey, ...]:  # fmt: skip
    """Every tensor to report, in the order of computation.

    A plan asks for its stages whoever has them. Without one those are reported that the oracle
    recorded, if it says that it saw as many layers as this model has: then it left the others out
    on purpose. Otherwise every layer is reported, so that one that is lost is a MISSING row.
    """
    own: set[StageKey] = set()
    if model is not None:
        own = set(stage_keys(model.config.num_layers, model.config.features))
    recorded = [_recorded(d) for d in (trace, oracle) if d is not None]
    both = own.union(*recorded)
    if plan is not None:
        both = {key for key in both if plan.wants(key)}
    elif oracle is not None and model is not None and _saw_all_layers(oracle, model):
        both = _recorded(oracle)
    elif oracle is not None:
        stages = {key.stage for key in _recorded(oracle)}
        both = {key for key in both if key.stage in stages}
    elif trace is not None:
        both = _recorded(trace)
    return tuple(sorted(both, key=computation_order))


def _saw_all_layers(directory: StageSource, model: Model) -> bool:
    """Whether the model behind a directory says that it is as deep as this one."""
    return (directory.sidecar.model or {}).get("num_layers") == model.config.num_layers


def _recorded(directory: StageSource) -> set[StageKey]:
    """Tensors that a directory holds or says that it holds."""
    listed = (parse_path(path) for path in directory.sidecar.stages or ())
    return {*directory.keys(), *(key for key in listed if key is not None)}


def _sizes(
    model: Model | None, trace: StageSource | None, oracle: StageSource | None,
    tokens: Sequence[int] | None,
) -> Mapping[str, int]:  # fmt: skip
    if model is not None and tokens is not None:
        return model.config.sizes(len(tokens))
    directories = [directory for directory in (oracle, trace) if directory is not None]
    # The longer tensor has the canonical size: the other may hold the last token only.
    counts: dict[StageKey, int] = {}
    for directory in directories:
        for key, values in directory.counts.items():
            counts[key] = max(values, counts.get(key, 0))
    count = None if tokens is None else len(tokens)
    if count is None:
        shapes = (d.shape(k) for d in directories for k in d.keys() if k.stage != "lm_head")
        count = next((shape[0] for shape in shapes if shape is not None and len(shape) == 2), None)
    if model is None:
        return infer_sizes(counts, count)
    hidden = model.config.hidden_size
    if count is None:
        rows = (n for key, n in counts.items() if BY_NAME[key.stage].shape == "T,E")
        count = next((n // hidden for n in rows if n and n % hidden == 0), None)
    return infer_sizes(counts, None) if count is None else model.config.sizes(count)


def _trace_side(model: Model | None, trace: StageSource | None) -> Side:
    if trace is not None:
        return _directory_side(trace)
    assert model is not None
    types = "+".join(sorted(model.weight_types))
    return Side(str(model.path), f"{types} {model.format}, numpy float32", "float32")


def _directory_side(directory: StageSource) -> Side:
    sidecar = directory.sidecar
    engine = {"transformers": "HF"}.get(sidecar.backend or "", sidecar.backend)
    label = " ".join(word for word in (engine, sidecar.dtype) if word) or "origin not recorded"
    return Side(str(directory.path), label, sidecar.dtype)
