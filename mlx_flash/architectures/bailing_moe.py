"""Ling 2: grouped sigmoid routing, first layers dense."""

from . import Architecture

architecture = Architecture()
