"""Whether two runtimes run the same model: their logits after every token of a prompt."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .ask import ask, module
from .runs import Setup

RAM = "60%"  # any budget gives the same answer
# Measured with four layers: 0.998. With the experts' gate and up exchanged 0.990, with value
# heads in the wrong order 0.962: most of a logit comes from the token itself, in any model.
LEAST_CORRELATION = 0.995


@dataclass(frozen=True)
class Agreement:
    """Over the positions of a prompt. Correlations are between the logits of one position."""

    positions: int
    top_1: float
    correlation: float  # median
    least_correlation: float

    @property
    def same(self) -> bool:
        return self.correlation >= LEAST_CORRELATION

    def __str__(self) -> str:
        verdict = "the same model" if self.same else "NOT THE SAME MODEL"
        return (
            f"logits of mlx-flash and llama.cpp after {self.positions} tokens: correlation "
            f"{self.correlation:.4f} (least {self.least_correlation:.4f}), the same first choice "
            f"in {self.top_1:.0%}: {verdict}"
        )


def compare(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> Agreement:
    """Two sets of logits. [positions, vocabulary] each."""
    pairs = list(zip(ours, theirs, strict=True))
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in pairs]
    return Agreement(
        positions=len(pairs),
        top_1=float(np.mean([a.argmax() == b.argmax() for a, b in pairs])),
        correlation=float(np.median(correlations)),
        least_correlation=float(np.min(correlations)),
    )


def check(setup: Setup, tokens: int) -> Agreement:
    """Runs both on the beginning of the prompt, one after the other.

    Raises:
        RuntimeError: If one of them does not get that far.
    """
    prompts = [setup.prompts[0][:tokens]]
    llama = {"model": str(setup.gguf), "mapped": True, "repack": False, "threads": setup.threads}
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for command, job in (
            (module(sys.executable, "mlx_run"), {"model": str(setup.model), "ram": RAM}),
            (module(setup.llama_python, "llama_run"), {**llama, "tokens": 0}),
        ):
            out = Path(folder) / f"{len(found)}.npy"
            answer = ask(command, {**job, "prompts": prompts, "logits": str(out)}, setup.limit_s)
            if "done" not in answer:
                raise RuntimeError(f"{command[-1]}: {answer['note']}")
            found.append(np.load(out))
        return compare(*found)
