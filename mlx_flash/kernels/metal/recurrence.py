"""What the decode steps of gated delta nets and Mamba2 mixers share: when they apply, how wide.

Both keep a float32 state of rows per head. Eight lanes read a row, a simdgroup has four rows at a
time, and the threadgroup of a head has as many simdgroups as divide its rows.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..experts import FLOATS

MAX_SIMDS = 16
MAX_TAPS = 8
MAX_TILE = 32
"""Floats of a head's state that a lane may hold. An Apple core has 104 registers for each of 512
threads, and a pipeline that needs more may not be launched that wide."""


def simdgroups(rows: int) -> int:
    """Simdgroups of the threadgroup that has ``rows`` rows of a state, a multiple of 4."""
    return max(n for n in range(1, MAX_SIMDS + 1) if rows // 4 % n == 0)


def state_fits(rows: int, row: int) -> bool:
    """Whether the kernels take a head's state of ``rows`` rows with ``row`` elements each.

    It then has at most 8 passes over its rows, and so a thread for every row.
    """
    if rows < 4 or rows % 4 or row < 32 or row % 32:
        return False
    passes = rows // 4 // simdgroups(rows)
    return passes * row // 8 <= MAX_TILE


def conv_fits(conv: nn.Conv1d) -> bool:
    """Whether a convolution is causal, channel by channel, with few enough taps."""
    channels, taps, each = conv.weight.shape
    plain = (conv.stride, conv.dilation, conv.padding) == (1, 1, 0)
    return plain and each == 1 and conv.groups == channels and 2 <= taps <= MAX_TAPS


def decodes(mixer: Any, inputs: mx.array, mask: mx.array | None, cache: Any | None) -> bool:
    """Whether a step kernel may take this call of a mixer.

    It takes one token of each sequence, without a mask, in the dtype of the convolution, with
    a float32 state. What needs gradients, or has sequences of several lengths, is mlx-lm's.
    """
    if inputs.shape[1] != 1 or mask is not None or mixer.training:
        return False
    if inputs.dtype not in FLOATS or mixer.conv1d.weight.dtype != inputs.dtype:
        return False
    if cache is None:
        return True
    return cache.lengths is None and (cache[1] is None or cache[1].dtype == mx.float32)


def history_of(cache: Any | None, conv: nn.Conv1d, x: mx.array) -> mx.array:
    """[B, taps - 1, channels]: what was before ``x`` [B, 1, ...], zeros if nothing was."""
    channels, taps, _ = conv.weight.shape
    if cache is None or cache[0] is None:
        return mx.zeros((x.shape[0], taps - 1, channels), x.dtype)
    history: mx.array = cache[0].astype(x.dtype)
    return history


def state_of(cache: Any | None, *shape: int) -> mx.array:
    """The state of a cache, or zeros of ``shape``."""
    return mx.zeros(shape) if cache is None or cache[1] is None else cache[1]


def pairs_of(channels: int, state: mx.array) -> int:
    """Pairs of rows, q and k or B and C, beside the values of a convolution's channels."""
    _, heads, rows, row = state.shape
    return (channels - heads * rows) // (2 * row)


def keep(cache: Any | None, history: mx.array, state: mx.array) -> None:
    """Put what the next token needs into a cache, if there is one."""
    if cache is not None:
        cache[0], cache[1] = history, state
        cache.advance(1)


def swap(model: nn.Module, classes: Mapping[type, type], supports: Any) -> None:
    """Give the modules of exactly these classes, where the kernels support them, the others."""
    for _, module in model.named_modules():
        if type(module) in classes and supports(module):
            module.__class__ = classes[type(module)]
