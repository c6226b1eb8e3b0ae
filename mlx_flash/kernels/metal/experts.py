"""Routed experts while decoding: two launches a layer, from tokens to their weighted sum.

The references are mlx-lm's ``SwitchGLU`` and ``SwitchMLP`` and the sum that a MoE block takes over
its top_k. Prompts stay with MLX's kernels, which multiply by many tokens at once.
"""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.qwen3_next import Qwen3NextMLP

from ..experts import AFFINE_BITS, FLOATS, MLPS, QUANTIZED, Kind, activation_of, projections_of
from . import SIMD, Kernel

DECODE_TOKENS = 8
"""Up to so many tokens at a time the kernels compute, and MLX above. Each token reads its experts
anew, which costs nothing while few of them are the same."""

CHUNK = 32
"""Values of a row that a lane takes at a time."""
SIMDGROUPS = 2
"""Of a threadgroup of ``gate_up``."""
MAX_SIMDGROUPS = 12
"""Of a threadgroup of ``down``: one an expert, if there are no more."""
MIN_ROWS = 8
"""MLX hands arrays of fewer elements to a kernel in another address space."""

ACTIVATIONS = {
    name: number
    for number, name in enumerate(
        ("swiglu", "clamped", "limited", "capped", "situ", "geglu", "relu2", "silu", "gelu")
    )
}
"""Their numbers in ``activations.h``."""

GATE_UP = Kernel(
    "gate_up",
    (
        *("x", "slots"),
        *("gate", "gate_scales", "gate_zeros", "gate_bias"),
        *("up", "up_scales", "up_zeros", "up_bias"),
        *("limit", "alpha"),
    ),
    ("h",),
    headers=("dequantize", "activations"),
)
DOWN = Kernel(
    "down",
    ("h", "slots", "scores", "weight", "scales", "zeros", "bias", "shared", "shared_gate"),
    ("y",),
    headers=("dequantize", "activations"),
)


def gate_up(x: mx.array, slots: mx.array, gate: Any, up: Any, kind: Kind) -> mx.array:
    """The first product of experts and their activation.

    Args:
        x: [T, D] of float32, float16 or bfloat16.
        slots: [T, K] uint32, into the first axis of the weights.
        gate: A quantized switch layer [S, I, D] that ``supports`` takes, or None. A linear layer
            [I, D] is one expert.
        up: Another, quantized in the same way.
        kind: The activation, its limit and its alpha.

    Returns:
        [T, K, I] in the dtype of ``x``; sums and activation in float32.
    """
    name, limit, alpha = kind
    tokens, top_k = slots.shape
    rows = up.weight.shape[-2]
    lanes = lanes_for(x.shape[-1])
    each = rows_for(lanes, up.bits, gate is not None)
    tile = SIMDGROUPS * each * (SIMD // lanes)
    (h,) = GATE_UP(
        x,
        slots,
        *_arrays(up if gate is None else gate),
        *_arrays(up),
        limit,
        alpha,
        template=[
            ("T", x.dtype),
            *_format(up),
            ("LANES", lanes),
            ("ROWS", each),
            ("KIND", ACTIVATIONS[name]),
            ("GATED", gate is not None),
        ],
        grid=(SIMD * SIMDGROUPS * -(-rows // tile), tokens * top_k, 1),
        threadgroup=(SIMD * SIMDGROUPS, 1, 1),
        outputs=[((tokens, top_k, rows), x.dtype)],
    )
    return h


def gate_up_reference(x: mx.array, slots: mx.array, gate: Any, up: Any, kind: Kind) -> mx.array:
    """``gate_up`` in MLX's operations."""
    rows = mx.expand_dims(x.astype(mx.float32), 1)  # [T, 1, D]
    u = _product(up, rows, slots)
    g = u if gate is None else _product(gate, rows, slots)
    return _activated(kind, g, u).astype(x.dtype)


def gate_up_bytes(x: mx.array, slots: mx.array, gate: Any, up: Any) -> int:
    """Bytes that one launch of ``gate_up`` moves: every token's experts, its input and output."""
    weights: int = slots.size * sum(expert_bytes(p) for p in (gate, up) if p is not None)
    moved: int = x.nbytes + slots.nbytes + slots.size * up.weight.shape[1] * x.itemsize
    return weights + moved


def down(
    h: mx.array,
    slots: mx.array,
    scores: mx.array,
    down_proj: Any,
    shared: mx.array | None = None,
    shared_gate: mx.array | None = None,
) -> mx.array:
    """The second product of experts and their weighted sum, the same in every run.

    Args:
        h: [T, K, I] of float32, float16 or bfloat16.
        slots: [T, K] uint32, into the first axis of the weights.
        scores: [T, K], of any float type.
        down_proj: A quantized switch layer [S, D, I] that ``supports`` takes.
        shared: [T, D], added.
        shared_gate: [T, 1] logits; their sigmoid multiplies ``shared``.

    Returns:
        [T, D] in the dtype of ``h``; sums in float32.
    """
    tokens, top_k, inner = h.shape
    rows = down_proj.weight.shape[1]
    lanes = lanes_for(inner)
    each = 4
    simdgroups = -(-top_k // -(-top_k // MAX_SIMDGROUPS))
    (y,) = DOWN(
        h,
        slots,
        scores,
        *_arrays(down_proj),
        h if shared is None else shared,
        h if shared_gate is None else shared_gate,
        template=[
            ("T", h.dtype),
            *_format(down_proj),
            ("LANES", lanes),
            ("ROWS", each),
            ("SIMDS", simdgroups),
            ("SHARED", shared is not None),
            ("SHARED_GATED", shared_gate is not None),
        ],
        grid=(SIMD * -(-rows // (each * (SIMD // lanes))), simdgroups, tokens),
        threadgroup=(SIMD, simdgroups, 1),
        outputs=[((tokens, rows), h.dtype)],
    )
    return y


def down_reference(
    h: mx.array,
    slots: mx.array,
    scores: mx.array,
    down_proj: Any,
    shared: mx.array | None = None,
    shared_gate: mx.array | None = None,
) -> mx.array:
    """``down`` in MLX's operations."""
    y = _product(down_proj, h.astype(mx.float32), slots)
    y = (y * scores.astype(mx.float32)[..., None]).sum(axis=1)
    if shared is not None:
        part = shared.astype(mx.float32)
        if shared_gate is not None:
            part = mx.sigmoid(shared_gate.astype(mx.float32)) * part
        y = y + part
    return y.astype(h.dtype)


def down_bytes(
    h: mx.array, slots: mx.array, scores: mx.array, down_proj: Any, shared: mx.array | None = None
) -> int:
    """Bytes that one launch of ``down`` moves: every token's experts, their inputs, the sum."""
    written: int = h.shape[0] * down_proj.weight.shape[1] * h.itemsize
    read: int = h.nbytes + slots.nbytes + scores.nbytes + (0 if shared is None else shared.nbytes)
    weights: int = slots.size * expert_bytes(down_proj)
    return weights + read + written


def expert_bytes(projection: Any) -> int:
    """Bytes of one expert in a quantized switch layer."""
    arrays = (projection.get(name) for name in ("weight", "scales", "biases", "bias"))
    size: int = sum(a.nbytes // a.shape[0] for a in arrays if a is not None)
    return size


def lanes_for(inner: int) -> int:
    """How many lanes share a row of ``inner`` values: those that leave the fewest idle."""
    chunks = inner // CHUNK
    return max((SIMD, SIMD // 2, SIMD // 4), key=lambda n: (chunks / (-(-chunks // n) * n), n))


def rows_for(lanes: int, bits: int, gated: bool) -> int:
    """How many rows those lanes take, one after another, with one read of their input.

    Enough to read more weights than input, and few enough for a small GPU's worth of simdgroups
    and, unrolled, for an instruction cache: 3, 5 and 6 bits take twice the instructions.
    """
    whole = lanes == SIMD and bits in (2, 4, 8)
    return 4 if whole or not gated else 2


class MetalSwitch(nn.Module):
    """Stands where ``SwitchGLU`` or ``SwitchMLP`` stood and answers the same call.

    Args:
        switch (nn.Module): The mlx-lm layer, which ``supports`` takes. Its weights are experts or
            slots, and prompts are its own.
    """

    def __init__(self, switch: nn.Module):
        super().__init__()
        kind = activation_of(switch)
        if kind is None or not supports(switch):
            raise TypeError(f"no Metal kernels for this {type(switch).__name__}")
        self.switch = switch
        object.__setattr__(self, "kind", kind)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        # x: [..., D], indices: [..., top_k] -> [..., top_k, D]
        y: mx.array
        if not _decodes(x, indices):
            y = self.switch(x, indices)
            return y
        gate, up, down_proj = projections_of(self.switch)
        slots = _rows(indices).astype(mx.uint32)
        h = gate_up(_rows(x), slots, gate, up, self.kind)
        y = down_proj(mx.expand_dims(h, -2), slots)
        return y.reshape(*indices.shape, -1)

    def weighted(
        self,
        x: mx.array,
        indices: mx.array,
        scores: mx.array,
        shared: mx.array | None = None,
        shared_gate: mx.array | None = None,
    ) -> mx.array:
        """The sum of the experts' outputs by their scores, and of a shared expert's.

        Args:
            x: [..., D]
            indices: [..., top_k]
            scores: [..., top_k]
            shared: [..., D], added.
            shared_gate: [..., 1] logits; their sigmoid multiplies ``shared``.

        Returns:
            [..., D] in the dtype of ``x``, summed in float32.
        """
        if not _decodes(x, indices):
            y = (self.switch(x, indices) * scores.astype(mx.float32)[..., None]).sum(axis=-2)
            if shared is not None:
                y = y + (shared if shared_gate is None else mx.sigmoid(shared_gate) * shared)
            total: mx.array = y.astype(x.dtype)
            return total
        gate, up, down_proj = projections_of(self.switch)
        slots = _rows(indices).astype(mx.uint32)
        h = gate_up(_rows(x), slots, gate, up, self.kind)
        y = down(
            h,
            slots,
            _rows(scores),
            down_proj,
            None if shared is None else _rows(shared),
            None if shared_gate is None else _rows(shared_gate),
        )
        return y.reshape(x.shape)


class MetalMLP(Qwen3NextMLP):
    """``mlx_lm.models.qwen3_next.Qwen3NextMLP``, the shared experts of Qwen3.5 too.

    For one token; with more, MLX reads the weights fewer times.
    """

    def __call__(self, x: mx.array) -> mx.array:
        # x: [..., D] -> [..., D]
        y: mx.array
        if x.size != x.shape[-1] or x.dtype not in FLOATS:
            y = super().__call__(x)
            return y
        h = gate_up(_rows(x), _slot_zero(), self.gate_proj, self.up_proj, MLPS[Qwen3NextMLP])
        y = self.down_proj(h.reshape(*x.shape[:-1], -1))
        return y


def supports_mlp(mlp: nn.Module) -> bool:
    """Whether ``MetalMLP`` can stand for this layer: a ``Qwen3NextMLP``, gate and up quantized."""
    if type(mlp) is not Qwen3NextMLP:
        return False
    gate, up, _ = projections_of(mlp)
    return all(map(_supported, (gate, up))) and _alike(gate, up)


def supports(switch: nn.Module) -> bool:
    """Whether the kernels take this switch layer as it is.

    It is exactly mlx-lm's, has an activation of ``ACTIVATIONS`` and nothing else attached, and its
    projections are quantized: affine with 2, 3, 4, 5, 6 or 8 bits and float scales, or mxfp4; gate
    and up in the same way.
    """
    kind = activation_of(switch)
    if kind is None or kind[0] not in ACTIVATIONS or type(switch) in MLPS:
        return False
    gate, up, down_proj = projections_of(switch)
    parts = [p for p in (gate, up, down_proj) if p is not None]
    if len(switch.keys() - {"activation"}) != len(parts) or not all(map(_supported, parts)):
        return False
    return gate is None or _alike(gate, up)


def _supported(projection: Any) -> bool:
    if type(projection) not in QUANTIZED:
        return False
    if projection.get("global_scale") is not None or projection.weight.shape[-2] < MIN_ROWS:
        return False
    if projection.mode == "affine":
        return projection.bits in AFFINE_BITS and projection.scales.dtype in FLOATS
    form: tuple[str, int, int] = (projection.mode, projection.bits, projection.group_size)
    return form == ("mxfp4", 4, CHUNK)


def _alike(gate: Any, up: Any) -> bool:
    return gate.weight.shape == up.weight.shape and _format(gate) == _format(up)


def _format(projection: Any) -> list[tuple[str, int | bool]]:
    return [
        ("BITS", projection.bits),
        ("GROUP", projection.group_size),
        ("FP4", projection.mode == "mxfp4"),
        ("BIASED", "bias" in projection),
    ]


def _arrays(projection: Any) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    # What there is not is not read; something has to stand in its place.
    scales, zeros = projection.scales, projection.get("biases")
    bias = projection.get("bias")
    return (
        projection.weight,
        scales,
        scales if zeros is None else zeros,
        scales if bias is None else bias,
    )


def _decodes(x: mx.array, indices: mx.array) -> bool:
    tokens = x.size // x.shape[-1]
    return 0 < tokens <= DECODE_TOKENS and x.shape[:-1] == indices.shape[:-1] and x.dtype in FLOATS


@functools.cache
def _slot_zero() -> mx.array:
    slots = mx.zeros((1, 1), mx.uint32)
    mx.eval(slots)  # every thread may use it
    return slots


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def _product(projection: Any, x: mx.array, slots: mx.array) -> mx.array:
    # x: [T, 1 or K, I], slots: [T, K] -> [T, K, rows]
    zeros = projection.get("biases")
    weight = mx.dequantize(
        projection.weight[slots],
        projection.scales[slots],
        None if zeros is None else zeros[slots],
        group_size=projection.group_size,
        bits=projection.bits,
        mode=projection.mode,
    ).astype(mx.float32)
    y = (weight @ x[..., None]).squeeze(-1)
    return y + projection.bias[slots].astype(mx.float32) if "bias" in projection else y


def _activated(kind: Kind, gate: mx.array, up: mx.array) -> mx.array:
    name, limit, alpha = kind
    activate: Callable[[], mx.array] = {
        "swiglu": lambda: nn.silu(gate) * up,
        "clamped": lambda: _swish(mx.minimum(gate, limit), alpha) * (_clip(up, limit) + 1),
        "limited": lambda: nn.silu(mx.minimum(gate, limit)) * _clip(up, limit),
        "capped": lambda: mx.minimum(nn.silu(gate), limit) * _clip(up, limit),
        "situ": lambda: limit * mx.tanh(gate / limit) * mx.sigmoid(gate) * _soft(up, alpha),
        "geglu": lambda: nn.gelu_approx(gate) * up,
        "relu2": lambda: mx.square(nn.relu(up)),
        "silu": lambda: nn.silu(up),
        "gelu": lambda: nn.gelu_approx(up),
    }[name]
    return activate()


def _swish(x: mx.array, alpha: float) -> mx.array:
    return x * mx.sigmoid(alpha * x)


def _clip(x: mx.array, limit: float) -> mx.array:
    return mx.clip(x, -limit, limit)


def _soft(x: mx.array, limit: float) -> mx.array:
    return limit * mx.tanh(x / limit) if limit else x
