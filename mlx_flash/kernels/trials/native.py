"""The compiled kernels of the CPU, each beside what MLX's CPU backend has for it."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta as stock_delta
from mlx_lm.models import ssm as stock_ssm
from mlx_lm.models.cache import ArraysCache, KVCache
from mlx_lm.models.nemotron_h import MambaRMSNormGated
from mlx_lm.models.qwen3_5 import DecoderLayer, TextModelArgs
from mlx_lm.models.qwen3_next import Qwen3NextMLP, Qwen3NextRMSNormGated
from mlx_lm.models.switch_layers import SwitchLinear

from .. import linear, mlp, native, norm, qwen3_5
from ..experts import NativeSwitch
from . import Case, Form, Sizes, Trial, cases, filled, normal, routes, weight_bytes

TAPS = 4
EPS = 1e-6


def trials(sizes: Sizes) -> list[Trial]:
    """Every kernel of the extension. In float32, where MLX's CPU backend is at its best."""
    return [
        *_experts(sizes),
        *_linears(sizes),
        *_small(sizes),
        *_recurrences(sizes),
        *_attention(sizes),
        *_blocks(sizes),
    ]


def _experts(s: Sizes) -> Iterator[Trial]:
    shape = f"{s.top_k} of {s.experts}, {s.hidden}x{s.middle}"
    for name, form in cases.FORMS.items():
        make = functools.partial(cases.experts, s, form, 1, mx.float32, _switch)
        yield Trial(f"experts {name}", shape, mx.float32, make)
    for name in cases.COMMON:
        make = functools.partial(cases.experts, s, cases.FORMS[name], 1, mx.bfloat16, _switch)
        yield Trial(f"experts {name}", shape, mx.bfloat16, make)
        make = functools.partial(cases.experts, s, cases.FORMS[name], s.prompt, mx.float32, _switch)
        yield Trial(f"experts {name}", f"{s.prompt} rows, {shape}", mx.float32, make)
    make = functools.partial(
        cases.experts, s, cases.FORMS["mxfp4"], 1, mx.float32, _switch, gated=False
    )
    yield Trial("experts relu2 mxfp4", shape, mx.float32, make)


def _linears(s: Sizes) -> Iterator[Trial]:
    shape = f"{s.hidden}x{s.hidden}"
    for name, form in cases.FORMS.items():
        make = functools.partial(_linear_case, s, form, 1)
        yield Trial(f"linear {name}", shape, mx.float32, make)
    for name in (*cases.COMMON, "dense"):
        make = functools.partial(_linear_case, s, cases.FORMS[name], 1, mx.bfloat16)
        yield Trial(f"linear {name}", shape, mx.bfloat16, make)
        make = functools.partial(_linear_case, s, cases.FORMS[name], s.prompt)
        yield Trial(f"linear {name}", f"{s.prompt} rows, {shape}", mx.float32, make)
    shape = f"{s.top_k} of {s.experts}, {s.hidden}x{s.middle}"
    for name in (*cases.COMMON, "dense"):
        make = functools.partial(_gathered_case, s, cases.FORMS[name])
        yield Trial(f"gathered {name}", shape, mx.float32, make)


def _linear_case(s: Sizes, form: Form, rows: int, dtype: mx.Dtype = mx.float32) -> Case:
    stock = filled(nn.Sequential(nn.Linear(s.hidden, s.hidden, bias=False)), form, dtype)
    variants = [(normal(i, 1, rows, s.hidden, dtype=dtype),) for i in range(cases.CALLS)]
    return cases.module(stock, linear.use_native, variants, weight_bytes(stock))


def _gathered_case(s: Sizes, form: Form) -> Case:
    stacked = SwitchLinear(s.hidden, s.middle, s.experts, bias=False)
    stock = filled(_Stack(stacked), form, mx.float32, s.experts)
    variants = [(normal(i, 1, 1, 1, 1, s.hidden), routes(i, 1, s)) for i in range(cases.CALLS)]
    return cases.module(
        stock, linear.use_native, variants, weight_bytes(stock, s.top_k / s.experts)
    )


class _Stack(nn.Module):
    """A stack of matrices below a module, where they can be exchanged."""

    def __init__(self, stack: nn.Module):
        super().__init__()
        self.stack = stack

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        y: mx.array = self.stack(x, indices)
        return y


def _small(s: Sizes) -> Iterator[Trial]:
    wide = f"{s.hidden}"
    groups = s.hidden // 4
    for name, module, takes in (
        ("rms norm", nn.RMSNorm(s.hidden, EPS), 1),
        ("gated rms norm", Qwen3NextRMSNormGated(s.hidden, EPS), 2),
        ("grouped gated rms norm", MambaRMSNormGated(s.hidden, EPS, groups), 2),
    ):
        yield Trial(name, wide, mx.float32, functools.partial(_norm_case, s, module, takes))
    yield Trial("gated mlp", f"{s.hidden}x{s.middle}", mx.float32, lambda: _mlp_case(s))
    gate = (normal(i, 1, s.heads, s.head_dim) for i in (1, 2))
    yield cases.function(
        "sigmoid gate",
        f"{s.heads}x{s.head_dim}",
        lambda x, z: _kernels().sigmoid_gate(x, z),
        lambda x, z: x * mx.sigmoid(z),
        *gate,
    )
    yield cases.function(
        "router",
        f"{s.top_k} of {4 * s.experts}",
        lambda logits: cases.dense(logits, *_kernels().softmax_topk(logits, s.top_k, True)),
        lambda logits: cases.dense(logits, *cases.stock_topk(logits, s.top_k)),
        normal(3, 1, 4 * s.experts),
    )


def _norm_case(s: Sizes, module: nn.Module, takes: int) -> Case:
    stock = filled(module, None, mx.float32)
    variants = [
        tuple(normal(i + j, 1, 1, s.hidden) for j in range(takes)) for i in range(cases.CALLS)
    ]
    return cases.module(stock, norm.use_native, variants, (2 + takes) * variants[0][0].nbytes)


def _mlp_case(s: Sizes) -> Case:
    stock = filled(Qwen3NextMLP(s.hidden, s.middle), None, mx.float32)
    variants = [(normal(i, 1, 1, s.hidden),) for i in range(cases.CALLS)]
    return cases.module(stock, mlp.use_native, variants, weight_bytes(stock))


def _recurrences(s: Sizes) -> Iterator[Trial]:
    keys = s.heads // 4
    channels = (2 * keys + s.heads) * s.head_dim
    for rows in (1, s.prompt):
        yield cases.function(
            "convolution",
            f"{cases.said_rows(rows)}, {channels}, {TAPS} taps",
            lambda x, before, w: _kernels().conv1d(before, x, w, None, True),
            _stock_conv,
            normal(0, 1, rows, channels),
            normal(1, 1, TAPS - 1, channels),
            normal(2, channels, TAPS, 1),
        )
        heads = (1, rows, s.heads)
        yield cases.function(
            "gated delta gates",
            f"{cases.said_rows(rows)}, {s.heads}",
            lambda a, b, log_a, bias: _kernels().gated_delta_gates(a, b, log_a, bias),
            lambda a, b, log_a, bias: (stock_delta.compute_g(log_a, a, bias), mx.sigmoid(b)),
            normal(0, *heads),
            normal(1, *heads),
            normal(2, s.heads),
            normal(3, s.heads),
        )
        yield cases.function(
            "gated delta rule",
            f"{cases.said_rows(rows)}, {s.heads}x{s.head_dim}x{s.head_dim}",
            lambda *arrays: _kernels().gated_delta(*arrays, True),
            _stock_delta,
            normal(0, 1, rows, keys, s.head_dim),
            normal(1, 1, rows, keys, s.head_dim),
            normal(2, *heads, s.head_dim),
            mx.sigmoid(normal(3, *heads)),
            mx.sigmoid(normal(4, *heads)),
            normal(5, 1, s.heads, s.head_dim, s.head_dim),
        )
        yield cases.function(
            "mamba2",
            f"{cases.said_rows(rows)}, {s.heads}x{s.head_dim}x{s.head_dim}",
            lambda *arrays: _kernels().ssm(*arrays, (0.001, 100.0)),
            lambda *arrays: stock_ssm.ssm_update(*arrays, (0.001, 100.0)),
            normal(0, *heads, s.head_dim),
            normal(1, s.heads),
            normal(2, 1, rows, keys, s.head_dim),
            normal(3, 1, rows, keys, s.head_dim),
            normal(4, s.heads),
            normal(5, *heads),
            normal(6, s.heads),
            normal(7, 1, s.heads, s.head_dim, s.head_dim),
        )


def _stock_conv(x: mx.array, before: mx.array, w: mx.array) -> tuple[mx.array, mx.array]:
    seen = mx.concatenate([before, x], axis=1)
    return nn.silu(mx.conv1d(seen, w, groups=w.shape[0])), seen[:, 1 - TAPS :]


def _stock_delta(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    q, k = stock_delta.normalize_qk(q, k, inv_scale=q.shape[-1] ** -0.5, eps=EPS)
    y: tuple[mx.array, mx.array] = stock_delta.gated_delta_ops(q, k, v, g, beta, state)
    return y


def _attention(s: Sizes) -> Iterator[Trial]:
    scale = s.head_dim**-0.5
    for rows, mask in ((1, None), (s.prompt, "causal")):
        yield cases.function(
            "rotary embedding",
            f"{cases.said_rows(rows)}, {s.heads}x{s.head_dim}",
            lambda x: _kernels().rope(x, s.head_dim, False, 1e6, 1.0, s.context),
            lambda x: mx.fast.rope(
                x, s.head_dim, traditional=False, base=1e6, scale=1.0, offset=s.context
            ),
            normal(0, 1, s.heads, rows, s.head_dim),
        )
        yield cases.function(
            "attention",
            f"{cases.said_rows(rows)} on {s.context}, {s.heads}x{s.head_dim}",
            lambda q, k, v, m=mask: _kernels().attention(q, k, v, scale, m),
            lambda q, k, v, m=mask: mx.fast.scaled_dot_product_attention(
                q, k, v, scale=scale, mask=m
            ),
            normal(0, 1, s.heads, rows, s.head_dim),
            normal(1, 1, s.heads // 4, s.context, s.head_dim),
            normal(2, 1, s.heads // 4, s.context, s.head_dim),
        )


def _blocks(s: Sizes) -> Iterator[Trial]:
    for name, layer in (("delta", 0), ("attention", 3)):
        make = functools.partial(_block_case, s, layer)
        yield Trial(
            f"{name} block 4 bit", f"{s.hidden}, {s.top_k} of {s.experts}", mx.float32, make
        )


def _block_case(s: Sizes, number: int) -> Case:
    args = TextModelArgs(
        hidden_size=s.hidden,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads // 4,
        head_dim=s.head_dim,
        linear_num_value_heads=s.heads,
        linear_num_key_heads=s.heads // 4,
        linear_key_head_dim=s.head_dim,
        linear_value_head_dim=s.head_dim,
        linear_conv_kernel_dim=TAPS,
        num_experts=s.experts,
        num_experts_per_tok=s.top_k,
        shared_expert_intermediate_size=s.middle,
        moe_intermediate_size=s.middle,
        rope_parameters={"type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    )
    stock = filled(DecoderLayer(args, number), cases.FORMS["4 bit"], mx.float32, s.experts)
    ours = copy.deepcopy(stock)
    ours.mlp.switch_mlp = NativeSwitch(ours.mlp.switch_mlp, _kernels())
    qwen3_5.use_native(ours, _kernels())

    def step(layer: Any, x: mx.array, *held: mx.array) -> tuple[mx.array, ...]:
        cache: Any = ArraysCache(2) if layer.is_linear else KVCache()
        if layer.is_linear:
            cache[0], cache[1] = held
            return layer(x, None, cache), cache[0], cache[1]
        cache.keys, cache.values, cache.offset = *held, KVCache.step
        y = layer(x, None, cache)
        return y, cache.keys[..., : cache.offset, :], cache.values[..., : cache.offset, :]

    if stock.is_linear:
        channels = stock.linear_attn.conv_dim
        held = [(1, TAPS - 1, channels), (1, s.heads, s.head_dim, s.head_dim)]
    else:
        # Not s.context: what the trial holds is copied, not written in place as in a model.
        held = [(1, s.heads // 4, 2 * KVCache.step, s.head_dim)] * 2
    variants = [(normal(0, 1, 1, s.hidden), *(normal(9, *shape) for shape in held))]
    read = weight_bytes(stock) - weight_bytes(stock.mlp.switch_mlp, 1 - s.top_k / s.experts)
    return Case(functools.partial(step, ours), functools.partial(step, stock), variants, read)


def _switch(stock: nn.Module) -> NativeSwitch:
    return NativeSwitch(stock, _kernels())


def _kernels() -> Any:
    return native()
