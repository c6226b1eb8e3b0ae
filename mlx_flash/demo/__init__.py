"""The embedded demo model: a small trained ``qwen3_5_moe`` checkpoint, and nothing else."""

from pathlib import Path

FOLDER = Path(__file__).parent
