"""mlx-lm's Metal kernels, built by whatever stands in for ``mx.fast.metal_kernel``.

Apple's own compiler takes these kernels on every Mac, so they say what Metal accepts and means
where our reading of its specification could be wrong.
"""

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import patch

import mlx.core as mx

MODULES = (
    "kernels.expert_routing",
    "kernels.norm_add_norm",
    "kernels.post_expert_norm_combine",
    "kernels.qk_norm",
    "kernels.qk_norm_rope",
    "kernels.rms_norm_sigmoid_gate",
    "models.gated_delta",
    "models.ssm",
)


def built(name: str, metal_kernel: Callable[..., Any]) -> ModuleType:
    """A second copy of a module of mlx-lm, made as on a machine with Metal."""
    found = importlib.util.find_spec(f"mlx_lm.{name}")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    with (
        patch.object(mx.metal, "is_available", return_value=True),
        patch.object(mx.fast, "metal_kernel", metal_kernel),
    ):
        found.loader.exec_module(module)
    return module


def calls(metal_kernel: Callable[..., Any], dtype: mx.Dtype) -> list[Callable[[], Any]]:
    """One small call of each of their kernels; each returns arrays, or None among them."""
    routing, add, combine, qk, rope, gate, delta, ssm = (built(m, metal_kernel) for m in MODULES)
    norm = _Norm(mx.ones((96,)), 1e-5)
    heads: dict[str, Any] = {"n_heads": 2, "n_kv_heads": 1, "head_dim": 64}
    q = mx.ones((1, 2, 1, 128))
    v, state = mx.ones((1, 2, 2, 8)), mx.ones((1, 2, 8, 128))
    g, mask = mx.ones((1, 2, 2)), mx.ones((1, 2), dtype=mx.bool_)
    recurrence = (q, q, v, g, g, state)
    vector = (q, q, v, mx.ones((1, 2, 2, 128)), g, state)
    branch, stream = mx.ones((3, 96), dtype=dtype), mx.ones((3, 96))
    added: dict[str, Any] = {"alpha": stream[0], "beta": stream[1], "post_eps": 1e-5}
    qkvg = mx.ones((1, 3, 384), dtype=dtype)
    return [
        lambda: routing.expert_routing(
            mx.ones((3, 40), dtype=dtype), mx.ones((40,)), top_k=4, multiplier=1.0,
            score_eps=1e-6, route_scale=2.0,
        ),
        lambda: add.norm_add_norm(branch, stream, **added, post_weight=None, next_norm=norm),
        lambda: add.norm_add_norm(branch, stream, **added, post_weight=stream[2], next_norm=None),
        lambda: add.pre_norm(stream, norm, dtype=dtype),
        lambda: combine.post_expert_norm_combine(
            mx.ones((3, 4, 96), dtype=dtype), mx.ones((3, 4)), norm_weight=norm.weight, eps=1e-5
        ),
        lambda: qk.qk_norm(qkvg, **heads, eps=1e-5, query_scale=2.0),
        lambda: rope.qk_norm_rope(
            qkvg, **heads, eps=1e-5, query_scale=2.0, rope_base=1e4, offset=7
        ),
        lambda: gate.rms_norm_sigmoid_gate(
            mx.ones((1, 2, 3, 64), dtype=dtype), mx.ones((1, 3, 128), dtype=dtype), eps=1e-5
        ),
        lambda: delta.gated_delta_kernel(*recurrence),
        lambda: delta.gated_delta_kernel_unpacked(*recurrence),
        lambda: delta.gated_delta_kernel_unpacked(*recurrence, mask),
        lambda: delta.gated_delta_kernel_unpacked(*vector),
        lambda: delta.gated_delta_kernel_unpacked(*vector, mask),
        lambda: delta.gated_delta_kernel_xtree(*recurrence),
        lambda: ssm.ssm_update_kernel(
            mx.ones((1, 1, 2, 8), dtype=dtype), mx.ones((2,)), mx.ones((1, 1, 1, 64)),
            mx.ones((1, 1, 1, 64)), mx.ones((2,)), mx.ones((1, 1, 2)), mx.ones((2,)),
            mx.ones((1, 2, 8, 64)), (0.001, 100.0),
        ),
    ]  # fmt: skip


class _Norm:
    def __init__(self, weight: mx.array, eps: float):
        self.weight, self.eps = weight, eps
