"""Metal kernels for decoding: one file of ``custom_kernels/metal`` each, and its door here.

No Mac has run them yet. ``tests/metal`` runs the source that MLX generates from them on a CPU.
Until ``mlx-flash selftest`` has shown them right and faster on a Mac, MLX's own operations are
the default there and ``--kernels metal`` opts in.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

SIMD = 32
"""Lanes of a simdgroup, on every Apple GPU."""

Template = Sequence[tuple[str, bool | int | mx.Dtype]]


class Kernel:
    """A kernel body of ``custom_kernels/metal`` and how MLX launches it.

    Args:
        name: The file without ``.metal``, and the function's name.
        inputs: Names that the body uses for its inputs, in the order of a call.
        outputs: Those of its outputs.
        headers: Files without ``.h`` beside it that the body needs, in order.
    """

    def __init__(
        self, name: str, inputs: Sequence[str], outputs: Sequence[str], headers: Sequence[str] = ()
    ):
        self.name = name
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.headers = tuple(headers)

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
            *inputs: Arrays, and numbers, which the body sees as float. MLX copies what is not
                contiguous. What a body loads as vectors has to begin where they may: at a
                multiple of 16 bytes, as what MLX computes or loads does, and rows of it.
            template: Names that the body uses for types and integers, and what they are.
            grid: Threads, not groups, in x, y and z.
            threadgroup: Threads of a group in x, y and z.
            outputs: Shape and dtype of each output.

        Returns:
            The outputs.

        Raises:
            RuntimeError: If MLX has no such backend here.
        """
        made: list[mx.array] = _built(self.maker(), self)(
            inputs=[x if isinstance(x, mx.array) else _number(x) for x in inputs],
            template=list(template),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[tuple(shape) for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )
        return made

    def maker(self) -> Callable[..., Any]:
        """MLX's function that makes a kernel of its texts."""
        make: Callable[..., Any] = mx.fast.metal_kernel
        return make

    def texts(self) -> tuple[str, str]:
        """The body, and the headers in front of it."""
        folder = sources()
        headers = [(folder / f"{name}.h").read_text() for name in self.headers]
        return (folder / f"{self.name}.metal").read_text(), "".join(headers)


def available() -> bool:
    """Whether MLX computes on a GPU that Metal drives."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def sources() -> Path:
    """The folder of kernel bodies: in an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[2]
    installed = package / "custom_kernels" / "metal"
    return installed if installed.is_dir() else package.parent / "custom_kernels" / "metal"


@functools.cache
def _number(value: float) -> mx.array:
    # One array for all launches: MLX would make one of every number in every call.
    made = mx.array(float(value))
    mx.eval(made)
    return made


@functools.cache
def _built(make: Callable[..., Any], kernel: Kernel) -> Any:
    # Not before the first launch: MLX may refuse to make one where it has no such backend.
    # ``make`` is part of the key: a test may stand in for the backend.
    body, header = kernel.texts()
    return make(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=body,
        header=header,
    )
