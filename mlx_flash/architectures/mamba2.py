"""Mamba2: no attention at all, whole layers stream."""

from . import Architecture

architecture = Architecture()
