"""Nemotron without experts, squared ReLU and partial rotary attention: whole layers stream."""

from . import Architecture

architecture = Architecture()
