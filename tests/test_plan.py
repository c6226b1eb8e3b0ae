"""Who gets the budget: arithmetic on numbers small enough to check by hand."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from patience import PATIENT

from mlx_flash.errors import BudgetError
from mlx_flash.streaming.plan import (
    FixedCosts,
    LayerExperts,
    Plan,
    check_budget,
    fixed_slots,
    floor_bytes,
    share_slots,
    size,
)
from mlx_flash.streaming.spread import (
    RING,
    fixed_layers,
    least_bytes,
    ring_bytes,
    spread_layers,
    whole_layer,
)

FIXED = FixedCosts(
    process_bytes=200_000_000,
    resident_bytes=1_500_000_000,
    state_bytes=30_000_000,
    scratch_bytes=70_000,
)
LAYER = st.builds(
    lambda count, top_k, nbytes: LayerExperts(count, min(top_k, count), nbytes),
    st.integers(1, 64),
    st.integers(1, 8),
    st.integers(1, 1000) | st.sampled_from([1 << 20, 3 << 20]),
)
LAYERS = st.lists(LAYER, min_size=1, max_size=6).map(
    lambda ls: {f"l{i}": e for i, e in enumerate(ls)}
)


def test_floor() -> None:
    layers = {"a": LayerExperts(16, 4, 100), "b": LayerExperts(2, 4, 1000)}
    assert layers["a"].nbytes == 1600
    assert floor_bytes(layers) == 4 * 100 + 2 * 1000  # a layer has no more than all of its own
    assert floor_bytes({}) == 0


def test_even_shares() -> None:
    layers = {path: LayerExperts(64, 8, 10) for path in "abcd"}
    assert share_slots(4 * 20 * 10, layers) == dict.fromkeys("abcd", 20)
    assert share_slots(floor_bytes(layers), layers) == dict.fromkeys("abcd", 8)
    assert share_slots(10**9, layers) == dict.fromkeys("abcd", 64)
    assert share_slots(0, {}) == {}


def test_what_a_small_layer_leaves_goes_evenly_to_large_ones() -> None:
    large, small = LayerExperts(10, 1, 100), LayerExperts(10, 1, 1)
    layers = {"a": large, "b": large, "small": small}
    assert share_slots(1010, layers) == {"a": 5, "b": 5, "small": 10}


@settings(PATIENT, max_examples=300)
@given(layers=LAYERS, beyond=st.integers(0, 200_000) | st.floats(0, 1.2))
@example(layers={"a": LayerExperts(100, 1, 1), "b": LayerExperts(2, 1, 60)}, beyond=130)
@example(layers={"a": LayerExperts(100, 1, 1), "b": LayerExperts(2, 1, 60)}, beyond=159)
def test_shares_use_the_budget_and_no_more(
    layers: dict[str, LayerExperts], beyond: int | float
) -> None:
    floor, total = floor_bytes(layers), sum(e.nbytes for e in layers.values())
    left = floor + (beyond if isinstance(beyond, int) else int(beyond * (total - floor)))
    slots = share_slots(left, layers)
    assert slots.keys() == layers.keys()
    for path, e in layers.items():
        assert e.top_k <= slots[path] <= e.count
    spare = left - sum(n * layers[path].nbytes_each for path, n in slots.items())
    assert spare >= 0
    assert all(spare < e.nbytes_each for path, e in layers.items() if slots[path] < e.count)
    if left >= total:
        assert slots == {path: e.count for path, e in layers.items()}


def test_fixed_slots() -> None:
    layers = {"a": LayerExperts(16, 4, 100), "b": LayerExperts(6, 2, 1000)}
    assert fixed_slots(4, layers) == {"a": 4, "b": 4}
    assert fixed_slots(99, layers) == {"a": 16, "b": 6}
    for slots in (3, 0, -1):
        with pytest.raises(BudgetError, match=f"--slots {slots} is less than the 4 .*Ask for 4 or"):
            fixed_slots(slots, layers)


WHOLE = st.lists(st.integers(1, 1000), min_size=1, max_size=40).map(
    lambda sizes: {f"l{i}": whole_layer(n) for i, n in enumerate(sizes)}
)


def whole_layers(*sizes: int) -> dict[str, LayerExperts]:
    return {f"l{i}": whole_layer(n) for i, n in enumerate(sizes)}


def test_whole_layers_are_spread() -> None:
    layers = whole_layers(*[10] * 12)
    assert least_bytes(layers) == RING * 10 == 20
    for left, expected in ((20, 0), (29, 0), (50, 3), (60, 4), (80, 6), (119, 9), (120, 12)):
        slots = spread_layers(left, layers)
        assert sum(slots.values()) == expected, left
        gaps = "".join(map(str, slots.values()))
        if 0 < expected < 12:
            most = -(-(12 - expected) // expected)
            assert "0" * (most + 1) not in gaps, f"{left}: {gaps}"
            assert "11" not in gaps or expected > 6, f"{left}: {gaps}"
    assert spread_layers(0, {}) == {}
    assert least_bytes(whole_layers(5)) == 5


@settings(PATIENT, max_examples=200)
@given(layers=WHOLE, beyond=st.floats(0, 1.2))
def test_whole_layers_use_the_budget_and_no_more(
    layers: dict[str, LayerExperts], beyond: float
) -> None:
    total, least = sum(e.nbytes for e in layers.values()), least_bytes(layers)
    left = int(least + beyond * (total - least))
    slots = spread_layers(left, layers)
    kept = sum(layers[path].nbytes for path, n in slots.items() if n)
    assert kept + ring_bytes(layers, slots) <= left
    if left >= total:
        assert all(slots.values())
    spare = left - kept - ring_bytes(layers, slots)
    streamed = [e.nbytes for path, e in layers.items() if not slots[path]]
    assert len(streamed) != 1, "a buffer is as large as the layer"
    assert not streamed or spare < max(streamed)


def test_fixed_layers() -> None:
    layers = whole_layers(*[10] * 8)
    assert sum(fixed_layers(0, layers).values()) == 0
    assert list(fixed_layers(4, layers).values()) == [0, 1, 0, 1, 0, 1, 0, 1]
    assert sum(fixed_layers(5, layers).values()) == 5
    for count in (6, 7, 8, 99):  # two buffers hold what two layers need
        assert sum(fixed_layers(count, layers).values()) == 8
    with pytest.raises(BudgetError, match="no experts"):
        fixed_layers(-1, layers)


def test_check_budget() -> None:
    floor = FIXED.nbytes + 400_000_000
    check_budget(floor, FIXED, 400_000_000, "Do this.")
    with pytest.raises(BudgetError) as caught:
        check_budget(floor - 500_000_000, FIXED, 400_000_000, "Do this.")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in (
        "budget of 1.63 GB",
        "500.00 MB short of the floor, 2.13 GB",
        "200.00 MB process",
        "1.50 GB resident weights",
        "30.00 MB context state",
        "70.00 KB scratch",
        "400.00 MB experts",
    ):
        assert part in message
    assert message.endswith("Do this.")
    with pytest.raises(BudgetError, match="1 B short"):
        check_budget(floor - 1, FIXED, 400_000_000, "")


def test_plan_adds_up() -> None:
    layers = {"a": LayerExperts(16, 4, 100), "b": LayerExperts(8, 2, 1000)}
    plan = Plan(10**10, 4096, 512, FIXED, layers, {"a": 4, "b": 8})
    assert plan.slot_bytes == 8400 and plan.expert_bytes == 9600
    assert plan.total_bytes == FIXED.nbytes + 8400 == 1_730_078_400
    assert plan.residency == 0.875
    assert plan.streams("a") and not plan.streams("b")
    assert plan.streamed_bytes is None, "it depends on the text"
    assert Plan(1, 1, 1, FIXED, {}, {}).residency == 1.0
    whole = whole_layers(100, 100, 100, 100)
    slots = {"l0": 0, "l1": 1, "l2": 0, "l3": 0}
    plan = Plan(10**10, 4096, 512, FIXED, whole, slots, whole_layers=True, ring_bytes=200)
    assert plan.total_bytes == FIXED.nbytes + 300
    assert plan.streamed_bytes == 300


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (2.5e6, "2.50 MB"), (-3e9, "-3.00 GB")],
)
def test_size(nbytes: float, text: str) -> None:
    assert size(nbytes) == text
