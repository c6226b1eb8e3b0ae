"""Expert projections in bfloat16 and float16 on the CPU, where ``mx.gather_mm`` has none.

MLX's CPU backend gathers float32 matrices only, while its dense matmul takes every float
type. So: rows grouped by expert, one dense product each. The reference is
``mlx_lm.models.switch_layers.SwitchLinear`` in float32.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear


class DenseSwitchLinear(SwitchLinear):
    """A ``SwitchLinear`` that multiplies expert by expert. Same weights, same call."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        # x: [..., 1 or k, 1, in], indices: [..., k] -> [..., k, 1, out]
        in_dims = x.shape[-1]
        rows = mx.broadcast_to(x, (*indices.shape, 1, in_dims)).reshape(-1, in_dims)
        routed = np.array(indices).reshape(-1)
        order = np.argsort(routed, kind="stable")
        experts, starts = np.unique(routed[order], return_index=True)
        groups = np.split(order, starts[1:])
        parts = [
            rows[mx.array(group)] @ self["weight"][int(expert)].T
            for expert, group in zip(experts, groups, strict=True)
        ]
        y = mx.concatenate(parts)[mx.array(np.argsort(order))]
        y = y.reshape(*indices.shape, 1, -1)
        if "bias" in self:
            y = y + mx.expand_dims(self["bias"][indices], -2)
        return y


def needs_dense(switch: nn.Module) -> bool:
    """Whether the present backend cannot compute this switch layer as it is."""
    return mx.default_device() == mx.cpu and any(
        type(module) is SwitchLinear and module.weight.dtype != mx.float32
        for _, module in switch.named_modules()
    )


def use_dense(switch: nn.Module) -> None:
    """Let a switch layer's unquantized projections multiply expert by expert."""
    for _, module in switch.named_modules():
        if type(module) is SwitchLinear:
            module.__class__ = DenseSwitchLinear
