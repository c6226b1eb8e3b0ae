"""Bytes from disk into memory that already exists. Sees spans, never experts."""

import errno
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import ReadError
from .checkpoint import Span

Job = tuple[Span, memoryview]

MAX_RUN_BYTES = 8 << 20  # one read request: large enough for any disk, small enough to share out
MAX_RUN_BUFFERS = 512  # half of the usual IOV_MAX
MAX_COMB_BYTES = 1 << 20  # one request of strided spans, which needs as much memory of its own
MAX_PIECE_BYTES = 64 << 10  # longer pieces of a strided span are reads of their own,
MAX_GAP_BYTES = 64 << 10  # and so are those that lie further apart
INLINE_BYTES = 256 << 10  # below this, waking a thread costs more than reading


class Reader(Protocol):
    """Fills buffers from spans. Its counters begin when it is made."""

    @property
    def bytes_read(self) -> int:
        """Bytes that have arrived: of strided spans, what lies between pieces too."""

    @property
    def read_s(self) -> float:
        """Seconds in which bytes were read."""

    def read_into(self, jobs: Sequence[Job]) -> None:
        """Fill every buffer from its span. Return when all are full.

        Raises:
            ReadError: If any span cannot be read whole. No buffer is written after
                that, but any of them may be partly filled.
        """

    def close(self) -> None:
        """Give back files and threads."""


@dataclass(slots=True)
class _Run:
    """One request: spans that follow one another in a file or, if strided, that interleave."""

    path: Path
    offset: int
    strided: bool
    jobs: list[Job]
    nbytes: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def takes(self, span: Span) -> bool:
        nbytes = span.offset + span.extent - self.offset
        if self.path != span.path or self.strided != span.is_strided:
            return False
        if self.strided:
            return span.offset < self.end and nbytes <= MAX_COMB_BYTES
        fits = nbytes <= MAX_RUN_BYTES and len(self.jobs) < MAX_RUN_BUFFERS
        return span.offset == self.end and fits

    def add(self, job: Job) -> None:
        self.jobs.append(job)
        self.nbytes = max(self.nbytes, job[0].offset + job[0].extent - self.offset)


class _Batch:
    """The requests of one call. Handed out one by one, until all are done or one fails."""

    def __init__(self, runs: Iterable[_Run]):
        self._runs = deque(runs)
        self._reading = 0
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._runs)

    def take(self) -> _Run | None:
        with self._changed:
            if not self._runs:
                return None
            self._reading += 1
            return self._runs.popleft()

    def done(self) -> None:
        with self._changed:
            self._reading -= 1
            self._changed.notify_all()

    def drop(self) -> None:
        with self._changed:
            self._runs.clear()

    def wait_idle(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._reading == 0)


class PreadReader:
    """Parallel ``preadv`` through the page cache, adjacent spans merged.

    Files are opened here and stay open: deleting one while a model runs does no harm,
    and one that changed since is noticed after every read and refused.

    Args:
        paths (Iterable[Path]): The files that spans may name.
        threads (int): Reads in flight. A disk wants a queue, not a stream.
    """

    def __init__(self, paths: Iterable[Path], threads: int = 8):
        self.bytes_read = 0
        self.read_s = 0.0
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mlx-flash-read")
        self._files: dict[Path, int] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        # Not the pool: a collector that runs within threading's own locks would wait for its
        # threads for ever. Those of a pool that is dropped end by themselves.
        self._close_files = weakref.finalize(self, _close, self._files)
        try:
            for path in paths:
                self._files[path] = fd = _open(path)
                self._stamps[path] = _stamp(fd)
        except ReadError:
            self.close()
            raise

    def read_into(self, jobs: Sequence[Job]) -> None:
        start = time.perf_counter()
        runs = _merge(jobs)
        total = sum(run.nbytes for run in runs)
        batch = _Batch(runs)
        if len(batch) == 1 or total <= INLINE_BYTES:
            self._drain(batch)
        else:
            self._drain_in_parallel(batch)
        for path in {span.path for span, _ in jobs}:
            if _stamp(self._files[path]) != self._stamps[path]:
                raise ReadError(
                    errno.ESTALE, "changed on disk since it was loaded; load the model again", path
                )
        with self._lock:
            self.bytes_read += total
            self.read_s += time.perf_counter() - start

    def _drain_in_parallel(self, batch: _Batch) -> None:
        threads = min(self._threads, len(batch))
        try:
            futures = [self._pool.submit(self._drain, batch) for _ in range(threads)]
            for future in futures:
                future.result()
        except BaseException:
            # A read still in flight would write into a slot after it was given away. Not
            # left to the futures: an interrupt within submit() loses the one it made.
            batch.drop()
            batch.wait_idle()
            raise

    def _drain(self, batch: _Batch) -> None:
        while run := batch.take():
            try:
                self._read(run)
            except BaseException:
                batch.drop()
                raise
            finally:
                batch.done()

    def _read(self, run: _Run) -> None:
        if not run.strided:
            self._fill([buffer for _, buffer in run.jobs], run.path, run.offset)
            return
        bounce = np.empty(run.nbytes, np.uint8)
        self._fill([bounce.data], run.path, run.offset)
        for span, buffer in run.jobs:
            rows = np.frombuffer(buffer, np.uint8).reshape(-1, span.piece)
            first = bounce[span.offset - run.offset :]
            rows[:] = np.lib.stride_tricks.as_strided(first, rows.shape, (span.stride, 1))

    def _fill(self, buffers: list[memoryview], path: Path, offset: int) -> None:
        while buffers:
            try:
                n = os.preadv(self._files[path], buffers, offset)
            except OSError as error:
                raise ReadError(
                    error.errno,
                    f"{os.strerror(error.errno or errno.EIO)} at byte {offset}; check the disk",
                    path,
                ) from error
            if n == 0:
                missing = sum(len(buffer) for buffer in buffers)
                raise ReadError(
                    errno.ENODATA,
                    f"ends at byte {offset}, {missing} bytes short; download it again",
                    path,
                )
            offset += n
            buffers = _after(buffers, n)

    def close(self) -> None:
        self._pool.shutdown()
        self._close_files()


class NativeReader:
    """The extension's ``Files``, past the page cache if they were opened so, as a ``Reader``.

    Args:
        files: The extension's ``Files``.
        paths (Sequence[Path]): What they were opened from, in the same order.
    """

    def __init__(self, files: Any, paths: Sequence[Path]):
        self._files = files
        self._numbers = {path: number for number, path in enumerate(paths)}

    @property
    def bytes_read(self) -> int:
        return int(self._files.bytes_read)

    @property
    def read_s(self) -> float:
        return float(self._files.read_s)

    def read_into(self, jobs: Sequence[Job]) -> None:
        self._files.read_into(
            [(self._numbers[span.path], span.offset, buffer) for span, buffer in jobs]
        )

    def close(self) -> None:
        self._files.close()


def _close(files: dict[Path, int]) -> None:
    for fd in files.values():
        os.close(fd)
    files.clear()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ReadError(error.errno, f"cannot be opened: {error.strerror}", path) from error


def _stamp(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def _merge(jobs: Sequence[Job]) -> list[_Run]:
    """Runs of jobs whose spans follow one another in one file, or interleave, in file order."""
    runs: list[_Run] = []
    parts = [part for job in jobs for part in _cut(*job)]
    for job in sorted(parts, key=lambda job: (job[0].path, job[0].is_strided, job[0].offset)):
        span = job[0]
        if not runs or not runs[-1].takes(span):
            runs.append(_Run(span.path, span.offset, span.is_strided, []))
        runs[-1].add(job)
    return runs


def _cut(span: Span, buffer: memoryview) -> Iterator[Job]:
    """A strided span in lengths of whole pieces that one request can hold. Nothing of nothing."""
    if not span.nbytes:
        return  # its read would look like an end of file
    if not span.is_strided:
        yield span, buffer
        return
    apart = span.piece > MAX_PIECE_BYTES or span.stride - span.piece > MAX_GAP_BYTES
    count = 1 if apart else max(1, MAX_COMB_BYTES // span.stride)
    for i, start in enumerate(range(0, span.nbytes, count * span.piece)):
        part = buffer[start : start + count * span.piece]
        offset = span.offset + i * count * span.stride
        yield Span(span.path, offset, len(part), span.piece, span.stride), part


def _after(buffers: list[memoryview], n: int) -> list[memoryview]:
    """What is left to fill once the first ``n`` bytes have arrived."""
    for i, buffer in enumerate(buffers):
        if n < len(buffer):
            return [buffer[n:], *buffers[i + 1 :]]
        n -= len(buffer)
    return []


READERS: dict[str, Callable[[Iterable[Path], int], Reader]] = {"pread": PreadReader}
