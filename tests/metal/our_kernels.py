"""One small call of each kernel of ``mlx_flash.kernels.metal``, for checks of the kernels alone."""

import importlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from mlx_flash.kernels.experts import AFFINE_BITS

SLOTS, TOP_K, INNER, ROWS = 3, 2, 96, 21
FORMS = [("mxfp4", 4), *(("affine", bits) for bits in AFFINE_BITS)]
KINDS = {
    True: ("clamped", "limited", "capped", "situ", "geglu"),
    False: ("relu2", "silu", "gelu"),
}


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    drawn = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
    return mx.array(drawn).astype(dtype)


def projection(inner: int, rows: int, bias: bool, dtype: mx.Dtype, mode: str, bits: int) -> Any:
    mx.random.seed(bits)
    layer = QuantizedSwitchLinear(inner, rows, SLOTS, bias, 32, bits, mode)
    layer.set_dtype(dtype)
    return layer


def gate_up(
    door: Any, dtype: mx.Dtype, mode: str, bits: int, kind: str = "swiglu", gated: bool = True
) -> Any:
    gate, up = (projection(INNER, ROWS, True, dtype, mode, bits) for _ in range(2))
    slots = mx.array([[2, 0], [1, 1]], mx.uint32)
    x = normal(2, INNER, dtype=dtype)
    return door.gate_up(x, slots, gate if gated else None, up, (kind, 1.5, 0.7))


def down(door: Any, dtype: mx.Dtype, mode: str, bits: int) -> Any:
    slots = mx.array([[2, 0], [1, 1]], mx.uint32)
    return door.down(
        normal(2, TOP_K, INNER, dtype=dtype), slots, normal(2, TOP_K),
        projection(INNER, ROWS, False, dtype, mode, bits), normal(2, ROWS, dtype=dtype),
        normal(2, 1, dtype=dtype),
    )  # fmt: skip


def route(door: Any, dtype: mx.Dtype, **how: Any) -> Any:
    return door.route(normal(3, 40, dtype=dtype), 4, **how)


def delta_step(door: Any, dtype: mx.Dtype) -> Any:
    keys, heads, rows, row = 1, 2, 8, 64
    channels = 2 * keys * row + heads * rows
    a, b = normal(2, 1, heads, dtype=dtype), normal(2, 1, heads, dtype=dtype)
    return door.delta_step(
        normal(2, 1, channels, dtype=dtype), normal(2, 1, heads * rows, dtype=dtype), a, b,
        normal(2, 3, channels, dtype=dtype), normal(channels, 4, 1, dtype=dtype), normal(heads),
        normal(heads), normal(rows, dtype=dtype), normal(2, heads, rows, row), 1e-6,
    )  # fmt: skip


def mamba2_step(door: Any, dtype: mx.Dtype) -> Any:
    groups, heads, rows, row = 1, 2, 8, 64
    channels = heads * rows + 2 * groups * row
    return door.mamba2_step(
        normal(2, 1, heads * rows + channels + heads, dtype=dtype),
        normal(2, 3, channels, dtype=dtype), normal(channels, 4, 1, dtype=dtype),
        normal(channels, dtype=dtype), normal(heads), normal(heads), normal(heads),
        normal(2, heads, rows, row), (0.001, 100.0),
    )  # fmt: skip


def gated_norm(door: Any, dtype: mx.Dtype) -> Any:
    x = normal(3, 100, dtype=dtype)
    return door.gated_norm(x, x, normal(100), 1e-5)


def group_norm(door: Any, dtype: mx.Dtype) -> Any:
    x = normal(3, 200, dtype=dtype)
    return door.group_norm(x, x, normal(200), 1e-5, 100, dtype)


CASES: list[tuple[str, str, Callable[..., Any], dict[str, Any]]] = [
    *(
        (call.__name__, "experts", call, {"mode": mode, "bits": bits})
        for call in (gate_up, down)
        for mode, bits in FORMS
    ),
    *(
        ("gate_up", "experts", gate_up, {"mode": "affine", "bits": 4, "kind": k, "gated": gated})
        for gated, kinds in KINDS.items()
        for k in kinds
    ),
    ("route", "router", route, {}),
    ("route", "router", route, {"score": "sigmoid", "groups": 4, "top_groups": 2, "eps": 1e-20}),
    ("delta_step", "delta", delta_step, {}),
    ("mamba2_step", "ssm", mamba2_step, {}),
    ("gated_norm", "norm", gated_norm, {}),
    ("gated_norm", "norm", group_norm, {}),
]
"""The kernel's file, the module of ``mlx_flash.kernels.metal``, a call, and what else it takes."""

NAMES = [" ".join(map(str, (call.__name__, *how.values()))) for *_, call, how in CASES]

SHORT = {"gate_up affine 4", "down mxfp4 4", "route sigmoid 4 2 1e-20", "delta_step", "gated_norm"}
"""What a short run takes of them."""


def run(number: int, dtype: mx.Dtype) -> list[mx.array]:
    """What a case gives."""
    _, room, call, how = CASES[number]
    made = call(importlib.import_module(f"mlx_flash.kernels.metal.{room}"), dtype, **how)
    return [made] if isinstance(made, mx.array) else list(made)
