"""Nemotron-H: Mamba2 and attention layers with MoE blocks between them."""

from types import ModuleType

import mlx.nn as nn

from ..kernels import nemotron_h
from ..streaming.checkpoint import Checkpoint, Span
from . import Architecture

HF_NAMES = {"fc1": "up_proj", "fc2": "down_proj"}


class NemotronH(Architecture):
    """Streams MLX layout, and Hugging Face layout with a tensor per expert."""

    def spans(self, checkpoint: Checkpoint, name: str, experts: int) -> list[Span]:
        if name in checkpoint:
            return super().spans(checkpoint, name, experts)
        block, _, tail = name.partition("switch_mlp.")  # tail: "fc1.weight"
        proj, _, part = tail.partition(".")
        return [
            checkpoint[f"{block}experts.{e}.{HF_NAMES[proj]}.{part}"].span for e in range(experts)
        ]

    def use_kernels(self, model: nn.Module, native: ModuleType) -> None:
        nemotron_h.use_native(model)
        super().use_kernels(model, native)


architecture = NemotronH()
