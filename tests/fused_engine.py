"""A Llama as serving engines build it, in torch: fused modules, and norms that add the residual.

Modules are called in the order and with the arguments of TensorRT-LLM's and SGLang's Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Weights = Mapping[str, NDArray[np.float32]]


class Linear(nn.Module):
    """A product."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T


class Embedding(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.weight[input]


class RMSNorm(nn.Module):
    """With a residual it adds that first, and gives the sum too."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        total = hidden_states if residual is None else hidden_states + residual
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        return normed if residual is None else (normed, total)


class SiluAndMul(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return nn.functional.silu(gate) * up


class RotaryEmbedding(nn.Module):
    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        self.frequencies = theta ** (-torch.arange(0, dim, 2).double() / dim)

    def forward(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Any:
        return self._turn(positions, q), self._turn(positions, k)

    def _turn(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        half = len(self.frequencies)
        angles = positions[:, None].double() * self.frequencies
        cos, sin = (f(angles).float()[:, None] for f in (torch.cos, torch.sin))
        first, second = x.view(len(x), -1, 2, half).unbind(2)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], 2)
        return turned.reshape(x.shape)


class CausalAttention(nn.Module):
    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tokens = len(q)
        q = q.view(tokens, self.heads, -1)
        k, v = (x.view(tokens, self.kv_heads, -1).repeat_interleave(self.heads // self.kv_heads, 1)
                for x in (k, v))  # fmt: skip
        scores = torch.einsum("thd,shd->hts", q, k) * q.shape[2] ** -0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, v).reshape(tokens, -1)


class Attention(nn.Module):
    def __init__(self, weights: Weights, prefix: str, heads: int, kv_heads: int) -> None:
        super().__init__()
        parts = [torch.from_numpy(weights[f"{prefix}.{x}_proj.weight"]) for x in "qkv"]
        self.sizes = [len(part) for part in parts]
        self.qkv_proj = Linear(torch.cat(parts))
        self.rotary_emb = RotaryEmbedding(self.sizes[0] // heads, 10000.0)
        self.attn = CausalAttention(heads, kv_heads)
        self.o_proj = Linear(torch.from_numpy(weights[f"{prefix}.o_proj.weight"]))

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(hidden_states).split(self.sizes, -1)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))


class GatedMLP(nn.Module):
    def __init__(self, weights: Weights, prefix: str) -> None:
        super().__init__()
        parts = [torch.from_numpy(weights[f"{prefix}.{x}_proj.weight"]) for x in ("gate", "up")]
        self.gate_up_proj = Linear(torch.cat(parts))
        self.act_fn = SiluAndMul()
        self.down_proj = Linear(torch.from_numpy(weights[f"{prefix}.down_proj.weight"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))


class LlamaDecoderLayer(nn.Module):
    """Gives the network's output and the residual; TensorRT-LLM calls the next norm as well."""

    def __init__(self, weights: Weights, number: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        prefix = f"model.layers.{number}"
        self.self_attn = Attention(weights, f"{prefix}.self_attn", heads, kv_heads)
        self.mlp = GatedMLP(weights, f"{prefix}.mlp")
        before = weights[f"{prefix}.input_layernorm.weight"]
        after = weights[f"{prefix}.post_attention_layernorm.weight"]
        self.input_layernorm = RMSNorm(torch.from_numpy(before))
        self.post_attention_layernorm = RMSNorm(torch.from_numpy(after))
        self.calls_next_norm = False
        object.__setattr__(self, "next_norm", None)  # no module of this one

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> Any:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        elif not self.calls_next_norm:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        mixed = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(mixed, residual)
        hidden_states = self.mlp(hidden_states)
        if self.calls_next_norm:
            hidden_states, residual = self.next_norm(hidden_states, residual)
        return hidden_states, residual


class LlamaModel(nn.Module):
    def __init__(self, weights: Weights, layers: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(torch.from_numpy(weights["model.embed_tokens.weight"]))
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(weights, number, heads, kv_heads) for number in range(layers)
        )
        self.norm = RMSNorm(torch.from_numpy(weights["model.norm.weight"]))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_states, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        if self.layers[-1].calls_next_norm:
            return hidden_states
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class LMHead(Linear):
    """The logits of the last token."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input[-1:])


class LlamaForCausalLM(nn.Module):
    def __init__(
        self, weights: Weights, layers: int, heads: int, kv_heads: int, *, next_norm: bool = False
    ) -> None:
        super().__init__()
        self.model = LlamaModel(weights, layers, heads, kv_heads)
        tied = weights["model.embed_tokens.weight"]
        self.lm_head = LMHead(torch.from_numpy(weights.get("lm_head.weight", tied)))
        for layer, after in zip(self.model.layers, [*self.model.layers[1:], None]):
            layer.calls_next_norm = next_norm
            norm = self.model.norm if after is None else after.input_layernorm
            object.__setattr__(layer, "next_norm", norm)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model(input_ids, positions))
