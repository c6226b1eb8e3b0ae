"""What mlx-flash costs when the whole model fits: decode speed against stock mlx-lm.

    python benchmarks/resident_tax.py --model DIR

Both models are in one process and take turns, so that a noisy machine is noisy for both.
Every pair's tokens are compared before its times count. The figure is the median ratio.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import mlx_lm
import typer
from mlx_lm.generate import generate_step

import mlx_flash
from mlx_flash import demo


def decode(model, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """Greedy tokens, and tokens per second after the first."""
    ids, times = [], []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=tokens):
        ids.append(token)
        times.append(time.perf_counter())
    return ids, (len(times) - 1) / (times[-1] - times[0])


def main(
    model: Annotated[Path, typer.Option(help="A model folder that fits in RAM twice.")] = (
        demo.FOLDER
    ),
    pairs: Annotated[int, typer.Option(help="Pairs of runs; the first is dropped.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens to decode in each run.")] = 200,
) -> None:
    """Print decode tok/s of both, and the median of their paired ratios."""
    stock, tokenizer = mlx_lm.load(str(model))
    ours, _ = mlx_flash.load(model, context=1024)
    if ours.stores:
        raise SystemExit("The model does not fit whole: the budget is below its size.")
    prompt = tokenizer.encode("Tell me a story about a lantern.")
    ratios, speeds = [], []
    for i in range(pairs):
        runs = [("stock", stock), ("ours", ours)]
        results = {name: decode(m, prompt, tokens) for name, m in (runs if i % 2 else runs[::-1])}
        if results["stock"][0] != results["ours"][0]:
            raise SystemExit("The tokens differ: no figure.")
        if i > 0:
            speeds.append((results["stock"][1], results["ours"][1]))
            ratios.append(results["ours"][1] / results["stock"][1])
    stock_speed, our_speed = (statistics.median(column) for column in zip(*speeds, strict=True))
    print(
        f"decode tok/s, median of {len(ratios)} pairs of {tokens} tokens: "
        f"mlx-lm {stock_speed:.1f}, mlx-flash {our_speed:.1f}, "
        f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    typer.run(main)
