"""Llama 4, its language model: one expert a token. Published experts are transposed."""

from . import Architecture

architecture = Architecture()
