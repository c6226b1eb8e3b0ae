"""What a model remembers of a prompt: mlx-lm's caches, looked into, copied and filled.

A layer's state is keys and values, which say how many tokens they are of, or a recurrent one,
which does not say it, and cannot be taken back to an earlier token.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models import cache as kv

from .errors import UsageError

Progress = Callable[[int, int], None]
"""Called with the tokens that are computed so far, and in all."""

COUNTING = (kv.KVCache, kv.QuantizedKVCache, kv.RotatingKVCache)
KNOWN = (*COUNTING, kv.ArraysCache)


@dataclass(frozen=True)
class KVSettings:
    """What ``mlx_lm.generate`` may do to keys and values, by its names.

    Attributes:
        max_kv_size: Tokens after which a cache rotates, where the model permits.
        kv_bits: Bits of quantized keys and values. None: as they are.
        kv_group_size: Values that share a scale.
        quantized_kv_start: The token from which they are quantized.
    """

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __str__(self) -> str:
        if self.kv_bits is None:
            return "no --kv-bits"
        return (
            f"--kv-bits {self.kv_bits} --kv-group-size {self.kv_group_size} "
            f"--quantized-kv-start {self.quantized_kv_start}"
        )

    def quantize(self, cache: list[Any]) -> None:
        """Quantize keys and values in place where the settings say so, as mlx-lm does."""
        maybe_quantize_kv_cache(cache, self.quantized_kv_start, self.kv_group_size, self.kv_bits)

    def agree(self, layer: Any) -> bool:
        """Whether a layer's keys and values are as these settings leave them."""
        if isinstance(layer, kv.QuantizedKVCache):
            return (layer.bits, layer.group_size) == (self.kv_bits, self.kv_group_size)
        due = self.kv_bits is not None and layer.offset >= self.quantized_kv_start
        return not due or not hasattr(layer, "to_quantized")


def prefill(
    model: nn.Module,
    cache: list[Any],
    tokens: Sequence[int],
    settings: KVSettings,
    prefill_step_size: int,
    progress: Progress | None = None,
) -> None:
    """Feed tokens to a model, as the prompt's part of mlx-lm's ``generate_step`` does.

    Args:
        model: The model.
        cache: Its prompt cache, written to.
        tokens: Token ids.
        settings: What is done to keys and values after each step.
        prefill_step_size: Most tokens at a time.
        progress: Called after every step.
    """
    done = 0
    while done < len(tokens):
        size = min(prefill_step_size, len(tokens) - done)
        if len(tokens) - done - size == 1 and size > 2:
            size -= 1  # one token alone is computed by decode's kernels: other last bits
        model(mx.array(list(tokens[done : done + size]))[None], cache=cache)
        settings.quantize(cache)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        done += size
        if progress is not None:
            progress(done, len(tokens))


def counts(cache: list[Any]) -> set[int]:
    """How many tokens the layers have seen that count them: one number, if all is well.

    Raises:
        UsageError: If the cache is of several sequences, or of a kind that is not known.
    """
    return {layer.offset for layer in counting(cache)}


def counting(cache: list[Any]) -> list[Any]:
    """The layers that have keys and values."""
    return [layer for layer in _flat(cache) if isinstance(layer, COUNTING)]


def trims(cache: list[Any]) -> bool:
    """Whether the state after fewer tokens can be had from this one."""
    # Not from quantized layers: after fewer tokens they might not have been quantized yet.
    plain = all(type(layer) in (kv.KVCache, kv.RotatingKVCache) for layer in _flat(cache))
    return plain and bool(kv.can_trim_prompt_cache(cache))


def arrays(cache: list[Any]) -> Iterator[mx.array]:
    """All arrays of a prompt cache."""
    for layer in _flat(cache):
        for _, leaf in tree_flatten(list(vars(layer).values())):
            if isinstance(leaf, mx.array):
                yield leaf


def copied(value: Any) -> Any:
    """A copy of a layer's state that holds its own bytes and no others."""
    if isinstance(value, mx.array):
        # MLX has no copy as such, and a slice may keep all of a prompt's activations alive.
        return (value.view(mx.uint8) | 0).view(value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(map(copied, value))
    if isinstance(value, (*KNOWN, kv.CacheList)):
        new = copy.copy(value)
        vars(new).update({name: copied(held) for name, held in vars(value).items()})
        return new
    return value


def _flat(cache: list[Any]) -> Iterator[Any]:
    for layer in cache:
        if type(layer) is kv.CacheList:
            yield from _flat(list(layer.caches))
        elif type(layer) not in KNOWN or _sequences(layer) != 1:
            raise UsageError(
                f"a prefix is of one sequence in mlx-lm's plain caches, not of {type(layer)} "
                f"with {_sequences(layer)}. Leave it to mlx-lm."
            )
        else:
            yield layer


def _sequences(layer: Any) -> int:
    held = (leaf for _, leaf in tree_flatten(list(vars(layer).values())))
    return next((int(a.shape[0]) for a in held if isinstance(a, mx.array) and a.ndim > 2), 1)
