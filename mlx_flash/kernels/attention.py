"""Attention and rotary embeddings, by the compiled kernels.

The references are ``mx.fast.rope`` and mlx-lm's ``scaled_dot_product_attention`` and classes:
same weights, same calls, same caches. Keys and values are read where the cache has them, once
for all query heads that share them, and no matrix of scores is ever whole in memory.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.nemotron_h import NemotronHAttention
from mlx_lm.models.qwen3_next import Qwen3NextAttention

from .cpu import kernels_for, swap

Mask = mx.array | str | None


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    """``scaled_dot_product_attention`` of mlx-lm, and that itself where no kernel applies.

    Masks that are arrays, quantized caches and mixed dtypes are such cases.

    Args:
        queries: [B, H, L, D]
        keys: [B, Hk, N, D], or what a quantized cache has.
        values: [B, Hk, N, Dv], or the same.
        cache: The cache that keys and values are of, or None.
        scale: What the products are multiplied by.
        mask: None, ``"causal"``, or an array as MLX takes it.
        sinks: [H] logits that take part in the softmax, or None.

    Returns:
        [B, H, L, Dv], of which the transpose [B, L, H, Dv] is contiguous if a kernel made it.
    """
    y: mx.array
    kernels = None
    plain = mask is None or (isinstance(mask, str) and mask == "causal")
    if plain and not hasattr(cache, "bits") and queries.dtype == keys.dtype == values.dtype:
        kernels = kernels_for(queries, *([] if sinks is None else [sinks]))
    if kernels is None:
        y = scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    else:
        y = kernels.attention(queries, keys, values, scale, mask, sinks)
    return y


class NativeRoPE(nn.RoPE):
    """``mlx.nn.RoPE``."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        kernels = kernels_for(x)
        y: mx.array
        if kernels is None or x.ndim < 3:
            y = super().__call__(x, offset)
        else:
            y = kernels.rope(x, self.dims, self.traditional, self.base, self.scale, offset)
        return y


class NativeQwen3NextAttention(Qwen3NextAttention):
    """``mlx_lm.models.qwen3_next.Qwen3NextAttention``, which is Qwen3.5's too."""

    def __call__(self, x: mx.array, mask: Mask = None, cache: Any | None = None) -> mx.array:
        # x: [B, L, D] -> [B, L, D]
        kernels = kernels_for(x)
        y: mx.array
        if kernels is None:
            y = super().__call__(x, mask, cache)
            return y
        batch, tokens, _ = x.shape
        both = self.q_proj(x).reshape(batch, tokens, self.num_attention_heads, -1)
        queries, gate = mx.split(both, 2, axis=-1)  # [B, L, H, head_dim] each
        keys = self.k_norm(self.k_proj(x).reshape(batch, tokens, self.num_key_value_heads, -1))
        values = self.v_proj(x).reshape(batch, tokens, self.num_key_value_heads, -1)
        queries, keys, values = (
            t.transpose(0, 2, 1, 3) for t in (self.q_norm(queries), keys, values)
        )
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = attention(queries, keys, values, cache, self.scale, mask).transpose(0, 2, 1, 3)
        y = self.o_proj(kernels.sigmoid_gate(out, gate).reshape(batch, tokens, -1))
        return y


class NativeNemotronHAttention(NemotronHAttention):
    """``mlx_lm.models.nemotron_h.NemotronHAttention``: no positions, no norms."""

    def __call__(self, x: mx.array, mask: Mask = None, cache: Any | None = None) -> mx.array:
        # x: [B, L, D] -> [B, L, D]
        batch, tokens, _ = x.shape
        queries, keys, values = (
            project(x).reshape(batch, tokens, heads, -1).transpose(0, 2, 1, 3)
            for project, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_key_value_heads),
                (self.v_proj, self.num_key_value_heads),
            )
        )
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = attention(queries, keys, values, cache, self.scale, mask).transpose(0, 2, 1, 3)
        y: mx.array = self.o_proj(out.reshape(batch, tokens, -1))
        return y


def covers(model: nn.Module) -> bool:
    """Whether no layer of a model calls mlx-lm's attention, which keeps all its scores at once."""
    return not any(
        scaled_dot_product_attention.__name__ in _names(type(module))
        for module in model.modules()
        if type(module) not in CLASSES
    )


def _names(kind: type) -> tuple[str, ...]:
    code = getattr(kind.__call__, "__code__", None)
    return code.co_names if code is not None else ()


def use_native(model: nn.Module) -> None:
    """Let attention and rotary embeddings in a model be computed by the extension, where it can."""
    swap(model, CLASSES)


CLASSES: dict[type, type] = {
    nn.RoPE: NativeRoPE,
    Qwen3NextAttention: NativeQwen3NextAttention,
    NemotronHAttention: NativeNemotronHAttention,
}
