"""Cases that several backends have: what is computed on, and what MLX computes it with."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from ..experts import AFFINE_BITS, MODES
from . import Case, Form, Sizes, Trial, filled, in_float32, normal, routes, weight_bytes

FORMS: dict[str, Form] = {
    **{f"{bits} bit": {"bits": bits, "group_size": 64} for bits in AFFINE_BITS},
    **{
        mode: {"bits": form[0], "group_size": form[1], "mode": mode}
        for mode, form in MODES.items()
        if form is not None
    },
    "dense": None,
}
COMMON = ("4 bit", "mxfp4")  # published checkpoints: tried in bfloat16 and on prompts too
CALLS = 4  # of one chain, each on experts of its own


def experts(
    s: Sizes,
    form: Form,
    rows: int,
    dtype: mx.Dtype,
    ours: Callable[[nn.Module], Any],
    gated: bool = True,
) -> Case:
    """The weighted sum of ``rows`` tokens' experts; ``ours`` makes our layer of mlx-lm's."""
    if gated:
        switch = SwitchGLU(s.hidden, s.middle, s.experts)
    else:
        switch = SwitchMLP(s.hidden, s.middle, s.experts, activation=nn.ReLU2())
    switch = filled(switch, form, dtype, s.experts)

    def weighted(switch: Any, x: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
        y: mx.array = (switch(x, indices) * scores[..., None]).sum(axis=-2)
        return y

    variants = [
        (
            normal(i, 1, rows, s.hidden, dtype=dtype),
            routes(i, rows, s),
            mx.softmax(normal(i + 50, 1, rows, s.top_k, dtype=dtype), axis=-1),
        )
        for i in range(CALLS)
    ]
    read = len(np.unique(np.array(variants[0][1])))
    return Case(
        ours(switch).weighted,
        functools.partial(weighted, switch),
        variants,
        weight_bytes(switch, read / s.experts),
        functools.partial(weighted, in_float32(switch)),
    )


def module(
    stock: Any, use: Callable[[Any], None], variants: Sequence[tuple[mx.array, ...]], nbytes: int
) -> Case:
    """A module beside the same that ``use`` has given kernels, and in float32."""
    ours = copy.deepcopy(stock)
    use(ours)
    return Case(ours, stock, variants, nbytes, in_float32(stock))


def stock_topk(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The router of mlx-lm's Qwen blocks, the scores of those chosen summing to one."""
    gates = mx.softmax(logits, axis=-1, precise=True)
    indices = mx.argpartition(gates, kth=-k, axis=-1)[..., -k:]
    scores = mx.take_along_axis(gates, indices, axis=-1)
    return indices, scores / scores.sum(axis=-1, keepdims=True)


def dense(logits: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
    """Every expert's score: two may choose the same in another order."""
    return mx.put_along_axis(mx.zeros_like(logits), indices, scores, axis=-1)


def function(name: str, shape: str, ours: Any, stock: Any, *arrays: mx.array) -> Trial:
    """A trial of a function in float32, which moves its arguments and about the first again."""
    nbytes = sum(a.nbytes for a in arrays) + arrays[0].nbytes
    return Trial(name, shape, mx.float32, lambda: Case(ours, stock, [arrays] * CALLS, nbytes))


def said_rows(count: int) -> str:
    """A number of rows in words."""
    return "1 row" if count == 1 else f"{count} rows"
