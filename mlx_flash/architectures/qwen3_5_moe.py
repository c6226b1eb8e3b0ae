"""Qwen3.5 MoE: gated delta nets, every fourth layer full attention, MoE in all."""

from types import ModuleType

import mlx.nn as nn

from ..kernels import qwen3_5
from . import Architecture


class Qwen35Moe(Architecture):
    """One token goes through a layer in two fused blocks, which have their own order of work.

    The shared expert and the experts in RAM are computed while others are read.
    """

    def use_kernels(self, model: nn.Module, native: ModuleType) -> None:
        qwen3_5.use_native(model, native)
        super().use_kernels(model, native)


architecture = Qwen35Moe()
