"""Whole decoder layers that pass through a few buffers in RAM, read ahead of compute.

Every token goes through every layer, so which bytes come next is known: there is nothing to look
up and nothing to evict, only the disk to keep busy.
"""

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ReadError
from .checkpoint import Span
from .reader import Reader
from .spread import RING

PAGE_BYTES = 4096
ALIGNMENT = 256  # what Metal asks of a buffer's offset, and more than any dtype does


@dataclass(frozen=True, eq=False)
class LayerTensor:
    """One large weight of a layer: the module that computes with it, and where it lies."""

    module: nn.Module
    name: str
    span: Span
    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass(slots=True)
class RingStats:
    """Calls of streamed layers, how many found their read begun, and seconds waited for bytes."""

    calls: int = 0
    begun_ahead: int = 0
    wait_s: float = 0.0


@dataclass(slots=True)
class _Buffer:
    """Memory for one layer, which layer is in it or on its way, and that read."""

    memory: mx.array
    layer: int | None = None
    read: "Future[None] | None" = None


class LayerRing:
    """Buffers that streamed layers take turns in, in the order in which the model calls them.

    Reads run in one thread, first come first served: what is read into a buffer last stays.
    A call out of order, or after a forward that was abandoned, is right and only waits longer.

    Args:
        layers (Sequence): Per streamed layer, in order, its weights. Each module holds
            weights of no size, which cannot be computed with, but during its layer's call.
        reader (Reader): Brings bytes from disk into a buffer.
        empty (Callable): Memory of so many bytes, uint8 and evaluated.
        in_pages (bool): Lay bytes in memory as they lie in the pages of their file, which
            lets a direct read put them in place. Needs memory that begins with a page.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[LayerTensor]],
        reader: Reader,
        empty: Callable[[int], mx.array],
        in_pages: bool = False,
    ):
        self.stats = RingStats()
        self._layers = layers
        self._reader = reader
        self._places = [_places(tensors, in_pages) for tensors in layers]
        nbytes = max(end for _, end in self._places)
        self._buffers = [_Buffer(empty(nbytes)) for _ in range(min(RING, len(layers)))]
        self._views = [[_views(b.memory, t, p) for t, (p, _) in self._zip()] for b in self._buffers]
        mx.eval(self._views)
        self._nothing = {t.dtype: mx.zeros((0,), t.dtype) for layer in layers for t in layer}
        mx.eval(self._nothing)
        for tensors in layers:
            self._unbind(tensors)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlx-flash-layers")
        self._calling = Lock()
        self._closed = False

    def begin(self) -> None:
        """Let the reads of the first layers begin, before anybody asks for them."""
        with self._calling:
            self._aim(0)

    @contextmanager
    def holding(self, layer: int) -> Iterator[None]:
        """The weights of a layer are in its modules, until the end of the block.

        What computes with them must have run by then.

        Raises:
            ReadError: If bytes do not arrive. The next call tries again.
        """
        with self._calling:
            self.stats.calls += 1
            self.stats.begun_ahead += any(b.layer == layer for b in self._buffers)
            self._aim(layer)
            number = next(i for i, b in enumerate(self._buffers) if b.layer == layer)
            self._wait_for(self._buffers[number])
            tensors = self._layers[layer]
            try:
                for tensor, view in zip(tensors, self._views[number][layer], strict=True):
                    tensor.module[tensor.name] = view
                yield
            except BaseException:
                mx.synchronize()  # half a layer may still be computing on these bytes
                raise
            finally:
                self._unbind(tensors)
            self._aim(layer + 1)

    def close(self) -> None:
        """End what is being read. The layers cannot be called any more."""
        with self._calling:
            self._closed = True
        self._thread.shutdown(cancel_futures=True)

    def _aim(self, first: int) -> None:
        """Have in the buffers, or on the way there, the layers from ``first`` on."""
        count = len(self._layers)
        wanted = [(first + i) % count for i in range(len(self._buffers))]
        for layer in wanted:
            if not any(b.layer == layer for b in self._buffers):
                self._read(layer, next(b for b in self._buffers if b.layer not in wanted))

    def _read(self, layer: int, buffer: _Buffer) -> None:
        if self._closed:
            path = self._layers[layer][0].span.path
            raise ReadError(errno.EBADF, "was closed with its model; load the model again", path)
        buffer.layer = None  # an interrupt from here on leaves a buffer of no layer
        if buffer.read is not None:
            buffer.read.cancel()
        memory = _host_bytes(buffer.memory)
        places, _ = self._places[layer]
        jobs = [
            (t.span, memory[at : at + t.span.nbytes])
            for t, at in zip(self._layers[layer], places, strict=True)
        ]
        buffer.read = self._thread.submit(self._reader.read_into, jobs)
        buffer.layer = layer

    def _wait_for(self, buffer: _Buffer) -> None:
        assert buffer.read is not None
        start = time.perf_counter()
        try:
            buffer.read.result()
        except Exception:
            buffer.layer = None
            raise
        finally:
            self.stats.wait_s += time.perf_counter() - start

    def _unbind(self, tensors: Sequence[LayerTensor]) -> None:
        for tensor in tensors:
            tensor.module[tensor.name] = self._nothing[tensor.dtype]

    def _zip(self) -> Iterator[tuple[Sequence[LayerTensor], tuple[list[int], int]]]:
        return zip(self._layers, self._places, strict=True)


class StreamedLayer(nn.Module):
    """What a streamed layer does beside what its mlx-lm class does.

    Mixed into a subclass of the layer's own class: the model reads its attributes as before.
    """

    ring: LayerRing
    turn: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin: Any = mx.async_eval  # its stubs have no types
        begin(list(_arrays((args, kwargs))))  # computes while bytes arrive
        with self.ring.holding(self.turn):
            out = super().__call__(*args, **kwargs)
            # All that depends on the weights: the next layer's are going to take their place.
            mx.eval(list(_arrays((out, args, kwargs))))
        return out


def as_streamed_layer(layer: nn.Module, ring: LayerRing, turn: int) -> None:
    """Let a decoder layer take its weights from a ring, keeping its class."""
    base = type(layer)
    layer.__class__ = type(base.__name__, (StreamedLayer, base), {"__module__": base.__module__})
    object.__setattr__(layer, "ring", ring)
    object.__setattr__(layer, "turn", turn)


def _places(tensors: Sequence[LayerTensor], in_pages: bool) -> tuple[list[int], int]:
    """Where in a buffer each tensor of a layer begins, and where the last one ends."""
    order = sorted(range(len(tensors)), key=lambda i: _at(tensors[i].span))
    places, end = [0] * len(tensors), 0
    for i in order:
        span = tensors[i].span
        border, phase = (PAGE_BYTES, span.offset % PAGE_BYTES) if in_pages else (ALIGNMENT, 0)
        places[i] = end + (phase - end) % border
        end = places[i] + span.nbytes
    return places, end


def _at(span: Span) -> tuple[str, int]:
    return str(span.path), span.offset


def _views(
    memory: mx.array, tensors: Sequence[LayerTensor], places: Sequence[int]
) -> list[mx.array]:
    return [
        memory[at : at + t.span.nbytes].view(t.dtype).reshape(t.shape)
        for t, at in zip(tensors, places, strict=True)
    ]


def _host_bytes(memory: Any) -> memoryview:  # an mx.array is a writable buffer
    return np.frombuffer(memory, np.uint8).data


def _arrays(value: Any) -> Iterator[mx.array]:
    """The arrays in arguments and results: nested, and those that a prompt cache keeps."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _arrays(item)
    elif isinstance(value, Mapping):
        yield from _arrays(list(value.values()))
    elif hasattr(type(value), "state"):  # not asked for: an empty cache has none
        yield from _arrays(list(vars(value).values()))
