"""Kimi Linear: Kimi delta attention and latent attention, sigmoid routing with a bias."""

from . import Architecture

architecture = Architecture()
