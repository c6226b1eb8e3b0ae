"""The parts of `side_by_side.py`: the same model for llama.cpp, and runs of each under a cap."""
