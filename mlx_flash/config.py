"""The knobs, in one place. Defaults are the product."""

from dataclasses import dataclass

from .errors import UsageError
from .streaming.eviction import POLICIES
from .streaming.reader import READERS

KERNELS = ("auto", "native", "reference", "graph")
READERS_BY_NAME = ("auto", *READERS, "direct")


@dataclass(frozen=True)
class StreamConfig:
    """How a model streams.

    Args:
        ram: Ceiling on the whole process at its peak: bytes, ``8GB``, ``60%`` or ``auto``.
        slots: Experts in RAM per layer, instead of what the budget gives. Of a model without
            experts: whole layers in RAM.
        context: Tokens of context that the budget must leave room for.
        prefill_step_size: Most prompt tokens to compute at a time. The plan may choose
            fewer, to give the memory to experts.
        policy: Eviction policy, a key of ``POLICIES``.
        reader: Disk reader: ``pread`` through the page cache, ``direct`` past it (native
            kernels only), ``auto``: direct where there is one.
        read_threads: Reads in flight.
        kernels: ``native``: the compiled kernels; ``reference``: MLX's own operations;
            ``graph``: MLX's own operations, with experts fetched inside MLX's graph by the
            compiled pool, which has never run on a GPU; ``auto``: native on a CPU, where they
            are built, and reference elsewhere.
        threads: Threads that compute, with native kernels. None: one per core.

    Raises:
        UsageError: If a knob has a value that means nothing.
    """

    ram: str | int = "auto"
    slots: int | None = None
    context: int = 8192
    prefill_step_size: int = 2048
    policy: str = "lru"
    reader: str = "auto"
    read_threads: int = 8
    kernels: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"no policy {self.policy!r}. There are {', '.join(POLICIES)}.")
        if self.reader not in READERS_BY_NAME:
            raise UsageError(f"no reader {self.reader!r}. There are {', '.join(READERS_BY_NAME)}.")
        if self.kernels not in KERNELS:
            raise UsageError(f"no kernels {self.kernels!r}. There are {', '.join(KERNELS)}.")
        for name in ("context", "prefill_step_size", "read_threads", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} leaves nothing. Ask for 1 or more.")
