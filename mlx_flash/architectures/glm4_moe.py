"""GLM-4.5 and 4.6: partial rotary attention, sigmoid routing with a bias, first layers dense."""

from . import Architecture

architecture = Architecture()
