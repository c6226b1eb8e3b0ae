"""Decode steps of gated delta nets and Mamba2 mixers on CUDA, where mlx-lm has no kernel for them.

UNRUN: no NVIDIA GPU has executed these. ``tests/metal/test_cuda_source.py`` runs the same text on a
CPU. Nothing turns them on by itself: ``use_cuda(model)`` does. The references are those of
``metal.delta`` and ``metal.ssm``, with which the doors share their arguments.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.nemotron_h import NemotronHMamba2Mixer
from mlx_lm.models.qwen3_5 import GatedDeltaNet
from mlx_lm.models.qwen3_next import Qwen3NextGatedDeltaNet

from .metal import Template, delta, sources, ssm
from .metal.recurrence import swap


class CudaKernel:
    """A kernel body of ``custom_kernels/cuda``, launched as ``metal.Kernel`` launches its own.

    MLX finds a compiled kernel by its name and template alone, so the template names the dtype of
    every input.
    """

    def __init__(self, name: str, inputs: Sequence[str], outputs: Sequence[str]):
        self.name = name
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)

    def __call__(
        self,
        *inputs: mx.array | float,
        template: Template,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
    ) -> list[mx.array]:
        """Put a launch into MLX's graph.

        Args:
            *inputs: Contiguous arrays, and numbers, which the body sees as pointers to one.
            template: Names that the body uses for types and integers, and what they are.
            grid: Threads, not blocks, in x, y and z.
            threadgroup: Threads of a block in x, y and z.
            outputs: Shape and dtype of each output.

        Returns:
            The outputs.

        Raises:
            RuntimeError: If this MLX has no CUDA backend.
        """
        made: list[mx.array] = _built(mx.fast.cuda_kernel, self)(
            inputs=list(inputs),
            template=list(template),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[tuple(shape) for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )
        return made


@functools.cache
def _built(make: Callable[..., Any], kernel: CudaKernel) -> Any:
    # Not at import: MLX refuses to make one where it has no CUDA.
    folder = sources().parent / "cuda"
    return make(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=(folder / f"{kernel.name}.cu").read_text(),
        header=(folder / "recurrence.cuh").read_text(),
    )


DELTA_STEP = CudaKernel("delta_step", delta.INPUTS, delta.OUTPUTS)
MAMBA2_STEP = CudaKernel("mamba2_step", ssm.INPUTS, ssm.OUTPUTS)
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
