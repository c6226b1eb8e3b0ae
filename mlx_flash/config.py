"""The knobs, in one place. Defaults are the product."""

from dataclasses import dataclass

from .errors import UsageError
from .streaming.eviction import POLICIES
from .streaming.reader import READERS


@dataclass(frozen=True)
class StreamConfig:
    """How a model streams.

    Args:
        ram: Ceiling on the whole process at its peak: bytes, ``8GB``, ``60%`` or ``auto``.
        slots: Experts in RAM per layer, instead of what the budget gives.
        context: Tokens of context that the budget must leave room for.
        prefill_step_size: Most prompt tokens to compute at a time. The plan may choose
            fewer, to give the memory to experts.
        policy: Eviction policy, a key of ``POLICIES``.
        reader: Disk reader, a key of ``READERS``.
        read_threads: Reads in flight.

    Raises:
        UsageError: If a knob has a value that means nothing.
    """

    ram: str | int = "auto"
    slots: int | None = None
    context: int = 8192
    prefill_step_size: int = 2048
    policy: str = "lru"
    reader: str = "pread"
    read_threads: int = 8

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"no policy {self.policy!r}. There are {', '.join(POLICIES)}.")
        if self.reader not in READERS:
            raise UsageError(f"no reader {self.reader!r}. There are {', '.join(READERS)}.")
        for name in ("context", "prefill_step_size", "read_threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} leaves nothing. Ask for 1 or more.")
