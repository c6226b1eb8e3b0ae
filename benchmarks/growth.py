"""Does a token cost what its bytes cost? Lookups against experts and slots, time against bytes."""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import numpy as np
import typer
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

import mlx_flash
from mlx_flash.kernels import native, why_not

TOP_K = 8
EXPERT_BYTES = 4096
CALLS = 2000
WINDOW = 8  # tokens between two readings of the clock
PROMPT_TOKENS = 64


def lookup_seconds(experts: int, slots: int) -> float:
    """Of one layer's call whose experts are all in their slots: the best of several means."""
    extension = native()
    assert extension is not None, why_not()
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(experts * EXPERT_BYTES)
        files = extension.Files([file.name], 1, False)
        spans = {"w": [(0, e * EXPERT_BYTES, EXPERT_BYTES) for e in range(experts)]}
        memory = {"w": extension.empty_slots([slots, EXPERT_BYTES], mx.uint8)}
        pool = extension.ExpertPool(files, spans, memory, "lru")
        pool.place(list(range(slots)))
        rng = np.random.default_rng(0)
        calls = [rng.choice(slots, TOP_K, replace=False).tolist() for _ in range(CALLS)]
        best = float("inf")
        for _ in range(5):
            begun = time.perf_counter()
            for call in calls:
                pool.place(call)
            best = min(best, (time.perf_counter() - begun) / CALLS)
        files.close()
    return best


def decode_windows(model_path: Path, slots: int, tokens: int) -> tuple[list[float], list[float]]:
    """Bytes read and seconds per token of each window of a decode."""
    model, _ = mlx_flash.load(model_path, slots=slots, context=PROMPT_TOKENS + tokens + WINDOW)
    prompt = mx.array(np.random.default_rng(0).integers(1000, size=PROMPT_TOKENS))
    steps = generate_step(
        prompt, model, max_tokens=tokens + WINDOW, prompt_cache=make_prompt_cache(model)
    )
    nbytes, seconds = [], []
    for number in range(tokens // WINDOW + 1):
        before, begun = model.reader.bytes_read, time.perf_counter()
        for _ in range(WINDOW):
            next(steps)
        if number:  # the first one holds the prompt
            nbytes.append((model.reader.bytes_read - before) / WINDOW)
            seconds.append((time.perf_counter() - begun) / WINDOW)
    steps.close()
    model.close()
    return nbytes, seconds


def main(
    model: Annotated[
        Path | None, typer.Argument(help="A checkpoint to decode with. Without it: lookups only.")
    ] = None,
    slots: Annotated[str, typer.Option(help="Experts in RAM per layer, one run each.")] = (
        "16,24,32,48,64,96,128"
    ),
    tokens: Annotated[int, typer.Option(min=16, help="Tokens to decode in a run.")] = 64,
) -> None:
    """Show what a lookup costs as experts and slots grow, and what a token costs as misses grow.

    python benchmarks/growth.py qwen-8
    """
    times = {
        (experts, held): lookup_seconds(experts, held)
        for experts in (128, 256, 512)
        for held in (16, 64, 128, 256, 512)
        if held <= experts
    }
    print("one layer's lookup of 8 experts in RAM, in microseconds, the call from Python included")
    for (experts, held), seconds in times.items():
        print(f"  {experts:>4} experts, {held:>4} slots: {seconds * 1e6:6.2f}")
    print(f"  slowest over fastest: {max(times.values()) / min(times.values()):.2f}")
    if model is None:
        return
    runs = {int(n): decode_windows(model, int(n), tokens) for n in slots.split(",")}
    print("decode")
    for n, (nbytes, seconds) in runs.items():
        print(
            f"  {n:>4} slots: {np.mean(nbytes) / 1e6:8.2f} MB and "
            f"{np.mean(seconds) * 1e3:7.2f} ms per token"
        )
    x = np.array([np.mean(nbytes) for nbytes, _ in runs.values()])
    y = np.array([np.mean(seconds) for _, seconds in runs.values()])
    slope, base = np.polyfit(x, y, 1)
    rest = y - (slope * x + base)
    explained = 1 - np.sum(rest**2) / np.sum((y - y.mean()) ** 2)
    print(
        f"  a line explains {explained:.1%}: {base * 1e3:.2f} ms and 1 s for each "
        f"{1 / slope / 1e6:.0f} MB; furthest from it {np.max(np.abs(rest) / y):.1%}"
    )


if __name__ == "__main__":
    typer.run(main)
