"""Synthetic checkpoints: what a model of a named shape stores, and the values it gets."""
