"""Decode steps of gated delta nets and Mamba2 mixers on CUDA, where mlx-lm has no kernel for them.

UNRUN: no NVIDIA GPU has executed these. ``tests/metal/test_cuda_source.py`` runs the same text on a
CPU. Nothing turns them on by itself: ``use_cuda(model)`` does. The references are those of
``metal.delta`` and ``metal.ssm``, with which the doors share their arguments.
"""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.nemotron_h import NemotronHMamba2Mixer
from mlx_lm.models.qwen3_5 import GatedDeltaNet
from mlx_lm.models.qwen3_next import Qwen3NextGatedDeltaNet

from .metal import Kernel, delta, sources, ssm
from .metal.recurrence import swap


class CudaKernel(Kernel):
    """A kernel body of ``custom_kernels/cuda``, launched as those of Metal are.

    MLX finds a compiled kernel by its name and template alone, so the template names the dtype of
    every input. The body sees numbers as pointers to one.
    """

    def maker(self) -> Callable[..., Any]:
        make: Callable[..., Any] = mx.fast.cuda_kernel
        return make

    def texts(self) -> tuple[str, str]:
        folder = sources().parent / "cuda"
        headers = [(folder / f"{name}.cuh").read_text() for name in self.headers]
        return (folder / f"{self.name}.cu").read_text(), "".join(headers)


DELTA_STEP = CudaKernel("delta_step", delta.INPUTS, delta.OUTPUTS, headers=["recurrence"])
MAMBA2_STEP = CudaKernel("mamba2_step", ssm.INPUTS, ssm.OUTPUTS, headers=["recurrence"])
delta_step = functools.partial(delta.delta_step, launch=DELTA_STEP)
mamba2_step = functools.partial(ssm.mamba2_step, launch=MAMBA2_STEP)


class CudaGatedDeltaNet(delta.MetalGatedDeltaNet):
    """``mlx_lm.models.qwen3_5.GatedDeltaNet``, which still computes what is not a decode step."""

    step = staticmethod(delta_step)


class CudaQwen3NextGatedDeltaNet(delta.MetalQwen3NextGatedDeltaNet):
    """``mlx_lm.models.qwen3_next.Qwen3NextGatedDeltaNet``, which still computes all else."""

    step = staticmethod(delta_step)


class CudaMamba2Mixer(ssm.MetalMamba2Mixer):
    """``mlx_lm.models.nemotron_h.NemotronHMamba2Mixer``, which still computes prompts."""

    step = staticmethod(mamba2_step)

    def normed(self, x: mx.array, dtype: mx.Dtype) -> mx.array:
        y: mx.array = self.norm(x).astype(dtype)
        return y


def use_cuda(model: nn.Module) -> None:
    """Let the recurrent layers in a model decode by the kernels, where they can."""
    swap(model, DELTA_NETS, delta.supports)
    swap(model, MIXERS, ssm.supports)


DELTA_NETS: dict[type, type] = {
    GatedDeltaNet: CudaGatedDeltaNet,
    Qwen3NextGatedDeltaNet: CudaQwen3NextGatedDeltaNet,
}
MIXERS: dict[type, type] = {NemotronHMamba2Mixer: CudaMamba2Mixer}
