"""The knobs, in one place. Defaults are the product."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from . import plugins
from .errors import UsageError
from .streaming.eviction import POLICIES
from .streaming.reader import READERS

KERNELS = ("auto", "native", "reference", "graph", "metal")
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
        policy: Eviction policy, a key of ``POLICIES`` or what an installed package offers.
        reader: Disk reader: ``pread`` through the page cache, ``direct`` past it (native
            kernels only), ``auto``: direct where there is one, or what an installed package
            offers.
        read_threads: Reads in flight.
        kernels: ``native``: the compiled kernels; ``reference``: MLX's own operations;
            ``graph``: MLX's own operations, with experts fetched inside MLX's graph by the
            compiled pool, which has never run on a GPU; ``metal``: our Metal kernels for
            decoding, on a Mac, where none has run yet (``mlx-flash selftest`` tries them);
            ``auto``: native on a CPU, where they are built, and reference elsewhere.
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
        _check("policy", self.policy, POLICIES, policies)
        _check("reader", self.reader, READERS_BY_NAME, readers)
        _check("kernels", self.kernels, KERNELS, lambda: KERNELS)
        if self.from_outside and self.kernels == "graph":
            raise UsageError(
                f"--kernels graph fetches inside MLX's graph, where {self.from_outside} of an "
                "installed package cannot run. Leave one of them out."
            )
        if self.from_outside and self.reader == "direct":
            raise UsageError(
                f"--reader direct is compiled, and cannot run {self.from_outside} of an installed "
                "package. Use --reader pread."
            )
        for name in ("context", "prefill_step_size", "read_threads", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} leaves nothing. Ask for 1 or more.")

    @property
    def reads_directly(self) -> bool:
        """Whether the compiled reader goes past the page cache."""
        return self.reader in ("auto", "direct")

    @property
    def from_outside(self) -> str:
        """What an installed package brings, so that Python has to fetch; empty if nothing."""
        given = (("policy", self.policy, POLICIES), ("reader", self.reader, READERS_BY_NAME))
        return " and ".join(f"--{knob} {name}" for knob, name, ours in given if name not in ours)


def policies() -> list[str]:
    """The names that ``policy`` may have, those of installed packages last."""
    return [*POLICIES, *plugins.names(plugins.POLICIES)]


def readers() -> list[str]:
    """The names that ``reader`` may have, those of installed packages last."""
    return [*READERS_BY_NAME, *plugins.names(plugins.READERS)]


def _check(
    knob: str, value: str, ours: Collection[str], known: Callable[[], Collection[str]]
) -> None:
    # What is installed is looked through for a name that is not ours: that takes milliseconds.
    if value not in ours and value not in known():
        raise UsageError(f"no {knob} {value!r}. There are {', '.join(known())}.")
