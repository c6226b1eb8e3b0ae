"""Experts on disk, slots in RAM. Knows bytes and expert ids, never a model family."""
