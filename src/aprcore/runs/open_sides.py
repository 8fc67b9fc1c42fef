"""Do the two sides belong together? What a run compares is settled here, before the first stage.

Everything that can make a comparison meaningless is found out in one place: both sides must have
run the same tokens at the same positions, and each tensor must be known to be there or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.directory import TraceDirectory
from aprcore.dumps.last_token import LastTokenDump
from aprcore.dumps.name_map import read_name_map
from aprcore.dumps.open import ReadingOptions, is_tensor_file, open_dump, open_ranks
from aprcore.dumps.plan import DEFAULT_PROMPT, Plan, check_layers
from aprcore.dumps.position_tree import PositionTree
from aprcore.dumps.shards import ShardedDump, find_split
from aprcore.dumps.source import StageSource
from aprcore.engines.arithmetic import (
    ENGINES,
    EngineArithmetic,
    arithmetic_of_dtype,
    engine_arithmetic,
    stated_arithmetic,
)
from aprcore.ground.errors import OracleError, PlanError, TraceError
from aprcore.judging.layouts import infer_sizes
from aprcore.judging.quantisation import open_reference
from aprcore.judging.verdict import cumulative_bound
from aprcore.network.graph import Graph, computation_order, known_stages, outline, parse_path
from aprcore.network.stages import StageKey
from aprcore.records.report import RunHeader, Side
from aprcore.runs.embedded import embedded_tokens
from aprcore.runs.request import Request
from aprcore.runs.sides import Sides, token_texts
from aprcore.runs.tokens import Dumps, agree_on_tokens, count_tokens

if TYPE_CHECKING:
    from aprcore.models.model import Model

Floats = NDArray[np.floating[Any]]

_NUMBERS = re.compile(r"\d+")


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
            from aprcore.models.model import open_model

            model = stack.enter_context(open_model(request.model))
            if request.reference_weights is not None:
                reference = stack.enter_context(open_reference(request.reference_weights, model))
        dumps = _open_dumps(request, model)
        yield replace(_match(request, model, dumps), reference=reference)


def _check_options(request: Request) -> None:
    """Hold what a request names against each other.

    Raises:
        PlanError: Something is missing that another part needs.
    """
    if request.model is None and request.trace is None:
        raise PlanError("nothing to run", hint="name a model, or a directory with --trace")
    if request.shards and request.against is not None:
        raise PlanError("--shards and --against do not go together", hint="leave one out")
    if request.uses_device and request.model is None:
        raise PlanError("--gpu needs a model to run", hint="name one")
    if request.uses_device and request.trace is not None:
        raise PlanError("--gpu runs the model, and --trace is another engine's run",
                        hint="leave one out; --against is for two dumps")  # fmt: skip
    if request.against is not None and request.trace is None:
        raise PlanError("--against is for two dumps", hint="name the one under test with --trace")
    given = [path for path in _paths(request) if path is not None]
    for option, value in (("--names", request.names), ("--row", request.row)):
        if value is not None and not any(map(is_tensor_file, given)):
            raise PlanError(
                f"{option} is for dumps of named tensors; directories hold stages of fixed names"
            )
    if request.reference_weights is None:
        return
    if request.model is None or request.oracle is None or request.cumulative_only:
        raise PlanError("--reference-weights needs a model, --oracle and the model judgment",
                        hint="the reference weights are run on the oracle's inputs")  # fmt: skip


def _paths(request: Request) -> tuple[Path | None, Path | None, Path | None]:
    """Where the dumps are, in the order of `Dumps`."""
    return request.trace, request.oracle, request.against


def _open_dumps(request: Request, model: Model | None) -> Dumps:
    """The dumps that a request names."""
    options = ReadingOptions(
        names=None if request.names is None else read_name_map(request.names),
        row=request.row,
        pad=None if model is None else model.pad_token_id,
    )
    graph = None if model is None else model.graph
    opened: dict[Path | None, StageSource] = {}
    paths = _paths(replace(request, trace=None) if request.shards else request)
    for path in sorted((p for p in paths if p is not None), key=is_tensor_file):
        opened[path] = _checked(open_dump(path, options, graph=graph))
        if model is None:  # directories come first: they tell what the stages of files may be
            graph = _outline(opened.values())
    if request.shards:
        shards = [_checked(shard) for path in request.shards
                  for shard in open_ranks(path, options, graph=graph)]  # fmt: skip
        opened[request.trace] = _joined(request, model, shards)
    dumps = Dumps(*(opened.get(path) for path in _paths(request)))
    _check_positions(model, dumps)
    return dumps


def _joined(request: Request, model: Model | None, shards: Sequence[StageSource]) -> ShardedDump:
    """All ranks of a tensor-parallel run as one dump."""
    if model is None:
        raise PlanError("--shards needs a model, which says what is dealt out", hint="name one")
    tokens = request.tokens or shards[0].sidecar.tokens
    num_tokens = len(tokens) if tokens else count_tokens(shards[0], model)
    if num_tokens is None:
        raise PlanError("the shards do not tell how many tokens ran", hint="give --tokens")
    return ShardedDump(shards, model.graph, num_tokens)


def _checked(dump: StageSource) -> StageSource:
    if isinstance(dump, TraceDirectory | PositionTree):
        dump.check_headers()
    return dump


def _check_positions(model: Model | None, dumps: Dumps) -> None:
    """An oracle judges full passes; decoding steps are judged alone or held against each other.

    An oracle's cache is not in its directory, so that nothing of a step can be computed again.

    Raises:
        OracleError: A step is held against something else.
    """
    starts = [(dump, dump.sidecar.positions or (0,)) for dump in dumps.present]
    steps = [dump for dump, positions in starts if positions[0] > 0]
    if not steps:
        for dump, positions in starts:
            if dump.sidecar.positions and positions != tuple(range(len(positions))):
                raise OracleError(f"was captured at positions {list(positions)}, with gaps",
                                  where=dump.path, hint="capture it again")  # fmt: skip
        return
    at = steps[0].sidecar.positions
    if dumps.oracle is not None:
        raise OracleError(
            f"was captured at positions {list(at or ())}; only a full pass from position 0 can be"
            " held against an oracle", where=steps[0].path,
            hint="leave the oracle out, hold two steps against each other with --trace and"
            " --against, or let `aprtui parity MODEL --stages` judge them",
        )  # fmt: skip
    histories = {dump.sidecar.history for dump in dumps.present}
    if len({positions for _, positions in starts}) > 1 or len(histories - {None}) > 1:
        raise OracleError(
            f"was captured at positions {list(at or ())} after other tokens than the other side",
            where=steps[0].path, hint="both sides must be at the same step of the same text",
        )  # fmt: skip


def _match(request: Request, model: Model | None, dumps: Dumps) -> Sides:
    tokens, notes = agree_on_tokens(request, model, dumps)
    dumps, tokens = _placed(model, dumps, tokens, notes)
    trace, oracle, against = dumps
    graph = _outline(dumps.present) if model is None else model.graph
    num_layers = graph.num_layers
    if request.plan is not None:
        check_layers(request.plan.layers, num_layers)
    keys = _rows(request.plan, model, dumps)
    if not keys:
        raise PlanError("the plan selects no stage of this run", hint="widen --stages or --layers")
    dtypes = set()
    if model is not None and tokens is not None:
        _check_whole(model, dumps, len(tokens))
    for name, directory in dumps.named:
        if directory is not against:
            dtypes.add(directory.sidecar.dtype or "float32")
        if directory.sidecar.dtype is None:
            notes.append(f"{name} does not record its dtype; float32 is assumed")
        if directory.ignored:
            few = _first_names(_kinds_of_names(directory.ignored))
            notes.append(f"parts of {name} that name no stage are left out: {few}")
        if directory.unlisted:
            few = _first_names([key.path for key in directory.unlisted])
            notes.append(f"files of {name} that its sidecar does not list are left out, as from an"
                         f" earlier run: {few}")  # fmt: skip
    positions = () if trace is None else trace.sidecar.positions or ()
    if positions and positions[0] and not isinstance(trace, LastTokenDump):
        first = positions[0]
        notes.append(f"a decoding step at position {first}, after a cache of {first} tokens")
    types = dtypes if model is None else dtypes | model.weight_types
    prompt = request.prompt
    for dump in (oracle, trace, against):
        if prompt is None and request.tokens is None and dump is not None:
            prompt = dump.sidecar.prompt
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
        tested=_tested_side(request, model, trace),
        trusted=_trusted_side(request, model, against),
    )
    missing = frozenset(k for k in keys if oracle is not None and k not in oracle)
    sides = Sides(
        header=header,
        model=model,
        trace=trace,
        oracle=oracle,
        sizes=_sizes(model, dumps, tokens),
        graph=graph,
        not_computed=missing if trace is None else frozenset(),
        arithmetic=arithmetic_of_dtype("float32"),  # the CPU path's
        oracle_arithmetic=_oracle_arithmetic(oracle, notes),
        bound_alone=cumulative_bound(types),
        cumulative_only=request.cumulative_only,
        threads=request.threads,
        past=None if model is None or trace is None else trace.past(model.config),
    )
    if trace is not None:
        stated = _stated(request, trace, notes)
        sides = _with_arithmetic(sides, stated, "the trace", notes)
    if against is not None:
        # What the command line says is said of the trace.
        other = replace(sides, trace=against, oracle=None)
        stated = _recorded_arithmetic(against, "the dump it is held against", notes)
        other = _with_arithmetic(other, stated, "the dump it is held against", notes)
        sides = replace(sides, other=other)
    texts = None
    if tokens is not None and model is not None:
        found = token_texts(model, tokens)
        texts = tuple(found[token] for token in tokens) if found else None
        if not found:
            notes.append("the model has no usable tokenizer; token ids are shown without text")
    return replace(sides, header=replace(header, token_texts=texts, notes=tuple(notes)))


def _placed(
    model: Model | None, dumps: Dumps, tokens: tuple[int, ...] | None, notes: list[str]
) -> tuple[Dumps, tuple[int, ...] | None]:
    """A trace that holds the last token's rows alone as the step at their position.

    Another side tells more of such rows than that, if it has every token's.

    Raises:
        OracleError: They are of another token.
    """
    trace = dumps.trace
    if model is None or trace is None or tokens is None or dumps.present != [trace]:
        return dumps, tokens
    if len(tokens) < 2 or trace.sidecar.positions or count_tokens(trace, model) != 1:
        return dumps, tokens
    ran = embedded_tokens(trace, model)
    if ran is not None and ran != tokens[-1:]:
        raise OracleError(f"has 1 token where {len(tokens)} were given, and it is not the last",
                          where=trace.path,
                          hint=f"its embedding is that of --tokens {ran[0]}")  # fmt: skip
    past = len(tokens) - 1
    notes.append(f"the trace holds the last token alone, at position {past}: what reads the"
                 " others is not judged")  # fmt: skip
    return dumps._replace(trace=LastTokenDump(trace, tokens)), tokens[-1:]


def _check_whole(model: Model, dumps: Dumps, num_tokens: int) -> None:
    """Refuse one rank of several, of which little could be judged.

    Raises:
        TraceError: A dump is one.
    """
    for dump in dumps.present:
        split = find_split(model.graph, dump.counts, model.config.sizes(num_tokens))
        if split is not None:
            raise TraceError(
                f"is one shard of {split.ranks} of a tensor-parallel run: {split.key} has"
                f" {split.held} values where {split.due} are due", where=dump.path,
                hint="give all of them, in order, with --shards rank*/",
            )  # fmt: skip


def _first_names(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _kinds_of_names(names: Sequence[str]) -> list[str]:
    """Names that differ in numbers only as one: "kqv_out-N (30)"."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_NUMBERS.sub("N", name), []).append(name)
    return [of[0] if len(of) == 1 else f"{kind} ({len(of)})" for kind, of in kinds.items()]


def _stated(request: Request, trace: StageSource, notes: list[str]) -> dict[str, str]:
    """What is said of a trace's arithmetic: on the command line, of its engine, in its sidecar."""
    said = _recorded_arithmetic(trace, "the trace", notes)
    if request.engine is not None:
        said = ENGINES[request.engine] | said
    if request.arithmetic == "auto":
        return {}
    return said | stated_arithmetic(request.arithmetic)


def _recorded_arithmetic(dump: StageSource, name: str, notes: list[str]) -> dict[str, str]:
    """What a dump says of its arithmetic; words of other programs are found out instead."""
    try:
        return stated_arithmetic(dump.sidecar.arithmetic)
    except PlanError as error:
        notes.append(f"what {name} says of its arithmetic is not understood ({error.what})")
        return {}


def _oracle_arithmetic(oracle: StageSource | None, notes: list[str]) -> EngineArithmetic:
    """What the engine behind the oracle computes in: as recorded, else in its values' type."""
    if oracle is None:
        return arithmetic_of_dtype(None)
    stated = _recorded_arithmetic(oracle, "the oracle", notes)
    dtype = oracle.sidecar.dtype
    return engine_arithmetic(stated).dumped_as(dtype) if stated else arithmetic_of_dtype(dtype)


def _with_arithmetic(sides: Sides, stated: Mapping[str, str], name: str, notes: list[str]) -> Sides:
    """Sides that know what the dump's engine computes in; what nobody says is found out."""
    assert sides.trace is not None
    dtype = sides.trace.sidecar.dtype
    is_judged = sides.model is not None and not sides.cumulative_only and "T" in sides.sizes
    if not is_judged:
        engine = engine_arithmetic(stated) if stated else arithmetic_of_dtype(dtype)
        return replace(sides, arithmetic=engine.dumped_as(dtype))
    from aprcore.judging.arithmetic import describe_inference, infer_arithmetic

    side = sides.recorded()[0]
    assert side is not None
    engine, found = infer_arithmetic(side, sides.trace.keys(), stated, dtype)
    if found:
        notes.append(
            f"{name} does not record its arithmetic; {describe_inference(engine, found)}"
        )  # fmt: skip
    return replace(sides, arithmetic=engine, past=side.past, layouts=side.layouts)


def _outline(dumps: Iterable[StageSource]) -> Graph:
    """The graph that dumps give away, where no model is at hand."""
    held = list(dumps)
    names = {key.stage for dump in held for key in dump.keys()}
    stated = ((dump.sidecar.model or {}).get("architecture") for dump in held)
    architecture = next((name for name in stated if isinstance(name, str)), None)
    layers = {key.layer for dump in held for key in _recorded(dump) if key.layer is not None}
    return outline(max(dump.num_layers for dump in held), names, architecture, layers)


def _rows(plan: Plan | None, model: Model | None, dumps: Dumps) -> tuple[StageKey, ...]:
    """Every tensor to report, in the order of computation.

    A plan asks for its stages whoever has them. Without one those are reported that the oracle
    recorded, if it says that it saw as many layers as this model has: then it left the others out
    on purpose. Otherwise every layer is reported, so that one that is lost is a MISSING row.
    """
    own: set[StageKey] = set()
    if model is not None:
        own = set(model.graph.keys)
    trace, oracle, against = dumps
    both = own.union(*map(_recorded, dumps.present))
    if plan is not None:
        both = {key for key in both if plan.wants(key)}
    elif oracle is not None and model is not None and _saw_all_layers(oracle, model):
        both = _recorded(oracle)
    elif oracle is not None:
        stages = {key.stage for key in _recorded(oracle)}
        both = {key for key in both if key.stage in stages}
    elif trace is not None:
        both = _recorded(trace) | (set() if against is None else _recorded(against))
    return tuple(sorted(both, key=computation_order))


def _saw_all_layers(directory: StageSource, model: Model) -> bool:
    """Whether the model behind a directory says that it is as deep as this one."""
    return (directory.sidecar.model or {}).get("num_layers") == model.config.num_layers


def _recorded(directory: StageSource) -> set[StageKey]:
    """Tensors that a directory holds or says that it holds."""
    listed = (parse_path(path) for path in directory.sidecar.stages or ())
    return {*directory.keys(), *(key for key in listed if key is not None)}


def _sizes(model: Model | None, dumps: Dumps, tokens: Sequence[int] | None) -> Mapping[str, int]:
    if model is not None and tokens is not None:
        first = next((d.sidecar.positions[0] for d in dumps.present if d.sidecar.positions), 0)
        return model.config.sizes(len(tokens), first + len(tokens))
    directories = [d for d in (dumps.oracle, dumps.trace, dumps.against) if d is not None]
    # The longer tensor has the canonical size: the other may hold the last token only.
    counts: dict[StageKey, int] = {}
    for directory in directories:
        for key, values in directory.counts.items():
            counts[key] = max(values, counts.get(key, 0))
    count = None if tokens is None else len(tokens)
    if count is None:
        shapes = (d.shape(k) for d in directories for k in d.keys() if k.layer is not None)
        count = next((shape[0] for shape in shapes if shape is not None and len(shape) == 2), None)
    if model is None:
        ends = [d.sidecar.positions[-1] + 1 for d in directories if d.sidecar.positions]
        return infer_sizes(counts, count, max(ends, default=None))
    hidden = model.config.hidden_size
    if count is None:
        rows = (n for key, n in counts.items() if known_stages()[key.stage].shape == "T,E")
        count = next((n // hidden for n in rows if n and n % hidden == 0), None)
    return infer_sizes(counts, None) if count is None else model.config.sizes(count)


def _trace_side(model: Model | None, trace: StageSource | None) -> Side:
    if trace is not None:
        return _directory_side(trace)
    assert model is not None
    return _model_side(model, "numpy float32")


def _model_side(model: Model, engine: str) -> Side:
    types = "+".join(sorted(model.weight_types))
    return Side(str(model.path), f"{types} {model.format}, {engine}", "float32")


def _tested_side(request: Request, model: Model | None, trace: StageSource | None) -> Side | None:
    """What is held against another side stage by stage, if that is asked for."""
    if trace is not None:
        return None if request.against is None else _directory_side(trace)
    return _model_side(model, "opencl") if request.uses_device and model is not None else None


def _trusted_side(
    request: Request, model: Model | None, against: StageSource | None
) -> Side | None:
    """What the tested side is held against."""
    if against is not None:
        return _directory_side(against)
    return _trace_side(model, None) if request.uses_device else None


def _directory_side(directory: StageSource) -> Side:
    sidecar = directory.sidecar
    engine = {"transformers": "HF"}.get(sidecar.backend or "", sidecar.backend)
    label = " ".join(word for word in (engine, sidecar.dtype) if word) or "origin not recorded"
    return Side(str(directory.path), label, sidecar.dtype)
