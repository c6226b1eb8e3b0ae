"""The matrix kernels against this machine's memory and against MLX's own kernels.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --part decode --format affine-4-64 --format mxfp4-4-32
    python benchmarks/kernels.py --part prefill --rows 16 --dtype bfloat16

Decode multiplies one activation vector by many matrices, so many that no cache holds them: what
counts is bytes of weights per second, as a share of what the memory gives to a loop that only
reads. Prefill multiplies many rows by each matrix: what counts is arithmetic per second, as a
multiple of MLX's. In every round the sides take turns, a ratio compares turns of one round, and
the table has the medians.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import mlx.core as mx
import typer
from rich.console import Console
from rich.table import Table

from mlx_flash.kernels import native, why_not

SHAPES = {  # of Qwen3.5-35B-A3B: [out, in]
    "expert gate, up": (512, 2048),
    "expert down": (2048, 512),
    "attention q": (8192, 2048),
    "attention out": (2048, 4096),
    "router": (256, 2048),
    "lm_head": (248320, 2048),
}
FORMATS = (
    *(f"affine-{bits}-64" for bits in (2, 3, 4, 5, 6, 8)),
    *("affine-4-32", "affine-4-128", "mxfp4-4-32", "mxfp8-8-32", "nvfp4-4-16", "dense"),
)
BEYOND_CACHES = 192_000_000  # bytes of weights that a decode turn goes through
MLX_BYTES = 5_000_000  # that MLX's own kernel, so much slower, goes through
MOST_ROWS = 8192  # that are random
TURN_S = 0.1
PREFILL_FLOPS = 4_000_000_000  # of a prefill turn, at least


@dataclass(frozen=True)
class Stack:
    """`count` random matrices of one shape and format."""

    weight: mx.array
    scales: mx.array | None
    biases: mx.array | None
    how: tuple[int, int, str]  # group, bits, mode

    @classmethod
    def random(cls, form: str, count: int, out: int, width: int, dtype: mx.Dtype) -> "Stack":
        if form == "dense":
            return cls(mx.random.normal((count, out, width)).astype(dtype), None, None, (0, 0, ""))
        mode, bits, group = form.split("-")[0], *map(int, form.split("-")[1:])
        # Rows repeat: MLX needs 32 GB to quantize an lm_head to mxfp4, and crashes without them.
        some = mx.random.normal((min(out, MOST_ROWS), width)).astype(dtype)
        one, *rest = (
            mx.tile(part, (-(-out // len(some)), 1))[:out]
            for part in mx.quantize(some, group, bits, mode)
        )
        arrays = [mx.contiguous(mx.broadcast_to(a, (count, *a.shape))) for a in (one, *rest)]
        return cls(arrays[0], arrays[1], (arrays[2:] or [None])[0], (group, bits, mode))

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in (self.weight, self.scales, self.biases) if a is not None]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def ours(self, x: mx.array, prefill: bool) -> mx.array:
        """x [count, rows, in] times each matrix: [count, rows, out]."""
        each = mx.arange(self.weight.shape[0], dtype=mx.uint32)
        if self.scales is None:
            return native().gather_mm(x, self.weight, each, prefill=prefill)
        arrays = (self.weight, self.scales, self.biases)
        return native().gather_qmm(x, *arrays, each, *self.how, prefill=prefill)

    def mlx(self, x: mx.array) -> mx.array:
        """x [rows, in] times the first matrix: [rows, out]."""
        w, scales, biases = (None if a is None else a[0] for a in self.three)
        if scales is None:
            return x @ w.T
        return mx.quantized_matmul(x, w, scales, biases, True, *self.how)

    def first(self, out: int) -> "Stack":
        """The first rows of the first matrix."""
        return Stack(*(None if a is None else a[:1, :out] for a in self.three), self.how)

    @property
    def three(self) -> tuple[mx.array | None, ...]:
        return self.weight, self.scales, self.biases


def seconds(turn: Callable[[], mx.array]) -> float:
    """The shortest of the evaluations that begin within TURN_S."""
    end = time.perf_counter() + TURN_S
    best = float("inf")
    while (start := time.perf_counter()) < end:
        mx.eval(turn())
        best = min(best, time.perf_counter() - start)
    return best


def decode(
    form: str, out: int, width: int, dtype: mx.Dtype, rounds: int, threads: int
) -> tuple[float, float, float]:
    """GB/s of our kernel, share of the memory's, multiple of MLX's."""
    once = Stack.random(form, 1, out, width, dtype).nbytes
    stack = Stack.random(form, max(1, BEYOND_CACHES // once), out, width, dtype)
    part = stack.first(max(1, min(out, MLX_BYTES * out // once)))
    x = mx.random.normal((1, width)).astype(dtype)
    mx.eval(stack.arrays, part.arrays, x)
    speeds, shares, multiples = [], [], []
    for i in range(rounds + 1):
        memory = native().memory_read_bandwidth(BEYOND_CACHES, threads, TURN_S)
        ours = stack.nbytes / seconds(lambda: stack.ours(x[None], False))
        mlx = part.nbytes / seconds(lambda: part.mlx(x))
        if i > 0:  # the first round finds cold code and sleeping threads
            speeds.append(ours / 1e9)
            shares.append(ours / memory)
            multiples.append(ours / mlx)
    return statistics.median(speeds), statistics.median(shares), statistics.median(multiples)


def prefill(
    form: str, out: int, width: int, rows: int, dtype: mx.Dtype, rounds: int
) -> tuple[float, float]:
    """GFLOP/s of our kernel, multiple of MLX's."""
    flops = 2 * rows * out * width
    count = max(1, PREFILL_FLOPS // flops)
    stack = Stack.random(form, count, out, width, dtype)
    x = mx.random.normal((count, rows, width)).astype(dtype)
    mx.eval(stack.arrays, x)
    speeds, multiples = [], []
    for i in range(rounds + 1):
        ours = count * flops / seconds(lambda: stack.ours(x, True))
        mlx = flops / seconds(lambda: stack.mlx(x[0]))
        if i > 0:
            speeds.append(ours / 1e9)
            multiples.append(ours / mlx)
    return statistics.median(speeds), statistics.median(multiples)


def main(
    part: Annotated[
        Literal["both", "decode", "prefill"], typer.Option(help="Which products to time.")
    ] = "both",
    form: Annotated[
        list[str] | None,
        typer.Option("--format", help=f"mode-bits-group; may repeat. One of {', '.join(FORMATS)}."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help=f"May repeat. One of {', '.join(map(repr, SHAPES))}."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Of activations, scales and dense weights."),
    ] = "float32",
    rows: Annotated[int, typer.Option(help="Activation rows in prefill.", min=2)] = 128,
    rounds: Annotated[int, typer.Option(help="Counted rounds; one more is dropped.", min=1)] = 3,
    threads: Annotated[int | None, typer.Option(help="Default: one per core.", min=1)] = None,
) -> None:
    """Time the matrix kernels on the shapes of Qwen3.5-35B-A3B, as ratios within one run.

    Decode is bound by memory: "of memory" says how much of the read bandwidth, measured in the same
    round, the weights arrived at. Prefill is bound by arithmetic. "x MLX" is the same product by
    MLX's CPU kernel. The lm_head takes part in decode only. On a machine that does other work at
    the same time the absolute figures fall; the ratios suffer less.
    """
    if native() is None:
        raise SystemExit(f"No native kernels: {why_not()}.")
    for given, known in ((form, FORMATS), (shape, SHAPES)):
        for name in given or ():
            if name not in known:
                raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}.")
    mx.set_default_device(mx.cpu)
    if threads:
        native().set_threads(threads)
    threads = native().threads()
    kind = getattr(mx, dtype)
    console = Console()
    console.print(f"{native().isa()}, {threads} threads, {dtype} activations")
    if part != "prefill":
        table = Table("decode", "format", "GB/s", "of memory", "x MLX")
        for name in shape or SHAPES:
            for f in form or FORMATS:
                speed, share, multiple = decode(f, *SHAPES[name], kind, rounds, threads)
                table.add_row(name, f, f"{speed:.1f}", f"{share:.0%}", f"{multiple:.0f}")
        console.print(table)
    if part != "decode":
        table = Table("prefill", "format", "rows", "GFLOP/s", "x MLX")
        for name in shape or SHAPES:
            for f in form or FORMATS if name != "lm_head" else ():
                speed, multiple = prefill(f, *SHAPES[name], rows, kind, rounds)
                table.add_row(name, f, str(rows), f"{speed:.0f}", f"{multiple:.0f}")
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
