"""Gated delta nets of Qwen3.5 and Qwen3-Next, by the compiled kernels.

The reference is mlx-lm's class: same weights, same call, same caches. Between the projections
there are four passes over the tokens, convolution, gates, recurrence and gated norm, where MLX's
CPU backend has dozens of operations for every single token.
"""

from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.qwen3_5 import GatedDeltaNet
from mlx_lm.models.qwen3_next import Qwen3NextGatedDeltaNet

from .cpu import swap
from .recurrence import conv_silu, kernels_for_mixer


class NativeGatedDeltaNet(GatedDeltaNet):
    """``mlx_lm.models.qwen3_5.GatedDeltaNet``.

    Masks, sequences of several lengths and shards are left to the base class.
    """

    def __call__(
        self, inputs: mx.array, mask: mx.array | None = None, cache: Any | None = None
    ) -> mx.array:
        # inputs: [B, S, D] -> [B, S, D]
        kernels = _kernels(self, inputs, mask, cache)
        y: mx.array
        if kernels is None or self.sharding_group is not None:
            y = super().__call__(inputs, mask, cache)
            return y
        batch, tokens, _ = inputs.shape
        out = _mix(
            kernels,
            self,
            self.in_proj_qkv(inputs),
            self.in_proj_z(inputs).reshape(batch, tokens, self.num_v_heads, self.head_v_dim),
            self.in_proj_a(inputs),
            self.in_proj_b(inputs),
            cache,
        )
        y = self.out_proj(out)
        return y


class NativeQwen3NextGatedDeltaNet(Qwen3NextGatedDeltaNet):
    """``mlx_lm.models.qwen3_next.Qwen3NextGatedDeltaNet``.

    Masks and sequences of several lengths are left to the base class.
    """

    def __call__(
        self, inputs: mx.array, mask: mx.array | None = None, cache: Any | None = None
    ) -> mx.array:
        # inputs: [B, S, D] -> [B, S, D]
        kernels = _kernels(self, inputs, mask, cache)
        y: mx.array
        if kernels is None:
            y = super().__call__(inputs, mask, cache)
            return y
        batch, tokens, _ = inputs.shape
        q, k, v, z, b, a = self.fix_query_key_value_ordering(
            self.in_proj_qkvz(inputs), self.in_proj_ba(inputs)
        )
        qkv = mx.concatenate([t.reshape(batch, tokens, -1) for t in (q, k, v)], axis=-1)
        y = self.out_proj(_mix(kernels, self, qkv, z, a, b, cache))
        return y


def use_native(model: nn.Module) -> None:
    """Let the gated delta nets in a model be computed by the extension, where it can."""
    swap(model, CLASSES)


def _kernels(
    net: Any, inputs: mx.array, mask: mx.array | None, cache: Any | None
) -> ModuleType | None:
    return kernels_for_mixer(net.conv1d, cache, mask, inputs, net.A_log, net.dt_bias)


def _mix(
    kernels: ModuleType,
    net: Any,
    qkv: mx.array,
    z: mx.array,
    a: mx.array,
    b: mx.array,
    cache: Any | None,
) -> mx.array:
    # qkv: [B, S, 2 Hk Dk + Hv Dv], z: [B, S, Hv, Dv], a, b: [B, S, Hv] -> [B, S, Hv Dv]
    batch, tokens, _ = qkv.shape
    history, state = (None, None) if cache is None else (cache[0], cache[1])
    mixed, history = conv_silu(kernels, net.conv1d, qkv, history)
    q, k, v = mx.split(mixed, [net.key_dim, 2 * net.key_dim], axis=-1)
    if state is None:
        state = mx.zeros((batch, net.num_v_heads, net.head_v_dim, net.head_k_dim))
    g, beta = kernels.gated_delta_gates(a, b, net.A_log, net.dt_bias)
    y, state = kernels.gated_delta(
        q.reshape(batch, tokens, net.num_k_heads, net.head_k_dim),
        k.reshape(batch, tokens, net.num_k_heads, net.head_k_dim),
        v.reshape(batch, tokens, net.num_v_heads, net.head_v_dim),
        g,
        beta,
        state,
        normalize=True,
    )
    if cache is not None:
        cache[0], cache[1] = history, state
        cache.advance(tokens)
    out: mx.array = net.norm(y, z).reshape(batch, tokens, -1)
    return out


CLASSES: dict[type, type] = {
    GatedDeltaNet: NativeGatedDeltaNet,
    Qwen3NextGatedDeltaNet: NativeQwen3NextGatedDeltaNet,
}
