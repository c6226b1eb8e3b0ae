"""Pocket MoE: a small Mixture-of-Experts transformer, written as mlx-lm writes its models.

The routed experts are mlx-lm's ``SwitchGLU``: that is the seam where mlx-flash streams.
B: batch, S: tokens, D: width, H: heads, E: experts.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    scaled_dot_product_attention,
)
from mlx_lm.models.switch_layers import SwitchGLU


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    vocab_size: int
    rms_norm_eps: float = 1e-6


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.heads = args.num_attention_heads
        self.scale = (args.hidden_size // self.heads) ** -0.5
        self.qkv = nn.Linear(args.hidden_size, 3 * args.hidden_size, bias=False)
        self.out = nn.Linear(args.hidden_size, args.hidden_size, bias=False)
        self.rope = nn.RoPE(args.hidden_size // self.heads)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        batch, tokens, _ = x.shape
        q, k, v = (
            part.reshape(batch, tokens, self.heads, -1).swapaxes(1, 2)
            for part in mx.split(self.qkv(x), 3, axis=-1)
        )
        offset = cache.offset if cache is not None else 0
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        y = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.out(y.swapaxes(1, 2).reshape(batch, tokens, -1))


class Experts(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.top_k = args.num_experts_per_tok
        self.gate = nn.Linear(args.hidden_size, args.num_experts, bias=False)
        self.switch_mlp = SwitchGLU(args.hidden_size, args.moe_intermediate_size, args.num_experts)

    def __call__(self, x: mx.array) -> mx.array:
        logits = self.gate(x)  # [B, S, E]
        indices = mx.argpartition(-logits, self.top_k - 1, axis=-1)[..., : self.top_k]
        scores = mx.softmax(mx.take_along_axis(logits, indices, axis=-1), axis=-1, precise=True)
        return (self.switch_mlp(x, indices) * scores[..., None]).sum(axis=-2)


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.experts = Experts(args)
        self.attention_norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.experts_norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        x = x + self.attention(self.attention_norm(x), mask, cache)
        return x + self.experts(self.experts_norm(x))


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.embedding = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.embedding(inputs)  # [B, S, D]
        caches = cache or [None] * len(self.layers)
        mask = create_attention_mask(x, caches[0])
        for layer, c in zip(self.layers, caches, strict=True):
            x = layer(x, mask, c)
        return self.head(self.norm(x))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """From the layout that is published: a tensor per expert, gate and up in one.

        mlx-flash needs no table of this. It runs this function on arrays that hold nothing,
        and reads off where the bytes of each expert lie.
        """
        for i in range(self.args.num_hidden_layers):
            raw, ours = f"blocks.{i}.expert", f"layers.{i}.experts.switch_mlp"
            if f"{raw}.0.w_in" not in weights:
                continue  # it is in MLX's layout already
            names = [f"{raw}.{e}" for e in range(self.args.num_experts)]
            w_in = mx.stack([weights.pop(f"{name}.w_in") for name in names])
            gate, up = mx.split(w_in, 2, axis=1)
            weights[f"{ours}.gate_proj.weight"] = gate
            weights[f"{ours}.up_proj.weight"] = up
            w_out = mx.stack([weights.pop(f"{name}.w_out") for name in names])
            weights[f"{ours}.down_proj.weight"] = w_out
        return {name.replace("blocks.", "layers."): array for name, array in weights.items()}
