"""Qwen3 MoE: attention with normalized queries and keys, dense layers where the config says so."""

from . import Architecture

architecture = Architecture()
