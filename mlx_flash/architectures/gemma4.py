"""Gemma 4 MoE, its language model: a dense and a routed GeGLU in every layer, sliding windows."""

from . import Architecture

architecture = Architecture()
