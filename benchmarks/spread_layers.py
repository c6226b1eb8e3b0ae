"""Which whole layers should stay in RAM: spread among those that stream, or in one block?

Layers and disk sleep instead of working, so that nothing but the order of things is measured:

    python benchmarks/spread_layers.py --layers 32 --stay 16 --compute-ms 5 --read-ms 10
"""

import time
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import typer

from mlx_flash.streaming import layers as streaming
from mlx_flash.streaming.checkpoint import Span
from mlx_flash.streaming.layers import LayerRing, LayerTensor
from mlx_flash.streaming.spread import fixed_layers, whole_layer


class SleepingDisk:
    """A reader that takes its time and brings nothing."""

    bytes_read, read_s = 0, 0.0

    def __init__(self, seconds: float):
        self.seconds = seconds

    def read_into(self, jobs: Any) -> None:
        time.sleep(self.seconds)

    def close(self) -> None:
        pass


def token_s(stays: list[int], compute_s: float, read_s: float, tokens: int) -> float:
    """Seconds for a token, when the layers of ``stays`` that are 1 need not be read."""
    span = Span(Path("none"), 0, 4)
    streamed = [
        [LayerTensor(nn.Module(), "weight", span, (1, 1), mx.float32)] for stay in stays if not stay
    ]
    ring = LayerRing(streamed, SleepingDisk(read_s), lambda n: mx.zeros((n,), mx.uint8))
    for i in range(tokens + 1):
        if i == 1:  # the first one fills the ring
            begun = time.perf_counter()
        turn = 0
        for stay in stays:
            if stay:
                time.sleep(compute_s)
                continue
            with ring.holding(turn):
                time.sleep(compute_s)
            turn += 1
    seconds = (time.perf_counter() - begun) / tokens
    ring.close()
    return seconds


def main(
    layers: int = 32,
    stay: Annotated[int, typer.Option(help="Layers in RAM.")] = 16,
    compute_ms: float = 5,
    read_ms: float = 10,
    tokens: int = 10,
) -> None:
    """Compare the two orders, with two buffers and with three."""
    each = {str(i): whole_layer(4) for i in range(layers)}
    orders = {
        "spread": list(fixed_layers(stay, each).values()),
        "block": [int(i < stay) for i in range(layers)],
    }
    ideal_ms = max((layers - stay) * read_ms, layers * compute_ms)
    print(f"at best {ideal_ms:.0f} ms a token: the longer of reading and computing")
    for ring in (2, 3):
        streaming.RING = ring
        for name, stays in orders.items():
            ms = 1e3 * token_s(stays, compute_ms / 1e3, read_ms / 1e3, tokens)
            print(f"{name}, {ring} buffers: {ms:.0f} ms a token, {ideal_ms / ms:.0%} of the best")


if __name__ == "__main__":
    typer.run(main)
