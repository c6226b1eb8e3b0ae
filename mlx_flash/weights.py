"""Where a model's weights lie in RAM: slots for experts that stream, huge pages for what stays."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from . import plugins
from .config import StreamConfig
from .errors import CheckpointError, UnsupportedModelError, brief
from .machine import rss_bytes
from .opening import LazyModel
from .streaming.checkpoint import Span
from .streaming.layers import LayerRing, LayerTensor
from .streaming.plan import Plan, size
from .streaming.reader import NativeReader, Reader
from .streaming.store import ExpertStore, NativeStore, Store

Progress = Callable[[int, int], None]
"""Called with bytes of resident weights loaded so far, and in all."""

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20
MOST_LAYER_BYTES = 2_000_000_000  # MLX counts the elements of an axis in 31 bits
SPARE_BYTES = 32 << 20  # of the budget, while an array is moved


def give_slots(
    lazy: LazyModel,
    decided: Plan,
    knobs: StreamConfig,
    reader: Any,
    paths: list[Path],
    extension: ModuleType | None,
    pools: ModuleType | None,
) -> dict[str, Store]:
    """Put slots where the experts were of every layer that does not fit whole."""
    stores: dict[str, Store] = {}
    new_policy = plugins.policy(knobs.policy)
    for path, switch in lazy.switches.items():
        if not decided.streams(path):
            continue  # it all fits: no lookup
        spans = lazy.expert_spans(path)
        slots = _shrink(lazy, switch, decided.slots[path], extension, spans)
        if pools is None:
            stores[path] = ExpertStore(spans, slots, new_policy(), reader)
            continue
        places = _places(spans, paths)
        stores[path] = NativeStore(pools.ExpertPool(reader, places, slots, knobs.policy))
    return stores


def give_ring(
    lazy: LazyModel, decided: Plan, reader: Reader, extension: ModuleType | None
) -> LayerRing | None:
    """Put a ring where the weights were of every whole layer that does not fit."""
    layers = [found for path, found in lazy.tensors.items() if decided.streams(path)]
    if not layers:
        return None
    largest = max(sum(t.span.nbytes for t in found) for found in layers)
    if largest > MOST_LAYER_BYTES:
        raise UnsupportedModelError(
            f"{lazy.checkpoint.folder}: a layer of {size(largest)} is more than the "
            f"{size(MOST_LAYER_BYTES)} that can stream in one piece. Quantize the model with "
            "mlx_lm.convert, or raise --ram until all of it fits."
        )

    def empty(nbytes: int) -> mx.array:
        memory: mx.array
        if extension is None:
            memory = mx.zeros((nbytes,), mx.uint8)
            mx.eval(memory)
        else:
            memory = extension.empty_slots((nbytes,), mx.uint8, HUGE_PAGE_BYTES)
        return memory

    return LayerRing(layers, reader, empty, in_pages=extension is not None)


def _places(
    spans: Mapping[str, Sequence[Span]], paths: Sequence[Path]
) -> dict[str, list[tuple[int, int, int, int, int]]]:
    """Spans as the extension takes them: number of the file, offset, bytes, piece, stride."""
    numbers = {path: number for number, path in enumerate(paths)}
    return {
        name: [(numbers[s.path], s.offset, s.nbytes, s.piece, s.stride) for s in found]
        for name, found in spans.items()
    }


def _shrink(
    lazy: LazyModel,
    switch: nn.Module,
    num_slots: int,
    extension: ModuleType | None,
    spans: Mapping[str, Sequence[Span]],
) -> dict[str, mx.array]:
    """Replace [experts, ...] weights by [num_slots, ...] of no value yet, in place."""
    slots = {}
    for name, w in lazy.architecture.parameters(switch).items():
        shape = (num_slots, *w.shape[1:])
        if extension is None:
            slots[name] = mx.zeros(shape, w.dtype)
        else:
            phase = spans[name][0].offset % PAGE_BYTES
            slots[name] = extension.empty_slots(shape, w.dtype, PAGE_BYTES, phase)
    mx.eval(slots)
    switch.update(tree_unflatten(list(slots.items())))
    return slots


def read_residents(
    lazy: LazyModel,
    decided: Plan,
    knobs: StreamConfig,
    paths: list[Path],
    extension: ModuleType | None,
    progress: Progress | None,
) -> None:
    """Read what stays in RAM, arrays that are no parameters included.

    The extension reads experts itself: faster than MLX, and into larger pages.
    """
    switches = tuple(f"{path}." for path in lazy.switches) if extension is not None else ()
    modules = [m for name, m in lazy.model.named_modules() if not name.startswith(switches)]
    whole = [p for p in lazy.switches if extension is not None and not decided.streams(p)]
    layers = [found for p, found in lazy.tensors.items() if not decided.streams(p)]
    total = sum(a.nbytes for m in modules for a in _own_arrays(m))
    total += sum(lazy.layers[path].nbytes for path in whole)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    if extension is not None and (whole or layers):
        files = extension.Files([str(p) for p in paths], knobs.read_threads, knobs.reads_directly)
        with closing(files):
            for path in whole:
                _read_experts(lazy, path, files, paths, extension)
                advance(lazy.layers[path].nbytes)
            for found in layers:
                _read_layer(found, NativeReader(files, paths), extension)
                advance(sum(t.span.nbytes for t in found))
    placed = {id(t.module[t.name]) for found in layers for t in found} if extension else set()
    for module in modules:
        for array in _own_arrays(module):
            try:
                mx.eval(array)
            except RuntimeError as error:  # MLX reads these, and names no file
                raise CheckpointError(
                    f"{lazy.checkpoint.folder}: the resident weights cannot be read "
                    f"({brief(error)}). Check the disk, or download the model again."
                ) from error
            if id(array) not in placed:
                advance(array.nbytes)
        if extension is not None:
            _use_huge_pages(module, extension, decided.ram_bytes, placed)


def _read_experts(
    lazy: LazyModel, path: str, files: Any, paths: list[Path], extension: ModuleType
) -> None:
    """Read all experts of a layer, each into the slot of its number."""
    switch, everyone = lazy.switches[path], list(range(lazy.layers[path].count))
    spans = lazy.expert_spans(path)
    slots = _shrink(lazy, switch, len(everyone), extension, spans)
    if extension.ExpertPool(files, _places(spans, paths), slots, "lru").place(everyone) != everyone:
        raise AssertionError("a new pool gives its slots in order")


def _read_layer(tensors: Sequence[LayerTensor], reader: Reader, extension: ModuleType) -> None:
    """Read a layer that stays, straight into the pages where it will be computed on."""
    jobs = []
    for tensor in tensors:
        phase = tensor.span.offset % PAGE_BYTES
        array: Any = extension.empty_slots(tensor.shape, tensor.dtype, PAGE_BYTES, phase)
        tensor.module[tensor.name] = array
        jobs.append((tensor.span, _host_bytes(array).data))
    reader.read_into(jobs)


def _use_huge_pages(
    module: nn.Module, extension: ModuleType, ram_bytes: int, placed: Collection[int]
) -> None:
    """Move a module's large arrays to where kernels read them faster, if there is room for both."""
    for name, value in module.items():
        if not isinstance(value, mx.array) or value.nbytes < HUGE_PAGE_BYTES:
            continue
        if id(value) in placed:
            continue  # it is there
        if rss_bytes() + value.nbytes + SPARE_BYTES <= ram_bytes:
            moved: Any = extension.empty_slots(value.shape, value.dtype)
            np.copyto(_host_bytes(moved), _host_bytes(value))
            module[name] = moved


def _host_bytes(array: Any) -> NDArray[np.uint8]:  # an mx.array is a writable buffer
    return np.frombuffer(array, np.uint8)


def _own_arrays(module: nn.Module) -> Iterator[mx.array]:
    for value in module.values():
        if not isinstance(value, nn.Module):
            for _, leaf in tree_flatten(value, is_leaf=nn.Module.is_module):
                if isinstance(leaf, mx.array):
                    yield leaf
