"""The Mamba2 mixer of Nemotron-H, by the compiled kernels.

The reference is mlx-lm's class: same weights, same call, same caches. The recurrence is taken
token by token, where mlx-lm builds matrices of tokens by tokens.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.nemotron_h import NemotronHMamba2Mixer

from .cpu import swap
from .recurrence import conv_silu, kernels_for_mixer


class NativeMamba2Mixer(NemotronHMamba2Mixer):
    """``mlx_lm.models.nemotron_h.NemotronHMamba2Mixer``.

    Masks and sequences of several lengths are left to the base class.
    """

    def __call__(
        self, hidden_states: mx.array, mask: mx.array | None = None, cache: Any | None = None
    ) -> mx.array:
        # hidden_states: [B, S, D] -> [B, S, D]
        kernels = kernels_for_mixer(
            self.conv1d, cache, mask, hidden_states, self.A_log, self.D, self.dt_bias
        )
        y: mx.array
        if kernels is None:
            y = super().__call__(hidden_states, mask, cache)
            return y
        batch, tokens, _ = hidden_states.shape
        heads, groups, n = self.num_heads, self.n_groups, self.ssm_state_size
        inner = self.intermediate_size
        gate, x, dt = mx.split(self.in_proj(hidden_states), [inner, inner + self.conv_dim], axis=-1)
        history, state = (None, None) if cache is None else (cache[0], cache[1])
        x, history = conv_silu(kernels, self.conv1d, x, history)
        x, b, c = mx.split(x, [inner, inner + groups * n], axis=-1)
        if state is None:
            state = mx.zeros((batch, heads, self.head_dim, n))
        mixed, state = kernels.ssm(
            x.reshape(batch, tokens, heads, self.head_dim),
            self.A_log,
            b.reshape(batch, tokens, groups, n),
            c.reshape(batch, tokens, groups, n),
            self.D,
            dt,
            self.dt_bias,
            state,
            self.time_step_limit,
        )
        if cache is not None:
            cache[0], cache[1] = history, state
            cache.advance(tokens)
        y = self.out_proj(self.norm(mixed.reshape(batch, tokens, -1), gate))
        return y


def use_native(model: nn.Module) -> None:
    """Let the Mamba2 mixers in a model be computed by the extension, where it can."""
    swap(model, CLASSES)


CLASSES: dict[type, type] = {NemotronHMamba2Mixer: NativeMamba2Mixer}
