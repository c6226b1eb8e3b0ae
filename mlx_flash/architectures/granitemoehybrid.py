"""Granite 4: Mamba2 and attention layers, each with MoE and a shared expert."""

from . import Architecture

architecture = Architecture()
