"""Llama, Mistral and what else mlx-lm computes as Llama: whole layers stream."""

from . import Architecture

architecture = Architecture()
