"""Composition root: mlx-lm's model, its routed experts left on disk."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import computing, plugins
from .budget import buffer_cache_bytes, make_plan
from .config import StreamConfig
from .errors import UntestedModelWarning
from .hub import resolve
from .kernels.dense_switch import needs_dense, use_dense
from .kernels.experts import NativeSwitch
from .kernels.metal import experts as metal
from .opening import LazyModel, open_lazily, open_tokenizer
from .streaming.layers import LayerRing, as_streamed_layer
from .streaming.model import StreamedModel, as_streamed
from .streaming.plan import (
    Plan,
)
from .streaming.reader import NativeReader
from .streaming.store import ExpertStore, NativeStore, Store
from .streaming.switch import StreamedSum, StreamedSwitch
from .weights import Progress, give_ring, give_slots, read_residents


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
        kernels: Who computes: ``native``, ``reference``, ``metal`` or ``auto``.
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


def stream(lazy: LazyModel, knobs: StreamConfig, progress: Progress | None = None) -> StreamedModel:
    """Plan, put slots where experts were, and read what stays.

    Raises:
        FlashError: If the budget is too small, or bytes cannot be read.
    """
    extension, on_metal = computing.extension(lazy, knobs), computing.on_metal(knobs)
    # The compiled pool calls no Python: with a policy or reader from outside, Python fetches.
    pools = None if knobs.from_outside else extension or computing.pools(lazy, knobs)
    decided = make_plan(lazy, knobs)
    mx.set_cache_limit(buffer_cache_bytes(decided.ram_bytes))
    paths = sorted({info.span.path for info in lazy.checkpoint.values()})
    if extension is not None:
        extension.set_threads(knobs.threads or os.cpu_count() or 1)
    if pools is not None:
        reader = pools.Files([str(p) for p in paths], knobs.read_threads, knobs.reads_directly)
    else:
        name = "pread" if knobs.reader == "auto" else knobs.reader
        reader = plugins.open_reader(name, paths, knobs.read_threads)
    try:
        stores = give_slots(lazy, decided, knobs, reader, paths, extension, pools)
        if on_metal:  # its doors ask for shapes, which a ring takes away
            _swap(lazy, stores, None, on_metal)
        layers = NativeReader(reader, paths) if pools is not None else reader
        ring = give_ring(lazy, decided, layers, extension)
        read_residents(lazy, decided, knobs, paths, extension, progress)
        if not on_metal:
            _swap(lazy, stores, extension, on_metal)
        if ring is not None:
            _take_turns(lazy, decided, ring)
    except BaseException:
        reader.close()
        raise
    return as_streamed(lazy.model, decided, reader, tuple(stores.values()), ring)


def _swap(
    lazy: LazyModel, stores: Mapping[str, Store], extension: ModuleType | None, on_metal: bool
) -> None:
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
        elif on_metal and metal.supports(switch):
            switch = metal.MetalSwitch(switch)
        elif needs_dense(switch):
            use_dense(switch)
        if isinstance(store, (ExpertStore, NativeStore)):
            streamed = StreamedSum if hasattr(switch, "weighted") else StreamedSwitch
            swapped.append((path, streamed(switch, store)))
        elif switch is not lazy.switches[path]:
            swapped.append((path, switch))
    lazy.model.update_modules(tree_unflatten(swapped))
    if extension is not None:
        lazy.architecture.use_kernels(lazy.model, extension)
    if on_metal:
        lazy.architecture.use_metal(lazy.model)


def _take_turns(lazy: LazyModel, decided: Plan, ring: LayerRing) -> None:
    """Let the layers that do not stay take their weights from the ring, and begin to read."""
    modules = dict(lazy.model.named_modules())
    streamed = [path for path in lazy.tensors if decided.streams(path)]
    for turn, path in enumerate(streamed):
        as_streamed_layer(modules[path], ring, turn)
    ring.begin()
