"""One layer's experts: some in RAM slots, all on disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import PluginError
from .checkpoint import Span
from .eviction import EvictionPolicy
from .reader import Job, Reader

Trace = list[list[int]]
"""The distinct experts of each call to one layer: policies and plans replay it without a model."""


@dataclass(slots=True)
class StoreStats:
    """Counts of routed experts, one per distinct expert of a call."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class Store(Protocol):
    """One layer's experts, as whoever reads its counters sees them."""

    @property
    def num_slots(self) -> int:
        """Experts that have a place in RAM."""

    @property
    def stats(self) -> StoreStats:
        """Hits, misses and evictions so far."""

    @property
    def trace(self) -> Trace:
        """What every call since ``record`` asked for."""

    def record(self) -> None:
        """Keep the experts of every call from now on: a few bytes each."""


class NativeStore:
    """The same as ``ExpertStore``, in the extension and inside MLX's graph.

    Args:
        pool: The extension's ``ExpertPool``.
    """

    def __init__(self, pool: Any):
        self.pool = pool

    @property
    def num_slots(self) -> int:
        return int(self.pool.num_slots)

    @property
    def stats(self) -> StoreStats:
        return StoreStats(*self.pool.stats())

    @property
    def trace(self) -> Trace:
        found: Trace = self.pool.trace()
        return found

    def resident(self) -> list[int]:
        """The experts that are in slots."""
        experts: list[int] = self.pool.resident()
        return experts

    def place(self, experts: Sequence[int]) -> list[int]:
        """As ``ExpertStore.place``."""
        slots: list[int] = self.pool.place(list(experts))
        return slots

    def place_in_graph(self, indices: mx.array, after: mx.array | None) -> mx.array:
        """Expert ids of any shape to slot ids, once MLX gets there, and to ``after`` before.

        No more ids than slots. Evaluating what depends on it raises what ``place`` would.
        """
        slots: mx.array = self.pool.place_in_graph(indices, after)
        return slots

    def record(self) -> None:
        self.pool.record()


class ExpertStore:
    """Keep up to ``num_slots`` experts of one layer resident, the rest on disk.

    Nothing here assumes one sequence: a call names experts, whoever routed to them.

    Args:
        spans (Mapping): Parameter name to its place on disk, expert by expert.
        slots (Mapping): Parameter name to its array in RAM, [num_slots, ...], evaluated.
            Written through the host's view: never run an in-place operation on it.
        policy (EvictionPolicy): Chooses the expert that loses its slot.
        reader (Reader): Brings bytes from disk into a slot.
    """

    def __init__(
        self,
        spans: Mapping[str, Sequence[Span]],
        slots: Mapping[str, mx.array],
        policy: EvictionPolicy,
        reader: Reader,
    ):
        self.num_slots: int = next(iter(slots.values())).shape[0]
        self.stats = StoreStats()
        self.trace: Trace = []
        self._records = False
        self._spans = spans
        self._policy = policy
        self._reader = reader
        self._slot_of: dict[int, int] = {}
        self._free = list(range(self.num_slots))[::-1]
        # Unified memory: bytes written here are the bytes the kernel reads.
        self._rows = {name: _host_rows(array) for name, array in slots.items()}

    def resident(self) -> list[int]:
        """The experts that are in slots."""
        return list(self._slot_of)

    def record(self) -> None:
        self._records = True

    def place(self, experts: Sequence[int]) -> list[int]:
        """Make these distinct experts resident and return their slots.

        The slots hold until the next call. At most ``num_slots`` experts.

        Raises:
            ValueError: If there are more of them than slots, or one occurs twice.
            ReadError: If bytes do not arrive. The missing experts stay on disk, no slot
                is bound to partial bytes, and the store goes on working.
            PluginError: If the policy gives up an expert that is pinned or not resident.
        """
        pinned = set(experts)
        if len(pinned) < len(experts) or len(pinned) > self.num_slots:
            raise ValueError(
                f"{len(experts)} experts in one call, {len(pinned)} distinct, for "
                f"{self.num_slots} slots: name each once, and no more than there are slots"
            )
        if self._records:
            self.trace.append(list(experts))
        missing = [e for e in experts if e not in self._slot_of]
        self.stats.hits += len(experts) - len(missing)
        self.stats.misses += len(missing)
        for expert in experts:
            if expert in self._slot_of:
                self._policy.touch(expert)
        if missing:
            self._fetch(missing, pinned)
        return [self._slot_of[e] for e in experts]

    def _fetch(self, missing: Sequence[int], pinned: set[int]) -> None:
        slots: list[int] = []
        try:
            for _ in missing:
                slots.append(self._take_slot(pinned))
            jobs = [job for e, s in zip(missing, slots, strict=True) for job in self._jobs(e, s)]
            self._reader.read_into(jobs)
        except BaseException:
            self._free += slots  # bound only once its bytes are in
            raise
        self._slot_of |= zip(missing, slots, strict=True)
        for expert in missing:
            self._policy.insert(expert)

    def _take_slot(self, pinned: set[int]) -> int:
        if self._free:
            return self._free.pop()
        victim = self._policy.evict(pinned)
        if victim in pinned or victim not in self._slot_of:
            why = "this call needs" if victim in pinned else "is not in RAM"
            raise PluginError(
                f"the eviction policy gives up expert {victim}, which {why}. Mend it, or choose "
                "another."
            )
        self.stats.evictions += 1
        return self._slot_of.pop(victim)

    def _jobs(self, expert: int, slot: int) -> Iterator[Job]:
        for name, spans in self._spans.items():
            yield spans[expert], self._rows[name][slot]


def _host_rows(array: mx.array) -> list[memoryview]:
    """One writable view of bytes per slot of an evaluated array, any dtype."""
    buffer: Any = array  # an mx.array is a writable buffer, which its stubs do not say
    rows = np.frombuffer(buffer, np.uint8).reshape(array.shape[0], -1)
    return [row.data for row in rows]
