"""DeepSeek-V3 and Kimi K2: latent attention, grouped sigmoid routing, first layers dense."""

from . import Architecture

architecture = Architecture()
