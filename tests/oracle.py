"""What transformers says of tiny checkpoints that it wrote itself. A process of its own.

    python tests/oracle.py FOLDER [FAMILY ...]

Writes FOLDER/FAMILY/hf and FOLDER/FAMILY/oracle.npz (tokens [96], logits [96, VOCAB] float32).
torch takes seconds to import and 200 MB, and transformers imports it wherever it is installed. So
it lies in a folder that only this process sees: `make oracle` puts it into `.oracle`.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

TORCH = Path(__file__).parents[1] / ".oracle"


def missing() -> str:
    """Why there is no oracle, or nothing."""
    if TORCH.is_dir() or importlib.util.find_spec("torch") is not None:
        return ""
    return "SKIPPED LOUDLY: PyTorch is not here to be the oracle; `make oracle` installs it"


def run(folder: Path, *names: str) -> None:
    """Have checkpoints and answers written by a process that sees torch."""
    path = os.pathsep.join(filter(None, [str(TORCH), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, folder, *names],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"the oracle failed:\n{done.stderr[-4000:]}")


def main(folder: Path, names: list[str]) -> None:
    import families
    import numpy as np

    for name in names or families.FAMILIES:
        family = families.FAMILIES[name]
        hf = families.write_hf(family, folder / name / "hf")
        tokens, logits = families.oracle(family, hf, families.prompt(family.seed))
        np.savez(folder / name / "oracle.npz", tokens=tokens, logits=logits)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
