"""One read after another, in the thread that asks."""

import errno
import os
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from mlx_flash.errors import ReadError
from mlx_flash.streaming.checkpoint import Span
from mlx_flash.streaming.reader import Job


class PlainReader:
    """Files are opened once. One that changes afterwards is an error, and never other bytes."""

    def __init__(self, paths: Iterable[Path], threads: int):
        self.bytes_read, self.read_s = 0, 0.0
        self._lock = threading.Lock()  # of the counters: several threads may read
        with ExitStack() as files:
            self._files: dict[Path, int] = {}
            for path in paths:
                try:
                    self._files[path] = fd = os.open(path, os.O_RDONLY)
                except OSError as e:
                    raise ReadError(e.errno, f"cannot be opened: {e.strerror}", path) from e
                files.callback(os.close, fd)
            self._stamps = {path: self._stamp(path) for path in self._files}
            self.close = weakref.finalize(self, files.pop_all().close)

    def read_into(self, jobs: Sequence[Job]) -> None:
        begun = time.perf_counter()
        for span, buffer in jobs:
            for piece in span.pieces():  # of most spans one
                self._fill(piece, buffer[: piece.nbytes])
                buffer = buffer[piece.nbytes :]
        for path in {span.path for span, _ in jobs}:
            if self._stamp(path) != self._stamps[path]:
                raise ReadError(
                    errno.ESTALE, "changed on disk since it was loaded; load again", path
                )
        with self._lock:
            self.bytes_read += sum(span.nbytes for span, _ in jobs)
            self.read_s += time.perf_counter() - begun

    def _fill(self, span: Span, buffer: memoryview) -> None:
        path, offset = span.path, span.offset
        while buffer:
            try:
                n = os.preadv(self._files[path], [buffer], offset)
            except OSError as e:
                raise ReadError(
                    e.errno, f"{e.strerror} at byte {offset}; check the disk", path
                ) from e
            if n == 0:
                short = f"ends at byte {offset}, {len(buffer)} bytes short; download it again"
                raise ReadError(errno.ENODATA, short, path)
            offset, buffer = offset + n, buffer[n:]

    def _stamp(self, path: Path) -> tuple[int, int]:
        status = os.fstat(self._files[path])
        return status.st_size, status.st_mtime_ns
