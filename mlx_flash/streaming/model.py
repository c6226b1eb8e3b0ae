"""A model whose experts stream: mlx-lm's own, with a plan, counters and an end."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .layers import LayerRing
from .plan import Plan
from .reader import Reader
from .store import Store, StoreStats


class StreamedModel(nn.Module):
    """What a streamed model can do beside what its mlx-lm class can.

    Mixed into a subclass of the model's own class, so that mlx-lm sees its own.
    """

    plan: Plan
    reader: Reader
    stores: tuple[Store, ...]
    ring: LayerRing | None

    def __call__(self, inputs: mx.array, cache: Any = None, **kwargs: Any) -> mx.array:
        feed = getattr(cache, "feed", None)
        if feed is not None and not kwargs:
            feed(inputs)  # a cache that keeps account of its tokens
        # A long prompt in one call would need more scratch than was planned for.
        chunk = self.plan.prefill_tokens
        if cache is None or inputs.shape[1] <= chunk or kwargs:
            out: mx.array = super().__call__(inputs, cache=cache, **kwargs)
            return out
        outputs = []
        for start in range(0, inputs.shape[1], chunk):
            outputs.append(super().__call__(inputs[:, start : start + chunk], cache=cache))
            mx.eval([c.state for c in cache])
        return mx.concatenate(outputs, axis=1)

    def stats(self) -> StoreStats:
        """Hits, misses and evictions of all layers since the model was loaded."""
        every = [store.stats for store in self.stores]
        return StoreStats(
            hits=sum(s.hits for s in every),
            misses=sum(s.misses for s in every),
            evictions=sum(s.evictions for s in every),
        )

    def close(self) -> None:
        """Give back files and threads. The model cannot stream any more."""
        mx.clear_cache()  # waits for graphs that nobody has waited for, as generators leave them
        if self.ring is not None:
            self.ring.close()
        self.reader.close()


def as_streamed(
    model: nn.Module,
    decided: Plan,
    reader: Reader,
    stores: tuple[Store, ...],
    ring: LayerRing | None = None,
) -> StreamedModel:
    """Give a model of mlx-lm the abilities of ``StreamedModel``, keeping its class."""
    base = type(model)
    model.__class__ = type(base.__name__, (StreamedModel, base), {"__module__": base.__module__})
    assert isinstance(model, StreamedModel)
    # Plain attributes: an nn.Module would take a tuple for a part of its parameter tree.
    added = {"plan": decided, "reader": reader, "stores": stores, "ring": ring}
    for name, value in added.items():
        object.__setattr__(model, name, value)
    return model
