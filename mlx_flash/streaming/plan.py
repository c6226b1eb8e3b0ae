"""How many expert slots fit the RAM budget. Arithmetic only: no I/O, no MLX."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..errors import BudgetError


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """The routed experts of one layer."""

    count: int
    top_k: int
    nbytes_each: int

    @property
    def nbytes(self) -> int:
        return self.count * self.nbytes_each


@dataclass(frozen=True, slots=True)
class FixedCosts:
    """What a process needs beside expert slots, in bytes.

    Args:
        process_bytes: Resident set before weights: interpreter, libraries, tokenizer.
        resident_bytes: Every weight that is not a routed expert.
        state_bytes: KV cache and recurrent state for the context asked for.
        scratch_bytes: Temporaries of the largest step, and MLX's buffer cache.
    """

    process_bytes: int
    resident_bytes: int
    state_bytes: int
    scratch_bytes: int

    @property
    def nbytes(self) -> int:
        return self.process_bytes + self.resident_bytes + self.state_bytes + self.scratch_bytes


@dataclass(frozen=True)
class Plan:
    """Who gets the budget. Made from headers alone, before a byte of weights is read.

    Args:
        ram_bytes: The budget for the whole process at its peak.
        context: Tokens of context that ``fixed.state_bytes`` leaves room for.
        prefill_tokens: Prompt tokens computed at a time.
        fixed: What is needed beside the slots.
        layers: The routed experts, by path of their layer in the model.
        slots: Experts in RAM, by the same path. All of a layer: it stays stock.
        whole_layers: A model without experts: ``layers`` are its decoder layers, each one
            expert that every token is routed to, and ``slots`` says which stay in RAM.
        ring_bytes: The buffers that the other layers of such a model pass through.
    """

    ram_bytes: int
    context: int
    prefill_tokens: int
    fixed: FixedCosts
    layers: Mapping[str, LayerExperts]
    slots: Mapping[str, int]
    whole_layers: bool = False
    ring_bytes: int = 0

    @cached_property
    def expert_bytes(self) -> int:
        return sum(e.nbytes for e in self.layers.values())

    @cached_property
    def slot_bytes(self) -> int:
        return sum(n * self.layers[path].nbytes_each for path, n in self.slots.items())

    @property
    def total_bytes(self) -> int:
        """Predicted peak of the process."""
        return self.fixed.nbytes + self.slot_bytes + self.ring_bytes

    @property
    def streamed_bytes(self) -> int | None:
        """What every token reads from disk. None with experts: it depends on the text."""
        return self.expert_bytes - self.slot_bytes if self.whole_layers else None

    @property
    def residency(self) -> float:
        """Share of the routed experts' bytes that stays in RAM."""
        return self.slot_bytes / self.expert_bytes if self.expert_bytes else 1.0

    def streams(self, path: str) -> bool:
        return self.slots[path] < self.layers[path].count


def share_slots(left: int, layers: Mapping[str, LayerExperts]) -> dict[str, int]:
    """Slots by layer for ``left`` bytes: every layer its top_k, then even shares.

    The caller has checked that ``left`` covers one token's experts (``floor_bytes``).
    """
    slots = {path: min(e.top_k, e.count) for path, e in layers.items()}
    left -= floor_bytes(layers)
    # Smallest layers first: what a whole layer leaves over goes to the others. Then all
    # once more, for what rounding to whole experts left over.
    by_size = sorted(layers, key=lambda path: layers[path].nbytes)
    sharers = [*range(len(by_size), 0, -1), *[1] * len(by_size)]
    for path, among in zip(by_size * 2, sharers, strict=True):
        experts = layers[path]
        share = left // among // experts.nbytes_each
        extra = min(share, experts.count - slots[path])
        slots[path] += extra
        left -= extra * experts.nbytes_each
    return slots


def fixed_slots(slots: int, layers: Mapping[str, LayerExperts]) -> dict[str, int]:
    """The same number of slots in every layer.

    Raises:
        BudgetError: If one token is routed to more experts than that.
    """
    top_k = max((e.top_k for e in layers.values()), default=0)
    if slots < top_k:
        raise BudgetError(
            f"--slots {slots} is less than the {top_k} experts that one token is routed to. "
            f"Ask for {top_k} or more."
        )
    return {path: min(slots, e.count) for path, e in layers.items()}


def floor_bytes(layers: Mapping[str, LayerExperts]) -> int:
    """The routed experts of one token, in every layer."""
    return sum(min(e.top_k, e.count) * e.nbytes_each for e in layers.values())


def check_budget(
    ram_bytes: int, fixed: FixedCosts, slot_bytes: int, remedy: str, unit: str = "experts"
) -> None:
    """Refuse a budget below what ``fixed`` and ``slot_bytes`` add up to.

    Raises:
        BudgetError: Says the floor, the shortfall, what makes it up, and ``remedy``.
    """
    floor = fixed.nbytes + slot_bytes
    if ram_bytes >= floor:
        return
    error = BudgetError(
        f"a RAM budget of {size(ram_bytes)} is {size(floor - ram_bytes)} short of the floor, "
        f"{size(floor)}: {size(fixed.process_bytes)} process, {size(fixed.resident_bytes)} "
        f"resident weights, {size(fixed.state_bytes)} context state, "
        f"{size(fixed.scratch_bytes)} scratch, {size(slot_bytes)} {unit}. {remedy}"
    )
    error.floor_bytes = floor
    raise error


def size(nbytes: float) -> str:
    """Bytes for people, in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes:.0f} B"
