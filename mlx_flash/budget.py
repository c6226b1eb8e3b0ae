"""How a model divides a RAM budget, and the smallest that it runs in. Reads no weight."""

from dataclasses import replace

from mlx.utils import tree_flatten

from .computing import extension
from .config import StreamConfig
from .errors import BudgetError
from .kernels import attention
from .machine import Machine, give_back_free_memory, rss_bytes
from .opening import LazyModel
from .streaming.plan import (
    FixedCosts,
    Plan,
    check_budget,
    fixed_slots,
    floor_bytes,
    share_slots,
)
from .streaming.spread import fixed_layers, least_bytes, ring_bytes, spread_layers

MIN_PREFILL_TOKENS = 32
SCRATCH_SHARE = 0.25  # of what experts and scratch have together
BUFFER_CACHE_BYTES = (32 << 20, 1 << 30)  # from MLX's own default on CPU to enough for a GPU
BUFFER_CACHE_SHARE = 1 / 64
OVERHEAD_BYTES = 32 << 20  # stacks of reader threads, fragments of the allocator


def make_plan(lazy: LazyModel, knobs: StreamConfig) -> Plan:
    """Divide the budget. Measures this process, reads nothing.

    Raises:
        BudgetError: If the budget is below the floor.
    """
    ram_bytes = Machine.probe().budget(knobs.ram)
    layers, whole = lazy.layers, not lazy.switches
    need = least_bytes(layers) if whole else floor_bytes(layers)
    if knobs.slots is not None:
        wanted = (fixed_layers if whole else fixed_slots)(knobs.slots, layers)
        need = sum(n * layers[path].nbytes_each for path, n in wanted.items())
        need += ring_bytes(layers, wanted) if whole else 0
    resident = sum(a.nbytes for _, a in tree_flatten(lazy.model.parameters()))
    resident -= sum(e.nbytes for e in layers.values())
    give_back_free_memory()
    bare = FixedCosts(
        process_bytes=rss_bytes(),
        resident_bytes=resident,
        state_bytes=lazy.step.state_bytes(knobs.context),
        scratch_bytes=buffer_cache_bytes(ram_bytes) + OVERHEAD_BYTES,
    )
    tokens, fixed = _prefill(lazy, knobs, bare, ram_bytes - bare.nbytes - need)
    check_budget(ram_bytes, fixed, need, _remedy(knobs), "layers" if whole else "experts")
    if knobs.slots is None:
        wanted = (spread_layers if whole else share_slots)(ram_bytes - fixed.nbytes, layers)
    ring = ring_bytes(layers, wanted) if whole else 0
    return Plan(ram_bytes, knobs.context, tokens, fixed, layers, wanted, whole, ring)


def floor(lazy: LazyModel, knobs: StreamConfig) -> int:
    """The smallest budget in bytes that ``make_plan`` takes, whatever ``knobs.ram`` says.

    Raises:
        BudgetError: If it cannot be known: other knobs mean nothing for this model.
    """
    step, ram_bytes = min(knobs.prefill_step_size, MIN_PREFILL_TOKENS), 0
    while True:  # a larger budget has a larger buffer cache, which is part of the floor
        try:
            make_plan(lazy, replace(knobs, ram=ram_bytes + 1, prefill_step_size=step))
        except BudgetError as error:
            if error.floor_bytes is not None:
                ram_bytes = max(error.floor_bytes, ram_bytes + 1)
                continue
            if not ram_bytes:
                raise
        return ram_bytes  # or more than this machine has


def _prefill(
    lazy: LazyModel, knobs: StreamConfig, bare: FixedCosts, left: int
) -> tuple[int, FixedCosts]:
    """The largest prompt chunk whose scratch leaves most of the budget to experts."""
    tokens = min(knobs.prefill_step_size, max(knobs.context, 1))
    fused = extension(lazy, knobs) is not None and attention.covers(lazy.model)
    while True:
        scratch = lazy.architecture.scratch_bytes(
            lazy.model, lazy.config, lazy.step, tokens, knobs.context, fused
        )
        if tokens <= MIN_PREFILL_TOKENS or scratch <= left * SCRATCH_SHARE:
            return tokens, replace(bare, scratch_bytes=bare.scratch_bytes + scratch)
        tokens = max(MIN_PREFILL_TOKENS, tokens // 2)


def buffer_cache_bytes(ram_bytes: int) -> int:
    """MLX's buffer cache's share of a budget."""
    least, most = BUFFER_CACHE_BYTES
    return min(max(int(ram_bytes * BUFFER_CACHE_SHARE), least), most)


def _remedy(knobs: StreamConfig) -> str:
    ways = ["raise --ram"]
    if knobs.slots is not None:
        ways.append("lower --slots")
    ways.append(f"lower --context (now {knobs.context})")
    return f"{', '.join(ways[:-1])} or {ways[-1]}.".capitalize()
