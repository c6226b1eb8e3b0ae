"""What a token costs besides its bytes does not grow with the model."""

import sys
from pathlib import Path

import pytest

from mlx_flash.kernels import native, why_not

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import growth

if native() is None:
    pytest.skip(f"SKIPPED LOUDLY: no native extension: {why_not()}", allow_module_level=True)


def test_a_lookup_costs_the_same_among_128_experts_and_512() -> None:
    few, many = growth.lookup_seconds(128, 16), growth.lookup_seconds(512, 512)
    assert many < 3 * few  # 1.2 on a quiet machine; four times the experts, 32 times the slots
