"""First in, first out: who has been in RAM for longest goes, used or not."""

from collections.abc import Set


class FIFO:
    """Made once per layer. Sees the ids of experts, and no more."""

    def __init__(self) -> None:
        self._order: list[int] = []

    def touch(self, expert: int) -> None:
        """A token was routed to it, and it is in RAM. Nothing to this policy."""

    def insert(self, expert: int) -> None:
        """It has come into RAM."""
        self._order.append(expert)

    def evict(self, pinned: Set[int]) -> int:
        """Choose one that is in RAM and not pinned, and forget it."""
        victim = next(expert for expert in self._order if expert not in pinned)
        self._order.remove(victim)
        return victim
