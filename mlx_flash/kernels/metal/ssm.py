"""The Mamba2 mixer of Nemotron-H: two launches between its projections.

The reference is mlx-lm's class: same weights, same call, same caches. Prompts stay mlx-lm's.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.nemotron_h import NemotronHMamba2Mixer
from mlx_lm.models.ssm import ssm_update

from . import SIMD, Kernel
from . import norm as norm_door
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
    *("projected", "history", "weight", "bias", "A_log", "D", "dt_bias"),
    *("low", "high", "state"),
)
OUTPUTS = ("y", "new_history", "new_state")
KERNEL = Kernel("mamba2_step", INPUTS, OUTPUTS, headers=["recurrence"])


def mamba2_step(
    projected: mx.array,
    history: mx.array,
    conv: mx.array,
    bias: mx.array | None,
    a_log: mx.array,
    d: mx.array,
    dt_bias: mx.array,
    state: mx.array,
    limits: tuple[float, float],
    *,
    launch: Callable[..., list[mx.array]] = KERNEL,
) -> tuple[mx.array, mx.array, mx.array]:
    """Take one token of each sequence through convolution, Mamba2's recurrence and its gate.

    The recurrence is that of https://arxiv.org/abs/2405.21060. Everything is float32, also
    where mlx-lm rounds to the activations' dtype.

    Args:
        projected: What ``in_proj`` gives: [B, 1, gate | x, B, C | dt], which are H Dh,
            H Dh + 2 G Ds and H elements; float32, float16 or bfloat16, as is history.
        history: What the convolution took before: [B, taps - 1, H Dh + 2 G Ds].
        conv: [H Dh + 2 G Ds, taps, 1], any of the dtypes, as are bias, a_log, d and dt_bias.
        bias: Of the convolution: [H Dh + 2 G Ds]. None: it has none.
        a_log: [H]
        d: [H]
        dt_bias: [H]
        state: [B, H, Dh, Ds] float32, in sizes that ``state_fits`` takes.
        limits: The least and the greatest time step.
        launch: The kernel, for a device that is not Metal.

    Returns:
        ``y * silu(gate)`` [B, 1, H Dh] in float32, which the norm takes; the next token's
        history, and its state.

    Raises:
        ValueError: If the kernel has no form for a head of these sizes.
    """
    batch, heads, rows, row = state.shape
    channels, taps, _ = conv.shape
    if not state_fits(rows, row):
        raise ValueError(f"a state of {rows} x {row} a head does not fit the kernel.")
    simds = simdgroups(rows)
    dtype = projected.dtype
    of_bias = conv if bias is None else bias
    y, new_history, new_state = launch(
        *(projected, history, conv, of_bias, a_log, d, dt_bias, *limits, state),
        template=[
            *(("T", dtype), ("ConvT", conv.dtype), ("ConvBiasT", of_bias.dtype)),
            *(("LogT", a_log.dtype), ("SkipT", d.dtype), ("BiasT", dt_bias.dtype)),
            *(("H", heads), ("G", pairs_of(channels, state)), ("Dh", rows), ("Ds", row)),
            *(("TAPS", taps), ("SIMDS", simds), ("BIASED", bias is not None)),
        ],
        grid=(SIMD * simds, heads, batch),
        threadgroup=(SIMD * simds, 1, 1),
        outputs=[
            ((batch, 1, heads * rows), mx.float32),
            ((batch, taps - 1, channels), dtype),
            (state.shape, mx.float32),
        ],
    )
    return y, new_history, new_state


def reference(
    projected: mx.array,
    history: mx.array,
    conv: mx.array,
    bias: mx.array | None,
    a_log: mx.array,
    d: mx.array,
    dt_bias: mx.array,
    state: mx.array,
    limits: tuple[float, float],
) -> tuple[mx.array, mx.array, mx.array]:
    """``mamba2_step`` by the operations of mlx-lm's class, which round where they do."""
    batch, heads, rows, row = state.shape
    channels, inner = conv.shape[0], heads * rows
    groups = pairs_of(channels, state)
    gate, token, dt = mx.split(projected, [inner, inner + channels], axis=-1)
    tokens = mx.concatenate([history, token], axis=1)
    mixed = mx.conv1d(tokens, conv, groups=channels)
    mixed = nn.silu(mixed if bias is None else mixed + bias)
    x, b, c = mx.split(mixed, [inner, inner + groups * row], axis=-1)
    y, state = ssm_update(
        x.reshape(batch, 1, heads, rows),
        a_log,
        b.reshape(batch, 1, groups, row),
        c.reshape(batch, 1, groups, row),
        d.astype(x.dtype),
        dt,
        dt_bias,
        state,
        limits,
    )
    gated = swiglu(gate, y.reshape(batch, 1, inner)).astype(mx.float32)
    return gated, tokens[:, 1:], state


def mamba2_step_bytes(
    batch: int, heads: int, groups: int, head_dim: int, state_dim: int, taps: int, size: int
) -> int:
    """Bytes that one launch reads and writes; ``size`` is that of an activation."""
    inner = heads * head_dim
    channels = inner + 2 * groups * state_dim
    state = 2 * 4 * inner * state_dim
    token = size * (inner + (1 + 2 * (taps - 1)) * channels + heads) + 4 * inner
    return batch * (state + token) + size * (channels * (taps + 1) + 3 * heads)


def supports(mixer: Any) -> bool:
    """Whether the kernels take a Mamba2 mixer of these sizes."""
    fits = conv_fits(mixer.conv1d) and mixer.num_heads % mixer.n_groups == 0
    return (
        fits and state_fits(mixer.head_dim, mixer.ssm_state_size) and norm_door.supports(mixer.norm)
    )


class MetalMamba2Mixer(NemotronHMamba2Mixer):
    """``mlx_lm.models.nemotron_h.NemotronHMamba2Mixer``, which still computes prompts."""

    step = staticmethod(mamba2_step)

    def __call__(
        self, hidden_states: mx.array, mask: mx.array | None = None, cache: Any | None = None
    ) -> mx.array:
        # hidden_states: [B, S, D] -> [B, S, D]
        y: mx.array
        same = self.norm.weight.dtype == hidden_states.dtype
        if not same or not decodes(self, hidden_states, mask, cache):
            y = super().__call__(hidden_states, mask, cache)
            return y
        projected = self.in_proj(hidden_states)
        sizes = (projected.shape[0], self.num_heads, self.head_dim, self.ssm_state_size)
        mixed, history, state = self.step(
            projected,
            history_of(cache, self.conv1d, projected),
            self.conv1d.weight,
            self.conv1d.get("bias"),
            *(self.A_log, self.D, self.dt_bias),
            state_of(cache, *sizes),
            self.time_step_limit,
        )
        keep(cache, history, state)
        y = self.out_proj(self.normed(mixed, projected.dtype))
        return y

    def normed(self, x: mx.array, dtype: mx.Dtype) -> mx.array:
        """What the output projection takes, of what ``step`` gives: [B, 1, H Dh] in ``dtype``."""
        norm = self.norm
        return norm_door.group_norm(x, None, norm.weight, norm.eps, norm.group_size, dtype)


def use_metal(model: nn.Module) -> None:
    """Let the Mamba2 mixers in a model decode by the kernels, where they can."""
    swap_classes(model, CLASSES, supports)


CLASSES: dict[type, type] = {NemotronHMamba2Mixer: MetalMamba2Mixer}
