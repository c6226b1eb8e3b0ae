"""What of a model without routed experts can stream: the large weights of its decoder layers."""

from collections import Counter
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from .layout import Layout
from .streaming.layers import LayerTensor

LEAST_BYTES = 64 << 10  # what is smaller stays: a read of its own would cost more than it saves


def layer_tensors(model: nn.Module, layout: Layout) -> dict[str, list[LayerTensor]]:
    """By path of a decoder layer, in the order of the model, its weights that can stream.

    Args:
        model: An mlx-lm model whose weights are not read yet.
        layout: Where the bytes of its parameters lie.
    """
    layers = {id(layer): layer for layer in getattr(model, "layers", ()) if layer is not None}
    paths = {id(module): path for path, module in model.named_modules()}
    owners = Counter(id(m) for layer in layers.values() for m in _modules(layer))
    found = {}
    for layer in layers.values():
        own = {id(m) for m in _modules(layer) if owners[id(m)] == 1}  # or it would lack its bytes
        path = paths[id(layer)]
        tensors = [t for m, t in _tensors(layer, path, layout) if id(m) in own]
        if tensors:
            found[path] = tensors
    return found


def _modules(layer: nn.Module) -> Iterator[nn.Module]:
    yield from {id(m): m for _, m in layer.named_modules()}.values()


def _tensors(
    layer: nn.Module, path: str, layout: Layout
) -> Iterator[tuple[nn.Module, LayerTensor]]:
    for below, module in layer.named_modules():
        for name, array in module.items():
            # Vectors are norms and biases, to which a sanitize adds, and what a graph captures.
            if not isinstance(array, mx.array) or array.ndim < 2 or array.nbytes < LEAST_BYTES:
                continue
            span = layout.span(".".join(filter(None, (path, below, name))), array.nbytes)
            if span is not None and not span.is_strided:
                yield module, LayerTensor(module, name, span, tuple(array.shape), array.dtype)
