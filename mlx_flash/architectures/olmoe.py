"""OLMoE: normalized queries and keys, many narrow experts."""

from . import Architecture

architecture = Architecture()
