"""Dump what an MLX model computes, under the names that aprtui reads. Copy this into your engine.

    model, tokenizer = mlx_lm.load("mlx-community/Qwen2.5-0.5B-Instruct-4bit")
    ids = tokenizer.encode("What is 2+2?")
    capture(model, ids, "dump.safetensors")

and then `aprtui bisect MODEL --trace dump.safetensors`. MLX has no hooks, so `__call__` of every
class that the model is made of is replaced while the model runs, and put back.
"""

import json

import mlx.core as mx
import mlx.nn as nn

# What these are given is a stage of its own: attention's result, the stream, act(gate) * up.
SHOWN_BY_INPUT = ("self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj")


def capture(model, ids, path):
    """Run `model` over the token ids once and write what its modules give to one file."""
    names = {id(module): name for name, module in model.named_modules()}
    tensors = {}
    rotated = {}

    def record(name, x, y):
        if name.endswith("self_attn.rope"):  # called with the queries, then with the keys
            layer = name.split(".")[-3]
            stage = "k_post_rope" if layer in rotated else "q_post_rope"
            rotated[layer] = True
            tokens = y.shape[2]  # [1, heads, T, D]
            tensors[f"layer-{layer}/{stage}"] = y.transpose(0, 2, 1, 3).reshape(tokens, -1)
        elif name:
            tensors[name] = y
            if name.endswith(SHOWN_BY_INPUT):
                tensors[f"{name}.input"] = x

    def hooked(original):
        def call(self, x, *args, **kwargs):
            y = original(self, x, *args, **kwargs)
            name = names.get(id(self))
            if name is not None and isinstance(y, mx.array):
                record(name, x, y)
            return y

        return call

    kinds = {type(module) for _, module in model.named_modules()}
    originals = {kind: kind.__call__ for kind in kinds if kind.__call__ is not nn.Module.__call__}
    try:
        for kind, original in originals.items():
            kind.__call__ = hooked(original)
        tensors["logits"] = model(mx.array([ids]))[:, -1]
    finally:
        for kind, original in originals.items():
            kind.__call__ = original
    mx.eval(tensors)
    facts = {"tokens": json.dumps(list(ids)), "backend": "mlx"}
    mx.save_safetensors(str(path), tensors, metadata=facts)
