"""Whole blocks of Qwen3.5's decoder layer, for one token of each sequence at a time.

The reference is mlx-lm's ``DecoderLayer``, whose submodules still compute prompts. One token in
the stock layer is some sixty nodes of MLX's graph, each cheaper than its own scheduling.
"""

import itertools
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache
from mlx_lm.models.qwen3_5 import DecoderLayer
from mlx_lm.models.qwen3_next import Qwen3NextSparseMoeBlock

from .experts import NativeSwitch, experts_of, supports, supports_weights, weights_of
from .mlp import softmax_topk


class NativeDecoderLayer(DecoderLayer):
    """A ``DecoderLayer`` that decodes in two fused blocks. Same weights, same caches."""

    def __call__(
        self, x: mx.array, mask: mx.array | None = None, cache: Any | None = None
    ) -> mx.array:
        # x: [B, S, D] -> [B, S, D]
        if x.shape[1] != 1 or mask is not None:
            y: mx.array = super().__call__(x, mask, cache)
            return y
        mixed = self._delta(x, cache) if self.is_linear else self._attend(x, cache)
        out: mx.array = self._blocks["moe"](mixed)
        return out

    def _delta(self, x: mx.array, cache: Any) -> mx.array:
        fits = type(cache) is ArraysCache and cache.lengths is None and cache[0] is not None
        if not fits or cache[0].dtype != x.dtype:
            r: mx.array = x + self.linear_attn(self.input_layernorm(x), None, cache)
            return r
        x, cache[0], cache[1] = self._blocks["mixer"](x, cache[0], cache[1])
        cache.advance(1)
        return x

    def _attend(self, x: mx.array, cache: Any) -> mx.array:
        room = type(cache) is KVCache and cache.keys is not None
        if not room or cache.offset >= cache.keys.shape[2] or cache.keys.dtype != x.dtype:
            r: mx.array = x + self.self_attn(self.input_layernorm(x), None, cache)
            return r
        x, cache.keys, cache.values = self._blocks["mixer"](
            x, cache.keys, cache.values, cache.offset
        )
        cache.offset += 1
        return x


class NativeSparseMoeBlock(Qwen3NextSparseMoeBlock):
    """The MoE block with the routed sum taken by the experts' kernel. Same weights."""

    def __call__(self, x: mx.array) -> mx.array:
        # x: [B, S, D] -> [B, S, D]
        indices, scores = softmax_topk(self.gate(x), self.top_k, self.norm_topk_prob)
        shared = mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        y: mx.array = self.switch_mlp.weighted(x, indices, scores) + shared
        return y


def use_native(model: nn.Module, native: ModuleType) -> None:
    """Let every decoder layer whose weights have kernels decode in fused blocks.

    Call it when the weights are in memory and the switch layers are ``NativeSwitch``.
    """
    for _, layer in model.named_modules():
        if type(layer) is DecoderLayer and _supported(layer):
            blocks = {"mixer": _mixer(layer, native), "moe": _moe(layer, native)}
            object.__setattr__(layer, "_blocks", blocks)
            layer.__class__ = NativeDecoderLayer
            layer.mlp.__class__ = NativeSparseMoeBlock
    for layer, after in itertools.pairwise(getattr(model, "layers", ())):
        if type(layer) is type(after) is NativeDecoderLayer and after.mlp.switch_mlp.pool:
            _look_ahead(layer, after, native)


def _look_ahead(layer: Any, after: Any, native: ModuleType) -> None:
    """Let a layer's MoE begin the reads that the MoE after it will probably want."""
    norm, moe = after.post_attention_layernorm, after.mlp
    layer._blocks["moe"].look_ahead(
        norm.weight, norm.eps, weights_of(moe.gate, native), moe.top_k, moe.switch_mlp.pool
    )


def _supported(layer: Any) -> bool:
    moe = layer.mlp
    if not isinstance(moe, Qwen3NextSparseMoeBlock) or not isinstance(moe.switch_mlp, NativeSwitch):
        return False
    linears = [moe.gate, moe.shared_expert_gate]
    if layer.is_linear:
        mixer = layer.linear_attn
        linears += [mixer.in_proj_qkv, mixer.in_proj_z, mixer.in_proj_b, mixer.in_proj_a]
        linears += [mixer.out_proj]
    else:
        mixer = layer.self_attn
        if type(mixer.rope) is not nn.RoPE or mixer.rope.traditional:
            return False
        linears += [mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj]
    return supports(moe.shared_expert) and all(map(supports_weights, linears))


def _moe(layer: Any, native: ModuleType) -> Any:
    norm, moe = layer.post_attention_layernorm, layer.mlp
    return native.MoeBlock(
        norm.weight,
        norm.eps,
        weights_of(moe.gate, native),
        moe.top_k,
        moe.norm_topk_prob,
        moe.switch_mlp.experts,
        experts_of(moe.shared_expert, native),
        weights_of(moe.shared_expert_gate, native),
    )


def _mixer(layer: Any, native: ModuleType) -> Any:
    norm = layer.input_layernorm
    if layer.is_linear:
        net = layer.linear_attn
        return native.DeltaBlock(
            norm.weight,
            norm.eps,
            weights_of(net.in_proj_qkv, native),
            weights_of(net.in_proj_z, native),
            weights_of(net.in_proj_b, native),
            weights_of(net.in_proj_a, native),
            weights_of(net.out_proj, native),
            net.conv1d.weight,
            net.A_log,
            net.dt_bias,
            net.norm.weight,
            net.norm.eps,
            net.num_k_heads,
            net.num_v_heads,
            net.head_k_dim,
            net.head_v_dim,
        )
    attention = layer.self_attn
    return native.AttentionBlock(
        norm.weight,
        norm.eps,
        weights_of(attention.q_proj, native),
        weights_of(attention.k_proj, native),
        weights_of(attention.v_proj, native),
        weights_of(attention.o_proj, native),
        attention.q_norm.weight,
        attention.k_norm.weight,
        attention.q_norm.eps,
        attention.num_attention_heads,
        attention.num_key_value_heads,
        attention.head_dim,
        attention.rope.dims,
        attention.rope.base,
        attention.rope.scale,
        attention.scale,
    )
