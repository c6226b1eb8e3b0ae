"""Qwen3 without experts: whole layers stream."""

from . import Architecture

architecture = Architecture()
