"""The routed experts of a layer in one pass: gate, up, activation, down, weighted sum.

The reference is mlx-lm's ``SwitchGLU`` and ``SwitchMLP`` and, around them, the sum that a MoE
block takes over its top_k. With a pool the pass reads missing experts while it computes on those
that are there, inside MLX's graph: nothing waits for the router in Python.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.qwen3_next import Qwen3NextMLP
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
MODES = {"affine": None, "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
DENSE = (nn.Linear, SwitchLinear)
QUANTIZED = (nn.QuantizedLinear, QuantizedSwitchLinear)

Kind = tuple[str, float, float]
"""The extension's name of an activation, and the limit and alpha that it takes."""


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
        """``(self(x, indices) * scores[..., None]).sum(axis=-2)`` without the parts: [..., D].

        Summed in float32 whatever the dtype of the scores, and given in that of ``x``.
        """
        y: mx.array = self.experts(x, indices, scores)
        return y


def supports(switch: nn.Module) -> bool:
    """Whether the extension has kernels for this switch layer, or gated MLP, as it is.

    A subclass may have a forward of its own, and one that carries more than projections and an
    activation is more than they compute.
    """
    if activation_of(switch) is None:
        return False
    projections = [p for p in projections_of(switch) if p is not None]
    own = switch.keys() - {"activation"}  # parts and arrays
    return len(own) == len(projections) and all(map(supports_weights, projections))


def supports_weights(module: Any) -> bool:
    """Whether the extension has a kernel for the weights of this linear layer."""
    if type(module) in DENSE:
        return module.weight.dtype in FLOATS
    if type(module) not in QUANTIZED:
        return False
    if module.get("global_scale") is not None or module.mode not in MODES:
        return False
    if module.mode == "affine":
        return module.bits in AFFINE_BITS and module.scales.dtype in FLOATS
    return (module.bits, module.group_size) == MODES[module.mode]


def weights_of(module: Any, native: ModuleType) -> Any:
    """The arrays of a linear or switch linear layer as the extension's ``Weights``."""
    bias = module.get("bias")
    if isinstance(module, DENSE):
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
    kind = activation_of(switch)
    if kind is None:
        raise TypeError(f"no native experts for {type(switch).__name__}")
    gate, up, down = (None if p is None else weights_of(p, native) for p in projections_of(switch))
    activation, limit, alpha = kind
    return native.Experts(gate, up, down, activation, limit, alpha, pool)


def projections_of(switch: Any) -> tuple[Any, Any, Any]:
    """Gate, or None where there is none, up and down of a switch layer or gated MLP."""
    if isinstance(switch, SwitchMLP):
        return None, switch.fc1, switch.fc2
    return switch.gate_proj, switch.up_proj, switch.down_proj


def activation_of(switch: Any) -> Kind | None:
    """Of a layer whose forward is known; None if no kernel has it."""
    if type(switch) in MLPS:
        return MLPS[type(switch)]
    known = ACTIVATIONS.get(type(switch), {})
    activation = getattr(switch, "activation", None)
    found = known.get(f"{type(activation).__module__}.{type(activation).__qualname__}")
    return None if found is None else found(activation)


def _limited(activation: Any) -> Kind:
    return ("limited", activation.limit, 0.0) if activation.limit > 0 else ("swiglu", 0.0, 0.0)


def _situ(activation: Any) -> Kind:
    return ("situ", activation.beta, activation.linear_beta or 0.0)


def _gelu(activation: Any) -> Kind | None:
    return ("gelu", 0.0, 0.0) if activation._approx in ("precise", "tanh") else None


# By name: no model's module is imported for it.
ACTIVATIONS: dict[type, dict[str, Callable[[Any], Kind | None]]] = {
    SwitchGLU: {
        "mlx_lm.models.switch_layers.SwiGLU": lambda a: ("swiglu", 0.0, 0.0),
        "mlx_lm.models.activations.SwigluOAI": lambda a: ("clamped", a._limit, a._alpha),
        "mlx_lm.models.deepseek_v41.DeepseekV41SwiGLU": _limited,
        "mlx_lm.models.step3p5.ClampedSwiGLU": lambda a: ("capped", a.limit, 0.0),
        "mlx_lm.models.kimi_k3.SiTU": _situ,
        "mlx_lm.models.gemma4_text.GeGLU": lambda a: ("geglu", 0.0, 0.0),
    },
    SwitchMLP: {
        "mlx.nn.layers.activations.ReLU2": lambda a: ("relu2", 0.0, 0.0),
        "mlx.nn.layers.activations.SiLU": lambda a: ("silu", 0.0, 0.0),
        "mlx.nn.layers.activations.GELU": _gelu,
    },
}
MLPS: dict[type, Kind] = {Qwen3NextMLP: ("swiglu", 0.0, 0.0)}
"""Dense MLPs, such as shared experts, that are ``down_proj(f(gate_proj(x), up_proj(x)))``."""
