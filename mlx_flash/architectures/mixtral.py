"""Mixtral: few wide experts, softmax over those chosen."""

from . import Architecture

architecture = Architecture()
