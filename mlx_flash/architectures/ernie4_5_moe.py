"""Ernie 4.5 MoE: shared experts, first layers dense."""

from . import Architecture

architecture = Architecture()
