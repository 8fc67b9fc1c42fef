"""Hooks on a running transformers model that hand out every stage tensor.

Most tensors come from hooks on the model's modules; those inside attention come from an attention
function registered with transformers' own interface, which does what eager attention does and shows
what it has on the way. No class is patched, and the hooks and the registration are gone when the
pass ends, however it ends.

torch and transformers are imported inside the functions that run a model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.plan import Plan, check_layers
from aprcore.ground.errors import AprError, OracleError, Where
from aprcore.models.model import with_found_weights
from aprcore.models.names import weights_of_layer
from aprcore.network.architectures import COMPUTED, find_architecture
from aprcore.network.dialects import declare_huggingface
from aprcore.network.graph import Graph
from aprcore.network.operations import AddBias, Embed, Head, Rotate, Scores, Softmax
from aprcore.network.stages import Row, StageKey

Float32 = NDArray[np.float32]
Sink = Callable[[StageKey, Float32], None]
Tensor = Any  # torch.Tensor; torch is no dependency of this package
Module = Any  # torch.nn.Module

# What transformers passes to every attention function and no arithmetic depends on.
HARMLESS_KEYWORDS = frozenset({"position_ids", "use_cache", "cache_position", "is_causal"})

_numbers = itertools.count()  # of registrations in this process


def capture(
    model: Module,
    tokens: Sequence[int],
    sink: Sink,
    layers: range | None = None,
    *,
    where: Where = None,
    graph: Graph | None = None,
) -> Tensor:
    """Run a transformers model over `tokens` and hand each stage tensor to `sink` as it is made.

    Tensors arrive in the order in which the model computes them, as float32 in canonical shape
    (see `aprcore.network.graph`). They may share memory with the model's own.

    Args:
        model: A `*ForCausalLM` of a supported architecture, in evaluation mode.
        tokens: Token ids, [T].
        sink: Called with each key and its values.
        layers: Layers to keep, or None for all.
        where: The model's place, for errors.
        graph: Its stages; None: as its own configuration says.

    Returns:
        The logits of all tokens, [1, T, V].

    Raises:
        OracleError: The model is not built like a supported one, calls attention with something
            that its architecture does not describe, fails while it runs, or did not show a stage
            that it should have.
    """
    import torch

    check_tokens(tokens, model.get_input_embeddings().weight.shape[0], where)
    taps = _Taps(model, graph or graph_of(model, where), len(tokens), sink, layers, where)
    with ExitStack() as stack:
        taps.attach(stack)
        stack.enter_context(_registered_attention(model, taps.attend, where))
        stack.enter_context(explained("the model failed while it ran", where))
        stack.enter_context(torch.inference_mode())
        logits = run_model(model, tokens)
        taps.show_logits(logits)
    if taps.pending:
        names = ", ".join(key.path for key in taps.pending)
        raise OracleError(f"the model ran without showing {names}", where=where)
    return logits


def run_model(model: Module, tokens: Sequence[int]) -> Tensor:
    """The logits of all tokens, [1, T, V]."""
    import torch

    device = model.get_input_embeddings().weight.device
    # Weights that accelerate keeps elsewhere are on no device; its hooks move the ids.
    ids = torch.tensor([list(tokens)], device="cpu" if device.type == "meta" else device)
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def graph_of(model: Module, where: Where = None) -> Graph:
    """The stages of a transformers model, from its configuration and the names of its weights.

    Of a model with code of its own, whose architecture has another name, those of the first family
    that it is built like; what it computes otherwise shows when its tensors are judged.

    Raises:
        OracleError: It is built like no supported one.
    """
    from aprcore.ground.errors import ConfigError

    names = {name.removeprefix("model.layers.0.") for name, _ in model.named_parameters()}
    fault: AprError | None = None
    own = model.config.model_type
    for family in [own] if own in COMPUTED else COMPUTED:
        try:
            declared = declare_huggingface(model.config.to_dict(), where, family)
        except ConfigError as error:
            fault = fault or error
            continue
        graph = Graph(with_found_weights(declared.config, names))
        mismatch = _mismatch(model, graph, names)
        if mismatch is None:
            return graph
        fault = fault or OracleError(
            f"architecture {own!r} {mismatch}",
            where=where,
            hint=f"capturing needs a model that is built like one of {', '.join(COMPUTED)}",
        )  # fmt: skip
    assert fault is not None
    raise OracleError(fault.what, where=where, hint=fault.hint) from fault


def expected_keys(graph: Graph, layers: range | None) -> tuple[StageKey, ...]:
    """The tensors that a capture yields, in the order of computation.

    Raises:
        PlanError: The range holds no layer of the model.
    """
    check_layers(layers, graph.num_layers)
    return tuple(filter(Plan(layers=layers).wants, graph.keys))


def _mismatch(model: Module, graph: Graph, names: Collection[str]) -> str | None:
    """How a model is built otherwise: a module that a stage is shown by, or a weight too many."""
    for layer in (*range(graph.num_layers), None):
        for path in {path for row in graph.layer(layer).values() for path, _ in _shown(row)}:
            try:
                _module(model, layer, path)
            except AttributeError:
                whole = path if layer is None else f"layers.{layer}.{path}"
                return f"has no module model.{whole}"
    used = {use.name for layer in (0, None) for use in weights_of_layer(graph, layer)}
    # Of the other layers: if they are built otherwise, the check of the tensors finds it.
    extra = sorted(name for name in names if name not in used and "layers." not in name)
    return f"has a weight {extra[0]} that no stage uses" if extra else None


def _module(model: Module, layer: int | None, path: str) -> Module:
    return model.model.get_submodule(
        path if layer is None else f"layers.{layer}.{path}".rstrip(".")
    )


def _shown(row: Row) -> list[tuple[str, bool]]:
    """The modules that show a stage, and whether by their input; none where attention does.

    The first way of showing it counts: others are for dumps of other engines.
    """
    operation = row.stage.operation
    if not row.stage.shown or isinstance(operation, Embed | Softmax | Head):
        return []
    return [(path.removesuffix(".input"), path.endswith(".input")) for path in row.stage.shown[0]]


class _Taps:
    """The hooks of one pass.

    Attributes:
        pending: Shapes of the tensors that are still to come, by key.
    """

    def __init__(
        self, model: Module, graph: Graph, num_tokens: int, sink: Sink, layers: range | None,
        where: Where,
    ) -> None:  # fmt: skip
        keys = expected_keys(graph, layers)
        self._model = model
        self._graph = graph
        self._sink = sink
        self._where = where
        sizes = graph.config.sizes(num_tokens)
        self._keywords = find_architecture(graph.config.architecture).attention_keywords
        self.pending: dict[StageKey, tuple[int, ...]] = {
            key: graph.shape(key, sizes) for key in keys
        }

    def attach(self, stack: ExitStack) -> None:
        """Hook every module that makes or receives a wanted tensor; the stack undoes it."""
        self._on_output(stack, self._model.get_input_embeddings(), self._graph.embedding)
        for layer in (*range(self._graph.num_layers), None):
            rows = self._graph.layer(layer).values()
            if not any(row.key in self.pending for row in rows):
                continue
            for row in rows:
                shown = _shown(row)
                if len(shown) > 1:
                    self._on_projections(stack, [_module(self._model, layer, p) for p, _ in shown],
                                         row)  # fmt: skip
                for path, by_input in shown if len(shown) == 1 else ():
                    hook = self._on_input if by_input else self._on_output
                    hook(stack, _module(self._model, layer, path), row.key)

    def show_logits(self, logits: Tensor) -> None:
        """What the model returns is the last stage, whatever it does behind its head."""
        self._emit(self._graph.logits, logits[:, -1])

    def attend(
        self,
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """Eager attention, operation for operation, with its tensors handed out on the way.

        Args:
            module: The attention module.
            query: [1, H, T, D], after RoPE.
            key: [1, K, T, D], after RoPE and before the repeat.
            value: [1, K, T, D].
            attention_mask: Added to the scores, [1, 1, T, T].
            scaling: 1/sqrt(D), as a rule.
            dropout: Not used: the model is in evaluation mode.
            softcap: Scores become softcap · tanh(score / softcap).
            sliding_window: Not used: it is in the mask.
            others: What else the model calls attention with.

        Raises:
            OracleError: There is something among these that the architecture does not describe.

        Source: `eager_attention_forward` of transformers' Llama, Mistral, Qwen2, Qwen3, Gemma2.
        """
        from torch import float32, matmul, tanh
        from torch.nn.functional import softmax

        given = {k: x for k, x in others.items() if k not in HARMLESS_KEYWORDS}
        given |= {"softcap": softcap, "sliding_window": sliding_window}
        unknown = [k for k, x in given.items() if x is not None and k not in self._keywords]
        if unknown:
            name = self._graph.config.architecture
            raise OracleError(
                f"its attention is called with {unknown[0]}, which {name} does not describe",
                where=self._where,
                hint="what that does to the scores is not known",
            )  # fmt: skip
        layer = module.layer_idx
        graph = self._graph
        for rotated, heads in zip(graph.of_kind(layer, Rotate), (query, key)):
            self._emit(rotated, heads.transpose(1, 2))
        groups = query.shape[1] // key.shape[1]
        scores = matmul(query, _repeat(key, groups).transpose(2, 3)) * scaling
        if softcap is not None:
            scores = tanh(scores / softcap) * softcap
        for kept in graph.of_kind(layer, Scores):
            self._emit(kept, self._masked(kept, scores))
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = softmax(scores, dim=-1, dtype=float32).to(query.dtype)
        for kept in graph.of_kind(layer, Softmax):
            self._emit(kept, weights)
        output = matmul(weights, _repeat(value, groups))
        return output.transpose(1, 2).contiguous(), weights

    def _masked(self, key: StageKey, scores: Tensor) -> Tensor:
        """Scores with zero for what no query sees: what is there differs from engine to engine."""
        from torch import from_numpy

        operation = self._graph.operation(key)
        assert isinstance(operation, Scores)
        hidden = ~operation.mask.allowed(*scores.shape[-2:])
        return scores.masked_fill(from_numpy(hidden).to(scores.device), 0.0)

    def _emit(self, key: StageKey, tensor: Tensor) -> None:
        """Pass a tensor on, unless it is not wanted.

        Raises:
            OracleError: It has not as many values as its stage should.
        """
        shape = self.pending.pop(key, None)
        if shape is None:
            return
        if tensor.numel() != math.prod(shape):
            raise OracleError(
                f"{key} has shape {list(tensor.shape)}, expected {list(shape)}", where=self._where
            )
        values = tensor.detach().float().cpu().numpy()
        self._sink(key, np.ascontiguousarray(values.reshape(shape)))

    def _on_output(self, stack: ExitStack, module: Module, key: StageKey) -> None:
        def hook(module: Module, args: Any, output: Any) -> None:
            # Decoder layers of older releases return a tuple.
            self._emit(key, output[0] if isinstance(output, tuple) else output)

        stack.callback(module.register_forward_hook(hook).remove)

    def _on_input(self, stack: ExitStack, module: Module, key: StageKey) -> None:
        def hook(module: Module, args: Any) -> None:
            self._emit(key, args[0])

        stack.callback(module.register_forward_pre_hook(hook).remove)

    def _on_projections(self, stack: ExitStack, modules: Sequence[Module], row: Row) -> None:
        """What several modules make side by side: without their biases, or with them."""
        from torch import cat

        biased = isinstance(row.stage.operation, AddBias)
        shown: dict[int, Tensor] = {}

        def hook(module: Module, args: Any, output: Tensor) -> None:
            part = next(i for i, candidate in enumerate(modules) if candidate is module)
            bare = biased or module.bias is None
            shown[part] = output if bare else _product(module, args[0])
            if len(shown) == len(modules):
                self._emit(row.key, cat([shown[i] for i in sorted(shown)], dim=-1))
                shown.clear()

        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)


def _product(linear: Module, x: Tensor) -> Tensor:
    """Multiply x by the weight alone. Output minus bias would lose x in half precision."""
    from torch.nn.functional import linear as multiply

    aligned: Any = nullcontext()
    if linear.weight.device.type == "meta":  # accelerate keeps it elsewhere between calls
        from accelerate.utils import align_module_device  # type: ignore[import-untyped]

        aligned = align_module_device(linear, x.device)
    with aligned:
        return multiply(x, linear.weight)


def _repeat(x: Tensor, groups: int) -> Tensor:
    """Each kv head `groups` times in a row: [1, K, T, D] -> [1, H, T, D]."""
    if groups == 1:
        return x
    batch, heads, tokens, dim = x.shape
    wide = x[:, :, None].expand(batch, heads, groups, tokens, dim)
    return wide.reshape(batch, heads * groups, tokens, dim)


@contextmanager
def _registered_attention(
    model: Module, function: Callable[..., Any], where: Where
) -> Iterator[None]:
    """Let the model compute attention with `function`, masked as eager attention is."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    name = f"aprtui_capture_{next(_numbers)}"
    before = model.config._attn_implementation
    AttentionInterface.register(name, function)
    # A name that the mask interface does not know gets no mask at all.
    AttentionMaskInterface.register(name, eager_mask)
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise OracleError("its code does not use transformers' attention interface",
                              where=where)  # fmt: skip
        yield
    finally:
        model.set_attn_implementation(before)
        for interface in (AttentionInterface, AttentionMaskInterface):
            # The interface has no way to unregister.
            interface._global_mapping.pop(name, None)


@contextmanager
def explained(what: str, where: Where) -> Iterator[None]:
    """Turn whatever the libraries raise into one line.

    They raise anything from OSError to KeyError for a bad file, so all of `Exception` is meant.

    Raises:
        OracleError: The block raised something other than an `AprError`.
    """
    try:
        yield
    except AprError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:300] if lines else type(error).__name__
        raise OracleError(f"{what}: {reason}", where=where) from error


def check_tokens(tokens: Sequence[int], vocab_size: int, where: Where) -> None:
    """Hold token ids against the vocabulary.

    Raises:
        OracleError: There are none, or one is outside.
    """
    if not tokens:
        raise OracleError("there are no tokens to run", where=where, hint="give a prompt")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise OracleError(
                f"token id {token} is outside the vocabulary of {vocab_size}", where=where,
                hint=f"ids are 0..{vocab_size - 1}",
            )  # fmt: skip
