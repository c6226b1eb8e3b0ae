"""What this machine has, and what of it one process may use."""

import ctypes
import os
import platform
import re
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import psutil

from .errors import BudgetError

AUTO_SHARE = 0.7  # the rest is the page cache's: peers got slower when a cache ate it
LIMIT_SLACK_BYTES = 64 << 10  # control groups round their limit down to a page
UNITS = {
    "": 1, "B": 1,
    "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6,
    "G": 10**9, "GB": 10**9, "T": 10**12, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory limits in bytes.

    Args:
        ram_bytes: Physical memory.
        available_bytes: What a new allocation can take without swapping, this process's
            own resident set included.
        cgroup_bytes: The memory limit of this process's control group, if any.
        metal_bytes: Metal's recommended working set, if there is Metal.
    """

    ram_bytes: int
    available_bytes: int
    cgroup_bytes: int | None
    metal_bytes: int | None

    @classmethod
    def probe(cls) -> "Machine":
        memory = psutil.virtual_memory()
        metal = mx.device_info().get("max_recommended_working_set_size")
        return cls(
            ram_bytes=memory.total,
            available_bytes=memory.available + rss_bytes(),
            cgroup_bytes=cgroup_limit_bytes(),
            metal_bytes=int(metal) if metal else None,
        )

    @property
    def limit_bytes(self) -> int:
        """The most that a budget can be on this machine."""
        return min(self.ram_bytes, self.cgroup_bytes or self.ram_bytes)

    def budget(self, ram: str | int) -> int:
        """The bytes that ``8GB``, ``1.5GiB``, ``60%``, ``auto`` or a number stands for.

        ``auto`` takes a share of what is available now, within the control group's limit
        and Metal's working set. A percentage is of the machine or its control group.

        Raises:
            BudgetError: If it cannot be read, is not positive, or exceeds the machine.
        """
        if isinstance(ram, str):
            ram = ram.strip()
        if ram == "auto":
            usable = min(self.available_bytes, self.limit_bytes)
            share = int(usable * AUTO_SHARE)
            return min(share, self.metal_bytes) if self.metal_bytes else share
        ram_bytes = self._parse(ram)
        if ram_bytes <= 0:
            raise BudgetError(
                f"--ram {ram} leaves nothing to run in. Ask for a size such as 8GB, or auto."
            )
        if ram_bytes > self.limit_bytes + LIMIT_SLACK_BYTES:
            raise BudgetError(
                f"--ram {ram} is more than the {self.limit_bytes / 1e9:.2f} GB this process may "
                "use here. Ask for less, or for auto."
            )
        return min(ram_bytes, self.limit_bytes)

    def _parse(self, ram: str | int) -> int:
        if isinstance(ram, int):
            return ram
        match = re.fullmatch(r"([-+]?\d{1,18}(?:\.\d+)?) *(%|[A-Za-z]*)", str(ram))
        unit = match[2].upper() if match else None
        if match is None or (unit != "%" and unit not in UNITS):
            raise BudgetError(f"--ram {ram!r} is not a size. Use 8GB, 1.5GiB, 60% or auto.")
        if unit == "%":
            return int(float(match[1]) / 100 * self.limit_bytes)
        return int(float(match[1]) * UNITS[match[2].upper()])


def rss_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def give_back_free_memory() -> None:
    """Have the C library return to the system what the process has freed.

    glibc keeps tens of MB, more or fewer with the timing of threads: a plan made before would
    have another floor in each run.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def peak_rss_bytes() -> int:
    """Highest resident set of this process since it began."""
    if sys.platform == "linux":
        # Not ru_maxrss: that one survives exec and may be the parent's.
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cgroup_limit_bytes() -> int | None:
    """The tightest memory limit among this process's control groups, v1 or v2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            limits += _limits(Path("/sys/fs/cgroup"), group, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits(Path("/sys/fs/cgroup/memory"), group, "memory.limit_in_bytes")
    return min(limits, default=None)


def _limits(root: Path, group: str, name: str) -> list[int]:
    """The limits of a group and of every group above it. Unlimited ones are left out."""
    limits = []
    here = root / group.lstrip("/")
    for folder in (here, *here.parents):
        if not folder.is_relative_to(root):
            break
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            continue  # inside a container the host's path of the group is not there
        if text.isdigit() and int(text) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            limits.append(int(text))
    return limits


def cores() -> int:
    """Cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor, as its maker calls it."""
    if sys.platform == "linux":
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        return match[1].strip() if match else platform.machine()
    return platform.processor() or platform.machine()


def can_drop() -> bool:
    """Whether this system lets a process drop its files from the page cache."""
    return hasattr(os, "posix_fadvise")


def drop_from_page_cache(paths: Iterable[Path]) -> None:
    """Let the next read of these files come from the disk. Needs no privilege."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # what is not on disk yet would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
