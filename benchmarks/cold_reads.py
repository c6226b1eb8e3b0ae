"""Disk, not us: reads of a cold decode against a plain parallel read of the same spans.

    python benchmarks/cold_reads.py --model DIR --residency 0.5

Decodes with part of the experts in RAM and notes every batch that the stores ask the reader
for. Then, token by token, the reader and a bare thread pool of ``os.pread`` each read that
token's batches again, the checkpoint dropped from the page cache before every turn. They take
turns at going first, after a round that nobody times: on a virtual machine the host may cache
the disk too, and whoever came first would pay for both. The figure is the median of the ratios.
"""

import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer
from mlx_lm.generate import generate_step

import mlx_flash
from mlx_flash.streaming.checkpoint import Span

Batch = list[tuple[Span, memoryview]]


def drop_from_page_cache(folder: Path) -> None:
    """Make the next read of every shard come from the disk. Needs no privilege."""
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def record(reader) -> list[Batch]:
    """From now on, a list of what each ``read_into`` of this reader was asked for."""
    batches: list[Batch] = []
    read_into = reader.read_into

    def recording(jobs: Sequence) -> None:
        batches.append(list(jobs))
        read_into(jobs)

    reader.read_into = recording
    return batches


def plain_read_s(batches: list[Batch], threads: int) -> float:
    """Seconds to read the batches one after another, a pread per span, in a thread pool."""
    paths = {span.path for batch in batches for span, _ in batch}
    files = {path: os.open(path, os.O_RDONLY) for path in paths}

    def read(job: tuple[Span, memoryview]) -> None:
        span, _ = job
        os.pread(files[span.path], span.nbytes, span.offset)

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for batch in batches:
            list(pool.map(read, batch))
        seconds = time.perf_counter() - start
    for fd in files.values():
        os.close(fd)
    return seconds


def reader_read_s(batches: list[Batch], reader) -> float:
    """Seconds that the reader takes for the same. It writes the slots that it wrote before."""
    start = time.perf_counter()
    for batch in batches:
        reader.read_into(batch)
    return time.perf_counter() - start


def main(
    model: Annotated[Path, typer.Option(help="A model folder.")],
    residency: Annotated[float, typer.Option(help="Share of experts in RAM.")] = 0.5,
    tokens: Annotated[int, typer.Option(help="Tokens to decode; the first is dropped.")] = 12,
    threads: Annotated[int, typer.Option(help="Reads in flight, for both.")] = 8,
) -> None:
    """Print MB/s of both and the median of their ratios."""
    layers = mlx_flash.plan(model, ram="100%", context=256).layers.values()
    slots = round(max(e.count for e in layers) * residency)
    streamed, _ = mlx_flash.load(model, ram="100%", slots=slots, context=256, read_threads=threads)
    asked = record(streamed.reader)
    by_token: list[list[Batch]] = []
    for _ in generate_step(mx.array([7, 77, 777]), streamed, max_tokens=tokens):
        by_token.append(asked.copy())
        asked.clear()
    sides = {
        "ours": lambda batches: reader_read_s(batches, streamed.reader),
        "plain": lambda batches: plain_read_s(batches, threads),
    }
    ratios, speeds = [], []
    for i, batches in enumerate(by_token[1:]):
        nbytes = sum(span.nbytes for batch in batches for span, _ in batch)
        if nbytes == 0:
            continue
        drop_from_page_cache(model)
        plain_read_s(batches, threads)
        seconds = {}
        for side in ("ours", "plain") if i % 2 else ("plain", "ours"):
            drop_from_page_cache(model)
            seconds[side] = sides[side](batches)
        speeds.append(tuple(nbytes / seconds[side] / 1e6 for side in sides))
        ratios.append(seconds["plain"] / seconds["ours"])
    ours, plain = (statistics.median(column) for column in zip(*speeds, strict=True))
    print(
        f"cold, {slots} slots, {threads} threads, median of {len(ratios)} tokens: "
        f"reader {ours:.0f} MB/s, plain pread {plain:.0f} MB/s, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    typer.run(main)
