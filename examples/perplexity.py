"""mlx-lm's own perplexity over a streamed model: its quality is the resident model's.

python examples/perplexity.py [MODEL]
"""

import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.perplexity import eval_ppl

import mlx_flash
from mlx_flash import demo

SAMPLES, LENGTH = 4, 64


def main(model_path: str) -> None:
    model, tokenizer = mlx_flash.load(model_path, slots=8)
    tokens = tokenizer.encode(Path(__file__).read_text() * 8)[: SAMPLES * LENGTH]
    perplexity, error = eval_ppl(model, mx.array(tokens).reshape(SAMPLES, LENGTH), batch_size=2)
    print(f"perplexity {perplexity:.3f} +- {error:.3f}, experts {model.plan.residency:.0%} in RAM")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(demo.FOLDER))
