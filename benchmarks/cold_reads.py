"""Disk, not us: reads of a cold decode against a plain parallel read of the same spans.

    python benchmarks/cold_reads.py --model DIR --residency 0.5

Decodes with part of the experts in RAM and the checkpoint dropped from the page cache
before every token, notes each batch of spans that the store asked for, then reads the
same batches with nothing but a thread pool and ``os.pread``. Both are timed around the
reads alone. The order alternates; the figure is the median of the paired ratios.
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

Batch = list[Span]


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
        batches.append([span for span, _ in jobs])
        read_into(jobs)

    reader.read_into = recording
    return batches


def plain_read_s(batches: list[Batch], threads: int) -> float:
    """Seconds to read the batches one after another, a pread per span, in a thread pool."""
    files = {s.path: os.open(s.path, os.O_RDONLY) for batch in batches for s in batch}
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for batch in batches:
            list(pool.map(lambda s: os.pread(files[s.path], s.nbytes, s.offset), batch))
        seconds = time.perf_counter() - start
    for fd in files.values():
        os.close(fd)
    return seconds


def main(
    model: Annotated[Path, typer.Option(help="A model folder.")],
    residency: Annotated[float, typer.Option(help="Share of experts in RAM.")] = 0.5,
    tokens: Annotated[int, typer.Option(help="Tokens to decode; the first two are dropped.")] = 12,
    threads: Annotated[int, typer.Option(help="Reads in flight, for both.")] = 8,
) -> None:
    """Print MB/s of both and the median of their ratios."""
    layers = mlx_flash.plan(model, ram="100%", context=256).layers.values()
    slots = round(max(e.count for e in layers) * residency)
    streamed, _ = mlx_flash.load(model, ram="100%", slots=slots, context=256, read_threads=threads)
    reader = streamed.reader
    batches = record(reader)
    ratios, speeds = [], []
    before = (0, 0.0)
    drop_from_page_cache(model)
    for i, _ in enumerate(generate_step(mx.array([7, 77, 777]), streamed, max_tokens=tokens)):
        nbytes, ours_s = reader.bytes_read - before[0], reader.read_s - before[1]
        if i >= 2 and nbytes:
            drop_from_page_cache(model)
            plain_s = plain_read_s(batches, threads)
            speeds.append((nbytes / ours_s / 1e6, nbytes / plain_s / 1e6))
            ratios.append(plain_s / ours_s)
        batches.clear()
        before = (reader.bytes_read, reader.read_s)
        drop_from_page_cache(model)
    ours, plain = (statistics.median(column) for column in zip(*speeds, strict=True))
    print(
        f"cold, {slots} slots, {threads} threads, median of {len(ratios)} tokens: "
        f"reader {ours:.0f} MB/s, plain pread {plain:.0f} MB/s, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    typer.run(main)
