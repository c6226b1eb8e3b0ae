"""LFM2 MoE: short convolutions and attention, sigmoid routing with a bias, first layers dense."""

from . import Architecture

architecture = Architecture()
