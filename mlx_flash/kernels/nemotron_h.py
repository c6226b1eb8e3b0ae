"""Nemotron-H's MoE block with the routed sum taken by the experts' kernel.

The reference is mlx-lm's ``NemotronHMoE``, whose router, latent projections and shared expert stay.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.nemotron_h import NemotronHMoE

from .experts import NativeSwitch


class NativeNemotronHMoE(NemotronHMoE):
    """Same weights, same call."""

    def __call__(self, x: mx.array) -> mx.array:
        # x: [B, S, D] -> [B, S, D]
        residuals = x
        indices, scores = self.gate(x)
        if self.moe_latent_size is not None:
            x = self.fc1_latent_proj(x)
        y: mx.array = self.switch_mlp.weighted(x, indices, scores)
        if self.moe_latent_size is not None:
            y = self.fc2_latent_proj(y)
        if self.config.n_shared_experts is not None:
            y = y + self.shared_experts(residuals)
        return y


def use_native(model: nn.Module) -> None:
    """Swap the MoE blocks whose switch layers are ``NativeSwitch``."""
    for _, module in model.named_modules():
        if type(module) is NemotronHMoE and isinstance(module.switch_mlp, NativeSwitch):
            module.__class__ = NativeNemotronHMoE
