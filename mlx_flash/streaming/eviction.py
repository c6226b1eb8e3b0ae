"""Which expert gives up its slot. Policies see expert ids, never weights."""

from collections import Counter, OrderedDict, deque
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


class S3FIFO:
    """A small queue for who came, a main one for who stays (Yang et al., SOSP 2023).

    Who is used more than once while it passes through the small queue, a tenth of the
    slots, moves to the main one. Otherwise it goes, and leaves its name in the ghost queue:
    who comes back while named there enters the main queue. That is a FIFO which lets who
    was used since go round again.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghost: OrderedDict[int, None] = OrderedDict()
        self._uses: dict[int, int] = {}  # since it entered its queue, at most 3
        self._slots = 0  # the most that were ever resident

    def touch(self, expert: int) -> None:
        self._uses[expert] = min(self._uses[expert] + 1, 3)

    def insert(self, expert: int) -> None:
        queue = self._main if expert in self._ghost else self._small
        self._ghost.pop(expert, None)
        queue[expert] = None
        self._uses[expert] = 0
        self._slots = max(self._slots, len(self._small) + len(self._main))

    def evict(self, pinned: Set[int]) -> int:
        queues = [self._from_small, self._from_main]
        if 10 * len(self._small) < self._slots:
            queues.reverse()
        return next(e for queue in queues if (e := queue(pinned)) is not None)

    def _from_small(self, pinned: Set[int]) -> int | None:
        for expert in [e for e in self._small if e not in pinned]:
            del self._small[expert]
            if self._uses[expert] <= 1:
                self._ghost[expert] = None
                if len(self._ghost) > max(self._slots * 9 // 10, 1):
                    self._ghost.popitem(last=False)
                return expert
            self._main[expert] = None
            self._uses[expert] = 0
        return None

    def _from_main(self, pinned: Set[int]) -> int | None:
        waiting = deque(e for e in self._main if e not in pinned)
        while waiting:
            expert = waiting.popleft()
            del self._main[expert]
            if self._uses[expert] == 0:
                return expert
            self._uses[expert] -= 1
            self._main[expert] = None
            waiting.append(expert)
        return None


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "lfu": LFU, "s3fifo": S3FIFO}
