"""Stock mlx-lm on the tiny checkpoint of every family says what transformers says."""

from pathlib import Path

import families
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

pytest.importorskip(
    "torch",
    reason="SKIPPED: NO FAMILY IS COMPARED WITH TRANSFORMERS. `pip install torch` to do so.",
)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_resident_model_agrees_with_the_oracle(name: str, tmp_path: Path) -> None:
    family = families.FAMILIES[name]
    folder = families.write_hf(family, tmp_path / "hf")
    tokens, expected = families.oracle(family, folder, families.prompt())
    model, _ = load_model(folder)
    found = families.logits(model, tokens)
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    # [positions]
    error = np.abs(found - expected).max(-1) / np.abs(expected).max(-1)
    assert error.max() <= 1e-3, f"at {error.argmax()}: {error.max():.1e}. {family.differs}"


@pytest.fixture(autouse=True)
def on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)
