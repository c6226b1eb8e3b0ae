"""How a model routes its own greedy text: is a hit rate measured on it worth anything?

Streams the checkpoint, of any size, and has every layer's store record what was asked of it.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from mlx_lm import stream_generate
from numpy.typing import NDArray

import mlx_flash

Ids = NDArray[np.int64]
SHARES = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of the experts that an LRU cache has slots for


@dataclass(frozen=True)
class Routing:
    """One layer's choices over a text; shares are of 1."""

    experts: int
    top_k: int
    used: float  # experts chosen at least once
    busiest: float  # tokens that chose the most chosen expert
    entropy: float  # of the choices; 1 when all experts are chosen equally often
    next_token: float  # choices the token before also made
    eight_tokens: float  # choices that one of the eight tokens before made
    lru: tuple[float, ...]  # hits of an LRU cache of each of SHARES


def statistics(chosen: Ids, experts: int) -> Routing:
    """Routing statistics of one layer. chosen: [tokens, top_k]."""
    counts = np.bincount(chosen.reshape(-1), minlength=experts)
    share = counts[counts > 0] / counts.sum()
    sets = [set(row) for row in chosen.tolist()]
    reuse = {n: _reuse(sets, n) for n in (1, 8)}
    return Routing(
        experts=experts,
        top_k=chosen.shape[1],
        used=float(np.mean(counts > 0)),
        busiest=counts.max() / len(chosen),
        entropy=float(-(share * np.log(share)).sum() / np.log(experts)),
        next_token=reuse[1],
        eight_tokens=reuse[8],
        lru=tuple(_lru(chosen, int(experts * share)) for share in SHARES),
    )


def _reuse(sets: list[set[int]], window: int) -> float:
    pairs = [(now, set().union(*sets[t - window : t])) for t, now in enumerate(sets) if t >= window]
    return float(np.mean([len(now & before) / len(now) for now, before in pairs]))


def _lru(chosen: Ids, slots: int) -> float:
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in chosen.reshape(-1).tolist():
        hits += expert in cache
        cache[expert] = None
        cache.move_to_end(expert)
        if len(cache) > slots:
            cache.popitem(last=False)
    return hits / chosen.size


def measure(model: Any, tokenizer: Any, prompt: str, tokens: int) -> list[Routing]:
    """Generates greedily and returns each layer's statistics over the decoded tokens."""
    for store in model.stores:
        store.record()
    for _ in stream_generate(model, tokenizer, prompt, max_tokens=tokens):
        pass
    found = []
    for store, experts in zip(model.stores, model.plan.layers.values(), strict=True):
        # The prompt's calls, each of many tokens, come first.
        calls = [call for call in store.trace if len(call) == experts.top_k][-tokens:]
        found.append(statistics(np.array(calls), experts.count))
    return found


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint.")],
    tokens: Annotated[int, typer.Option(min=16, help="Tokens to decode.")] = 256,
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "Once upon a time",
    slots: Annotated[int, typer.Option(min=1, help="Experts in RAM, a layer.")] = 64,
) -> None:
    """Print how often each layer's experts repeat while the model decodes.

        python benchmarks/routing_statistics.py qwen-8

    Published models choose 29-45 % of a token's experts again for the next token and about 80 %
    within eight tokens. An LRU cache hits 49 / 59 / 68 / 71 % with a 32nd / 16th / 8th / 4th of
    512 experts of Qwen3.5-397B.
    """
    layers = measure(*mlx_flash.load(model, slots=slots), prompt, tokens)
    names = ("used", "busiest", "entropy", "next_token", "eight_tokens")
    print(f"{layers[0].experts} experts, top {layers[0].top_k}; columns are shares of 1")
    lru = (f"{f'lru {share:.3f}':>12}" for share in SHARES)
    print("layer", *(f"{name:>12}" for name in names), *lru)
    for number, layer in enumerate(layers):
        print(f"{number:>5}", *(f"{value:12.3f}" for value in _columns(layer, names)))
    mean = np.mean([_columns(layer, names) for layer in layers], axis=0)
    print(" mean", *(f"{value:12.3f}" for value in mean))


def _columns(layer: Routing, names: tuple[str, ...]) -> list[float]:
    return [*(getattr(layer, name) for name in names), *layer.lru]


if __name__ == "__main__":
    typer.run(main)
