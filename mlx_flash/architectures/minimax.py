"""MiniMax-M2: partial rotary attention, sigmoid routing with a bias."""

from . import Architecture

architecture = Architecture()
