"""Kernels of these tests run on the emulator."""

import functools

import emulator
import mlx.core as mx
import pytest


def _stand_in(monkeypatch, mode):
    if emulator.COMPILER is None:
        pytest.skip("SKIPPED LOUDLY: no g++, so Metal kernels cannot run here")
    kernel = functools.partial(emulator.metal_kernel, mode=mode)
    monkeypatch.setattr(mx.fast, "metal_kernel", kernel)
    return emulator


@pytest.fixture
def metal(monkeypatch):
    """Metal, as far as a CPU can stand in for it, every access checked. Gives the emulator."""
    return _stand_in(monkeypatch, "checked")


@pytest.fixture
def quick_metal(monkeypatch):
    """As ``metal`` and unchecked, some twenty times as fast: for whole models."""
    return _stand_in(monkeypatch, "plain")
