"""Memory caps and read-ahead for one process or one file; the machine's own settings stay.

Linux only, and as root: control groups, loop devices, mounts.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUP_V1 = Path("/sys/fs/cgroup/memory")
CGROUP_V2 = Path("/sys/fs/cgroup")
SPARE_BYTES = 96 << 20  # of an image, beside its file


@contextmanager
def memory_cap(nbytes: int | None) -> Iterator[Callable[[], None] | None]:
    """What a child calls to be in a control group with that limit, page cache included.

    Raises:
        OSError: If no such group can be made here.
    """
    if nbytes is None:
        yield None
        return
    v1 = (CGROUP_V1 / "memory.limit_in_bytes").exists()
    group = (CGROUP_V1 if v1 else CGROUP_V2) / f"side-by-side-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(nbytes))
        swap = group / ("memory.memsw.limit_in_bytes" if v1 else "memory.swap.max")
        if swap.exists():  # or it would swap instead of reading again
            swap.write_text(str(nbytes) if v1 else "0")

        def join() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        yield join
    finally:
        group.rmdir()


class NoLoopError(OSError):
    """Loop devices or mounts are not allowed here."""


class Image:
    """A file system in a file, mounted over a loop device whose read-ahead is ours to choose.

    Args:
        path: The file; made anew if it is not there or too small for ``nbytes``.

    Raises:
        NoLoopError: If it cannot be mounted here.
        OSError: If there is no room for it, or someone is using it.
    """

    def __init__(self, path: Path, nbytes: int):
        self.path = path
        self.folder = path.with_name(path.name + ".mounted")
        if self.folder.is_mount():  # left by a run that was killed
            self.device = _run("findmnt", "--noheadings", "--output", "SOURCE", str(self.folder))
            self.close()
        size = int(nbytes * 1.02) + SPARE_BYTES
        if not path.exists() or path.stat().st_size < size:
            self._make(size)
        try:
            # Direct: or every page would be cached twice, once in a group that has no cap.
            self.device = _run("losetup", "--direct-io=on", "--find", "--show", str(path))
        except OSError as error:
            raise NoLoopError(str(error)) from error
        try:
            self.folder.mkdir(exist_ok=True)
            _run("mount", "-o", "noatime", self.device, str(self.folder))
        except OSError as error:
            _run("losetup", "-d", self.device)
            raise NoLoopError(str(error)) from error

    def _make(self, size: int) -> None:
        self.path.unlink(missing_ok=True)
        if shutil.disk_usage(self.path.parent).free < size:
            raise OSError(f"{self.path}: no room for {size / 1e9:.2f} GB")
        with self.path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-T", "largefile4", str(self.path))

    def set_read_ahead(self, kib: int) -> None:
        """For files opened from now on."""
        _run("blockdev", "--setra", str(kib * 2), self.device)  # in sectors of 512

    def default_read_ahead_kib(self) -> int:
        """Of the disk that the image lies on."""
        return read_ahead_kib(self.path)

    def close(self) -> None:
        _run("umount", str(self.folder))
        _run("losetup", "-d", self.device)
        self.folder.rmdir()


def read_ahead_kib(path: Path) -> int:
    """Of the block device under a file."""
    device = path.stat().st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    return int(Path(f"/sys/class/bdi/{numbers}/read_ahead_kb").read_text())


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip()
        raise OSError(f"{' '.join(command)}: {said}") from error
    return done.stdout.strip()
