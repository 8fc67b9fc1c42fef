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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.plan import Plan, check_layers
from aprcore.ground.errors import AprError, OracleError, Where
from aprcore.network.graph import BY_NAME, StageKey, resolve_shape, stage_keys

Float32 = NDArray[np.float32]
Sink = Callable[[StageKey, Float32], None]
Tensor = Any  # torch.Tensor; torch is no dependency of this package
Module = Any  # torch.nn.Module

PROJECTIONS = tuple(f"self_attn.{letter}_proj" for letter in "qkv")

# Stages that are what a module of a decoder layer returns ("": the layer itself) ...
MODULE_OUTPUTS = {
    "attn_norm": "input_layernorm",
    "attn_out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_silu": "mlp.act_fn",
    "ffn_out": "mlp.down_proj",
    "post_ffn_residual": "",
}
# ... and those that one is given.
MODULE_INPUTS = {
    "attention": "self_attn.o_proj",
    "post_attn_residual": "post_attention_layernorm",
    "ffn_swigl": "mlp.down_proj",
}

_numbers = itertools.count()  # of registrations in this process


def capture(
    model: Module,
    tokens: Sequence[int],
    sink: Sink,
    layers: range | None = None,
    *,
    where: Where = None,
) -> None:
    """Run a transformers model over `tokens` and hand each stage tensor to `sink` as it is made.

    Tensors arrive in the order in which the model computes them, as float32 in canonical shape
    (see `aprcore.network.graph`). They may share memory with the model's own.

    Args:
        model: A `*ForCausalLM` of a supported architecture, in evaluation mode.
        tokens: Token ids, [T].
        sink: Called with each key and its values.
        layers: Layers to keep, or None for all.
        where: The model's place, for errors.

    Raises:
        OracleError: The model is not built like a supported one, uses a sliding window that the
            tokens reach, fails while it runs, or did not show a stage that it should have.
    """
    import torch

    check_tokens(tokens, model.get_input_embeddings().weight.shape[0], where)
    check_window(model.config, len(tokens), where)
    taps = _Taps(model, len(tokens), sink, layers, where)
    with ExitStack() as stack:
        taps.attach(stack)
        stack.enter_context(_registered_attention(model, taps.attend, where))
        stack.enter_context(explained("the model failed while it ran", where))
        stack.enter_context(torch.inference_mode())
        device = model.get_input_embeddings().weight.device
        # Weights that accelerate keeps elsewhere are on no device; its hooks move the ids.
        ids = torch.tensor([list(tokens)], device="cpu" if device.type == "meta" else device)
        model(input_ids=ids, use_cache=False)
    if taps.pending:
        names = ", ".join(key.path for key in taps.pending)
        raise OracleError(f"the model ran without showing {names}", where=where)


def expected_keys(model: Module, layers: range | None, where: Where = None) -> tuple[StageKey, ...]:
    """The tensors that a capture yields, in the table's order.

    Raises:
        PlanError: The range holds no layer of the model.
        OracleError: The model is not built like a supported one.
    """
    _check_structure(model, where)
    num_layers = model.config.num_hidden_layers
    check_layers(layers, num_layers)
    keys = stage_keys(num_layers, _features(model))
    return tuple(filter(Plan(layers=layers).wants, keys))


def _features(model: Module) -> frozenset[str]:
    attention = [layer.self_attn for layer in model.model.layers]
    biased = any(m.bias is not None for a in attention for m in (a.q_proj, a.k_proj, a.v_proj))
    return frozenset({"dense"} | ({"qkv_bias"} if biased else set()))


class _Taps:
    """The hooks of one pass.

    Attributes:
        pending: Shapes of the tensors that are still to come, by key.
    """

    def __init__(
        self, model: Module, num_tokens: int, sink: Sink, layers: range | None, where: Where
    ) -> None:
        keys = expected_keys(model, layers, where)
        self._model = model
        self._sink = sink
        self._where = where
        sizes = _sizes(model, num_tokens)
        self.pending: dict[StageKey, tuple[int, ...]] = {
            key: resolve_shape(BY_NAME[key.stage].shape, sizes) for key in keys
        }

    def attach(self, stack: ExitStack) -> None:
        """Hook every module that makes or receives a wanted tensor; the stack undoes it."""
        self._on_output(stack, self._model.get_input_embeddings(), 0, "embedding")
        for number, layer in enumerate(self._model.model.layers):
            if StageKey(number, "attn_norm") not in self.pending:
                continue
            for stage, path in MODULE_OUTPUTS.items():
                self._on_output(stack, layer.get_submodule(path), number, stage)
            for stage, path in MODULE_INPUTS.items():
                self._on_input(stack, layer.get_submodule(path), number, stage)
            self._on_projections(stack, [layer.get_submodule(p) for p in PROJECTIONS], number)
        self._on_output(stack, self._model.model.norm, None, "final_norm")

        def last_token(module: Module, args: Any, logits: Tensor) -> None:
            self._emit(None, "lm_head", logits[:, -1])

        head = self._model.get_output_embeddings()
        stack.callback(head.register_forward_hook(last_token).remove)

    def attend(
        self,
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Eager attention, operation for operation, with its tensors handed out on the way.

        Args:
            module: The attention module.
            query: [1, H, T, D], after RoPE.
            key: [1, K, T, D], after RoPE and before the repeat.
            value: [1, K, T, D].
            attention_mask: Added to the scores, [1, 1, T, T].
            scaling: 1/sqrt(D).
            dropout: Not used: the model is in evaluation mode.

        Source: `eager_attention_forward` of transformers' Llama, Mistral, Qwen2 and Qwen3.
        """
        from torch import float32, matmul
        from torch.nn.functional import softmax

        layer = module.layer_idx
        self._emit(layer, "q_post_rope", query.transpose(1, 2))
        self._emit(layer, "k_post_rope", key.transpose(1, 2))
        groups = query.shape[1] // key.shape[1]
        scores = matmul(query, _repeat(key, groups).transpose(2, 3)) * scaling
        self._emit(layer, "attn_scores", scores.tril())
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = softmax(scores, dim=-1, dtype=float32).to(query.dtype)
        self._emit(layer, "attn_softmax", weights.tril())
        output = matmul(weights, _repeat(value, groups))
        return output.transpose(1, 2).contiguous(), weights

    def _emit(self, layer: int | None, stage: str, tensor: Tensor) -> None:
        """Pass a tensor on, unless it is not wanted.

        Raises:
            OracleError: It has not as many values as its stage should.
        """
        key = StageKey(layer, stage)
        shape = self.pending.pop(key, None)
        if shape is None:
            return
        if tensor.numel() != math.prod(shape):
            raise OracleError(
                f"{key} has shape {list(tensor.shape)}, expected {list(shape)}", where=self._where
            )
        values = tensor.detach().float().cpu().numpy()
        self._sink(key, np.ascontiguousarray(values.reshape(shape)))

    def _on_output(self, stack: ExitStack, module: Module, layer: int | None, stage: str) -> None:
        def hook(module: Module, args: Any, output: Any) -> None:
            # Decoder layers of older releases return a tuple.
            self._emit(layer, stage, output[0] if isinstance(output, tuple) else output)

        stack.callback(module.register_forward_hook(hook).remove)

    def _on_input(self, stack: ExitStack, module: Module, layer: int, stage: str) -> None:
        def hook(module: Module, args: Any) -> None:
            self._emit(layer, stage, args[0])

        stack.callback(module.register_forward_pre_hook(hook).remove)

    def _on_projections(self, stack: ExitStack, modules: Sequence[Module], layer: int) -> None:
        """q, k and v side by side, once without and once with their biases."""
        from torch import cat

        plain: dict[int, Tensor] = {}
        biased: dict[int, Tensor] = {}

        def hook(module: Module, args: Any, output: Tensor) -> None:
            part = next(i for i, candidate in enumerate(modules) if candidate is module)
            plain[part] = output if module.bias is None else _product(module, args[0])
            biased[part] = output
            if len(plain) == len(modules):
                self._emit(layer, "qkv_matmul", cat([plain[i] for i in sorted(plain)], dim=-1))
                self._emit(layer, "qkv_bias", cat([biased[i] for i in sorted(biased)], dim=-1))
                plain.clear()
                biased.clear()

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


def check_window(config: Any, num_tokens: int, where: Where) -> None:
    """Refuse a pass whose attention is not full: no stage of the table describes it.

    Source: layers of Qwen2 and Qwen3 say what they do in `layer_types`; all of Mistral's use the
    window if there is one; Llama has none.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ()
    on = "sliding_attention" in kinds or (config.model_type == "mistral" and not kinds)
    if on and window is not None and num_tokens > window:
        raise OracleError(
            f"{num_tokens} tokens are more than its sliding window of {window}",
            where=where, hint=f"capture at most {window} tokens",
        )  # fmt: skip


def _check_structure(model: Module, where: Where) -> None:
    """Whether the model has the modules that the hooks go to.

    Raises:
        OracleError: One is missing.
    """
    layer = ("", *PROJECTIONS, *MODULE_OUTPUTS.values(), *MODULE_INPUTS.values())
    num_layers = model.config.num_hidden_layers
    paths = [f"model.layers.{n}.{path}".rstrip(".") for n in range(num_layers) for path in layer]
    for path in ("model.norm", *paths):
        try:
            model.get_submodule(path)
        except AttributeError as error:
            raise OracleError(
                f"architecture {model.config.model_type!r} has no module {path}", where=where,
                hint="capturing needs a model that is built like Llama, Mistral, Qwen2 or Qwen3",
            ) from error  # fmt: skip


def _sizes(model: Module, num_tokens: int) -> dict[str, int]:
    """Numbers for the letters of the table's shapes, from the modules themselves."""
    layer, heads = model.model.layers[0], model.config.num_attention_heads
    vocab_size, hidden_size = model.get_output_embeddings().weight.shape
    head_dim = layer.self_attn.q_proj.out_features // heads
    return {
        "T": num_tokens,
        "S": num_tokens,
        "H": heads,
        "K": layer.self_attn.k_proj.out_features // head_dim,
        "D": head_dim,
        "E": hidden_size,
        "F": layer.mlp.gate_proj.out_features,
        "V": vocab_size,
    }
