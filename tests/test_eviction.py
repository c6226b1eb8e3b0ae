"""The contract of every policy, and each policy against a naive model of its name.

Those of installed packages are held to it too.
"""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENT

from mlx_flash import plugins
from mlx_flash.streaming.eviction import LFU, LRU, POLICIES, S3FIFO, EvictionPolicy

NAMES = (*POLICIES, *plugins.names(plugins.POLICIES))
EXPERTS = st.integers(0, 4)
# A use of an expert, or an eviction with some pinned.
STEPS = st.lists(EXPERTS | st.sets(EXPERTS, max_size=3), max_size=60)


class Naive:
    """Remembers every use, and looks through all of them to choose."""

    def __init__(self) -> None:
        self.uses: list[int] = []
        self.resident: set[int] = set()

    def use(self, expert: int) -> None:
        self.uses.append(expert)
        self.resident.add(expert)

    def last_use(self, expert: int) -> int:
        return max(i for i, used in enumerate(self.uses) if used == expert)

    def lru(self, pinned: set[int]) -> int:
        return min(self.resident - pinned, key=self.last_use)

    def lfu(self, pinned: set[int]) -> int:
        counts = Counter(self.uses)
        return min(self.resident - pinned, key=lambda e: (counts[e], self.last_use(e)))


MODELS = {"lru": Naive.lru, "lfu": Naive.lfu}


@pytest.mark.parametrize("name", NAMES)
@settings(PATIENT, max_examples=200)
@given(steps=STEPS)
def test_evicts_residents_as_its_model_would(name: str, steps: list[int | set[int]]) -> None:
    policy, naive = plugins.policy(name)(), Naive()
    for step in steps:
        if isinstance(step, int):
            (policy.touch if step in naive.resident else policy.insert)(step)
            naive.use(step)
        elif could := naive.resident - step:
            victim = policy.evict(step)
            assert victim in could
            if name in MODELS:
                assert victim == MODELS[name](naive, step)
            naive.resident.discard(victim)
    left = naive.resident
    assert {policy.evict(set()) for _ in left} == left  # each resident once, and all of them


@pytest.mark.parametrize("name", NAMES)
def test_the_one_that_is_not_pinned(name: str) -> None:
    policy = plugins.policy(name)()
    for expert in range(5):
        policy.insert(expert)
    for expert in (4, 2, 2, 0):
        policy.touch(expert)
    for expert in range(5):
        assert policy.evict(set(range(5)) - {expert}) == expert
        policy.insert(expert)


def drain(policy: EvictionPolicy, count: int) -> list[int]:
    return [policy.evict(set()) for _ in range(count)]


def test_lru_order() -> None:
    policy = LRU()
    for expert in (1, 2, 3, 4):
        policy.insert(expert)
    policy.touch(1)
    policy.touch(3)
    assert drain(policy, 4) == [2, 4, 1, 3]


def test_lfu_order_and_memory_of_the_evicted() -> None:
    policy = LFU()
    for expert in (1, 2, 3):
        policy.insert(expert)
    policy.touch(1)
    policy.touch(1)
    policy.touch(3)
    assert drain(policy, 3) == [2, 3, 1]
    for expert in (1, 4, 3):  # 1 was used four times by now, 3 three times
        policy.insert(expert)
    assert drain(policy, 3) == [4, 3, 1]
    policy = LFU()
    for expert in (1, 2):
        policy.insert(expert)
    for expert in (2, 1):
        policy.touch(expert)
    assert drain(policy, 2) == [2, 1]  # equals: the one used longest ago


class PaperS3FIFO:
    """Algorithm 1 of Yang et al. (SOSP 2023), line by line, for a cache of ``size`` slots.

    Heads of queues are at index 0. Only the count of all slots bounds the main queue.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghost: list[int] = []
        self.freq: dict[int, int] = {}

    def read(self, x: int) -> None:
        if x in self.small or x in self.main:
            self.freq[x] = min(self.freq[x] + 1, 3)
            return
        while len(self.small) + len(self.main) >= self.size:
            if len(self.small) >= 0.1 * self.size:
                self.evict_small()
            else:
                self.evict_main()
        if x in self.ghost:
            self.ghost.remove(x)
            self.main.insert(0, x)
        else:
            self.small.insert(0, x)
        self.freq[x] = 0

    def evict_small(self) -> None:
        evicted = False
        while not evicted and self.small:
            t = self.small.pop()
            if self.freq[t] > 1:
                self.main.insert(0, t)
                self.freq[t] = 0
            else:
                self.ghost.insert(0, t)
                del self.ghost[max(int(0.9 * self.size), 1) :]
                evicted = True

    def evict_main(self) -> None:
        evicted = False
        while not evicted and self.main:
            t = self.main.pop()
            if self.freq[t] > 0:
                self.main.insert(0, t)
                self.freq[t] -= 1
            else:
                evicted = True


@settings(PATIENT, max_examples=300)
@given(
    size=st.integers(1, 25),
    reads=st.lists(st.integers(0, 3) | st.integers(0, 60), min_size=1, max_size=300),
)
def test_s3fifo_against_the_paper(size: int, reads: list[int]) -> None:
    policy, paper, resident = S3FIFO(), PaperS3FIFO(size), set[int]()
    for fill in range(100, 100 + size):  # the policy learns the size from a full cache
        policy.insert(fill)
        paper.read(fill)
        resident.add(fill)
    for expert in reads:
        if expert in resident:
            policy.touch(expert)
        else:
            resident.remove(policy.evict(set()))
            policy.insert(expert)
            resident.add(expert)
        paper.read(expert)
        assert resident == {*paper.small, *paper.main}


def test_s3fifo_keeps_who_comes_back_from_a_scan() -> None:
    policy, lru = S3FIFO(), LRU()
    for expert in range(20):
        policy.insert(expert)
        lru.insert(expert)
    for expert in (3, 3, 7, 7):
        policy.touch(expert)
        lru.touch(expert)
    resident, lru_resident = set(range(20)), set(range(20))
    for stranger in range(100, 140):  # each comes once
        resident.discard(policy.evict(set()))
        policy.insert(stranger)
        lru_resident.discard(lru.evict(set()))
        lru.insert(stranger)
    assert {3, 7} <= resident and not {3, 7} & lru_resident


@pytest.mark.parametrize("name", NAMES)
def test_registry_makes_a_new_policy_each_time(name: str) -> None:
    make = plugins.policy(name)
    make().insert(1)
    second = make()
    second.insert(2)
    assert second.evict(set()) == 2
