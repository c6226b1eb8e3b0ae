"""How the demo model routes: expert usage by layer, next-token reuse, LRU hit rate by slots.

Runs corpus documents of a seed that training does not use through the embedded model, token after
token in order.
"""

from __future__ import annotations

import argparse
import random
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from corpus import document
from evaluate import DEMO

SLOTS = (4, 6, 8, 12, 16, 20, 24, 28, 32)


class RecordingSwitch(nn.Module):
    """A routed layer that also keeps the expert ids it was asked for."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.seen: list[mx.array] = []

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self.seen.append(indices)
        return self.inner(x, indices)


def record(model, tokenizer, count: int, seed: str = "routing") -> list[np.ndarray]:
    """Expert ids per layer, [tokens, top_k], over `count` documents in a row."""
    for layer in model.layers:
        layer.mlp.switch_mlp = RecordingSwitch(layer.mlp.switch_mlp)
    for index in range(count):
        doc = document(random.Random(f"{seed}:{index}"))
        ids = tokenizer.apply_chat_template(doc.messages, tools=doc.tools)
        mx.eval(model(mx.array([ids])), [layer.mlp.switch_mlp.seen[-1] for layer in model.layers])
    out = []
    for layer in model.layers:
        out.append(np.concatenate([np.array(ids)[0] for ids in layer.mlp.switch_mlp.seen]))
        layer.mlp.switch_mlp = layer.mlp.switch_mlp.inner
    return out


def usage(ids: np.ndarray, experts: int) -> np.ndarray:
    """Share of the routed slots that each expert got, [experts]."""
    return np.bincount(ids.reshape(-1), minlength=experts) / ids.size


def reuse(ids: np.ndarray) -> float:
    """Share of a token's experts that the token before used too."""
    same = (ids[1:, :, None] == ids[:-1, None, :]).any(-1)
    return float(same.mean())


def lru_hit_rate(ids: Sequence[Sequence[int]], slots: int) -> float:
    """Hits over requests of a least-recently-used cache with this many slots."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for token in ids:
        for expert in token:
            total += 1
            if expert in cache:
                hits += 1
                cache.move_to_end(expert)
                continue
            if len(cache) >= slots:
                cache.popitem(last=False)
            cache[expert] = None
    return hits / total


def table_head(*cells: object) -> None:
    """The first two lines of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |\n|" + "---|" * len(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--documents", type=int, default=40)
    args = parser.parse_args()
    model, tokenizer = mlx_lm.load(str(args.model))
    experts = model.layers[0].mlp.num_experts
    layers = record(model, tokenizer, args.documents)
    top_k = layers[0].shape[1]
    print(f"{args.documents} documents, {len(layers[0])} tokens, {experts} experts, top-{top_k}\n")
    table_head("layer", "dead experts", "least used", "most used", "next-token reuse")
    for index, ids in enumerate(layers):
        share = usage(ids, experts)
        dead, least, most = (share == 0).sum(), 100 * share.min(), 100 * share.max()
        print(f"| {index} | {dead} | {least:.2f} % | {most:.2f} % | {100 * reuse(ids):.0f} % |")
    mean, chance = np.mean([reuse(ids) for ids in layers]), top_k / experts
    print(f"\nnext-token reuse: {100 * mean:.0f} % (random routing: {100 * chance:.1f} %)\n")
    table_head("slots per layer", *SLOTS)
    rates = [np.mean([lru_hit_rate(ids.tolist(), slots) for ids in layers]) for slots in SLOTS]
    print("| LRU hit rate | " + " | ".join(f"{100 * rate:.0f} %" for rate in rates) + " |")


if __name__ == "__main__":
    main()
