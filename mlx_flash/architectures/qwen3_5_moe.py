"""Qwen3.5 MoE: gated delta nets, every fourth layer full attention, MoE in all."""

from types import ModuleType

import mlx.nn as nn

from ..kernels import qwen3_5
from ..streaming.checkpoint import Checkpoint, Span
from . import Architecture


class Qwen35Moe(Architecture):
    """Streams MLX layout, and Hugging Face layout with gate and up fused in one tensor."""

    def spans(self, checkpoint: Checkpoint, name: str, experts: int) -> list[Span]:
        if name in checkpoint:
            return super().spans(checkpoint, name, experts)
        # Hugging Face: gate_up_proj [experts, 2 * mid, in], gate first; down_proj beside it.
        hf = name.replace("language_model.model", "model.language_model")
        block, _, tail = hf.partition("switch_mlp.")
        if tail == "down_proj.weight":
            return checkpoint[f"{block}experts.down_proj"].rows()
        if tail in ("gate_proj.weight", "up_proj.weight"):
            fused = checkpoint[f"{block}experts.gate_up_proj"].rows()
            return [row.split(2)[tail == "up_proj.weight"] for row in fused]
        return super().spans(checkpoint, name, experts)

    def use_kernels(self, model: nn.Module, native: ModuleType) -> None:
        # One token goes through a layer in two fused blocks, which have their own order of
        # work: the shared expert and the experts in RAM are computed while others are read.
        qwen3_5.use_native(model, native)
        super().use_kernels(model, native)


architecture = Qwen35Moe()
