"""The native expert pool: the Python store's twin, with reads that run while others compute."""

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import astuple
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from patience import PATIENT

from mlx_flash.errors import ReadError
from mlx_flash.kernels import native, why_not
from mlx_flash.streaming.checkpoint import Span
from mlx_flash.streaming.eviction import POLICIES
from mlx_flash.streaming.reader import PreadReader
from mlx_flash.streaming.store import ExpertStore, NativeStore

_native: Any = native()
if _native is None:
    pytest.skip(f"SKIPPED LOUDLY: no native extension: {why_not()}", allow_module_level=True)

EXPERTS, SLOTS, BLOCK = 14, 5, 4096
SHAPES = {  # parameter -> dtype, shape of one expert, and where its first one begins
    "gate.weight": (mx.uint32, (BLOCK // 2,), BLOCK),  # of whole blocks, where blocks begin
    "up.weight": (mx.uint32, (BLOCK // 4,), 3),  # of whole blocks, across them
    "up.scales": (mx.bfloat16, (5, 7), BLOCK),
    "down.weight": (mx.float32, (5, 701), 1),
    "codes": (mx.uint8, (3,), 0),
}
ROWS = 8
FUSED = {  # rows of a gate and an up in turns -> dtype, items of one row
    "fused.weight": (mx.uint8, 1100),  # long enough to be read into place
    "fused.scales": (mx.uint8, 37),
    "fused.bias": (mx.bfloat16, 1),
}
SLOT_SHAPES = {name: (dtype, shape) for name, (dtype, shape, _) in SHAPES.items()} | {
    f"{half} of {name}": (dtype, (ROWS, items))
    for name, (dtype, items) in FUSED.items()
    for half in ("gate", "up")
}
ANY_EXPERTS = st.lists(st.integers(0, EXPERTS - 1), max_size=SLOTS, unique=True)


class Layer:
    """Random experts, one file for each tensor. Of the last, half of one is there at most."""

    def __init__(self, folder: Path, unreadable: int = 0):
        self.rng = np.random.default_rng(0)
        self.folder, self.unreadable = folder, unreadable
        self.spans: dict[str, list[Span]] = {}
        self.content: dict[Path, bytes] = {}
        for name, (dtype, shape, start) in SHAPES.items():
            nbytes = dtype.size * int(np.prod(shape))
            path = self.write(name, start, nbytes)
            self.spans[name] = Span(path, start, nbytes * EXPERTS).split(EXPERTS)
        for name, (dtype, items) in FUSED.items():
            row = dtype.size * items
            path = self.write(name, 7, 2 * ROWS * row)
            for half, at in (("gate", 7), ("up", 7 + row)):
                every = Span(path, at, ROWS * row * EXPERTS, row, 2 * row)
                self.spans[f"{half} of {name}"] = every.split(EXPERTS)
        self.paths = [*self.content]

    def write(self, name: str, start: int, nbytes: int) -> Path:
        path = self.folder / f"{name}.bin"
        there = EXPERTS - self.unreadable
        self.content[path] = self.rng.bytes(
            start + nbytes * there + (nbytes // 2 if self.unreadable else 0)
        )
        path.write_bytes(self.content[path])
        return path

    def bytes_of(self, span: Span) -> bytes:
        content = self.content[span.path]
        return b"".join(content[p.offset : p.offset + p.nbytes] for p in span.pieces())

    def files(self, direct: bool = False, threads: int = 3) -> Any:
        return _native.Files(self.paths, threads, direct)

    def slots(self, count: int = SLOTS) -> dict[str, mx.array]:
        return {
            name: _native.empty_slots([count, *shape], dtype)
            for name, (dtype, shape) in SLOT_SHAPES.items()
        }

    def pool(
        self, files: Any, slots: dict[str, mx.array], policy: str = "lru", pinned: Any = ()
    ) -> Any:
        spans = {
            name: [
                (self.paths.index(s.path), s.offset, s.nbytes, s.piece, s.stride)[
                    : 5 if s.piece else 3
                ]
                for s in spans
            ]
            for name, spans in self.spans.items()
        }
        return _native.ExpertPool(files, spans, slots, policy, [*pinned])

    def check(self, slots: dict[str, mx.array], experts: Sequence[int], at: Sequence[int]) -> None:
        """What MLX reads in those slots is what lies in the files."""
        assert len(set(at)) == len(experts) == len(at)
        for name, spans in self.spans.items():
            rows = np.array(mx.view(slots[name], mx.uint8)).reshape(slots[name].shape[0], -1)
            for expert, slot in zip(experts, at, strict=True):
                assert rows[slot].tobytes() == self.bytes_of(spans[expert])


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    return Layer(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    """A layer of which three experts cannot be read."""
    return Layer(tmp_path_factory.mktemp("cut"), unreadable=3)


@pytest.fixture(params=[False, True], ids=["cached", "direct"])
def direct(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def own(tmp_path: Path) -> Layer:
    """A layer whose files a test may spoil."""
    return Layer(tmp_path)


def python_store(layer: Layer, policy: str, slots: int = SLOTS) -> ExpertStore:
    arrays = {n: mx.zeros((slots, *shape), dtype) for n, (dtype, shape) in SLOT_SHAPES.items()}
    mx.eval(arrays)
    return ExpertStore(layer.spans, arrays, POLICIES[policy](), PreadReader(layer.paths, 2))


def residents(store: ExpertStore) -> list[int]:
    return sorted(store.resident())


def said(call: Callable[[], object]) -> tuple[str, int | None, object]:
    with pytest.raises(ReadError) as caught:
        call()
    return str(caught.value), caught.value.errno, caught.value.filename


def held() -> tuple[int, int]:
    """Open files and threads of this process, once what earlier tests left is gone."""
    gc.collect()
    return psutil.Process().num_fds(), psutil.Process().num_threads()


# The twin of the Python store


@pytest.mark.parametrize("policy", POLICIES)
@settings(PATIENT, max_examples=60)
@given(calls=st.lists(ANY_EXPERTS, min_size=1, max_size=30), direct=st.booleans())
def test_the_same_slots_and_victims_as_the_python_store(
    layer: Layer, policy: str, calls: list[list[int]], direct: bool
) -> None:
    slots = layer.slots()
    pool, store = layer.pool(layer.files(direct), slots, policy), python_store(layer, policy)
    for experts in calls:
        at = pool.place(experts)
        assert at == store.place(experts)
        layer.check(slots, experts, at)
        assert pool.resident() == residents(store)
        assert pool.stats() == astuple(store.stats)


def test_a_trace_begins_when_asked_for(layer: Layer) -> None:
    twins = NativeStore(layer.pool(layer.files(), layer.slots())), python_store(layer, "lru")
    for store in twins:
        place = store.pool.place if isinstance(store, NativeStore) else store.place
        place([1, 2])
        store.record()
        place([3, 1])
        place([])
        place([2])
        assert store.trace == [[3, 1], [], [2]]


@pytest.mark.parametrize("policy", POLICIES)
@settings(PATIENT, max_examples=40)
@given(calls=st.lists(ANY_EXPERTS, min_size=1, max_size=12), direct=st.booleans())
def test_the_same_state_after_failed_reads(
    cut: Layer, policy: str, calls: list[list[int]], direct: bool
) -> None:
    slots = cut.slots()
    pool, store = cut.pool(cut.files(direct), slots, policy), python_store(cut, policy)
    for experts in calls:
        if set(experts) & {11, 12, 13}:
            assert said(lambda e=experts: pool.place(e))[1] == errno.ENODATA
            with pytest.raises(ReadError):
                store.place(experts)
        else:
            at = pool.place(experts)
            assert at == store.place(experts)
            cut.check(slots, experts, at)
        kept = residents(store)
        assert pool.resident() == kept and pool.stats() == astuple(store.stats)
        cut.check(slots, kept, pool.place(kept))
        store.place(kept)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_trace_with_favourites(layer: Layer, policy: str, direct: bool) -> None:
    rng = random.Random(0)
    weights = [1 / (1 + e) for e in range(EXPERTS)]
    slots = layer.slots()
    files = layer.files(direct)
    pool, store = layer.pool(files, slots, policy), python_store(layer, policy)
    for _ in range(1000):
        experts = sorted(set(rng.choices(range(EXPERTS), weights, k=4)))
        at = pool.place(experts)
        assert at == store.place(experts)
    layer.check(slots, pool.resident(), pool.place(pool.resident()))
    hits, misses, evictions = pool.stats()
    assert hits > misses > evictions == misses - SLOTS > 500
    assert files.bytes_read == misses * sum(spans[0].nbytes for spans in layer.spans.values())
    assert files.read_s > 0


@pytest.mark.parametrize("experts", [[0, 1, 2, 3, 4, 5], [1, 1], [0, 1, 2, 3, 4, 4]])
def test_more_experts_than_slots_or_one_twice(layer: Layer, experts: list[int]) -> None:
    pool, store = layer.pool(layer.files(), layer.slots()), python_store(layer, "lru")
    pool.place([8, 9])
    with pytest.raises(ValueError) as theirs:
        store.place(experts)
    with pytest.raises(ValueError) as ours:
        pool.place(experts)
    assert str(ours.value) == str(theirs.value)
    assert pool.resident() == [8, 9] and pool.stats() == (0, 2, 0)


@pytest.mark.parametrize("expert", [EXPERTS, -1, 1 << 30])
def test_an_expert_that_does_not_exist(layer: Layer, expert: int) -> None:
    pool = layer.pool(layer.files(), layer.slots())
    for _ in range(SLOTS + 1):
        with pytest.raises(IndexError, match=f"no expert {expert} among {EXPERTS}"):
            pool.place([0, expert])
    assert pool.place([0, 1, 2, 3, 4]) == [0, 1, 2, 3, 4]


# Pinned experts


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_experts_keep_their_slots(layer: Layer, policy: str) -> None:
    slots = layer.slots()
    pool = layer.pool(layer.files(), slots, policy, pinned=[3, 7])
    rng = random.Random(0)
    pool.place([3, 7])
    for _ in range(100):
        pool.place(rng.sample(range(EXPERTS), 3))
        assert {3, 7} <= set(pool.resident())
        consume(pool, rng.sample(range(EXPERTS), EXPERTS), lambda expert, slot: None)
        assert {3, 7} <= set(pool.resident())
    layer.check(slots, [3, 7], pool.place([3, 7]))


def test_more_experts_than_pinned_ones_leave_slots_for(layer: Layer) -> None:
    slots = layer.slots()
    pool = layer.pool(layer.files(), slots, pinned=[0, 1, 2])
    pool.place([0, 1, 2])
    with pytest.raises(RuntimeError, match="No slot is left for 1 experts"):
        pool.place([4, 5, 6])
    layer.check(slots, [4, 1, 5], pool.place([4, 1, 5]))


# More experts than slots: prefill


def consume(pool: Any, experts: Sequence[int], look: Callable[[int, int], None]) -> list[int]:
    """Takes every expert of a call as it comes and releases it. Returns the order."""
    order = []
    with closing(_native.Fetch(pool, experts)) as fetch:
        while taken := fetch.take(True):
            for which, slot in taken:
                look(experts[which], slot)
                fetch.release(which)
                order.append(which)
    return order


@pytest.mark.parametrize("policy", POLICIES)
@settings(PATIENT, max_examples=40)
@given(
    calls=st.lists(
        st.permutations(range(EXPERTS)).flatmap(
            lambda p: st.integers(0, EXPERTS).map(lambda n: p[:n])
        ),
        max_size=6,
    ),
    direct=st.booleans(),
)
def test_every_expert_once_whatever_the_slots(
    layer: Layer, policy: str, calls: list[list[int]], direct: bool
) -> None:
    slots, files = layer.slots(), layer.files(direct)
    pool = layer.pool(files, slots, policy)
    each = sum(spans[0].nbytes for spans in layer.spans.values())
    for experts in calls:
        before, read = set(pool.resident()), files.bytes_read
        order = consume(pool, experts, lambda e, s: layer.check(slots, [e], [s]))
        assert sorted(order) == [*range(len(experts))]
        hits = [i for i, e in enumerate(experts) if e in before]
        assert order[: len(hits)] == hits, "hits first"
        assert files.bytes_read - read == each * (len(experts) - len(hits)), "each read once"
        after = pool.resident()
        assert set(after) <= before | set(experts)
        assert len(after) == min(SLOTS, len(before | set(experts)))
        if len(experts) >= SLOTS:
            assert set(after) <= set(experts), "strangers go first"
        layer.check(slots, after, pool.place(after))


def test_what_stays_is_what_is_worth_most(tmp_path: Path) -> None:
    path = tmp_path / "experts.bin"
    path.write_bytes(bytes(range(200)))
    array = _native.empty_slots([40], mx.uint8)
    spans = {"w": [(0, e, 1) for e in range(200)]}
    pool = _native.ExpertPool(_native.Files([path], 2, False), spans, {"w": array}, "lru")
    best = list(range(160, 200))
    pool.place(best)
    consume(pool, range(200), lambda expert, slot: None)
    # All of the best were there, were computed with, and could go. A few had to.
    assert len(pool.resident()) == 40
    assert len(set(pool.resident()) & set(best)) >= 40 - 16
    pool.place(list(range(40)))
    consume(pool, range(200), lambda expert, slot: None)  # none of the best is there
    assert len(set(pool.resident()) & set(best)) >= 40 - 16


def test_hits_come_at_once_and_nothing_is_overwritten_before_release(layer: Layer) -> None:
    slots = layer.slots()
    pool = layer.pool(layer.files(), slots)
    pool.place([0, 1, 2, 3, 4])
    with closing(_native.Fetch(pool, [5, 0, 1, 2, 3, 4])) as fetch:
        hits = fetch.take(False)
        assert [which for which, _ in hits] == [1, 2, 3, 4, 5]
        assert fetch.take(False) == []
        with pytest.raises(RuntimeError, match="No slot is left for 1 experts of this call"):
            fetch.take(True)
        layer.check(slots, [0, 1, 2, 3, 4], [slot for _, slot in hits])
        fetch.release(3)  # the third expert's slot, and no other
        assert fetch.take(True) == [(0, hits[2][1])]
        layer.check(slots, [0, 1, 5, 3, 4], [slot for _, slot in hits])
        assert fetch.take(True) == []
    assert pool.resident() == [0, 1, 3, 4, 5] and pool.stats() == (5, 6, 1)


# Looking ahead


@pytest.mark.parametrize("policy", POLICIES)
@settings(PATIENT, max_examples=60)
@given(
    calls=st.lists(st.tuples(ANY_EXPERTS, ANY_EXPERTS), min_size=1, max_size=20),
    direct=st.booleans(),
)
def test_whatever_was_guessed_every_slot_holds_its_expert(
    layer: Layer, policy: str, calls: list[tuple[list[int], list[int]]], direct: bool
) -> None:
    slots = layer.slots()
    pool = layer.pool(layer.files(direct), slots, policy)
    for guess, experts in calls:
        pool.look_ahead(guess)
        layer.check(slots, experts, pool.place(experts))
        assert len(pool.resident()) <= SLOTS
    hits, misses, _ = pool.stats()
    assert hits + misses == sum(len(experts) for _, experts in calls)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_right_guess_is_read_once_and_is_a_miss(layer: Layer) -> None:
    files, slots = layer.files(), layer.slots()
    pool = layer.pool(files, slots)
    pool.look_ahead([3, 7])
    size = sum(spans[0].nbytes for spans in layer.spans.values())
    until(lambda: files.bytes_read == 2 * size)
    layer.check(slots, [3, 7], pool.place([3, 7]))
    assert files.bytes_read == 2 * size
    assert pool.stats() == (0, 2, 0) and pool.read_ahead == 2
    pool.place([3])
    assert pool.stats() == (1, 2, 0)


def test_a_rank_that_guesses_wrong_is_not_read_any_more(layer: Layer) -> None:
    files = layer.files()
    pool = layer.pool(files, layer.slots())
    pool.place([3])
    each, counts = files.bytes_read, []
    for call in range(60):
        wrong, right = 6 + call % 8, call % 3
        there = files.bytes_read - each * pool.read_ahead
        pool.look_ahead([right, wrong])
        while files.bytes_read < there + each * pool.read_ahead:
            time.sleep(1e-4)  # no guess is taken while the last one is being read
        pool.place([right, 3])
        counts.append(pool.read_ahead)
    assert counts[-1] == counts[30], "the wrong rank is left alone, the right one is resident"
    assert 11 <= counts[-1] < 30  # trust is halved by eleven wrong guesses


def test_nothing_is_read_ahead_while_a_call_holds_the_layer(layer: Layer) -> None:
    pool = layer.pool(layer.files(), layer.slots())
    with closing(_native.Fetch(pool, [1, 2])):
        pool.look_ahead([3, 4])
    assert pool.read_ahead == 0


def test_a_call_that_needs_all_slots_gets_those_of_a_guess(layer: Layer) -> None:
    slots = layer.slots()
    pool = layer.pool(layer.files(), slots)
    for first in range(EXPERTS - SLOTS):
        pool.look_ahead([(first + SLOTS + i) % EXPERTS for i in range(4)])
        wanted = list(range(first, first + SLOTS))
        layer.check(slots, wanted, pool.place(wanted))
        assert pool.resident() == wanted


@pytest.mark.parametrize("guess", [[EXPERTS], [-1], [3, 3]])
def test_a_guess_of_what_cannot_be(layer: Layer, guess: list[int]) -> None:
    pool = layer.pool(layer.files(), layer.slots())
    with pytest.raises((IndexError, ValueError), match=r"no expert|twice"):
        pool.look_ahead(guess)
    assert pool.read_ahead == 0


def test_a_guess_that_cannot_be_read_fails_only_who_needs_it(cut: Layer) -> None:
    slots = cut.slots()
    pool = cut.pool(cut.files(), slots)
    for _ in range(4):
        pool.look_ahead([1, EXPERTS - 1])
        cut.check(slots, [1, 2], pool.place([1, 2]))
    pool.look_ahead([EXPERTS - 1])
    with pytest.raises(ReadError, match="bytes short"):
        pool.place([1, EXPERTS - 1])
    cut.check(slots, [1, 3], pool.place([1, 3]))


def test_a_pool_that_goes_while_it_looks_ahead(layer: Layer) -> None:
    before = held()
    for _ in range(20):
        layer.pool(layer.files(), layer.slots()).look_ahead([1, 2, 3])
    assert held() == before


@settings(PATIENT, max_examples=80)
@given(
    start=st.integers(0, 9000),
    sizes=st.lists(st.integers(0, 20000), min_size=1, max_size=6),
    phase=st.integers(0, 4095),
    congruent=st.booleans(),
)
def test_direct_reads_of_any_place_into_any_place(
    tmp_path_factory: pytest.TempPathFactory,
    start: int,
    sizes: list[int],
    phase: int,
    congruent: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "direct.bin"
    content = np.random.default_rng(0).bytes(start + sum(sizes))
    path.write_bytes(content)
    files = _native.Files([path], 2, True)
    at = start
    for nbytes in sizes:  # the last one ends with the file
        here = at % BLOCK if congruent else phase
        memory = _native.empty_slots([2, max(nbytes, 1)], mx.uint8, BLOCK, here)
        rows = np.frombuffer(memory, np.uint8)
        assert rows.ctypes.data % BLOCK == here
        rows[:] = 77
        if nbytes:
            pool = _native.ExpertPool(files, {"w": [(0, at, nbytes)]}, {"w": memory}, "lru")
            (slot,) = pool.place([0])
            found = rows.reshape(2, -1)
            assert found[slot].tobytes() == content[at : at + nbytes]
            assert (found[1 - slot] == 77).all(), "its neighbour is as it was"
        at += nbytes


def test_what_a_fetch_refuses(layer: Layer) -> None:
    pool = layer.pool(layer.files(), layer.slots())
    with pytest.raises(ValueError, match="Expert 3 occurs twice"):
        _native.Fetch(pool, [3, 4, 3])
    fetch = _native.Fetch(pool, [3])
    with pytest.raises(RuntimeError, match="Only an expert that was given"):
        fetch.release(0)
    while not fetch.take(False):
        time.sleep(0.001)
    fetch.release(0)
    with pytest.raises(RuntimeError, match="Only an expert that was given"):
        fetch.release(0)
    with pytest.raises(IndexError):
        fetch.release(1)
    fetch.close()
    with pytest.raises(ValueError, match="closed"):
        fetch.take(True)
    assert pool.place([3]) == [0]


def test_a_fetch_nobody_finishes(layer: Layer, direct: bool) -> None:
    slots = layer.slots()
    pool = layer.pool(layer.files(direct), slots)
    rng = random.Random(0)
    for i in range(100):
        fetch = _native.Fetch(pool, rng.sample(range(EXPERTS), rng.randint(1, EXPERTS)))
        if i % 3:
            fetch.take(i % 3 == 1)
        fetch.close()
        kept = pool.resident()
        assert len(kept) <= SLOTS
        layer.check(slots, kept, pool.place(kept))
    everyone = [*range(EXPERTS)]
    for experts in (everyone[:SLOTS], everyone[-SLOTS:]):  # no slot was lost
        layer.check(slots, experts, pool.place(experts))


def test_an_error_among_more_experts_than_slots(cut: Layer) -> None:
    slots = cut.slots()
    pool = cut.pool(cut.files(), slots)
    pool.place([0, 1, 2])
    experts = [13, *range(10)]
    with closing(_native.Fetch(pool, experts)) as fetch:
        taken = []
        with pytest.raises(ReadError):
            while True:
                for which, slot in fetch.take(True):
                    cut.check(slots, [experts[which]], [slot])
                    taken.append(which)
                    fetch.release(which)
        with pytest.raises(ReadError):
            fetch.take(False)
    assert 0 not in taken
    assert set(pool.resident()) <= {0, 1, 2}, "what this call read is given up"
    cut.check(slots, [5, 6, 7, 8, 9], pool.place([5, 6, 7, 8, 9]))


# Errors in the same words as the Python reader's


def test_a_truncated_file(own: Layer, direct: bool) -> None:
    spans = own.spans["down.weight"]
    slots = own.slots()
    pool, store = own.pool(own.files(direct), slots), python_store(own, "lru")
    pool.place([2])
    os.truncate(spans[0].path, spans[9].offset + 1000)
    ours = said(lambda: pool.place([9]))
    assert ours == said(lambda: store.place([9]))
    missing = spans[9].nbytes - 1000
    assert ours[0] == (
        f"{spans[0].path}: ends at byte {spans[9].offset + 1000}, {missing} bytes short; "
        "download it again."
    )
    assert ours[1:] == (errno.ENODATA, spans[0].path)
    assert said(lambda: pool.place([13]))[1] == errno.ENODATA  # wholly past the end
    assert pool.resident() == [2]
    own.check(slots, [2], pool.place([2]))


def test_a_truncated_file_says_so_even_where_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "experts.bin"
    path.write_bytes(bytes(12_500))
    spans = {"large": [Span(path, 0, 9000)], "small": [Span(path, 9500, 3000)]}
    slots = {name: mx.zeros((1, s[0].nbytes), mx.uint8) for name, s in spans.items()}
    mx.eval(slots)
    store = ExpertStore(spans, slots, POLICIES["lru"](), PreadReader([path]))
    places = {"large": [(0, 0, 9000)], "small": [(0, 9500, 3000)]}
    pool = _native.ExpertPool(_native.Files([path], 1, False), places, slots, "lru")
    os.truncate(path, 10_000)
    ours = said(lambda: pool.place([0]))  # the large one is read first, and is there
    assert ours == said(lambda: store.place([0]))
    assert ours[1] == errno.ENODATA


@pytest.mark.parametrize("how", ["a read fails", "it is closed"])
def test_nothing_is_written_after_a_call(tmp_path: Path, how: str) -> None:
    nbytes = 8 << 20  # several requests, all of them in flight at once
    path = tmp_path / "experts.bin"
    path.write_bytes(b"x" * nbytes)
    slots = {"w": _native.empty_slots([1, nbytes], mx.uint8), "v": mx.zeros((1, 9), mx.uint8)}
    spans = {"w": [(0, 0, nbytes)] * 2, "v": [(0, nbytes, 9), (0, 0, 9)]}
    pool = _native.ExpertPool(_native.Files([path], 5, False), spans, slots, "lru")
    lasts = np.frombuffer(slots["w"], np.uint8)[(2 << 20) - 1 :: 2 << 20]  # of each request
    for _ in range(10):
        fetch = _native.Fetch(pool, [0 if how == "a read fails" else 1])
        if how == "a read fails":
            with pytest.raises(ReadError):
                fetch.take(True)
        else:
            time.sleep(0.0005)
            fetch.close()
        lasts[:] = 7
        time.sleep(0.005)
        assert np.all(lasts == 7)
        fetch.close()
        pool.place([1])


def test_a_file_changed_since_it_was_opened(own: Layer, direct: bool) -> None:
    pool, store = own.pool(own.files(direct), own.slots()), python_store(own, "lru")
    path = own.paths[0]
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    ours = said(lambda: pool.place([1]))
    assert ours == said(lambda: store.place([1]))
    assert "changed on disk since it was loaded; load the model again" in ours[0]
    assert ours[1:] == (errno.ESTALE, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert pool.place([1]) == [0]


def test_a_file_that_reads_as_an_error(tmp_path: Path) -> None:
    spans = {"w": [Span(tmp_path, 4096, 3)]}
    array = mx.zeros((1, 3), mx.uint8)
    mx.eval(array)
    store = ExpertStore(spans, {"w": array}, POLICIES["lru"](), PreadReader([tmp_path]))
    files = _native.Files([tmp_path], 1, False)  # a folder opens, and cannot be read
    pool = _native.ExpertPool(files, {"w": [(0, 4096, 3)]}, {"w": array}, "lru")
    ours = said(lambda: pool.place([0]))
    assert ours == said(lambda: store.place([0]))
    assert ours[1] == errno.EISDIR and "at byte 4096; check the disk" in ours[0]


def test_a_missing_file(own: Layer) -> None:
    before = held()
    paths = [*own.paths, own.paths[0].with_name("gone: 2 \udcff.bin")]
    ours = said(lambda: _native.Files(paths, 4, True))
    assert ours == said(lambda: PreadReader(paths))
    assert ours[1:] == (errno.ENOENT, paths[-1])
    assert held() == before


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_deleted_after_opening(own: Layer, direct: bool, replace: bool) -> None:
    slots = own.slots()
    pool = own.pool(own.files(direct), slots)
    for path in own.paths:
        if replace:
            path.with_suffix(".new").write_bytes(b"other bytes")
            path.with_suffix(".new").replace(path)
        else:
            path.unlink()
    own.check(slots, [0, 13], pool.place([0, 13]))


# Direct reads


def has_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        return sys.platform == "darwin"
    return True


def test_direct_reads_of_every_alignment(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "experts.bin"
    content = rng.randbytes(6 * 2**20 + 1234)
    path.write_bytes(content)
    files = _native.Files([path], 4, True)
    for nbytes in (1, 511, 512, 4096, 4097, 3 * 4096, 2**20 - 512, 2**20 + 1, 3 * 2**20 + 512):
        last = len(content) - nbytes
        offsets = [0, last, last // 512 * 512, last // 4096 * 4096]
        offsets += [rng.randint(0, last) for _ in range(6)]
        offsets += [rng.randint(0, last) // 512 * 512 for _ in range(3)]
        slots = _native.empty_slots([len(offsets), nbytes], mx.uint8)
        spans = {"w": [(0, offset, nbytes) for offset in offsets]}
        at = _native.ExpertPool(files, spans, {"w": slots}, "lru").place([*range(len(offsets))])
        rows = np.array(slots)
        for offset, slot in zip(offsets, at, strict=True):
            assert rows[slot].tobytes() == content[offset : offset + nbytes]
    assert files.direct is has_direct(path)


def test_neighbours_on_disk_go_to_slots_apart(tmp_path: Path, direct: bool) -> None:
    content = random.Random(0).randbytes(24 * 2**20)
    (tmp_path / "experts.bin").write_bytes(content)
    files = _native.Files([tmp_path / "experts.bin"], 3, direct)
    for nbytes in (4096, 5000, 2**20, 9 * 2**20):  # many to a request, and several requests to one
        count = min(len(content) // nbytes, 600)
        slots = _native.empty_slots([count, nbytes], mx.uint8)
        spans = {"w": [(0, e * nbytes, nbytes) for e in range(count)]}
        pool = _native.ExpertPool(files, spans, {"w": slots}, "lru")
        experts = random.Random(0).sample(range(count), count)
        rows = np.array(slots)
        for expert, slot in zip(experts, pool.place(experts), strict=True):
            rows = np.frombuffer(slots, np.uint8).reshape(count, nbytes)
            assert rows[slot].tobytes() == content[expert * nbytes : (expert + 1) * nbytes]


def test_spans_that_touch_across_files(tmp_path: Path, direct: bool) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 9000)
    files = _native.Files([tmp_path / "a", tmp_path / "b"], 2, direct)
    slots = _native.empty_slots([2, 4096], mx.uint8)
    pool = _native.ExpertPool(files, {"w": [(0, 0, 4096), (1, 4096, 4096)]}, {"w": slots}, "lru")
    assert pool.place([0, 1]) == [0, 1]
    assert bytes(np.array(slots)) == b"a" * 4096 + b"b" * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="files that refuse O_DIRECT are Linux's")
def test_where_direct_reads_are_refused() -> None:
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    files = _native.Files([path], 1, True)
    assert files.direct is False
    slots = _native.empty_slots([1, 6], mx.uint8)
    _native.ExpertPool(files, {"w": [(0, 1, 6)]}, {"w": slots}, "lru").place([0])
    assert bytes(np.array(slots)) == Path(path).read_bytes()[1:7]


def test_direct_is_what_it_says(layer: Layer) -> None:
    assert layer.files(False).direct is False
    assert layer.files(True).direct is all(has_direct(path) for path in layer.paths)


# Strided spans


@st.composite
def layouts(draw: Any) -> tuple[int, list[tuple[int, int, int, int]]]:
    """Bytes of a file, and spans within it: offset, count of pieces, piece, stride."""
    spans = []
    for _ in range(draw(st.integers(1, 4))):
        piece = draw(st.sampled_from([1, 2, 90, 511, 512, 1440, 5000, 70_000]))
        gap = draw(st.sampled_from([0, 1, piece, 3 * piece, 70_000]))
        count = draw(st.integers(1, max(2, min(3000, 6_000_000 // (piece + gap)))))
        spans.append((draw(st.integers(0, 3 * piece)), count, piece, piece + gap))
    return max(at + (n - 1) * stride + piece for at, n, piece, stride in spans), spans


@settings(PATIENT, max_examples=80)
@given(layout=layouts(), direct=st.booleans(), threads=st.integers(1, 3))
@example(layout=(5_000_003, [(3, 1, 5_000_000, 9_000_000)]), direct=False, threads=2)
@example(layout=(5_000_003, [(3, 1, 5_000_000, 9_000_000)]), direct=True, threads=2)
def test_strided_spans_of_any_layout(
    tmp_path_factory: pytest.TempPathFactory, layout: Any, direct: bool, threads: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "strided.bin"
    end, spans = layout  # the file ends with the last of them
    content = np.random.default_rng(end).integers(0, 256, end, np.uint8)
    content.tofile(path)
    places = {
        str(i): [(0, at, n * piece, piece, stride)]
        for i, (at, n, piece, stride) in enumerate(spans)
    }
    slots = {
        str(i): _native.empty_slots([2, n * piece], mx.uint8, BLOCK, at % BLOCK)
        for i, (at, n, piece, _) in enumerate(spans)
    }
    rows = {name: np.frombuffer(a, np.uint8).reshape(2, -1) for name, a in slots.items()}
    for row in rows.values():
        row[:] = 77
    files = _native.Files([path], threads, direct)
    (slot,) = _native.ExpertPool(files, places, slots, "lru").place([0])
    for i, (at, n, piece, stride) in enumerate(spans):
        want = np.lib.stride_tricks.as_strided(content[at:], (n, piece), (stride, 1))
        assert np.array_equal(rows[str(i)][slot], want.reshape(-1))
        assert (rows[str(i)][1 - slot] == 77).all(), "its neighbour is as it was"


@pytest.mark.parametrize("piece", [2, 90, 1440, 100_000])
def test_what_interleaves_is_read_once(tmp_path: Path, piece: int, direct: bool) -> None:
    count = 6_000_000 // piece  # several requests
    content = np.random.default_rng(0).integers(0, 256, (count, 2, piece), np.uint8)
    (tmp_path / "f.bin").write_bytes(b"odd" + content.tobytes())
    files = _native.Files([tmp_path / "f.bin"], 3, direct)
    spans = {
        name: [(0, 3 + half * piece, count * piece, piece, 2 * piece)]
        for half, name in enumerate(("gate", "up"))
    }
    slots = {name: _native.empty_slots([1, count * piece], mx.uint8) for name in spans}
    _native.ExpertPool(files, spans, slots, "lru").place([0])
    for half, name in enumerate(("gate", "up")):
        assert np.array_equal(np.array(slots[name]).reshape(count, piece), content[:, half])
    assert files.bytes_read == content.size
    alone = {"gate": slots["gate"]}
    _native.ExpertPool(files, {"gate": spans["gate"]}, alone, "lru").place([0])
    together = count * piece if piece > 64 << 10 else content.size
    assert content.size + count * piece <= files.bytes_read <= content.size + together


def test_a_strided_span_of_a_truncated_file(tmp_path: Path, direct: bool) -> None:
    for piece in (2, 1440):
        path = tmp_path / f"{piece}.bin"
        path.write_bytes(bytes(20 * piece - 1))
        spans = {"w": [Span(path, half * piece, 10 * piece, piece, 2 * piece) for half in (0, 1)]}
        slots = {"w": mx.zeros((1, 10 * piece), mx.uint8)}
        mx.eval(slots)
        store = ExpertStore(spans, slots, POLICIES["lru"](), PreadReader([path]))
        places = {"w": [(0, s.offset, s.nbytes, s.piece, s.stride) for s in spans["w"]]}
        pool = _native.ExpertPool(_native.Files([path], 2, direct), places, slots, "lru")
        assert pool.place([0]) == [0]
        ours = said(lambda pool=pool: pool.place([1]))
        assert ours == said(lambda store=store: store.place([1]))
        assert f"ends at byte {20 * piece - 1}, 1 bytes short" in ours[0]
        os.truncate(path, 15 * piece)
        ours = said(lambda pool=pool: pool.place([1]))
        assert ours == said(lambda store=store: store.place([1]))
        assert f"ends at byte {15 * piece}, {5 * piece} bytes short" in ours[0]


@pytest.mark.parametrize(
    "span",
    [
        (0, 0, 12, 5, 5),  # no whole pieces
        (0, 0, 12, 4, 3),  # pieces over one another
        (0, 0, 12, 0, 3),  # a distance of nothing
        (0, 0, 12, -4, 8),
        (0, 0, 12, 4, -8),
        (0, 1 << 62, 12, 4, 1 << 61),  # beyond the end of any file
        (0, 0, 12, 4, 1 << 62),
        (0, (1 << 63) - 4, 12),
    ],
)
def test_strided_spans_that_cannot_be(layer: Layer, span: tuple[int, ...]) -> None:
    slots = {"w": mx.zeros((1, 12), mx.uint8)}
    with pytest.raises(ValueError, match="do not make up 12 bytes of a file"):
        _native.ExpertPool(layer.files(), {"w": [span]}, slots, "lru")
    with pytest.raises(TypeError):
        _native.ExpertPool(layer.files(), {"w": [(0, 0, 12, 4)]}, slots, "lru")


# In the graph


def test_slot_ids_in_the_graph(layer: Layer) -> None:
    slots = layer.slots()
    pool, store = layer.pool(layer.files(), slots), python_store(layer, "lru")
    rng = np.random.default_rng(0)
    for dtype in (mx.uint32, mx.int32, mx.int64, mx.uint8):
        for shape in ((4,), (1, 1, 2), (2, 2), (0,), (3, 0)):
            routed = rng.integers(0, EXPERTS, shape)
            at = pool.place_in_graph(mx.array(routed).astype(dtype))
            assert at.shape == shape and at.dtype == mx.uint32
            experts = np.unique(routed)
            expected = np.array(store.place(experts.tolist()))
            if routed.size:
                assert np.array_equal(np.array(at), expected[np.searchsorted(experts, routed)])
            layer.check(slots, experts.tolist(), expected.tolist())


def test_a_lazy_graph_of_many_calls(layer: Layer, direct: bool) -> None:
    """Each call waits for what read the slots before it, by `after` alone."""
    rng = np.random.default_rng(0)
    slots = layer.slots()
    pool = layer.pool(layer.files(direct), slots)
    routed = [mx.array(rng.choice(EXPERTS, 4, replace=False)) for _ in range(1000)]
    total, expected = mx.array(0.0), 0.0
    for indices in routed:
        at = pool.place_in_graph(indices[::-1], after=total)  # not contiguous
        total = total + slots["up.scales"][at].view(mx.uint16).astype(mx.float32).sum()
    assert pool.stats() == (0, 0, 0), "nothing has run"
    mx.async_eval(total)
    for indices in routed:
        for e in np.array(indices).tolist():
            span = layer.spans["up.scales"][e]
            data = layer.content[span.path][span.offset : span.offset + span.nbytes]
            expected += float(np.frombuffer(data, np.uint16).sum(dtype=np.float64))
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert pool.stats()[2] > 1000


def test_an_error_in_the_graph_reaches_the_caller(own: Layer) -> None:
    path = own.spans["down.weight"][0].path
    before = path.stat()
    slots = own.slots()
    pool, store = own.pool(own.files(), slots), python_store(own, "lru")
    mx.eval(pool.place_in_graph(mx.array([1, 2])))
    os.truncate(path, own.spans["down.weight"][9].offset + 1000)
    said_by_python = said(lambda: store.place([9]))
    for call in (
        lambda: mx.eval(pool.place_in_graph(mx.array([9]))),
        lambda: pool.place_in_graph(mx.array([9])).item(),
        lambda: pool.place_in_graph(mx.array([9])).tolist(),
        lambda: mx.eval(slots["codes"][pool.place_in_graph(mx.array([9]))] + 1),
    ):
        assert said(call) == said_by_python
    assert pool.resident() == [1, 2]
    mx.eval(pool.place_in_graph(mx.array([2, 1])))  # what is there needs no disk
    path.write_bytes(own.content[path])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    at = pool.place_in_graph(mx.array([9, 3, 1]))
    own.check(slots, [9, 3, 1], at.tolist())


def test_more_experts_in_the_graph_than_slots(layer: Layer) -> None:
    pool = layer.pool(layer.files(), layer.slots())
    at = pool.place_in_graph(mx.array([0, 1, 2, 3, 4, 5, 0]))
    with pytest.raises(RuntimeError, match="6 experts in one call, 6 distinct, for 5 slots"):
        mx.eval(at)
    assert pool.place_in_graph(mx.array([0, 1, 2, 3, 4, 0])).tolist() == [0, 1, 2, 3, 4, 0]


def test_other_errors_of_mlx_stay_what_they_were() -> None:
    with pytest.raises(ValueError, match="shape"):
        mx.eval(mx.zeros((2, 3)) + mx.zeros((4, 5)))
    with pytest.raises(RuntimeError, match="Failed to open"):
        mx.eval(mx.load("/nonexistent.safetensors"))


# Two threads, graphs nobody waits for, the end of the process


def test_two_threads_take_turns(layer: Layer, direct: bool) -> None:
    slots, failures = layer.slots(), []
    pool = layer.pool(layer.files(direct), slots, "s3fifo")
    rows = {n: np.frombuffer(a, np.uint8).reshape(SLOTS, -1) for n, a in slots.items()}

    def run(seed: int) -> None:
        rng = random.Random(seed)

        def look(expert: int, slot: int) -> None:
            for name, spans in layer.spans.items():
                if rows[name][slot].tobytes() != layer.bytes_of(spans[expert]):
                    failures.append((name, expert))

        for _ in range(60):
            consume(pool, rng.sample(range(EXPERTS), rng.randint(1, EXPERTS)), look)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    hits, misses, evictions = pool.stats()
    assert evictions == misses - SLOTS and hits > 0


def test_graphs_nobody_waits_for(layer: Layer) -> None:
    slots = layer.slots()
    pool = layer.pool(layer.files(), slots)
    for i in range(60):
        at = pool.place_in_graph(mx.array([i % EXPERTS, (i + 5) % EXPERTS]))
        if i % 4 == 0:
            mx.async_eval(at)
        elif i % 4 == 1:
            assert "uint32" in repr(at)
        elif i % 4 == 2:
            mx.clear_cache()
        else:
            mx.synchronize()
        del at
    experts = [3, 1, 4]
    layer.check(slots, experts, pool.place_in_graph(mx.array(experts)).tolist())


def test_a_graph_keeps_its_pool_and_slots_alive(layer: Layer) -> None:
    pool = layer.pool(layer.files(), layer.slots())
    at = [pool.place_in_graph(mx.array([e])) for e in range(EXPERTS)]
    del pool
    assert [a.item() for a in at] == [*range(SLOTS), *(i % SLOTS for i in range(EXPERTS - SLOTS))]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_signals_are_for_other_threads(layer: Layer) -> None:
    before = set(Path("/proc/self/task").iterdir())
    files = layer.files(threads=3)
    made = set(Path("/proc/self/task").iterdir()) - before
    assert len(made) == 3
    for task in made:
        status = (task / "status").read_text()
        blocked = int(status.split("SigBlk:")[1].split()[0], 16)
        assert blocked >> (signal.SIGINT - 1) & 1
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []), "ours are as they were"
    files.close()


def test_a_pool_keeps_its_slots_alive() -> None:
    files = _native.Files([__file__], 1, False)
    before, nbytes = mx.get_active_memory(), 64 << 20
    slots = _native.empty_slots([1, nbytes], mx.uint8)
    pool = _native.ExpertPool(files, {"w": [(0, 0, nbytes)]}, {"w": slots}, "lru")
    at = pool.place_in_graph(mx.array([0]))
    del slots
    assert mx.get_active_memory() - before >= nbytes
    del pool
    assert mx.get_active_memory() - before >= nbytes
    del at
    assert mx.get_active_memory() - before < nbytes


def test_close_fails_what_has_not_begun(tmp_path: Path) -> None:
    nbytes = 128 << 20  # many requests for one thread
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(nbytes)
    slots = _native.empty_slots([1, nbytes], mx.uint8)
    files = _native.Files([path], 1, False)
    pool = _native.ExpertPool(files, {"w": [(0, 0, nbytes)]}, {"w": slots}, "lru")
    fetch = _native.Fetch(pool, [0])
    files.close()
    with pytest.raises(ReadError, match="was closed with its model; load the model again"):
        fetch.take(True)
    assert files.bytes_read < nbytes
    fetch.close()
    assert pool.resident() == []


def test_close_while_others_read(own: Layer, direct: bool) -> None:
    before = held()
    files = own.files(direct)
    pool = own.pool(files, own.slots())
    ended: list[BaseException] = []

    def read() -> None:
        try:
            for i in range(1_000_000):
                pool.place([i % EXPERTS, (i + 1) % EXPERTS])
        except ReadError as error:
            ended.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.05)
    files.close()
    files.close()
    thread.join()
    assert "was closed with its model" in str(ended[0])
    assert held() == before
    with pytest.raises(ReadError, match="was closed"):
        pool.place([e for e in range(EXPERTS) if e not in pool.resident()][:1])


EXIT = """
import sys, mlx.core as mx
from mlx_flash.kernels import native
size, count = 128 << 20, 400
files = native().Files([sys.argv[1]], 1, False)
slots = native().empty_slots([1, size], mx.uint8)
spans = {"w": [(0, e, size) for e in range(count)]}
pool = native().ExpertPool(files, spans, {"w": slots}, "lru")
HOW
print("reading", flush=True)
"""
HOW_IT_ENDS = {
    "a graph is abandoned": """
at = [pool.place_in_graph(mx.array([e])) for e in range(3)]
mx.async_eval(at)
""",
    "a thread is reading": """
import threading
threading.Thread(target=lambda: pool.place([1]), daemon=True).start()
""",
    "a fetch is open": "fetch = native().Fetch(pool, [1])",
    "it is told to exit": """
import os
mx.async_eval(pool.place_in_graph(mx.array([1])))
sys.exit(0)
""",
}


@pytest.mark.parametrize("how", HOW_IT_ENDS)
def test_the_process_ends_while_a_read_is_in_flight(tmp_path: Path, how: str) -> None:
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.truncate((128 << 20) + 400)
    code = EXIT.replace("HOW", HOW_IT_ENDS[how])
    begun = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert time.monotonic() - begun < 20


# Slots


def test_empty_slots_cost_nothing_until_filled() -> None:
    size = 256 << 20
    before = psutil.Process().memory_info().rss
    slots = _native.empty_slots([64, size // 64], mx.uint8)
    assert slots.shape == (64, size // 64) and slots.dtype == mx.uint8
    rows = np.frombuffer(slots, np.uint8).reshape(64, -1)
    assert psutil.Process().memory_info().rss - before < size / 16
    rows[:] = 7
    assert psutil.Process().memory_info().rss - before > size * 15 / 16
    assert mx.array_equal(slots[63], mx.full((size // 64,), 7, mx.uint8))
    active = mx.get_active_memory()
    del slots, rows
    assert active - mx.get_active_memory() >= size


@pytest.mark.parametrize("dtype", [mx.uint8, mx.bfloat16, mx.uint32, mx.float32, mx.int64])
@pytest.mark.parametrize("shape", [[4, 1], [3, 5, 7], [8, 512], [1], [0, 4]])
@pytest.mark.parametrize("alignment", [4096, 64, 1 << 16])
def test_where_slots_begin(dtype: mx.Dtype, shape: list[int], alignment: int) -> None:
    slots = _native.empty_slots(shape, dtype, alignment)
    assert slots.shape == tuple(shape) and slots.dtype == dtype
    if slots.size:
        host = np.frombuffer(slots, np.uint8)
        assert host.ctypes.data % alignment == 0
        host[:] = np.random.default_rng(0).integers(0, 256, host.size)
        twice = mx.concatenate([slots, slots])
        assert np.array_equal(np.frombuffer(twice, np.uint8), np.tile(host, 2))


def test_slots_that_are_refused(layer: Layer) -> None:
    with pytest.raises(ValueError, match="power of two"):
        _native.empty_slots([4], mx.uint32, 100)
    with pytest.raises(ValueError, match="negative"):
        _native.empty_slots([4, -1], mx.uint32)
    files, slots = layer.files(), layer.slots()
    pool = layer.pool
    with pytest.raises(ValueError, match="policy nope: lru, lfu or s3fifo"):
        pool(files, slots, "nope")
    with pytest.raises(ValueError, match="no expert 14 to pin"):
        pool(files, slots, pinned=[14])
    with pytest.raises(ValueError, match="needs both spans and slots"):
        pool(files, {"codes": slots["codes"]})
    with pytest.raises(ValueError, match=r"codes: slots are a row contiguous array"):
        pool(files, {**slots, "codes": mx.zeros((3, SLOTS), mx.uint8).T})
    with pytest.raises(ValueError, match="others have 4"):
        pool(files, {**slots, "codes": _native.empty_slots([4, 3], mx.uint8)})
    with pytest.raises(ValueError, match="does not fit a slot of 4 bytes"):
        pool(files, {**slots, "codes": _native.empty_slots([SLOTS, 4], mx.uint8)})
    with pytest.raises(ValueError, match="in file 4 does not fit"):
        pool(_native.Files(layer.paths[:4], 1, False), slots)
