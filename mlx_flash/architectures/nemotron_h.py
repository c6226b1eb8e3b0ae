"""Nemotron-H: Mamba2 and attention layers with MoE blocks between them."""

from types import ModuleType

import mlx.nn as nn

from ..kernels import nemotron_h
from . import Architecture


class NemotronH(Architecture):
    """The routed sum of its MoE block has a kernel."""

    def use_kernels(self, model: nn.Module, native: ModuleType) -> None:
        nemotron_h.use_native(model)
        super().use_kernels(model, native)


architecture = NemotronH()
