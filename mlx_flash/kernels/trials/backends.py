"""Whose kernels can run here, and their trials."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from .. import cuda, why_not
from .. import metal as metal_kernels
from .. import native as extension
from . import Sizes, Trial, metal, native


@dataclass(frozen=True)
class Backend:
    """Kernels that are turned on together.

    Args:
        name: Theirs.
        turned_on: By what.
        runs_on: What compiled them, or what they run on.
        trials: Theirs, at some sizes.
    """

    name: str
    turned_on: str
    runs_on: str
    trials: Callable[[Sizes], list[Trial]]


def present() -> list[Backend]:
    """Those that compute where MLX computes now."""
    found = []
    if metal_kernels.available():
        runs_on = "compiled by Metal at first use"
        found.append(Backend("metal", "--kernels metal", runs_on, metal.trials))
    if mx.cuda.is_available() and mx.default_device() == mx.gpu:
        runs_on = "compiled by CUDA at first use"
        found.append(Backend("cuda", "mlx_flash.kernels.cuda.use_cuda", runs_on, _on_cuda))
    kernels = extension() if mx.default_device() == mx.cpu else None
    if kernels is not None:
        runs_on = f"{kernels.isa()}, {kernels.threads()} threads"
        found.append(Backend("native", "--kernels native", runs_on, native.trials))
    return found


def why_none() -> str:
    """Why there are none at all, where there are none."""
    if mx.default_device() == mx.cpu:
        return why_not()
    return "there are none for the GPU that MLX computes on"


def _on_cuda(sizes: Sizes) -> list[Trial]:
    return list(metal.steps(sizes, cuda.delta_step, cuda.mamba2_step))
