"""Norms over the last axis, and norms with a gate, by the compiled kernels.

The reference of each class is its base class: same weights, same call. Sums and products are in
float32 whatever the dtypes, and are rounded once, to the dtype that MLX gives the answer.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.nemotron_h import MambaRMSNormGated
from mlx_lm.models.qwen3_next import Qwen3NextRMSNormGated

from .cpu import kernels_for, swap


class NativeRMSNorm(nn.RMSNorm):
    """``mlx.nn.RMSNorm``."""

    def __call__(self, x: mx.array) -> mx.array:
        kernels = kernels_for(x, self.weight)
        y: mx.array
        if kernels is None or x.ndim == 0:
            y = super().__call__(x)
        else:
            y = kernels.rms_norm(x, self.weight, self.eps)
        return y


class NativeRMSNormGated(Qwen3NextRMSNormGated):
    """``Qwen3NextRMSNormGated``: rms_norm(x) * silu(gate)."""

    def __call__(self, hidden_states: mx.array, gate: mx.array | None = None) -> mx.array:
        kernels = kernels_for(hidden_states, self.weight)
        y: mx.array
        if kernels is None or gate is None or kernels_for(gate) is None:
            y = super().__call__(hidden_states, gate)
        else:
            y = kernels.rms_norm_gated(hidden_states, gate, self.weight, self.eps)
        return y


class NativeMambaRMSNormGated(MambaRMSNormGated):
    """``MambaRMSNormGated``: rms_norm(silu(gate) * x), group by group of the last axis."""

    def __call__(self, x: mx.array, gate: mx.array | None = None) -> mx.array:
        kernels = kernels_for(x, self.weight)
        y: mx.array
        if kernels is None or gate is None or kernels_for(gate) is None:
            y = super().__call__(x, gate)
        else:
            y = kernels.gated_rms_norm(x, gate, self.weight, self.eps, self.group_size)
        return y


def use_native(model: nn.Module) -> None:
    """Let the norms in a model be computed by the extension, where it can."""
    swap(model, CLASSES)


CLASSES: dict[type, type] = {
    nn.RMSNorm: NativeRMSNorm,
    Qwen3NextRMSNormGated: NativeRMSNormGated,
    MambaRMSNormGated: NativeMambaRMSNormGated,
}
