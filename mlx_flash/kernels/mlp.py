"""What surrounds the products of a feed-forward layer: the gated activation, the router's choice.

The references are mlx-lm's ``Qwen3NextMLP``, and in ``Qwen3NextSparseMoeBlock`` the softmax,
partition and renormalization of the router's logits.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.qwen3_next import Qwen3NextMLP

from .cpu import kernels_for, swap


class NativeMLP(Qwen3NextMLP):
    """``mlx_lm.models.qwen3_next.Qwen3NextMLP``, the dense and shared experts of Qwen3.5 too."""

    def __call__(self, x: mx.array) -> mx.array:
        kernels = kernels_for(x)
        y: mx.array
        if kernels is None:
            y = super().__call__(x)
        else:
            y = self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))
        return y


def softmax_topk(logits: mx.array, k: int, norm: bool) -> tuple[mx.array, mx.array]:
    """Choose experts.

    Args:
        logits: [..., experts]
        k: How many to choose.
        norm: Whether the scores of those chosen sum to one.

    Returns:
        indices [..., k], the largest logit first and the lower index first among equals, and
        their softmax over all experts, computed in float32, in the dtype of ``logits``.
    """
    kernels = kernels_for(logits)
    if kernels is not None:
        chosen: tuple[mx.array, mx.array] = kernels.softmax_topk(logits, k, norm)
        return chosen
    # argsort is stable: of equals the lower index stays first.
    indices = mx.argsort(-logits, axis=-1)[..., :k]
    scores = mx.take_along_axis(mx.softmax(logits, axis=-1, precise=True), indices, axis=-1)
    if norm:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return indices, scores


def use_native(model: nn.Module) -> None:
    """Let the gated MLPs in a model be computed by the extension, where it can."""
    swap(model, CLASSES)


CLASSES: dict[type, type] = {Qwen3NextMLP: NativeMLP}
