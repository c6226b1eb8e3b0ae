"""The compiled kernels of the CPU, each beside what MLX's CPU backend has for it."""

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import gated_delta as stock_delta
from mlx_lm.models import ssm as stock_ssm
from mlx_lm.models.cache import ArraysCache, KVCache
from mlx_lm.models.nemotron_h import MambaRMSNormGated
from mlx_lm.models.qwen3_5 import DecoderLayer, TextModelArgs
from mlx_lm.models.qwen3_next import Qwen3NextMLP, Qwen3NextRMSNormGated
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

from .. import linear, mlp, native, norm, qwen3_5
from ..experts import AFFINE_BITS, MODES, NativeSwitch
from . import Case, Form, Sizes, Trial, filled, in_float32, normal, routes, weight_bytes

FORMS: dict[str, Form] = {
    **{f"{bits} bit": {"bits": bits, "group_size": 64} for bits in AFFINE_BITS},
    **{
        mode: {"bits": form[0], "group_size": form[1], "mode": mode}
        for mode, form in MODES.items()
        if form is not None
    },
    "dense": None,
}
COMMON = ("4 bit", "mxfp4")  # published checkpoints: tried in bfloat16 and on prompts too
CALLS = 4  # of one chain, each on experts of its own
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
    for name, form in FORMS.items():
        make = functools.partial(_switch_case, s, form, 1)
        yield Trial(f"experts {name}", shape, mx.float32, make)
    for name in COMMON:
        make = functools.partial(_switch_case, s, FORMS[name], 1, dtype=mx.bfloat16)
        yield Trial(f"experts {name}", shape, mx.bfloat16, make)
        make = functools.partial(_switch_case, s, FORMS[name], s.prompt)
        yield Trial(f"experts {name}", f"{s.prompt} rows, {shape}", mx.float32, make)
    make = functools.partial(_switch_case, s, FORMS["mxfp4"], 1, gated=False)
    yield Trial("experts relu2 mxfp4", shape, mx.float32, make)


def _switch_case(
    s: Sizes, form: Form, rows: int, dtype: mx.Dtype = mx.float32, gated: bool = True
) -> Case:
    if gated:
        switch = SwitchGLU(s.hidden, s.middle, s.experts)
    else:
        switch = SwitchMLP(s.hidden, s.middle, s.experts, activation=nn.ReLU2())
    switch = filled(switch, form, dtype, s.experts)
    ours = NativeSwitch(switch, _kernels())

    def weighted(switch: Any, x: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
        y: mx.array = (switch(x, indices) * scores[..., None]).sum(axis=-2)
        return y

    variants = [
        (
            normal(i, 1, rows, s.hidden, dtype=dtype),
            routes(i, rows, s),
            mx.softmax(normal(i + 50, 1, rows, s.top_k, dtype=dtype), axis=-1),
        )
        for i in range(CALLS)
    ]
    read = len(np.unique(np.array(variants[0][1])))
    return Case(
        ours.weighted,
        functools.partial(weighted, switch),
        variants,
        weight_bytes(switch, read / s.experts),
        functools.partial(weighted, in_float32(switch)),
    )


def _linears(s: Sizes) -> Iterator[Trial]:
    shape = f"{s.hidden}x{s.hidden}"
    for name, form in FORMS.items():
        make = functools.partial(_linear_case, s, form, 1)
        yield Trial(f"linear {name}", shape, mx.float32, make)
    for name in (*COMMON, "dense"):
        make = functools.partial(_linear_case, s, FORMS[name], 1, mx.bfloat16)
        yield Trial(f"linear {name}", shape, mx.bfloat16, make)
        make = functools.partial(_linear_case, s, FORMS[name], s.prompt)
        yield Trial(f"linear {name}", f"{s.prompt} rows, {shape}", mx.float32, make)
    shape = f"{s.top_k} of {s.experts}, {s.hidden}x{s.middle}"
    for name in (*COMMON, "dense"):
        make = functools.partial(_gathered_case, s, FORMS[name])
        yield Trial(f"gathered {name}", shape, mx.float32, make)


def _linear_case(s: Sizes, form: Form, rows: int, dtype: mx.Dtype = mx.float32) -> Case:
    stock = filled(nn.Sequential(nn.Linear(s.hidden, s.hidden, bias=False)), form, dtype)
    variants = [(normal(i, 1, rows, s.hidden, dtype=dtype),) for i in range(CALLS)]
    return _module_case(stock, linear, variants, weight_bytes(stock))


def _gathered_case(s: Sizes, form: Form) -> Case:
    stacked = SwitchLinear(s.hidden, s.middle, s.experts, bias=False)
    stock = filled(_Stack(stacked), form, mx.float32, s.experts)
    variants = [(normal(i, 1, 1, 1, 1, s.hidden), routes(i, 1, s)) for i in range(CALLS)]
    return _module_case(stock, linear, variants, weight_bytes(stock, s.top_k / s.experts))


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
    yield _function(
        "sigmoid gate",
        f"{s.heads}x{s.head_dim}",
        lambda x, z: _kernels().sigmoid_gate(x, z),
        lambda x, z: x * mx.sigmoid(z),
        *gate,
    )
    yield _function(
        "router",
        f"{s.top_k} of {4 * s.experts}",
        lambda logits: _dense(logits, *_kernels().softmax_topk(logits, s.top_k, True)),
        lambda logits: _dense(logits, *_stock_topk(logits, s.top_k)),
        normal(3, 1, 4 * s.experts),
    )


def _norm_case(s: Sizes, module: nn.Module, takes: int) -> Case:
    stock = filled(module, None, mx.float32)
    variants = [tuple(normal(i + j, 1, 1, s.hidden) for j in range(takes)) for i in range(CALLS)]
    return _module_case(stock, norm, variants, (2 + takes) * variants[0][0].nbytes)


def _mlp_case(s: Sizes) -> Case:
    stock = filled(Qwen3NextMLP(s.hidden, s.middle), None, mx.float32)
    variants = [(normal(i, 1, 1, s.hidden),) for i in range(CALLS)]
    return _module_case(stock, mlp, variants, weight_bytes(stock))


def _stock_topk(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    gates = mx.softmax(logits, axis=-1, precise=True)
    indices = mx.argpartition(gates, kth=-k, axis=-1)[..., -k:]
    scores = mx.take_along_axis(gates, indices, axis=-1)
    return indices, scores / scores.sum(axis=-1, keepdims=True)


def _dense(logits: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
    """Every expert's score: two may choose the same in another order."""
    return mx.put_along_axis(mx.zeros_like(logits), indices, scores, axis=-1)


def _recurrences(s: Sizes) -> Iterator[Trial]:
    keys = s.heads // 4
    channels = (2 * keys + s.heads) * s.head_dim
    for rows in (1, s.prompt):
        yield _function(
            "convolution",
            f"{_rows(rows)}, {channels}, {TAPS} taps",
            lambda x, before, w: _kernels().conv1d(before, x, w, None, True),
            _stock_conv,
            normal(0, 1, rows, channels),
            normal(1, 1, TAPS - 1, channels),
            normal(2, channels, TAPS, 1),
        )
        heads = (1, rows, s.heads)
        yield _function(
            "gated delta gates",
            f"{_rows(rows)}, {s.heads}",
            lambda a, b, log_a, bias: _kernels().gated_delta_gates(a, b, log_a, bias),
            lambda a, b, log_a, bias: (stock_delta.compute_g(log_a, a, bias), mx.sigmoid(b)),
            normal(0, *heads),
            normal(1, *heads),
            normal(2, s.heads),
            normal(3, s.heads),
        )
        yield _function(
            "gated delta rule",
            f"{_rows(rows)}, {s.heads}x{s.head_dim}x{s.head_dim}",
            lambda *arrays: _kernels().gated_delta(*arrays, True),
            _stock_delta,
            normal(0, 1, rows, keys, s.head_dim),
            normal(1, 1, rows, keys, s.head_dim),
            normal(2, *heads, s.head_dim),
            mx.sigmoid(normal(3, *heads)),
            mx.sigmoid(normal(4, *heads)),
            normal(5, 1, s.heads, s.head_dim, s.head_dim),
        )
        yield _function(
            "mamba2",
            f"{_rows(rows)}, {s.heads}x{s.head_dim}x{s.head_dim}",
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
        yield _function(
            "rotary embedding",
            f"{_rows(rows)}, {s.heads}x{s.head_dim}",
            lambda x: _kernels().rope(x, s.head_dim, False, 1e6, 1.0, s.context),
            lambda x: mx.fast.rope(
                x, s.head_dim, traditional=False, base=1e6, scale=1.0, offset=s.context
            ),
            normal(0, 1, s.heads, rows, s.head_dim),
        )
        yield _function(
            "attention",
            f"{_rows(rows)} on {s.context}, {s.heads}x{s.head_dim}",
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
    stock = filled(DecoderLayer(args, number), FORMS["4 bit"], mx.float32, s.experts)
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


def _module_case(
    stock: Any, door: Any, variants: Sequence[tuple[mx.array, ...]], nbytes: int
) -> Case:
    """A module beside the same with a door's kernels, and in float32."""
    ours = copy.deepcopy(stock)
    door.use_native(ours)
    return Case(ours, stock, variants, nbytes, in_float32(stock))


def _function(name: str, shape: str, ours: Any, stock: Any, *arrays: mx.array) -> Trial:
    """A trial of a function in float32, which moves its arguments and about the first again."""
    nbytes = sum(a.nbytes for a in arrays) + arrays[0].nbytes
    return Trial(name, shape, mx.float32, lambda: Case(ours, stock, [arrays] * CALLS, nbytes))


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _kernels() -> Any:
    return native()
