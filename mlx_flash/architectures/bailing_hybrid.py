"""Ling 2.5 and 3: linear and latent attention, grouped sigmoid routing, first layers dense."""

from . import Architecture

architecture = Architecture()
