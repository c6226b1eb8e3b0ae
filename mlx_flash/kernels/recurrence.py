"""What gated delta nets and Mamba2 mixers share: their caches, and the convolution before them.

The reference of ``conv_silu`` is ``nn.silu(conv(mx.concatenate([history, x], axis=1)))``.
"""

from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .cpu import kernels_for

MAX_TAPS = 16


def kernels_for_mixer(
    conv: nn.Conv1d, cache: Any | None, mask: mx.array | None, *arrays: mx.array
) -> ModuleType | None:
    """The extension if it can take this call of a recurrent mixer, else None.

    Args:
        conv: The mixer's convolution.
        cache: An ``ArraysCache`` of the convolution's history and the state, or None.
        mask: What the mixer was called with. The extension takes none.
        arrays: The input, and the parameters that are not of a linear layer.
    """
    if mask is not None or not _supports(conv):
        return None
    if cache is not None and cache.lengths is not None:
        return None
    if cache is not None and cache[1] is not None and cache[1].dtype != mx.float32:
        return None
    return kernels_for(*arrays, conv.weight)


def conv_silu(
    kernels: ModuleType, conv: nn.Conv1d, x: mx.array, history: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Convolve tokens with those before them, causally and channel by channel, then silu.

    Args:
        kernels: The extension.
        conv: The convolution of a call that ``kernels_for_mixer`` accepts.
        x: [B, S, channels]
        history: The taps - 1 rows before ``x``: [B, taps - 1, channels]. None: zeros.

    Returns:
        The activations [B, S, channels], and the history of what follows.
    """
    channels, taps, _ = conv.weight.shape
    if history is None:
        history = mx.zeros((x.shape[0], taps - 1, channels), x.dtype)
    y: tuple[mx.array, mx.array] = kernels.conv1d(
        history.astype(x.dtype), x, conv.weight, conv.get("bias"), True
    )
    return y


def _supports(conv: nn.Conv1d) -> bool:
    channels, taps, each = conv.weight.shape
    plain = (conv.stride, conv.dilation, conv.padding) == (1, 1, 0)
    return plain and each == 1 and conv.groups == channels and 1 < taps <= MAX_TAPS
