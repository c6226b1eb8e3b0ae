"""When the compiled kernels apply: MLX computes on the CPU, on dtypes that they take."""

from collections.abc import Mapping
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn

from . import native
from .experts import FLOATS


def kernels_for(*arrays: mx.array) -> ModuleType | None:
    """The extension if it can compute with these arrays where MLX computes now, else None."""
    if mx.default_device() != mx.cpu or any(a.dtype not in FLOATS for a in arrays):
        return None
    return native()


def swap(model: nn.Module, classes: Mapping[type, type]) -> None:
    """Give every module in a tree the class that stands for its own.

    Subclasses, which may have a forward of their own, stay as they are. So does everything
    where the extension is missing.
    """
    if native() is None:
        return
    for _, module in model.named_modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
