"""Jamba: Mamba and attention layers, every second with MoE."""

from . import Architecture

architecture = Architecture()
