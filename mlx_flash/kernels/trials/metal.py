"""The Metal kernels, each beside what MLX and mlx-lm run on a Mac. CUDA's are some of them.

In bfloat16, as models are, and where kernels differ in more than loads in float32 too, which
shows an error that rounding would hide.
"""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.nemotron_h import NemotronHMoE
from mlx_lm.models.qwen3_moe import Qwen3MoeSparseMoeBlock
from mlx_lm.models.qwen3_next import Qwen3NextMLP, Qwen3NextSparseMoeBlock

from ..experts import AFFINE_BITS
from ..metal import delta, moe, norm, router, ssm
from ..metal.experts import MetalMLP, MetalSwitch
from . import Call, Case, Form, Sizes, Trial, cases, filled, normal, weight_bytes

DTYPES = (mx.bfloat16, mx.float32)
FORMS: dict[str, Form] = {
    name: cases.FORMS[name] for name in (*(f"{bits} bit" for bits in AFFINE_BITS), "mxfp4")
}
TAPS = 4
EPS = 1e-6


def trials(sizes: Sizes) -> list[Trial]:
    """Every Metal kernel."""
    return [
        *_experts(sizes),
        *_router(sizes),
        *steps(sizes, delta.delta_step, ssm.mamba2_step),
        *_norms(sizes),
        *_blocks(sizes),
    ]


def steps(s: Sizes, delta_step: Call, mamba2_step: Call) -> Iterator[Trial]:
    """Decode steps of recurrent layers, by those doors."""
    keys, inner = s.heads // 4, s.heads * s.head_dim
    channels = inner + 2 * keys * s.head_dim
    shape = f"{s.heads}x{s.head_dim}x{s.head_dim}"
    state = (1, s.heads, s.head_dim, s.head_dim)
    for dtype in DTYPES:
        draw = functools.partial(normal, dtype=dtype)
        recent = [draw(8, 1, TAPS - 1, channels), draw(9, channels, TAPS, 1) * 0.5]
        heads = [normal(seed, s.heads) * 0.5 for seed in (10, 11)]
        held = normal(12, *state) * 0.1
        nbytes = delta.delta_step_bytes(1, keys, s.heads, s.head_dim, s.head_dim, TAPS, dtype.size)
        given = [draw(1, 1, 1, channels), draw(2, 1, 1, inner)]
        given += [draw(3, 1, 1, s.heads), draw(4, 1, 1, s.heads), *recent, *heads]
        arrays = [*given, 1 + 0.1 * draw(5, s.head_dim), held]
        make = functools.partial(_pure, delta_step, delta.reference, arrays, nbytes, EPS)
        yield Trial("gated delta step", shape, dtype, make)
        joined, ab = draw(6, 1, 1, channels + inner), draw(7, 1, 1, 2 * s.heads)
        arrays = [joined, joined, ab, ab, *arrays[4:]]
        make = functools.partial(_pure, delta_step, delta.reference, arrays, nbytes, EPS, True)
        yield Trial("gated delta step, joined", shape, dtype, make)
        nbytes = ssm.mamba2_step_bytes(1, s.heads, keys, s.head_dim, s.head_dim, TAPS, dtype.size)
        arrays = [draw(1, 1, 1, inner + channels + s.heads), *recent, 0.1 * draw(2, channels)]
        arrays += [*heads, normal(13, s.heads), held]
        make = functools.partial(_pure, mamba2_step, ssm.reference, arrays, nbytes, (0.001, 100.0))
        yield Trial("mamba2 step", shape, dtype, make)


def _pure(ours: Call, stock: Call, arrays: list[mx.array], nbytes: int, *rest: Any) -> Case:
    """A function of arrays, and of numbers after them."""
    return Case(
        lambda *given: ours(*given, *rest),
        lambda *given: stock(*given, *rest),
        [tuple(arrays)] * cases.CALLS,
        nbytes,
    )


def _experts(s: Sizes) -> Iterator[Trial]:
    shape = f"{s.top_k} of {s.experts}, {s.hidden}x{s.middle}"
    for name, form in FORMS.items():
        for dtype in DTYPES if name in cases.COMMON else DTYPES[:1]:
            make = functools.partial(cases.experts, s, form, 1, dtype, MetalSwitch)
            yield Trial(f"experts {name}", shape, dtype, make)
    form, dtype = FORMS["mxfp4"], mx.bfloat16
    make = functools.partial(cases.experts, s, form, 1, dtype, MetalSwitch, gated=False)
    yield Trial("experts relu2 mxfp4", shape, dtype, make)
    yield Trial("shared expert 4 bit", f"{s.hidden}x{s.middle}", mx.float32, lambda: _shared(s))


def _shared(s: Sizes) -> Case:
    stock = filled(Qwen3NextMLP(s.hidden, s.middle), FORMS["4 bit"], mx.float32)

    def use(mlp: Any) -> None:
        mlp.__class__ = MetalMLP

    return cases.module(stock, use, _tokens(s), weight_bytes(stock))


def _router(s: Sizes) -> Iterator[Trial]:
    experts = 4 * s.experts
    logits = normal(3, 1, experts)
    yield cases.function(
        "router",
        f"{s.top_k} of {experts}",
        lambda x: cases.dense(x, *router.route(x, s.top_k)),
        lambda x: cases.dense(x, *cases.stock_topk(x, s.top_k)),
        logits,
    )


def _norms(s: Sizes) -> Iterator[Trial]:
    size = s.heads * s.head_dim // 4
    for dtype in DTYPES:
        x, z = (normal(seed, s.heads, s.head_dim, dtype=dtype) for seed in (1, 2))
        nbytes = norm.norm_bytes(x.size, dtype.size)
        arrays = [x, z, 1 + 0.1 * normal(3, s.head_dim, dtype=dtype)]
        make = functools.partial(_pure, norm.gated_norm, norm.reference, arrays, nbytes, EPS)
        yield Trial("gated norm", f"{s.heads}x{s.head_dim}", dtype, make)
        wide = [x.reshape(1, -1), z.reshape(1, -1), 1 + 0.1 * normal(4, 4 * size, dtype=dtype)]
        rest = (EPS, size, dtype)
        make = functools.partial(_pure, norm.group_norm, norm.group_reference, wide, nbytes, *rest)
        yield Trial("group norm", f"4x{size}", dtype, make)


def _blocks(s: Sizes) -> Iterator[Trial]:
    shape = f"{s.top_k} of {s.experts}, {s.hidden}x{s.middle}"
    for name, block in (
        ("qwen3.5 moe block", Qwen3NextSparseMoeBlock),
        ("qwen3 moe block", Qwen3MoeSparseMoeBlock),
        ("nemotron moe block", NemotronHMoE),
    ):
        make = functools.partial(_block, s, block)
        yield Trial(f"{name} 4 bit", shape, mx.float32, make)


def _block(s: Sizes, kind: Callable[[Any], nn.Module]) -> Case:
    args = SimpleNamespace(
        hidden_size=s.hidden,
        moe_intermediate_size=s.middle,
        shared_expert_intermediate_size=s.middle,
        moe_shared_expert_intermediate_size=s.middle,
        intermediate_size=s.middle,
        num_experts=s.experts,
        n_routed_experts=s.experts,
        n_shared_experts=1,
        num_experts_per_tok=s.top_k,
        moe_latent_size=None,
        mlp_bias=False,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        n_group=1,
        topk_group=1,
    )
    stock = filled(_Holder(kind(args)), FORMS["4 bit"], mx.float32, s.experts)
    read = weight_bytes(stock) - weight_bytes(stock.block.switch_mlp, 1 - s.top_k / s.experts)
    return cases.module(stock, moe.use_metal, _tokens(s), read)


class _Holder(nn.Module):
    """A block below a module."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.block(x)
        return y


def _tokens(s: Sizes) -> list[tuple[mx.array]]:
    return [(normal(seed, 1, 1, s.hidden),) for seed in range(cases.CALLS)]
