"""What of a model without routed experts can stream: the large weights of its decoder layers."""

import io
from collections import Counter
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn

from .streaming.checkpoint import Checkpoint, Span
from .streaming.layers import LayerTensor

LEAST_BYTES = 64 << 10  # what is smaller stays: a read of its own would cost more than it saves

SpanOf = Callable[[str, mx.array], Span | None]
"""Where a parameter's bytes lie as the model computes with them; None if they do so nowhere."""


def layer_tensors(model: nn.Module, span_of: SpanOf) -> dict[str, list[LayerTensor]]:
    """By path of a decoder layer, in the order of the model, its weights that can stream.

    Args:
        model: An mlx-lm model whose weights are not read yet.
        span_of: Where the bytes of a parameter lie.
    """
    layers = {id(layer): layer for layer in getattr(model, "layers", ()) if layer is not None}
    paths = {id(module): path for path, module in model.named_modules()}
    owners = Counter(id(m) for layer in layers.values() for m in _modules(layer))
    found = {}
    for layer in layers.values():
        own = {id(m) for m in _modules(layer) if owners[id(m)] == 1}  # or it would lack its bytes
        path = paths[id(layer)]
        tensors = [t for m, t in _tensors(layer, path, span_of) if id(m) in own]
        if tensors:
            found[path] = tensors
    return found


def span_in(checkpoint: Checkpoint) -> SpanOf:
    """Spans of the parameters that are in a checkpoint by the same name, as they are."""

    def span_of(name: str, array: mx.array) -> Span | None:
        if name not in checkpoint or not _is_as_loaded(array):
            return None
        info = checkpoint[name]
        same = info.shape == tuple(array.shape) and info.span.nbytes == array.nbytes
        return info.span if same else None

    return span_of


def _modules(layer: nn.Module) -> Iterator[nn.Module]:
    yield from {id(m): m for _, m in layer.named_modules()}.values()


def _tensors(
    layer: nn.Module, path: str, span_of: SpanOf
) -> Iterator[tuple[nn.Module, LayerTensor]]:
    for below, module in layer.named_modules():
        for name, array in module.items():
            # Vectors are norms and biases, to which a sanitize adds, and what a graph captures.
            if not isinstance(array, mx.array) or array.ndim < 2 or array.nbytes < LEAST_BYTES:
                continue
            span = span_of(".".join(filter(None, (path, below, name))), array)
            if span is not None:
                yield module, LayerTensor(module, name, span, tuple(array.shape), array.dtype)


def _is_as_loaded(array: mx.array) -> bool:
    """Whether nothing was done to an array since ``mx.load``: its graph is that one node."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return graph.getvalue().count("label =") == 1 and '"Load"' in graph.getvalue()
