"""Composition root: mlx-lm's model, its routed experts left on disk."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import plugins
from .config import StreamConfig
from .errors import BudgetError, UntestedModelWarning, UsageError
from .hub import resolve
from .kernels import attention, native, why_not
from .kernels.dense_switch import needs_dense, use_dense
from .kernels.experts import NativeSwitch, supports
from .machine import Machine, rss_bytes
from .opening import LazyModel, open_lazily, open_tokenizer
from .streaming.layers import LayerRing, as_streamed_layer
from .streaming.model import StreamedModel, as_streamed
from .streaming.plan import (
    FixedCosts,
    Plan,
    check_budget,
    fixed_slots,
    floor_bytes,
    share_slots,
)
from .streaming.reader import NativeReader
from .streaming.spread import fixed_layers, least_bytes, ring_bytes, spread_layers
from .streaming.store import ExpertStore, NativeStore, Store
from .streaming.switch import StreamedSwitch
from .weights import Progress, give_ring, give_slots, read_residents

MIN_PREFILL_TOKENS = 32
SCRATCH_SHARE = 0.25  # of what experts and scratch have together
BUFFER_CACHE_BYTES = (32 << 20, 1 << 30)  # from MLX's own default on CPU to enough for a GPU
BUFFER_CACHE_SHARE = 1 / 64
OVERHEAD_BYTES = 32 << 20  # stacks of reader threads, fragments of the allocator


def load(
    path_or_repo: str | Path,
    ram: str | int = "auto",
    slots: int | None = None,
    policy: str = "lru",
    reader: str = StreamConfig.reader,
    *,
    context: int = StreamConfig.context,
    prefill_step_size: int = StreamConfig.prefill_step_size,
    read_threads: int = StreamConfig.read_threads,
    kernels: str = StreamConfig.kernels,
    threads: int | None = StreamConfig.threads,
    revision: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model whose routed experts, or layers, stream from disk, within a RAM budget.

    What it returns goes where ``mlx_lm.load``'s result goes, with the same tokens out.
    Sets MLX's buffer cache limit, which is the whole process's, to its share of the budget.

    Args:
        path_or_repo: A model folder, or a Hub repository such as ``owner/name``.
        ram: Ceiling on the whole process at its peak: bytes, ``8GB``, ``60%``, ``auto``.
        slots: Experts in RAM per layer, instead of what the budget gives. Of a model without
            experts: whole layers in RAM.
        policy: Which expert gives up its slot: ``lru``, ``lfu`` or ``s3fifo``.
        reader: How bytes come from disk: ``pread``, ``direct`` or ``auto``.
        context: Tokens of context that the budget leaves room for.
        prefill_step_size: Most prompt tokens to compute at a time.
        read_threads: Reads in flight.
        kernels: Who computes: ``native``, ``reference`` or ``auto``.
        threads: Threads that compute, with native kernels. None: one per core.
        revision: Branch, tag or commit of a Hub repository.
        tokenizer_config: As in ``mlx_lm.load``.
        model_config: As in ``mlx_lm.load``.
        adapter_path: LoRA weights for layers that are not routed experts.
        trust_remote_code: Run Python that a checkpoint brings. Off, as it should be.
        progress: Called while resident weights load.

    Returns:
        The mlx-lm model, with ``plan``, ``stats()`` and ``close()`` added, and its tokenizer.

    Raises:
        FlashError: If the model is missing, damaged or unknown, or the budget too small.

    Warns:
        UntestedModelWarning: If no test here compares this model family with mlx-lm.
    """
    config = StreamConfig(
        ram=ram,
        slots=slots,
        context=context,
        prefill_step_size=prefill_step_size,
        policy=policy,
        reader=reader,
        read_threads=read_threads,
        kernels=kernels,
        threads=threads,
    )
    folder = resolve(path_or_repo, revision)
    lazy = open_lazily(folder, model_config, adapter_path, trust_remote_code)
    if lazy.untested:
        warnings.warn(lazy.untested, UntestedModelWarning, stacklevel=2)
    tokenizer = open_tokenizer(folder, tokenizer_config, trust_remote_code)
    return stream(lazy, config, progress), tokenizer


def plan(path_or_repo: str | Path, **knobs: Any) -> Plan:
    """What ``load`` would do with the same knobs, without reading a weight.

    Args:
        path_or_repo: A model folder, or a Hub repository.
        **knobs: Fields of ``StreamConfig``: ``ram="8GB"``, ``context=32768``, ...

    Raises:
        FlashError: As ``load`` would.
    """
    return make_plan(open_lazily(resolve(path_or_repo)), StreamConfig(**knobs))


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
    bare = FixedCosts(
        process_bytes=rss_bytes(),
        resident_bytes=resident,
        state_bytes=lazy.step.state_bytes(knobs.context),
        scratch_bytes=_buffer_cache_bytes(ram_bytes) + OVERHEAD_BYTES,
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


def stream(lazy: LazyModel, knobs: StreamConfig, progress: Progress | None = None) -> StreamedModel:
    """Plan, put slots where experts were, and read what stays.

    Raises:
        FlashError: If the budget is too small, or bytes cannot be read.
    """
    extension = _extension(lazy, knobs)
    # The compiled pool calls no Python: with a policy or reader from outside, Python fetches.
    pools = None if knobs.from_outside else extension or _pools(lazy, knobs)
    decided = make_plan(lazy, knobs)
    mx.set_cache_limit(_buffer_cache_bytes(decided.ram_bytes))
    paths = sorted({info.span.path for info in lazy.checkpoint.values()})
    if extension is not None:
        extension.set_threads(knobs.threads or os.cpu_count() or 1)
    if pools is not None:
        direct = knobs.reader != "pread"
        reader = pools.Files([str(p) for p in paths], knobs.read_threads, direct)
    else:
        name = "pread" if knobs.reader == "auto" else knobs.reader
        reader = plugins.open_reader(name, paths, knobs.read_threads)
    try:
        stores = give_slots(lazy, decided, knobs, reader, paths, extension, pools)
        layers = NativeReader(reader, paths) if pools is not None else reader
        ring = give_ring(lazy, decided, layers, extension)
        read_residents(lazy, decided, knobs, paths, extension, progress)
        _swap(lazy, stores, extension)
        if ring is not None:
            _take_turns(lazy, decided, ring)
    except BaseException:
        reader.close()
        raise
    return as_streamed(lazy.model, decided, reader, tuple(stores.values()), ring)


def slower_because(knobs: StreamConfig) -> str:
    """Why the compiled kernels will not compute though they should; empty if they may."""
    wanted = knobs.kernels == "auto" and mx.default_device() == mx.cpu
    return why_not() if wanted else ""


def who_computes(lazy: LazyModel, knobs: StreamConfig) -> tuple[str, str]:
    """The kernels that would run, and why they are not the compiled ones; empty if they are.

    Raises:
        UsageError: If they are asked for and cannot be had.
    """
    extension = _extension(lazy, knobs)
    if extension is not None:
        return f"native {extension.isa()}", ""
    if knobs.kernels in ("reference", "graph"):
        return knobs.kernels, f"--kernels {knobs.kernels}"
    if mx.default_device() != mx.cpu:
        return "reference", "the compiled ones are for CPUs, and MLX runs on a GPU here"
    return "reference", why_not() or "there are none for this model's experts"


def _extension(lazy: LazyModel, knobs: StreamConfig) -> ModuleType | None:
    """The compiled kernels, if they are to compute this model."""
    if knobs.kernels in ("reference", "graph"):
        return None
    if knobs.kernels == "native" and native() is None:
        raise UsageError(f"--kernels native: {why_not()}.")
    fits = mx.default_device() == mx.cpu and all(map(supports, lazy.switches.values()))
    if fits and native() is not None:
        return native()
    if knobs.kernels == "native":
        raise UsageError("--kernels native: none for this device or for this model's experts.")
    if knobs.reader == "direct":
        raise UsageError(f"--reader direct comes with the native kernels: {why_not()}.")
    return None


def _pools(lazy: LazyModel, knobs: StreamConfig) -> ModuleType | None:
    """The compiled extension, if it only fetches and MLX computes."""
    if knobs.kernels != "graph":
        return None
    if native() is None:
        raise UsageError(f"--kernels graph: {why_not()}.")
    if any(map(needs_dense, lazy.switches.values())):
        raise UsageError("--kernels graph: MLX cannot compute these experts on this device.")
    return native()


def _swap(lazy: LazyModel, stores: Mapping[str, Store], extension: ModuleType | None) -> None:
    """Replace switch layers by what computes on slots, and what else has a kernel."""
    swapped: list[tuple[str, nn.Module]] = []
    for path, switch in lazy.switches.items():
        store = stores.get(path)
        if extension is not None and not isinstance(store, ExpertStore):
            pool = store.pool if isinstance(store, NativeStore) else None
            swapped.append((path, NativeSwitch(switch, extension, pool)))
            continue
        if extension is not None:
            switch = NativeSwitch(switch, extension)
        elif needs_dense(switch):
            use_dense(switch)
        if isinstance(store, (ExpertStore, NativeStore)):
            swapped.append((path, StreamedSwitch(switch, store)))
    lazy.model.update_modules(tree_unflatten(swapped))
    if extension is not None:
        lazy.architecture.use_kernels(lazy.model, extension)


def _take_turns(lazy: LazyModel, decided: Plan, ring: LayerRing) -> None:
    """Let the layers that do not stay take their weights from the ring, and begin to read."""
    modules = dict(lazy.model.named_modules())
    streamed = [path for path in lazy.tensors if decided.streams(path)]
    for turn, path in enumerate(streamed):
        as_streamed_layer(modules[path], ring, turn)
    ring.begin()


def _prefill(
    lazy: LazyModel, knobs: StreamConfig, bare: FixedCosts, left: int
) -> tuple[int, FixedCosts]:
    """The largest prompt chunk whose scratch leaves most of the budget to experts."""
    tokens = min(knobs.prefill_step_size, max(knobs.context, 1))
    fused = _extension(lazy, knobs) is not None and attention.covers(lazy.model)
    while True:
        scratch = lazy.architecture.scratch_bytes(
            lazy.model, lazy.config, lazy.step, tokens, knobs.context, fused
        )
        if tokens <= MIN_PREFILL_TOKENS or scratch <= left * SCRATCH_SHARE:
            return tokens, replace(bare, scratch_bytes=bare.scratch_bytes + scratch)
        tokens = max(MIN_PREFILL_TOKENS, tokens // 2)


def _buffer_cache_bytes(ram_bytes: int) -> int:
    least, most = BUFFER_CACHE_BYTES
    return min(max(int(ram_bytes * BUFFER_CACHE_SHARE), least), most)


def _remedy(knobs: StreamConfig) -> str:
    ways = ["raise --ram"]
    if knobs.slots is not None:
        ways.append("lower --slots")
    ways.append(f"lower --context (now {knobs.context})")
    return f"{', '.join(ways[:-1])} or {ways[-1]}.".capitalize()
