"""What memory and disk can give at most, measured: the ceilings that `mlx-flash bench` names.

Nothing here knows of slots or budgets.
"""

import errno
import fcntl
import mmap
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..kernels import native
from ..machine import Machine, can_drop, cores, drop_from_page_cache
from ..opening import LazyModel
from ..streaming.checkpoint import Span
from ..streaming.plan import floor_bytes

SECONDS = 0.5  # of each measurement
MEMORY_BYTES = 1 << 30  # past any cache
MEMORY_SHARE = 1 / 4  # of what is available, where that is less
SAMPLE_BYTES = 128 << 20
ALIGNMENT = 4096  # of O_DIRECT: no disk's block is larger


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second, and how each figure was got."""

    memory_bytes_per_s: float
    memory_how: str
    disk_bytes_per_s: float
    disk_how: str
    page_cache_bytes_per_s: float
    read_bytes: float  # the mean of one read


def measure(experts: Sequence[Sequence[Span]], threads: int, seconds: float = SECONDS) -> Ceilings:
    """All ceilings of this machine for a model, now.

    Args:
        experts: The spans of a sample of experts, as ``sample_experts`` gives them.
        threads: Reads in flight.
        seconds: How long to measure each.
    """
    spans = [span for expert in experts for span in expert if span.nbytes]
    memory, memory_how = memory_read(seconds)
    disk, disk_how = disk_read(spans, threads, seconds)
    with ExitStack() as files:
        fds = {path: files.enter_context(_opened(path)) for path in {s.path for s in spans}}
        cached = _read_rate(fds, spans, threads, seconds)
    mean = sum(s.nbytes for s in spans) / len(spans)
    return Ceilings(memory, memory_how, disk, disk_how, cached, mean)


def memory_read(seconds: float = SECONDS) -> tuple[float, str]:
    """Bytes per second that all cores together read from memory, and by which means."""
    nbytes = min(MEMORY_BYTES, int(Machine.probe().available_bytes * MEMORY_SHARE))
    threads = cores()
    measure_native = getattr(native(), "memory_read_bandwidth", None)
    if measure_native is not None:
        return float(measure_native(nbytes, threads, seconds)), f"native, {threads} threads"
    array = np.ones(nbytes // 8, np.uint64)  # ones: untouched zeros would all be one page
    parts = np.array_split(array, 8 * threads)
    best, deadline = 0.0, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while True:
            start = time.perf_counter()
            list(pool.map(np.add.reduce, parts))  # gives the GIL back
            end = time.perf_counter()
            best = max(best, array.nbytes / (end - start))
            if end > deadline:
                return best, f"numpy, {threads} threads, a lower bound"


def disk_read(spans: Sequence[Span], threads: int, seconds: float = SECONDS) -> tuple[float, str]:
    """Bytes per second that reads of these spans bring from the disk itself, and how.

    Past the page cache, and through it after dropping it; whichever is faster here.
    """
    paths = sorted({span.path for span in spans})
    rates: dict[str, float] = {}
    with ExitStack() as files:
        try:
            fds = {path: files.enter_context(_opened(path, direct=True)) for path in paths}
            how = "F_NOCACHE" if sys.platform == "darwin" else "O_DIRECT"
            rates[how] = _read_rate(fds, spans, threads, seconds, ALIGNMENT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise  # else: a file system that knows no such reads
    if can_drop():
        with ExitStack() as files:
            fds = {path: files.enter_context(_opened(path)) for path in paths}
            rates["page cache dropped"] = _read_rate(
                fds, spans, threads, seconds, before_pass=lambda: drop_from_page_cache(paths)
            )
    how = max(rates, key=rates.__getitem__)
    return rates[how], f"{how}, {threads} threads"


def sample_experts(lazy: LazyModel, seed: int = 0) -> list[list[Span]]:
    """Random experts of random layers, ``SAMPLE_BYTES`` or all of them."""
    every = [(path, e) for path, experts in lazy.layers.items() for e in range(experts.count)]
    random.Random(seed).shuffle(every)
    by_layer: dict[str, list[list[Span]]] = {}
    sample: list[list[Span]] = []
    nbytes = 0
    for path, expert in every:
        if nbytes >= SAMPLE_BYTES:
            break
        if path not in by_layer:
            by_layer[path] = _layer_spans(lazy, path)
        sample.append([spans[expert] for spans in by_layer[path]])
        nbytes += lazy.layers[path].nbytes_each
    return sample


def active_bytes(lazy: LazyModel) -> int:
    """Bytes of weights that one decoded token reads: what stays resident, and its experts.

    Of an embedding table a token reads one row, unless the output layer is the same table.
    """
    every = sum(a.nbytes for _, a in tree_flatten(lazy.model.parameters()))
    routed = sum(experts.nbytes for experts in lazy.layers.values())
    text = lazy.config.get("text_config", {})
    tables = 0
    if not lazy.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)):
        tables = sum(
            a.nbytes
            for _, module in lazy.model.named_modules()
            if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
            for _, a in tree_flatten(module.parameters())
        )
    return int(every - routed - tables + floor_bytes(lazy.layers))


def _layer_spans(lazy: LazyModel, path: str) -> list[list[Span]]:
    """Per parameter of a layer, where each expert's bytes lie, or those of the whole layer."""
    if path in lazy.tensors:
        return [[tensor.span] for tensor in lazy.tensors[path]]
    return list(lazy.expert_spans(path).values())


@contextmanager
def _opened(path: Path, direct: bool = False) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_CLOEXEC
    if direct and sys.platform == "linux":
        flags |= os.O_DIRECT
    fd = os.open(path, flags)
    try:
        if direct and sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        yield fd
    finally:
        os.close(fd)


def _read_rate(
    fds: dict[Path, int],
    spans: Sequence[Span],
    threads: int,
    seconds: float,
    alignment: int = 1,
    before_pass: Callable[[], None] | None = None,
) -> float:
    """Bytes of spans per second, all spans read again and again, ``threads`` at a time."""
    longest = max(span.nbytes for span in spans) + 2 * alignment
    buffers = [mmap.mmap(-1, longest) for _ in range(threads)]  # on a page's border

    def drain(queue: deque[Span], buffer: memoryview) -> None:
        while queue:
            try:
                span = queue.popleft()
            except IndexError:
                return  # another thread has taken the last one
            start = span.offset // alignment * alignment
            end = -(-(span.offset + span.nbytes) // alignment) * alignment
            os.preadv(fds[span.path], [buffer[: end - start]], start)

    read_s, passes = 0.0, -1
    with ThreadPoolExecutor(threads) as pool:
        while read_s < seconds:
            if before_pass is not None:
                before_pass()
            queue = deque(spans)
            start = time.perf_counter()
            list(pool.map(lambda b, q=queue: drain(q, memoryview(b)), buffers))
            passes += 1
            # The first one does not count: a virtual machine's host may cache the disk too.
            read_s += time.perf_counter() - start if passes else 0.0
    return passes * sum(span.nbytes for span in spans) / read_s
