"""Which expert gives up its slot. Policies see expert ids, never weights."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Set
from typing import Protocol


class EvictionPolicy(Protocol):
    """Keeps the resident experts of one layer in the order they will be given up."""

    def touch(self, expert: int) -> None:
        """Record that a token was routed to this resident expert."""

    def insert(self, expert: int) -> None:
        """Record that this expert became resident."""

    def evict(self, pinned: Set[int]) -> int:
        """Forget one resident expert outside ``pinned`` and return it."""


class LRU:
    """Least recently used."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def touch(self, expert: int) -> None:
        self._order.move_to_end(expert)

    def insert(self, expert: int) -> None:
        self._order[expert] = None

    def evict(self, pinned: Set[int]) -> int:
        victim = next(e for e in self._order if e not in pinned)
        del self._order[victim]
        return victim


class LFU:
    """Least frequently used, the older one among equals. Counts survive eviction."""

    def __init__(self) -> None:
        self._uses: Counter[int] = Counter()
        self._resident: OrderedDict[int, None] = OrderedDict()

    def touch(self, expert: int) -> None:
        self._uses[expert] += 1
        self._resident.move_to_end(expert)

    def insert(self, expert: int) -> None:
        self._uses[expert] += 1
        self._resident[expert] = None

    def evict(self, pinned: Set[int]) -> int:
        victim = min((e for e in self._resident if e not in pinned), key=self._uses.__getitem__)
        del self._resident[victim]
        return victim


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "lfu": LFU}
