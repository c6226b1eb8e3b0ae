"""Whose kernels can run here, and their trials."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from .. import native as extension
from .. import why_not
from . import Sizes, Trial, native


@dataclass(frozen=True)
class Backend:
    """Kernels that one name of ``--kernels`` stands for.

    Args:
        name: That name.
        runs_on: What compiled them, or what they run on.
        trials: Theirs, at some sizes.
    """

    name: str
    runs_on: str
    trials: Callable[[Sizes], list[Trial]]


def present() -> list[Backend]:
    """Those that compute where MLX computes now."""
    found = []
    kernels = extension() if mx.default_device() == mx.cpu else None
    if kernels is not None:
        runs_on = f"{kernels.isa()}, {kernels.threads()} threads"
        found.append(Backend("native", runs_on, native.trials))
    return found


def why_none() -> str:
    """Why there are none at all, where there are none."""
    if mx.default_device() == mx.cpu:
        return why_not()
    return "MLX runs on a GPU here that there are none for"
