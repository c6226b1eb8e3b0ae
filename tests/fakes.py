"""Stand-ins for the plug points, small enough to be obviously right."""

import errno
from collections.abc import Sequence

from mlx_flash.errors import ReadError
from mlx_flash.streaming.reader import Job


class FakeReader:
    """Reads job by job in the calling thread, and fails at job ``fail_at`` if told to.

    The job that fails leaves the first half of its buffer written, as a disk would.
    """

    def __init__(self, fail_at: int | None = None, fault: type[BaseException] = ReadError):
        self.bytes_read = 0
        self.read_s = 0.0
        self.fail_at = fail_at
        self.fault = fault
        self.calls: list[int] = []

    def read_into(self, jobs: Sequence[Job]) -> None:
        self.calls.append(len(jobs))
        for i, (span, buffer) in enumerate(jobs):
            with span.path.open("rb") as file:
                file.seek(span.offset)
                data = file.read(span.nbytes)
            if i == self.fail_at:
                buffer[: len(data) // 2] = data[: len(data) // 2]
                raise self.fault(errno.EIO, "fake fault", "fake")
            buffer[:] = data
            self.bytes_read += span.nbytes

    def close(self) -> None:
        pass
