"""Which whole layers of a model without experts stay in RAM. Arithmetic only: no I/O, no MLX.

The others stream through a ring of buffers, each as large as the largest of them. Those that stay
are spread among those that stream: the disk fills a buffer while a layer in RAM computes, and
with all of these in one block it would wait, its buffers full, while they compute.
"""

from collections.abc import Mapping

from ..errors import BudgetError
from .plan import LayerExperts

RING = 2  # buffers: one is computed on while the other fills
SHARES = 1024  # steps in which a share of the weights is looked for


def whole_layer(nbytes: int) -> LayerExperts:
    """A layer that streams as one piece: an expert that every token is routed to."""
    return LayerExperts(count=1, top_k=1, nbytes_each=nbytes)


def ring_bytes(layers: Mapping[str, LayerExperts], slots: Mapping[str, int]) -> int:
    """The buffers that the layers without a slot pass through."""
    streamed = [e.nbytes for path, e in layers.items() if slots[path] < e.count]
    return RING * max(streamed, default=0)


def least_bytes(layers: Mapping[str, LayerExperts]) -> int:
    """What the fewest layers in RAM need: none, and the ring, or all, if that is less."""
    return min(ring_bytes(layers, dict.fromkeys(layers, 0)), sum(e.nbytes for e in layers.values()))


def spread_layers(left: int, layers: Mapping[str, LayerExperts]) -> dict[str, int]:
    """Slots by layer, 0 or 1, that with their ring fit ``left`` bytes, evenly spread.

    The caller has checked that ``left`` covers ``least_bytes``.
    """
    candidates = (_evenly(layers, share / SHARES) for share in range(SHARES, -1, -1))
    slots = next(s for s in candidates if _needs(layers, s) <= left or not any(s.values()))
    # What rounding to whole layers left over: to those furthest from one that stays.
    for path in sorted(layers, key=lambda path: -_distance(path, list(layers), slots)):
        more = slots | {path: 1}
        if _needs(layers, more) <= left:
            slots = more
    return slots


def fixed_layers(count: int, layers: Mapping[str, LayerExperts]) -> dict[str, int]:
    """So many whole layers in RAM, evenly spread. All, where buffers could hold the others.

    Raises:
        BudgetError: If that is no number of layers.
    """
    if count < 0:
        raise BudgetError(
            f"--slots {count}: this model has no experts, so that is how many of its "
            f"{len(layers)} layers stay in RAM. Ask for 0 or more."
        )
    if len(layers) - count <= RING:
        return dict.fromkeys(layers, 1)
    places = {(2 * i + 1) * len(layers) // (2 * count) for i in range(count)}
    return {path: int(i in places) for i, path in enumerate(layers)}


def _needs(layers: Mapping[str, LayerExperts], slots: Mapping[str, int]) -> int:
    return sum(slots[path] * e.nbytes for path, e in layers.items()) + ring_bytes(layers, slots)


def _evenly(layers: Mapping[str, LayerExperts], share: float) -> dict[str, int]:
    """Of any stretch of layers this share of bytes, give or take half a layer."""
    slots, owed = {}, 0.0
    for path, experts in layers.items():
        owed += share * experts.nbytes
        slots[path] = int(owed >= experts.nbytes / 2 and share > 0)
        owed -= slots[path] * experts.nbytes
    return slots


def _distance(path: str, order: list[str], slots: Mapping[str, int]) -> int:
    """Layers to the nearest that stays; one token follows another, so the last meets the first."""
    here, n = order.index(path), len(order)
    away = [abs(here - i) for i, other in enumerate(order) if slots[other]]
    return min((min(d, n - d) for d in away), default=n)
