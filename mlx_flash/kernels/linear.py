"""Products with one weight matrix, or with one out of a stack, by the compiled kernels.

The reference of each class is its mlx-lm or MLX base class: same weights, same call. Sums are
in float32 whatever the dtypes, and the answer has the dtype of ``x``. A call with one row per
sequence goes row by row, so no answer depends on what else is in the batch; a call with several
goes through the matrix kernel, whatever their number, so none depends on a prompt's chunks.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from . import native
from .experts import AFFINE_BITS, FLOATS, MODES


def _product(module: Any, x: mx.array) -> mx.array:
    kernels: Any = native()
    bias = module.get("bias")
    y: mx.array
    if "scales" not in module:
        y = kernels.dense_matmul(x, module.weight, bias)
    else:
        y = kernels.quantized_matmul(x, *_quantized(module), *_format(module), bias)
    return y


def _gathered(module: Any, x: mx.array, indices: mx.array) -> mx.array:
    # x: [..., 1 or k, 1, in], indices: [..., k] -> [..., k, 1, out]
    kernels: Any = native()
    bias = module.get("bias")
    y: mx.array
    if "scales" not in module:
        y = kernels.gather_mm(x, module.weight, indices, bias)
    else:
        y = kernels.gather_qmm(x, *_quantized(module), indices, *_format(module), bias)
    return y


def _quantized(module: Any) -> tuple[mx.array, mx.array, mx.array | None]:
    return module.weight, module.scales, module.get("biases")


def _format(module: Any) -> tuple[int, int, str]:
    return module.group_size, module.bits, module.mode


class NativeLinear(nn.Linear):
    """``mlx.nn.Linear`` in float32, float16 or bfloat16."""

    def __call__(self, x: mx.array) -> mx.array:
        return _product(self, x)


class NativeQuantizedLinear(nn.QuantizedLinear):
    """``mlx.nn.QuantizedLinear``. The scales may have another dtype than ``x``."""

    def __call__(self, x: mx.array) -> mx.array:
        return _product(self, x)


class NativeEmbedding(nn.Embedding):
    """``mlx.nn.Embedding``, where it serves as the output projection too."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(self, x)


class NativeQuantizedEmbedding(nn.QuantizedEmbedding):
    """``mlx.nn.QuantizedEmbedding``, where it serves as the output projection too."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(self, x)


class NativeSwitchLinear(SwitchLinear):
    """``mlx_lm.models.switch_layers.SwitchLinear``. Reads each routed expert once a call."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        return _gathered(self, x, indices)


class NativeQuantizedSwitchLinear(QuantizedSwitchLinear):
    """``mlx_lm.models.switch_layers.QuantizedSwitchLinear``. Reads each routed expert once."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        return _gathered(self, x, indices)


def use_native(module: nn.Module) -> None:
    """Let every linear layer in a module that the kernels can compute be computed by them.

    Layers of other formats, and subclasses with a forward of their own, stay as they are. So
    does everything where the extension is missing or MLX computes on another device.
    """
    if native() is None or mx.default_device() != mx.cpu:
        return
    for _, part in module.named_modules():
        if type(part) in CLASSES and _supported(part):
            part.__class__ = CLASSES[type(part)]


def _supported(part: Any) -> bool:
    if "scales" not in part:
        return part.weight.dtype in FLOATS
    if part.get("global_scale") is not None or part.mode not in MODES:
        return False
    if part.mode == "affine":
        return part.bits in AFFINE_BITS and part.scales.dtype in FLOATS
    return (part.bits, part.group_size) == MODES[part.mode]


CLASSES: dict[type, type] = {
    nn.Linear: NativeLinear,
    nn.QuantizedLinear: NativeQuantizedLinear,
    nn.Embedding: NativeEmbedding,
    nn.QuantizedEmbedding: NativeQuantizedEmbedding,
    SwitchLinear: NativeSwitchLinear,
    QuantizedSwitchLinear: NativeQuantizedSwitchLinear,
}
