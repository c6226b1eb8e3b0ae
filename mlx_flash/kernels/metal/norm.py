"""RMS norms with a gate, of gated delta nets and of Mamba2, in one launch each.

The reference of each class is its base class: same weights, same call. Everything between is in
float32 whatever the dtypes, and is rounded once.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import precise_swiglu, swiglu
from mlx_lm.models.nemotron_h import MambaRMSNormGated
from mlx_lm.models.qwen3_next import Qwen3NextRMSNormGated

from . import SIMD, Kernel
from .recurrence import swap as swap_classes

KERNEL = Kernel("gated_norm", ["x", "z", "weight", "eps"], ["y"], headers=["recurrence"])
PER_SIMDGROUP = 256
"""Elements, 8 a lane."""
MAX_SIZE = 32 * PER_SIMDGROUP
PARTS_PER_GROUP = 8
PLAIN, GATE_AFTER, GATE_BEFORE = range(3)


def gated_norm(x: mx.array, z: mx.array, weight: mx.array, eps: float) -> mx.array:
    """``rms_norm(x) * weight * silu(z)`` over the last axis.

    Args:
        x: [..., D] float32, float16 or bfloat16, D up to ``MAX_SIZE``.
        z: [..., D], any of the dtypes.
        weight: [D], any of the dtypes.
        eps: Added to the mean of squares.

    Returns:
        [..., D] in the dtype of x.
    """
    return _launch(GATE_AFTER, x, z, weight, eps, x.shape[-1], x.dtype)


def reference(x: mx.array, z: mx.array, weight: mx.array, eps: float) -> mx.array:
    """``gated_norm`` by the operations of mlx-lm's class."""
    y: mx.array = precise_swiglu(x, z, mx.fast.rms_norm(x, weight, eps))
    return y


def group_norm(
    x: mx.array,
    z: mx.array | None,
    weight: mx.array,
    eps: float,
    group_size: int,
    dtype: mx.Dtype,
) -> mx.array:
    """``rms_norm(x * silu(z)) * weight``, each group of the last axis with a mean of its own.

    Args:
        x: [..., D] float32, float16 or bfloat16.
        z: [..., D], any of the dtypes. None: no gate.
        weight: [D], any of the dtypes.
        eps: Added to the mean of squares.
        group_size: Elements of a group, a divisor of D, up to ``MAX_SIZE``.
        dtype: Of the answer.

    Returns:
        [..., D]
    """
    mode = PLAIN if z is None else GATE_BEFORE
    return _launch(mode, x, x if z is None else z, weight, eps, group_size, dtype)


def group_reference(
    x: mx.array,
    z: mx.array | None,
    weight: mx.array,
    eps: float,
    group_size: int,
    dtype: mx.Dtype,
) -> mx.array:
    """``group_norm`` by the operations of mlx-lm's class."""
    gated = x if z is None else swiglu(z, x)
    parts = mx.unflatten(gated, -1, (-1, group_size))
    return (weight * mx.fast.rms_norm(parts, None, eps).flatten(-2)).astype(dtype)


def norm_bytes(elements: int, size: int, gated: bool = True) -> int:
    """Bytes that a launch over ``elements`` of ``size`` bytes reads and writes, but for weights."""
    return elements * size * (3 if gated else 2)


class MetalRMSNormGated(Qwen3NextRMSNormGated):
    """``Qwen3NextRMSNormGated``."""

    def __call__(self, hidden_states: mx.array, gate: mx.array | None = None) -> mx.array:
        y: mx.array
        if gate is None or not _takes(self, hidden_states, gate):
            y = super().__call__(hidden_states, gate)
        else:
            y = gated_norm(hidden_states, gate, self.weight, self.eps)
        return y


class MetalMambaRMSNormGated(MambaRMSNormGated):
    """``MambaRMSNormGated``."""

    def __call__(self, x: mx.array, gate: mx.array | None = None) -> mx.array:
        y: mx.array
        if not _takes(self, x, *([] if gate is None else [gate])):
            y = super().__call__(x, gate)
        else:
            y = group_norm(x, gate, self.weight, self.eps, self.group_size, x.dtype)
        return y


def supports(norm: Any) -> bool:
    """Whether the kernel takes a gated norm of this size."""
    size: int = getattr(norm, "group_size", norm.weight.size)
    return size <= MAX_SIZE


def use_metal(model: nn.Module) -> None:
    """Let the gated norms in a model be computed by the kernel, where it can."""
    swap_classes(model, CLASSES, supports)


def _takes(norm: Any, *arrays: mx.array) -> bool:
    # A weight in another dtype than its input gives mlx-lm's answer another dtype than ours.
    same = all(array.dtype == norm.weight.dtype for array in arrays)
    return same and not norm.training


def _launch(
    mode: int, x: mx.array, z: mx.array, weight: mx.array, eps: float, size: int, dtype: mx.Dtype
) -> mx.array:
    parts = x.size // size
    split = -(-size // PER_SIMDGROUP)
    y: mx.array
    (y,) = KERNEL(
        *(x, z, weight, eps),
        template=[
            *(("T", dtype), ("InT", x.dtype), ("GateT", z.dtype), ("NormT", weight.dtype)),
            *(("SIZE", size), ("PARTS", weight.size // size), ("MODE", mode), ("SPLIT", split)),
        ],
        grid=(SIMD * split * parts, 1, 1),
        threadgroup=(SIMD * (PARTS_PER_GROUP if split == 1 else split), 1, 1),
        outputs=[(x.shape, dtype)],
    )
    return y


CLASSES: dict[type, type] = {
    Qwen3NextRMSNormGated: MetalRMSNormGated,
    MambaRMSNormGated: MetalMambaRMSNormGated,
}
