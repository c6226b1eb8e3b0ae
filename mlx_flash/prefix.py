"""States of prompts already computed, so that a prompt that begins alike goes on from there.

Nothing in a recurrent state tells which tokens it has seen. So a state never leaves here but
with the tokens it stands for, and none comes in that was not handed out here.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as kv
from numpy.typing import NDArray

from .config import StreamConfig
from .errors import UsageError
from .states import KVSettings, Progress, arrays, copied, counting, counts, prefill, trims
from .streaming.model import StreamedModel

Tokens = NDArray[np.int64]

UNSETTLED = 256  # inputs kept as they came, before they become one array
IN_FLIGHT = 2  # of mlx-lm's steps; to look at one would wait for it


class PrefixCache:
    """Snapshots of one model's state after the beginnings of prompts, in bounded memory.

    ::

        prefixes = PrefixCache(model, max_bytes=500_000_000)
        prefixes.prefill(system_tokens)
        cache, rest = prefixes.restore(prompt_tokens)
        mlx_lm.generate(model, tokenizer, rest, prompt_cache=cache)

    What follows a restored state has the bits of a run that computed the same tokens the same
    way. With the native kernels that is: however the prompt is cut, as long as no piece is a
    single token, which decode's kernels compute.

    Args:
        model: What ``mlx_flash.load`` returned. One of ``mlx_lm.load`` works too, but does not
            say what it was fed: there ``take`` has to believe the ids, and checks their number;
            where no layer counts tokens, as in a pure Mamba, it takes what ``prefill`` fed.
        max_bytes: Most bytes of all snapshots. They come on top of the model's ``ram``.
        settings: What is done to keys and values. Give the same to ``mlx_lm.generate``.
    """

    def __init__(self, model: nn.Module, max_bytes: int, settings: KVSettings | None = None):
        self.max_bytes = max_bytes
        self.settings = settings or KVSettings()
        self._model = model
        self._shapes = _shapes(model)
        self._snapshots: OrderedDict[bytes, _Snapshot] = OrderedDict()

    def __len__(self) -> int:
        return len(self._snapshots)

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots: arrays that nobody else holds, and their tokens."""
        return sum(s.nbytes for s in self._snapshots.values())

    def prefill(
        self,
        tokens: Sequence[int],
        prefill_step_size: int = StreamConfig.prefill_step_size,
        progress: Progress | None = None,
    ) -> bool:
        """Compute the state after some tokens, and keep it. What is here is not computed again.

        Args:
            tokens: Token ids, the beginning of prompts to come.
            prefill_step_size: Most tokens at a time.
            progress: Called after every step.

        Returns:
            Whether there is room for it.

        Raises:
            UsageError: If there are no tokens, or the model's weights are others by now.
        """
        key = _ids(tokens).tobytes()
        if key in self._snapshots:
            self._snapshots.move_to_end(key)
            return True
        cache, rest = self.restore(tokens)
        prefill(self._model, cache, rest, self.settings, prefill_step_size, progress)
        if isinstance(cache, _Handed) and not isinstance(self._model, StreamedModel):
            cache.feed(mx.array(rest))
        return self.take(tokens, cache)

    def restore(self, prompt: Sequence[int]) -> tuple[list[Any], list[int]]:
        """A state after the longest beginning of a prompt that there is one of.

        Where all layers keep plain keys and values, a longer snapshot is trimmed to what it
        has in common with the prompt.

        Args:
            prompt: Token ids, one or more.

        Returns:
            A prompt cache of the caller's own, and the tokens of the prompt that it has not
            seen: at least one.

        Raises:
            UsageError: If the prompt is empty, or the model's weights are others by now.
        """
        tokens = _ids(prompt)
        self._check_model()
        found, most = None, 0
        for key, snapshot in self._snapshots.items():
            common = _common(snapshot.tokens, tokens[:-1])
            if common > most and (common == len(snapshot.tokens) or trims(snapshot.layers)):
                found, most = key, common
        if found is None:
            fresh = kv.make_prompt_cache(self._model, self.settings.max_kv_size)
            return _Handed(fresh, self, tokens[:0]), tokens.tolist()
        self._snapshots.move_to_end(found)
        # The copy shares its arrays. MLX writes in place only what nobody else holds, and so
        # do the kernels.
        layers = copy.deepcopy(self._snapshots[found].layers)
        kv.trim_prompt_cache(layers, len(self._snapshots[found].tokens) - most)
        if counts(layers) - {most}:
            raise AssertionError("a state has seen the tokens it is handed out for")
        return _Handed(layers, self, tokens[:most]), tokens[most:].tolist()

    def take(self, tokens: Sequence[int], cache: list[Any]) -> bool:
        """Keep a copy of a state, which goes on being the caller's to write to.

        Args:
            tokens: Ids of all tokens that the state has seen, those of ``restore`` included.
            cache: What ``restore`` returned, since fed with the rest of them.

        Returns:
            Whether there is room for it.

        Raises:
            UsageError: If the cache is not from here, has seen other tokens, or has keys and
                values that the settings do not make.
        """
        ids = _ids(tokens)
        self._check_model()
        if not isinstance(cache, _Handed) or cache.owner is not self:
            raise UsageError(
                "this prompt cache was not handed out by this PrefixCache, so nothing says which "
                "model it is of. Begin with restore()."
            )
        if counts(cache) - {len(ids)} or not cache.has_seen(ids, self._model):
            raise UsageError(
                f"this prompt cache has seen other tokens than the {len(ids)} that are given. "
                "Give all that it has seen, in order."
            )
        if not all(map(self.settings.agree, counting(cache))):
            raise UsageError(
                f"this prompt cache's keys and values are not as {self.settings} leaves them. "
                "Give mlx-lm the settings of this PrefixCache."
            )
        return self._keep(ids, cache)

    def _keep(self, tokens: Tokens, cache: list[Any]) -> bool:
        key = tokens.tobytes()
        self._snapshots.pop(key, None)
        nbytes = tokens.nbytes + sum(a.nbytes for a in arrays(cache))
        if nbytes > self.max_bytes:
            return False
        while self.nbytes + nbytes > self.max_bytes:
            self._snapshots.popitem(last=False)
        layers = [copied(layer) for layer in cache]
        mx.eval(list(arrays(layers)))
        self._snapshots[key] = _Snapshot(tokens.copy(), layers, nbytes)
        return True

    def _check_model(self) -> None:
        if _shapes(self._model) != self._shapes:
            raise UsageError(
                "the model has other weights than when this PrefixCache was made. Make a new one."
            )


@dataclass(frozen=True)
class _Snapshot:
    tokens: Tokens
    layers: list[Any]
    nbytes: int


class _Handed(list[Any]):
    """A prompt cache, as mlx-lm takes it, that knows whose it is and what it has been fed."""

    def __init__(self, layers: list[Any], owner: PrefixCache, begun: Tokens):
        super().__init__(layers)
        self.owner = owner
        self._begun = begun
        self._fed: list[mx.array] = []

    def feed(self, inputs: mx.array) -> None:
        """Remember tokens that the model is about to see: [1, S]. They may not be computed yet."""
        self._fed.append(inputs)
        if len(self._fed) > UNSETTLED:
            self._settle(IN_FLIGHT)

    def has_seen(self, tokens: Tokens, model: nn.Module) -> bool:
        """Whether these are the tokens, as far as the model says what it is fed."""
        self._settle(0)
        told = isinstance(model, StreamedModel) or not counts(self)
        least = len(tokens) if told else len(self._begun)
        return least <= len(self._begun) and _common(self._begun, tokens) == len(self._begun)

    def _settle(self, but: int) -> None:
        done = len(self._fed) - but
        computed = [np.asarray(inputs).reshape(-1) for inputs in self._fed[:done]]
        self._begun = np.concatenate([self._begun, *computed]).astype(np.int64)
        del self._fed[:done]


def _ids(tokens: Sequence[int]) -> Tokens:
    ids = np.asarray(tokens, np.int64)
    if ids.ndim != 1 or not len(ids):
        raise UsageError("no tokens. Give a list of token ids.")
    return ids


def _common(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences begin with alike."""
    least = min(len(one), len(other))
    differ = np.flatnonzero(one[:least] != other[:least])
    return int(differ[0]) if len(differ) else least


def _shapes(model: nn.Module) -> list[tuple[Any, ...]]:
    weights = tree_flatten(model.parameters())
    return [(name, tuple(a.shape), a.dtype) for name, a in weights]
