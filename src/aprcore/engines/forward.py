"""The forward pass: walk the graph on a backend and hand out every tensor."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.expectation import product_weights
from aprcore.ground.errors import ConfigError
from aprcore.network.backend import Array, Backend, KeyValueCache, QueuedBackend, Site
from aprcore.network.config import ModelConfig
from aprcore.network.graph import Graph
from aprcore.network.stages import StageKey, Wants
from aprcore.network.weights import Weight

Floats = NDArray[np.floating[Any]]

# Tensors that a device may be ahead of the host: enough that it has work while the host compares.
AHEAD = 16
# Together they hold no more than this, or are one: a long prompt's scores would add up.
AHEAD_BYTES = 64 << 20


def check_step(config: ModelConfig, past: int) -> None:
    """Refuse a pass that continues another where every token sees those that come after it.

    Raises:
        ConfigError: The model attends in both directions, and tokens were run before.
    """
    if past and not config.is_causal:
        raise ConfigError("the model attends in both directions: it does not continue a text",
                          hint="run all of its tokens in one pass")  # fmt: skip


def everything(key: StageKey) -> bool:
    """Wants every stage."""
    return True


def needed_keys(graph: Graph, wants: Wants, given: Container[StageKey] = ()) -> list[StageKey]:
    """The stages that must be at hand, in order: the wanted ones and all that they read.

    What only `given` ones read is not among them.
    """
    needed: set[StageKey] = set()
    for key in reversed(graph.keys):
        if key in needed or wants(key):
            needed.add(key)
            if key not in given:
                needed.update(graph.inputs(key))
    return [key for key in graph.keys if key in needed]


def trace(
    graph: Graph,
    weights: Mapping[str, Weight],
    backend: Backend,
    tokens: Sequence[int],
    wants: Wants = everything,
    cache: KeyValueCache | None = None,
    ahead: int = AHEAD,
) -> Iterator[tuple[StageKey, Floats]]:
    """As `forward`, with each tensor on the host in the shape of its stage.

    Args:
        graph, weights, backend, tokens, wants, cache: As for `forward`.
        ahead: How many tensors a backend that queues its work may be ahead of what is yielded, as
            long as they are small; with 0 nothing is computed between one tensor and the next.
    """
    past = 0 if cache is None else cache.num_positions
    sizes = graph.config.sizes(len(tokens), past + len(tokens))
    stream = forward(graph, weights, backend, tokens, wants, cache)
    if isinstance(backend, QueuedBackend):
        fetched = _fetch(stream, backend, ahead)
    else:
        fetched = ((key, backend.to_host(tensor)) for key, tensor in stream)
    for key, tensor in fetched:
        yield key, tensor.reshape(graph.shape(key, sizes))


def _fetch(
    stream: Iterator[tuple[StageKey, Array]], backend: QueuedBackend, ahead: int
) -> Iterator[tuple[StageKey, Floats]]:
    """Each tensor on the host, in order. An error comes after the tensors made before it."""
    coming: deque[tuple[StageKey, Callable[[], Floats], int]] = deque()
    held_bytes = 0
    failure: Exception | None = None
    while failure is None:
        try:
            key, tensor = next(stream)
        except StopIteration:
            break
        except Exception as error:
            failure = error
        else:
            size_bytes = 4 * math.prod(tensor.shape)
            held_bytes += size_bytes
            coming.append((key, backend.fetch(tensor), size_bytes))
            del tensor  # the device may use its memory again
        while len(coming) > ahead or (len(coming) > 1 and held_bytes > AHEAD_BYTES):
            done, wait, size_bytes = coming.popleft()
            held_bytes -= size_bytes
            yield done, wait()
    for key, wait, _ in coming:
        yield key, wait()
    if failure is not None:
        raise failure


def forward(
    graph: Graph,
    weights: Mapping[str, Weight],
    backend: Backend,
    tokens: Sequence[int],
    wants: Wants = everything,
    cache: KeyValueCache | None = None,
    given: Mapping[StageKey, Floats] | None = None,
) -> Iterator[tuple[StageKey, Array]]:
    """Run a pass and yield each wanted tensor as soon as it is made.

    A tensor is kept only until the last stage that reads it, so a long prompt does not accumulate.
    Whether anyone keeps what is yielded does not change the arithmetic: nothing is written into.

    Args:
        graph: The model's stages.
        weights: Its weights, by canonical name.
        backend: Where to compute.
        tokens: Token ids, [T], already checked against the vocabulary.
        wants: Which tensors to yield; what no wanted stage reads is not computed.
        cache: Makes `tokens` the continuation of those that filled it, and keeps their keys and
            values as well: those of every layer only where `lm_head` is wanted. None for a full
            pass.
        given: Tensors on the host, in canonical layout, that are taken as they are and not
            computed: a pass can begin at a layer's input.

    Yields:
        The key and the backend's array, in the order of computation: canonical layout, with a
        leading axis of one row for a stage of the last token only.

    Raises:
        ConfigError: As `check_step`.
        WeightError: The model lacks a tensor.
        TruncatedError: A weight can no longer be read.
    """
    so_far = KeyValueCache() if cache is None else cache
    check_step(graph.config, so_far.num_positions)
    positions = so_far.claim(len(tokens))
    given = {} if given is None else given
    keys = needed_keys(graph, wants, given)
    reads = {key: () if key in given else graph.inputs(key) for key in keys}
    last_reader = {source: key for key in keys for source in reads[key]}
    ids = np.asarray(tokens, dtype=np.int64)
    if isinstance(backend, QueuedBackend):
        backend.expect(product_weights(graph, weights, keys))
    alive: dict[StageKey, Array] = {}
    for key in keys:
        if key in given:
            tensor = backend.from_host(given[key])
        else:
            operation = graph.operation(key)
            assert operation is not None, f"{key.stage} is read from dumps, never computed"
            site = Site(graph.config, ids, positions, key.layer, weights, cache)
            inputs = [alive[source] for source in reads[key]]
            if graph.stage(key).last_token:
                inputs = [backend.rows(x, ids.size - 1, ids.size) for x in inputs]
            tensor = operation(backend, site, *inputs)
        if key in last_reader:
            alive[key] = tensor
        for source in reads[key]:
            if last_reader[source] == key:
                alive.pop(source, None)
        if wants(key):
            yield key, tensor
