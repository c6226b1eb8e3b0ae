"""One decoded token of a model, as a graph that is built and never evaluated.

Its shapes say what configs call by many names: experts of a token, widths, caches, vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models import cache as kv


@dataclass(frozen=True)
class Call:
    """How one token comes to a layer of routed experts.

    Args:
        experts: Experts it is routed to.
        width: Elements of what each of them is given.
    """

    experts: int
    width: int


@dataclass(frozen=True)
class CacheSize:
    """What one layer's cache takes.

    Args:
        fixed_bytes: Whatever the context: recurrent state.
        position_bytes: For every position that is kept.
        block: Positions are allocated so many at a time.
        most: Positions that are kept at most; None: all.
    """

    fixed_bytes: int
    position_bytes: int = 0
    block: int = 1
    most: int | None = None

    def nbytes(self, context: int) -> int:
        """Bytes with ``context`` tokens behind."""
        positions = context if self.most is None else min(self.most, context)
        blocks = -(-positions // self.block)
        return self.fixed_bytes + blocks * self.block * self.position_bytes


@dataclass(frozen=True)
class Step:
    """What one token did. Sizes only: an array would keep its whole graph, and the weights.

    Args:
        caches: Of every layer that has one.
        vocab: Logits of one token.
        calls: By path, the switch layers that were called.
    """

    caches: tuple[CacheSize, ...]
    vocab: int
    calls: Mapping[str, Call]

    def state_bytes(self, context: int) -> int:
        """KV cache and recurrent state of one sequence of ``context`` tokens."""
        return sum(cache.nbytes(context) for cache in self.caches)


class _Witness(nn.Module):
    """Stands where a switch layer stood, answers as it does, and remembers the call."""

    def __init__(self, switch: nn.Module):
        super().__init__()
        dict.update(self, switch)  # whatever the model may look at
        self._switch = switch
        self._call: Call | None = None

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self._call = Call(indices.size, x.shape[-1])
        y: mx.array = self._switch(x, indices)
        return y


def one_token_caches(model: nn.Module) -> list[Any]:
    """The prompt cache after one token: kinds and shapes, for whoever lets go of it at once."""
    return _built(model)[0]


def one_token(model: nn.Module, switches: Mapping[str, nn.Module]) -> Step:
    """Build the graph of one token, with someone watching at every switch layer."""
    witnesses = {path: _Witness(switch) for path, switch in switches.items()}
    _put(model, witnesses)
    try:
        caches, logits = _built(model)
    finally:
        _put(model, switches)
    calls = {path: w._call for path, w in witnesses.items() if w._call is not None}
    return Step(tuple(_sizes(caches)), logits.shape[-1], calls)


def _built(model: nn.Module) -> tuple[list[Any], mx.array]:
    caches: list[Any] = kv.make_prompt_cache(model)
    return caches, model(mx.zeros((1, 1), mx.int32), cache=caches)


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    model.update_modules(tree_unflatten(list(modules.items())))


def _sizes(caches: Iterable[Any]) -> Iterator[CacheSize]:
    for cache in caches:
        if isinstance(cache, kv.CacheList):
            yield from _sizes(cache.caches)
        elif not isinstance(cache, (kv.KVCache, kv.RotatingKVCache, kv.ChunkedKVCache)):
            yield CacheSize(cache.nbytes if cache is not None else 0)
        elif cache.keys is not None:
            most = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
            position_bytes = (cache.keys.nbytes + cache.values.nbytes) // cache.keys.shape[2]
            yield CacheSize(0, position_bytes, cache.step, most)
