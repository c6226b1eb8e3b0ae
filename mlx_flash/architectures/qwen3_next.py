"""Qwen3-Next: gated delta nets and gated attention, MoE with a gated shared expert."""

from . import Architecture

architecture = Architecture()
