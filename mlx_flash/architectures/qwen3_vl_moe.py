"""Qwen3-VL MoE, its language model. Published experts are transposed."""

from . import Architecture

architecture = Architecture()
