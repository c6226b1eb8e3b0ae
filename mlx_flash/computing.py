"""Who computes a model and who fetches for it: the compiled extension, or MLX and Python.

The Metal kernels are MLX's as far as fetching goes: Python does it.
"""

from types import ModuleType

import mlx.core as mx

from .config import StreamConfig
from .errors import UsageError
from .kernels import metal, native, why_not
from .kernels.dense_switch import needs_dense
from .kernels.experts import supports
from .kernels.metal import experts as metal_experts
from .opening import LazyModel


def extension(lazy: LazyModel, knobs: StreamConfig) -> ModuleType | None:
    """The compiled kernels, if they are to compute this model.

    Raises:
        UsageError: If they are asked for and cannot be had.
    """
    if knobs.kernels in ("reference", "graph") or on_metal(knobs):
        return None
    if knobs.kernels == "native" and native() is None:
        raise UsageError(f"--kernels native: {why_not()}.")
    fits = mx.default_device() == mx.cpu and all(map(supports, lazy.switches.values()))
    if fits and native() is not None:
        return native()
    if knobs.kernels == "native":
        raise UsageError("--kernels native: none for this device or for this model's experts.")
    if knobs.reader == "direct":
        raise UsageError(f"--reader direct comes with the native kernels: {why_not()}.")
    return None


def on_metal(knobs: StreamConfig) -> bool:
    """Whether the Metal kernels are to compute what they can.

    Raises:
        UsageError: If they are asked for and cannot be had.
    """
    if knobs.kernels != "metal":
        return False
    if not metal.available():
        raise UsageError(
            "--kernels metal needs a Mac, and MLX computing on its GPU. Leave it out: --kernels "
            "auto takes the fastest that there is."
        )
    if knobs.reader == "direct":
        raise UsageError("--reader direct comes with the native kernels. Use --reader pread.")
    return True


def pools(lazy: LazyModel, knobs: StreamConfig) -> ModuleType | None:
    """The compiled extension, if it only fetches and MLX computes.

    Raises:
        UsageError: If that is asked for and cannot be had.
    """
    if knobs.kernels != "graph":
        return None
    if native() is None:
        raise UsageError(f"--kernels graph: {why_not()}.")
    if any(map(needs_dense, lazy.switches.values())):
        raise UsageError("--kernels graph: MLX cannot compute these experts on this device.")
    return native()


def slower_because(knobs: StreamConfig) -> str:
    """Why the compiled kernels will not compute though they should; empty if they may."""
    wanted = knobs.kernels == "auto" and mx.default_device() == mx.cpu
    return why_not() if wanted else ""


def who_computes(lazy: LazyModel, knobs: StreamConfig) -> tuple[str, str]:
    """The kernels that would run, and why they are not the compiled ones; empty if they are.

    Raises:
        UsageError: If they are asked for and cannot be had.
    """
    compiled = extension(lazy, knobs)
    if compiled is not None:
        return f"native {compiled.isa()}", ""
    if knobs.kernels in ("reference", "graph"):
        return knobs.kernels, f"--kernels {knobs.kernels}"
    if knobs.kernels == "metal":
        ours = sum(map(metal_experts.supports, lazy.switches.values()))
        theirs = len(lazy.switches) - ours
        said = f"; MLX computes {theirs} of {len(lazy.switches)} layers of experts"
        return "metal", f"--kernels metal{said if theirs else ''}"
    if mx.default_device() != mx.cpu:
        return "reference", "the compiled ones are for CPUs, and MLX runs on a GPU here"
    return "reference", why_not() or "there are none for this model's experts"
