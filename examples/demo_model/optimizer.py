"""Muon for the matrices, AdamW for the rest, and 4-bit rounding in the forward pass towards the end
of training.

Muon: Keller Jordan et al., 2024; step sizes as in Liu et al., 2025, "Muon is Scalable for LLM
Training".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

GROUP = 64


def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix, g: [batch, rows, cols],
    in bfloat16."""
    tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if tall else g).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized; matrices [rows, cols] or stacks of them [n, rows, cols]."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                matrices = self._matrices(p, update)
                update = orthogonalize(matrices).reshape(update.shape).float()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(matrices.shape[-2:]) ** 0.5)

    @staticmethod
    def _matrices(p: nn.Parameter, update: torch.Tensor) -> torch.Tensor:
        """Gate and up projections share a tensor but are two matrices."""
        if p.ndim == 3 and p.shape[1] == 2 * GROUP:
            return update.reshape(-1, GROUP, p.shape[-1])
        return update.reshape(-1, *update.shape[-2:])


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, everything else: embeddings, head, routers, convolutions, gains)."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        outside = any(
            part in name
            for part in ("embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate", "conv1d")
        )
        (rest if outside or p.ndim < 2 or p.shape[-2] < 16 else matrices).append(p)
    return matrices, rest


def fake_quantize(w: torch.Tensor, bits: int) -> torch.Tensor:
    """mx.quantize then mx.dequantize (affine, group of 64 along the last axis), float32."""
    groups = w.reshape(-1, GROUP)
    levels = 2**bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / levels).clamp_min(1e-7)
    low_is_edge = low.abs() > high.abs()
    scale = torch.where(low_is_edge, scale, -scale)
    edge = torch.where(low_is_edge, low, high)
    zero = torch.round(edge / scale)
    scale = torch.where(zero != 0, edge / zero.where(zero != 0, torch.ones_like(zero)), scale)
    bias = torch.where(zero == 0, torch.zeros_like(edge), edge)
    steps = torch.round((groups - bias) / scale).clamp_(0, levels)
    return (steps * scale + bias).reshape(w.shape)


def quantized_bits(name: str, p: nn.Parameter, bits: int) -> int | None:
    """The bits mlx-lm's conversion gives this tensor, None where it stays float."""
    if p.ndim < 2 or "conv1d" in name or p.shape[-1] % GROUP:
        return None
    return 8 if "mlp.gate." in name or "shared_expert_gate" in name else bits


@contextmanager
def rounded_weights(model: nn.Module, bits: int | None) -> Iterator[None]:
    """Weights as the quantized model will have them; gradients taken here go to the float weights
    (straight through)."""
    if bits is None:
        yield
        return
    kept = []
    with torch.no_grad():
        for name, p in model.named_parameters():
            if width := quantized_bits(name, p, bits):
                kept.append((p, p.data))
                p.data = fake_quantize(p.data, width)
    try:
        yield
    finally:
        for p, data in kept:
            p.data = data
