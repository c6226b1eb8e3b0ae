"""Gated delta nets of Qwen3.5 and Qwen3-Next: one launch from projections to projection.

The reference is mlx-lm's class: same weights, same call, same caches. Prompts stay mlx-lm's, whose
Metal kernel keeps the state in registers over all tokens.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import precise_swiglu
from mlx_lm.models.gated_delta import gated_delta_update, normalize_qk
from mlx_lm.models.qwen3_5 import GatedDeltaNet
from mlx_lm.models.qwen3_next import Qwen3NextGatedDeltaNet

from . import SIMD, Kernel
from .recurrence import (
    conv_fits,
    decodes,
    history_of,
    keep,
    pairs_of,
    simdgroups,
    state_fits,
    state_of,
)
from .recurrence import swap as swap_classes

INPUTS = (
    *("qkv", "z", "a", "b", "history", "weight"),
    *("A_log", "dt_bias", "norm", "eps", "state"),
)
OUTPUTS = ("y", "new_history", "new_state")
MAX_ROW = 128
"""Of a state: beside it a lane holds its share of q and of k, and has registers for no more."""
KERNEL = Kernel("delta_step", INPUTS, OUTPUTS, headers=["recurrence"])


def delta_step(
    qkv: mx.array,
    z: mx.array,
    a: mx.array,
    b: mx.array,
    history: mx.array,
    conv: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    norm: mx.array,
    state: mx.array,
    eps: float,
    grouped: bool = False,
    *,
    launch: Callable[..., list[mx.array]] = KERNEL,
) -> tuple[mx.array, mx.array, mx.array]:
    """Take one token of each sequence through convolution, gated delta rule and gated norm.

    The gated delta rule is that of https://arxiv.org/abs/2412.06464. Everything between the
    inputs and ``y`` is float32, also where mlx-lm rounds to the activations' dtype.

    Args:
        qkv: [B, 1, 2 Hk Dk + Hv Dv], float32, float16 or bfloat16, as are z, a, b and history.
        z: The gate of the norm: [B, 1, Hv, Dv], or with the last two axes as one.
        a: [B, 1, Hv]
        b: [B, 1, Hv]
        history: The rows before ``qkv``: [B, taps - 1, channels].
        conv: [channels, taps, 1], any of the dtypes, as are a_log, dt_bias and norm.
        a_log: [Hv]
        dt_bias: [Hv]
        norm: The norm's weight: [Dv].
        state: [B, Hv, Dv, Dk] float32, in sizes that ``fits`` takes.
        eps: Of the norm.
        grouped: Qwen3-Next's projections: ``qkv`` and ``z`` are both what ``in_proj_qkvz`` gives,
            [B, 1, 2 Hk Dk + 2 Hv Dv] with q, k, v and z of each key head side by side; ``a`` and
            ``b`` are both what ``in_proj_ba`` gives, [B, 1, 2 Hv].
        launch: The kernel, for a device that is not Metal.

    Returns:
        What the output projection takes [B, 1, Hv Dv] in the dtype of qkv, the next token's
        history, and its state.

    Raises:
        ValueError: If the kernel has no form for a head of these sizes.
    """
    batch, heads, rows, row = state.shape
    channels, taps, _ = conv.shape
    if not fits(rows, row):
        raise ValueError(f"a state of {rows} x {row} a head does not fit the kernel.")
    simds = simdgroups(rows)
    dtype = qkv.dtype
    y, new_history, new_state = launch(
        *(qkv, z, a, b, history, conv, a_log, dt_bias, norm, eps, state),
        template=[
            *(("T", dtype), ("ConvT", conv.dtype), ("LogT", a_log.dtype)),
            *(("BiasT", dt_bias.dtype), ("NormT", norm.dtype)),
            *(("Hk", pairs_of(channels, state)), ("Hv", heads), ("Dk", row), ("Dv", rows)),
            *(("TAPS", taps), ("SIMDS", simds), ("GROUPED", grouped)),
        ],
        grid=(SIMD * simds, heads, batch),
        threadgroup=(SIMD * simds, 1, 1),
        outputs=[
            ((batch, 1, heads * rows), dtype),
            ((batch, taps - 1, channels), dtype),
            (state.shape, mx.float32),
        ],
    )
    return y, new_history, new_state


def reference(
    qkv: mx.array,
    z: mx.array,
    a: mx.array,
    b: mx.array,
    history: mx.array,
    conv: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    norm: mx.array,
    state: mx.array,
    eps: float,
    grouped: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """``delta_step`` by the operations of mlx-lm's class, which round where they do."""
    batch, heads, rows, row = state.shape
    channels = conv.shape[0]
    key_heads = pairs_of(channels, state)
    if grouped:
        sizes = SimpleNamespace(
            num_k_heads=key_heads, num_v_heads=heads, head_k_dim=row, head_v_dim=rows
        )
        split = Qwen3NextGatedDeltaNet.fix_query_key_value_ordering(sizes, qkv, a)
        *parts, z, b, a = split
        qkv = mx.concatenate([part.reshape(batch, 1, -1) for part in parts], axis=-1)
    tokens = mx.concatenate([history, qkv], axis=1)
    mixed = nn.silu(mx.conv1d(tokens, conv, groups=channels))
    q, k, v = mx.split(mixed, [key_heads * row, 2 * key_heads * row], axis=-1)
    q, k = normalize_qk(
        q.reshape(batch, 1, key_heads, row),
        k.reshape(batch, 1, key_heads, row),
        inv_scale=row**-0.5,
        eps=1e-6,
    )
    y, state = gated_delta_update(
        q, k, v.reshape(batch, 1, heads, rows), a, b, a_log, dt_bias, state
    )
    y = precise_swiglu(y, z.reshape(y.shape), mx.fast.rms_norm(y, norm, eps))
    return y.reshape(batch, 1, -1), tokens[:, 1:], state


def delta_step_bytes(
    batch: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, taps: int, size: int
) -> int:
    """Bytes that one launch reads and writes; ``size`` is that of an activation."""
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    state = 2 * 4 * value_heads * value_dim * key_dim
    token = (1 + 2 * (taps - 1)) * channels + 2 * value_heads * (value_dim + 1)
    weights = channels * taps + 2 * value_heads + value_dim
    return batch * (state + size * token) + size * weights


def fits(rows: int, row: int) -> bool:
    """Whether the kernel takes a head's state of ``rows`` rows with ``row`` elements each."""
    return row <= MAX_ROW and state_fits(rows, row)


def supports(net: Any) -> bool:
    """Whether the kernel takes a gated delta net of these sizes."""
    convolves = conv_fits(net.conv1d) and "bias" not in net.conv1d
    return convolves and fits(net.head_v_dim, net.head_k_dim)


class MetalGatedDeltaNet(GatedDeltaNet):
    """``mlx_lm.models.qwen3_5.GatedDeltaNet``, which still computes what is not a decode step."""

    step = staticmethod(delta_step)

    def __call__(
        self, inputs: mx.array, mask: mx.array | None = None, cache: Any | None = None
    ) -> mx.array:
        # inputs: [B, S, D] -> [B, S, D]
        y: mx.array
        if self.sharding_group is not None or not decodes(self, inputs, mask, cache):
            y = super().__call__(inputs, mask, cache)
            return y
        qkv, z = self.in_proj_qkv(inputs), self.in_proj_z(inputs)
        y = self.out_proj(
            _step(self, cache, qkv, z, self.in_proj_a(inputs), self.in_proj_b(inputs))
        )
        return y


class MetalQwen3NextGatedDeltaNet(Qwen3NextGatedDeltaNet):
    """``mlx_lm.models.qwen3_next.Qwen3NextGatedDeltaNet``, which still computes all else.

    The kernel reads the projections as they come, without the copies that sort them.
    """

    step = staticmethod(delta_step)

    def __call__(
        self, inputs: mx.array, mask: mx.array | None = None, cache: Any | None = None
    ) -> mx.array:
        # inputs: [B, S, D] -> [B, S, D]
        y: mx.array
        if not decodes(self, inputs, mask, cache):
            y = super().__call__(inputs, mask, cache)
            return y
        qkvz, ba = self.in_proj_qkvz(inputs), self.in_proj_ba(inputs)
        y = self.out_proj(_step(self, cache, qkvz, qkvz, ba, ba, grouped=True))
        return y


def use_metal(model: nn.Module) -> None:
    """Let the gated delta nets in a model decode by the kernel, where it can."""
    swap_classes(model, CLASSES, supports)


def _step(
    net: Any,
    cache: Any | None,
    qkv: mx.array,
    z: mx.array,
    a: mx.array,
    b: mx.array,
    grouped: bool = False,
) -> mx.array:
    # -> [B, 1, Hv Dv]
    sizes = (qkv.shape[0], net.num_v_heads, net.head_v_dim, net.head_k_dim)
    y: mx.array
    y, history, state = net.step(
        *(qkv, z, a, b, history_of(cache, net.conv1d, qkv), net.conv1d.weight),
        *(net.A_log, net.dt_bias, net.norm.weight, state_of(cache, *sizes), net.norm.eps),
        grouped,
    )
    keep(cache, history, state)
    return y


CLASSES: dict[type, type] = {
    GatedDeltaNet: MetalGatedDeltaNet,
    Qwen3NextGatedDeltaNet: MetalQwen3NextGatedDeltaNet,
}
