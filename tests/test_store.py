"""One layer's slots over files: every slot named holds its expert, whatever came before."""

from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fakes import FakeReader
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENT

from mlx_flash.errors import ReadError
from mlx_flash.streaming.checkpoint import Span
from mlx_flash.streaming.eviction import LRU, POLICIES
from mlx_flash.streaming.reader import READERS, Reader
from mlx_flash.streaming.store import ExpertStore

EXPERTS, SLOTS = 10, 4
SHAPES = {  # parameter -> dtype and shape of one expert
    "gate.weight": (mx.uint32, (3, 8)),
    "gate.scales": (mx.bfloat16, (3, 2)),
    "up.weight": (mx.float32, (5, 7)),
    "up.bias": (mx.float16, (5,)),
    "codes": (mx.uint8, (3,)),
}
CALLS = st.lists(
    st.lists(st.integers(0, EXPERTS - 1), max_size=SLOTS, unique=True), min_size=1, max_size=12
)


class Layer:
    """Random experts in two files, and empty slots for them."""

    def __init__(self, folder: Path):
        rng = np.random.default_rng(0)
        self.spans: dict[str, list[Span]] = {}
        for i, (name, (dtype, shape)) in enumerate(SHAPES.items()):
            path = folder / f"{i % 2}.bin"
            start = path.stat().st_size if path.exists() else 3  # aligned to nothing
            nbytes = dtype.size * int(np.prod(shape))
            with path.open("ab") as file:
                file.write(rng.bytes(nbytes * EXPERTS + start - file.tell()))
            self.spans[name] = Span(path, start, nbytes * EXPERTS).split(EXPERTS)
        self.paths = sorted(folder.glob("*.bin"))
        self.content = {path: path.read_bytes() for path in self.paths}

    def slots(self) -> dict[str, mx.array]:
        slots = {n: mx.zeros((SLOTS, *shape), dtype) for n, (dtype, shape) in SHAPES.items()}
        mx.eval(slots)
        return slots

    def check(self, slots: dict[str, mx.array], experts: Sequence[int], at: Sequence[int]) -> None:
        """What MLX reads in those slots is what lies in the files."""
        assert len(set(at)) == len(experts) == len(at)
        for name, spans in self.spans.items():
            rows = np.array(mx.view(slots[name], mx.uint8)).reshape(SLOTS, -1)
            for expert, slot in zip(experts, at, strict=True):
                span = spans[expert]
                end = span.offset + span.nbytes
                assert rows[slot].tobytes() == self.content[span.path][span.offset : end]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    return Layer(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module", params=[*READERS, "fake"])
def reader(request: pytest.FixtureRequest, layer: Layer) -> Iterator[Reader]:
    made = FakeReader() if request.param == "fake" else READERS[request.param](layer.paths, 2)
    yield made
    made.close()


def residents(store: ExpertStore) -> set[int]:
    return set(store.resident())


@pytest.mark.parametrize("policy", POLICIES)
@settings(PATIENT, max_examples=40)
@given(calls=CALLS)
def test_slots_hold_their_experts_after_any_calls(
    layer: Layer, reader: Reader, policy: str, calls: list[list[int]]
) -> None:
    slots = layer.slots()
    store = ExpertStore(layer.spans, slots, POLICIES[policy](), reader)
    hits = misses = evictions = 0
    for experts in calls:
        before = residents(store)
        at = store.place(experts)
        layer.check(slots, experts, at)
        after = residents(store)
        assert set(experts) <= after <= before | set(experts)
        hits += len(before & set(experts))
        misses += len(set(experts) - before)
        evictions += len(before - after)
        assert len(after) == min(SLOTS, len(before | set(experts)))
        assert astuple(store.stats) == (hits, misses, evictions)


@settings(PATIENT)
@given(calls=CALLS)
def test_lru_store_against_a_naive_model(layer: Layer, calls: list[list[int]]) -> None:
    store = ExpertStore(layer.spans, layer.slots(), LRU(), FakeReader())
    order: list[int] = []  # residents, the one used longest ago first
    for experts in calls:
        hits, missing = [e for e in experts if e in order], [e for e in experts if e not in order]
        idle = [e for e in order if e not in experts]
        idle = idle[max(0, len(order) + len(missing) - SLOTS) :]
        order = [*idle, *hits, *missing]
        store.place(experts)
        assert residents(store) == set(order)


def test_only_what_is_missing_is_read(layer: Layer) -> None:
    reader = FakeReader()
    store = ExpertStore(layer.spans, layer.slots(), LRU(), reader)
    store.place([1, 2])
    store.place([2, 1])
    store.place([2, 3])
    assert reader.calls == [2 * len(SHAPES), len(SHAPES)]
    assert reader.bytes_read == 3 * sum(spans[0].nbytes for spans in layer.spans.values())


def test_an_expert_keeps_its_slot_while_it_is_resident(layer: Layer) -> None:
    store = ExpertStore(layer.spans, layer.slots(), LRU(), FakeReader())
    first = store.place([5])
    for other in (1, 2, 3, 4, 6):
        assert store.place([other, 5])[1:] == first


# When reads fail

STEP = st.tuples(
    st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=SLOTS, unique=True),
    st.none() | st.integers(0, SLOTS * len(SHAPES) - 1),
    st.sampled_from([ReadError, KeyboardInterrupt]),
)


@pytest.mark.parametrize("policy", POLICIES)
@settings(PATIENT, max_examples=50)
@given(steps=st.lists(STEP, min_size=1, max_size=10))
def test_a_failed_read_binds_nothing_and_breaks_nothing(
    layer: Layer, policy: str, steps: list[tuple[list[int], int | None, type[BaseException]]]
) -> None:
    slots, reader = layer.slots(), FakeReader()
    store = ExpertStore(layer.spans, slots, POLICIES[policy](), reader)
    for experts, reader.fail_at, reader.fault in steps:
        before = residents(store)
        missing = set(experts) - before
        if reader.fail_at is not None and reader.fail_at < len(missing) * len(SHAPES):
            with pytest.raises(reader.fault):
                store.place(experts)
            assert residents(store) <= before
            assert residents(store) >= before & set(experts)
        else:
            layer.check(slots, experts, store.place(experts))
        reader.fail_at = None
        kept = sorted(residents(store))
        layer.check(slots, kept, store.place(kept))
    everyone = [*range(EXPERTS)]
    for experts in (everyone[:SLOTS], everyone[-SLOTS:]):  # no slot was lost
        layer.check(slots, experts, store.place(experts))


@pytest.mark.parametrize("name", READERS)
def test_a_truncated_file(tmp_path: Path, name: str) -> None:
    layer = Layer(tmp_path)
    spans = layer.spans["codes"]
    with spans[0].path.open("r+b") as file:
        file.truncate(spans[7].offset + 1)  # of the last parameter in its file
    reader = READERS[name](layer.paths, 2)
    slots = layer.slots()
    store = ExpertStore(layer.spans, slots, LRU(), reader)
    store.place([0, 1, 2, 3])
    with pytest.raises(ReadError, match="2 bytes short") as caught:
        store.place([1, 6, 7])
    assert str(spans[0].path) in str(caught.value)
    assert residents(store) == {1, 3} and astuple(store.stats) == (1, 6, 2)
    layer.check(slots, [3, 1], store.place([3, 1]))
    layer.check(slots, [6, 5, 4, 3], store.place([6, 5, 4, 3]))
    reader.close()


# What callers must not do


@pytest.mark.parametrize("experts", [[0, 1, 2, 3, 4], [1, 1], [0, 1, 2, 3, 3]])
def test_more_experts_than_slots_or_one_twice(layer: Layer, experts: list[int]) -> None:
    slots = layer.slots()
    store = ExpertStore(layer.spans, slots, LRU(), FakeReader())
    store.place([8, 9])
    with pytest.raises(ValueError, match=rf"^{len(experts)} experts in one call, .* 4 slots"):
        store.place(experts)
    assert residents(store) == {8, 9} and astuple(store.stats) == (0, 2, 0)
    layer.check(slots, [9, 0, 1, 2], store.place([9, 0, 1, 2]))


def test_an_expert_that_does_not_exist(layer: Layer) -> None:
    slots = layer.slots()
    store = ExpertStore(layer.spans, slots, LRU(), FakeReader())
    for _ in range(SLOTS + 1):
        with pytest.raises(IndexError):
            store.place([EXPERTS])
    layer.check(slots, [0, 1, 2, 3], store.place([0, 1, 2, 3]))
