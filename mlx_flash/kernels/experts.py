"""The routed experts of a layer in one pass: gate, up, activation, down, weighted sum.

The reference is mlx-lm's ``SwitchGLU`` and ``SwitchMLP`` and, around them, the sum that a MoE
block takes over its top_k. With a pool the pass reads missing experts while it computes on those
that are there, inside MLX's graph: nothing waits for the router in Python.
"""

from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwiGLU,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
MODES = {"affine": None, "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
AFFINE_BITS = (2, 3, 4, 5, 6, 8)


class NativeSwitch(nn.Module):
    """Stands where ``SwitchGLU`` or ``SwitchMLP`` stood and answers the same call.

    Args:
        switch (nn.Module): The mlx-lm layer. Its weights are experts, or slots of ``pool``.
        native (ModuleType): The extension.
        pool: The extension's ``ExpertPool`` that fills those slots, or None.
    """

    def __init__(self, switch: nn.Module, native: ModuleType, pool: Any = None):
        super().__init__()
        self.switch = switch
        object.__setattr__(self, "experts", experts_of(switch, native, pool))
        object.__setattr__(self, "pool", pool)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        # x: [..., D], indices: [..., top_k] -> [..., top_k, D]
        y: mx.array = self.experts(x, indices)
        return y

    def weighted(self, x: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
        """``(self(x, indices) * scores[..., None]).sum(axis=-2)`` without the parts: [..., D]."""
        y: mx.array = self.experts(x, indices, scores)
        return y


def supports(switch: nn.Module) -> bool:
    """Whether the extension has kernels for this switch layer as it is."""
    kind = _activation(switch)
    return kind is not None and all(supports_weights(p) for p in _projections(switch) if p)


def supports_weights(module: Any) -> bool:
    """Whether the extension has a kernel for the weights of this linear layer."""
    if isinstance(module, (nn.Linear, SwitchLinear)):
        return module.weight.dtype in FLOATS
    if not isinstance(module, (nn.QuantizedLinear, QuantizedSwitchLinear)):
        return False
    if module.get("global_scale") is not None or module.mode not in MODES:
        return False
    if module.mode == "affine":
        return module.bits in AFFINE_BITS and module.scales.dtype in FLOATS
    return (module.bits, module.group_size) == MODES[module.mode]


def weights_of(module: Any, native: ModuleType) -> Any:
    """The arrays of a linear or switch linear layer as the extension's ``Weights``."""
    bias = module.get("bias")
    if isinstance(module, (nn.Linear, SwitchLinear)):
        return native.Weights(module.weight, None, None, bias, 0, 0, "dense")
    return native.Weights(
        module.weight,
        module.scales,
        module.get("biases"),
        bias,
        module.group_size,
        module.bits,
        module.mode,
    )


def experts_of(switch: nn.Module, native: ModuleType, pool: Any = None) -> Any:
    """A switch layer, or a gated MLP of one expert, as the extension's ``Experts``."""
    kind = _activation(switch)
    if kind is None:
        raise TypeError(f"no native experts for {type(switch).__name__}")
    gate, up, down = (weights_of(p, native) if p else None for p in _projections(switch))
    activation, limit, alpha = kind
    return native.Experts(gate, up, down, activation, limit, alpha, pool)


def _projections(switch: Any) -> tuple[Any, Any, Any]:
    if isinstance(switch, SwitchMLP):
        return None, switch.fc1, switch.fc2
    return switch.gate_proj, switch.up_proj, switch.down_proj


def _activation(switch: Any) -> tuple[str, float, float] | None:
    """Name, limit and alpha of the activation, None if there is no native one."""
    if isinstance(switch, SwitchMLP):
        return ("relu2", 0.0, 0.0) if isinstance(switch.activation, nn.ReLU2) else None
    if not isinstance(switch, SwitchGLU):
        # A dense gated MLP, such as a shared expert.
        gated = all(hasattr(switch, name) for name in ("gate_proj", "up_proj", "down_proj"))
        return ("swiglu", 0.0, 0.0) if gated else None
    if isinstance(switch.activation, SwiGLU):
        return ("swiglu", 0.0, 0.0)
    if isinstance(switch.activation, SwigluOAI):
        return ("clamped", switch.activation._limit, switch.activation._alpha)
    return None
