"""What one decoded token asks of a GPU, before and after `--kernels metal`: launches and bytes.

Before is MLX with mlx-lm's kernels. Models are traced, on any machine, and their weights never
made. Nothing is timed.

Counted: every operation that launches a kernel on a Mac. It reads its inputs once and writes its
outputs once: of routed experts those of the token, of a table the rows taken, of a KV cache the
positions there are, this token's among them. What `mx.compile` fuses is one launch, by MLX's rule.
Bytes are of weights, of state (KV cache, recurrent state, convolution history), or of what
operations pass to each other, which is all that fusing them can save.

Not counted: views and constants, and the copies that MLX makes of strided rows to have them side
by side. A concatenation is one launch (MLX's: one an input), attention too (MLX's: two, once the
context is long). No sampling; and no streaming, as if all experts were in RAM.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import typer
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import cache as kv
from on_a_mac import VIEWS, Graph, Mac, Node, fused, traced
from rich import box
from rich.console import Console
from rich.table import Column, Table
from synthetic import shapes

from mlx_flash import architectures
from mlx_flash.step import one_token, one_token_caches

MODELS = ("qwen3.5-35b-a3b", "nemotron-3-nano-30b-a3b")
KINDS = {
    "GatedDeltaNet": "delta net",
    "Qwen3NextAttention": "attention",
    "Qwen3NextSparseMoeBlock": "MoE",
    "NemotronHMamba2Mixer": "Mamba2",
    "NemotronHAttention": "attention",
    "NemotronHMoE": "MoE",
    "Attention": "attention",
    "MLP": "MLP",
}
Shape = StrEnum("Shape", list(shapes.SHAPES))
REST = "embedding, lm_head"
TOKEN = "a token"
TAKES_ROWS = {"Gather", "GatherAxis"}
Cost = Counter[str]
"""How many "launches", and how many bytes of "weights" and "state" and bytes "passed"."""


@dataclass(frozen=True)
class Held:
    """What an array holds, and how many bytes of it an operation reads that takes it."""

    kind: str  # "weights", "state", "passed" or "constant"
    nbytes: int


def charged(
    nodes: Sequence[Node],
    nbytes: Mapping[str, int],
    held: dict[str, Held],
    kept: Mapping[str, int],
    compiled: Sequence[Graph],
) -> Iterator[tuple[Node, Cost]]:
    """What each operation costs; views cost nothing.

    Args:
        nodes: The operations, in order.
        nbytes: Of every array.
        held: Of what there is before; what is made is added.
        kept: By name, bytes of what is made that are the next token's state.
        compiled: The graphs of compiled functions.
    """
    for node in nodes:
        inputs = [held[name] for name in node.inputs]
        cost: Cost = Counter()
        if node.name in VIEWS:
            for name in node.outputs:
                held[name] = replace(inputs[0], nbytes=min(inputs[0].nbytes, nbytes[name]))
        elif number := re.match(r"compiled_(\d+)_", node.name):
            graph = compiled[int(number[1])]
            inner = dict.fromkeys(graph.constants, Held("constant", 0))
            inner |= zip(graph.inputs, inputs, strict=True)
            for _, part in charged(fused(graph), graph.nbytes, inner, {}, compiled):
                cost += part
            held |= zip(node.outputs, (inner[name] for name in graph.outputs), strict=True)
        elif node.name == "SliceUpdate":  # in place
            update = inputs[1]
            cost += Counter({"launches": 1, update.kind: update.nbytes})
            cost[inputs[0].kind] += nbytes[node.inputs[1]]
            held[node.outputs[0]] = inputs[0]
        else:
            made = {name: nbytes[name] for name in node.outputs}
            cost["launches"] += 1
            for name in dict.fromkeys(node.inputs):
                rows = node.name in TAKES_ROWS and name == node.inputs[0]
                read = held[name].nbytes
                cost[held[name].kind] += min(read, sum(made.values())) if rows else read
            for name, size in made.items():
                state = min(size, kept.get(name, 0))
                cost += Counter(state=state, passed=size - state)
                held[name] = Held("passed", size)
        del cost["constant"]
        yield node, cost


def places(graph: Graph, of_inputs: Mapping[str, int]) -> list[int]:
    """The layer in which each operation of a model runs; -1 is in none.

    Args:
        graph: Of a whole model.
        of_inputs: The layer of each weight, -1 of one that is in none, and of the token.
    """
    known: dict[str, int] = {}
    users: dict[str, list[int]] = {}
    found: dict[int, int] = {}
    for number, node in enumerate(graph.nodes):
        given = [of_inputs[n] for n in node.inputs if n in of_inputs]
        at = [known[n] for n in node.inputs if n in known]
        place = -1 if -1 in given else max(given + at, default=None)
        if place is not None:
            known |= dict.fromkeys(node.outputs, place)
            found[number] = place
        for name in node.inputs:
            users.setdefault(name, []).append(number)
    for number, node in reversed(list(enumerate(graph.nodes))):
        if number not in found:  # made of constants: it is where it is wanted
            found[number] = min(found[user] for name in node.outputs for user in users[name])
    return [found[number] for number in range(len(graph.nodes))]


def of_token(
    model: nn.Module, experts: Mapping[str, int], states: Sequence[mx.array]
) -> list[Cost]:
    """What a token costs: a layer at a time, and last what is in no layer.

    Args:
        model: An mlx-lm model, its weights lazy or not; they are not read.
        experts: By path of a layer of routed experts: how many of them a token takes.
        states: As ``states_of`` gives them.
    """
    mac = Mac()
    weights = dict(tree_flatten(model.parameters()))

    def run(token: mx.array, *arrays: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(zip(weights, arrays, strict=False))))
        left, caches = iter(arrays[len(weights) :]), kv.make_prompt_cache(model)
        for cache in caches:
            _fill(cache, left)
        logits = model(token, cache=caches)
        return [logits, *(x for cache in caches for x in _arrays(cache))]

    empty = [mx.zeros(x.shape, x.dtype) for x in (*weights.values(), *states)]
    try:
        with mac.stands_in():
            graph = traced(run, [mx.zeros((1, 1), mx.uint32), *empty])
    finally:
        model.update(tree_unflatten(list(weights.items())))
    held, where = _of_inputs(graph, weights, experts)
    rows: list[Cost] = [Counter() for _ in range(len(model.layers) + 1)]
    nodes = charged(graph.nodes, graph.nbytes, held, _kept(graph), mac.compiled)
    for place, (_, cost) in zip(places(graph, where), nodes, strict=True):
        rows[place] += cost
    return rows


def _of_inputs(
    graph: Graph, weights: Mapping[str, mx.array], experts: Mapping[str, int]
) -> tuple[dict[str, Held], dict[str, int]]:
    """What the inputs of a model's graph hold, and the layers of token and weights."""
    token, *rest = graph.inputs
    names, states = rest[: len(weights)], rest[len(weights) :]
    held = dict.fromkeys(graph.constants, Held("constant", 0))
    held[token] = Held("passed", graph.nbytes[token])
    held |= {name: Held("state", graph.nbytes[name]) for name in states}
    where = {token: -1}
    for name, (path, array) in zip(names, weights.items(), strict=True):
        taken = next((n for switch, n in experts.items() if path.startswith(f"{switch}.")), None)
        share = 1 if taken is None else taken / array.shape[0]
        held[name] = Held("weights", round(array.nbytes * share))
        layer = re.search(r"\.layers\.(\d+)\.", path)
        where[name] = int(layer[1]) if layer else -1
    return held, where


def states_of(model: nn.Module, context: int) -> list[mx.array]:
    """The state that a token finds, with room for it as the last of ``context``; not evaluated.

    Raises:
        TypeError: If the model keeps it in caches that are unknown here.
    """
    states: list[mx.array] = []
    for cache in one_token_caches(model):
        if type(cache) not in (kv.KVCache, kv.ArraysCache):
            raise TypeError(f"no count of what a {type(cache).__name__} moves")
        for x in _arrays(cache):
            positions = type(cache) is kv.KVCache  # [B, H, positions, D]
            states.append(mx.zeros((*x.shape[:2], context, x.shape[3])) if positions else x)
            states[-1] = states[-1].astype(x.dtype)
    return states


def _kept(graph: Graph) -> dict[str, int]:
    """By name of what operations make: bytes of it that are state."""
    maker = {name: node for node in graph.nodes for name in node.outputs}
    kept: Counter[str] = Counter()
    for name in graph.outputs[1:]:
        size = graph.nbytes[name]
        while maker[name].name in VIEWS:
            name = maker[name].inputs[0]
        kept[name] += size
    return kept


def _arrays(cache: Any) -> list[mx.array]:
    return [cache.keys, cache.values] if type(cache) is kv.KVCache else list(cache.cache)


def _fill(cache: Any, arrays: Iterator[mx.array]) -> None:
    if type(cache) is kv.KVCache:
        cache.keys, cache.values = next(arrays), next(arrays)
        cache.offset = cache.keys.shape[2] - 1
    else:
        cache.cache = [next(arrays) for _ in cache.cache]


@dataclass(frozen=True)
class Row:
    """Layers of one kind: how many, and what one of them costs before and after."""

    kind: str
    count: int
    before: Cost
    after: Cost


def compare(shape: str, context: int = 1024, layers: int | None = None) -> list[Row]:
    """Before and after ``--kernels metal``, layers of each kind and the rest: 4 bits, bfloat16."""
    config = shapes.config_for(shape, layers, "bfloat16")
    model, _ = shapes.lazy_model(config, "bfloat16", None, None, "affine")
    model.eval()
    architecture = architectures.lookup(config["model_type"])
    step = one_token(model, dict(architecture.switches(model)))
    experts = {path: call.experts for path, call in step.calls.items()}
    kinds = [_kind(layer) for layer in model.layers] + [REST]
    states = states_of(model, context)
    before = of_token(model, experts, states)
    architecture.use_metal(model)
    after = of_token(model, experts, states)
    rows: dict[str, list[tuple[Cost, Cost]]] = {}
    for kind, *pair in zip(kinds, before, after, strict=True):
        rows.setdefault(kind, []).append((pair[0], pair[1]))
    for kind, costs in rows.items():
        if any(c != costs[0] for c in costs):
            raise RuntimeError(f"{shape}: layers of the kind {kind!r} differ")
    return [Row(kind, len(costs), *costs[0]) for kind, costs in rows.items()]


def total(rows: Sequence[Row]) -> Row:
    """All of them, as one."""
    before, after = Counter[str](), Counter[str]()
    for row in rows:
        before.update({key: n * row.count for key, n in row.before.items()})
        after.update({key: n * row.count for key, n in row.after.items()})
    return Row(TOKEN, 1, before, after)


def _kind(layer: nn.Module) -> str:
    found = [KINDS.get(type(part).__name__) for part in layer.children().values()]
    return ", ".join(kind for kind in found if kind)


def table_of(shape: str, rows: Sequence[Row]) -> Table:
    """One line a kind of layer, for one layer of it; the last is the whole token."""
    heads = ("launches", "passed", "weights", "state")
    columns = [Column(head, justify="right", no_wrap=True) for head in heads]
    table = Table(
        Column("", no_wrap=True),
        *columns,
        title=f"{shape}, sizes in MB",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for row in [*rows, total(rows)]:
        before, after = row.before, row.after
        table.add_row(
            f"{row.count} x {row.kind}" if row.count > 1 else row.kind,
            f"{before['launches']} > {after['launches']} {_change(row, 'launches')}",
            f"{before['passed'] / 1e6:.2f} > {after['passed'] / 1e6:.2f} {_change(row, 'passed')}",
            *(f"{after[kind] / 1e6:.1f}" for kind in ("weights", "state")),
            end_section=row is rows[-1],
        )
    return table


def _change(row: Row, what: str) -> str:
    return f"{row.after[what] / row.before[what] - 1:4.0%}"


def main(
    shape: Annotated[
        list[Shape] | None, typer.Option(help=f"May repeat. Default: {', '.join(MODELS)}.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens that attention reads.")] = 1024,
) -> None:
    """Count what one decoded token launches and moves, before and after `--kernels metal`.

    python benchmarks/launches.py
    """
    console = Console()
    for name in shape or MODELS:
        console.print(table_of(name, compare(name, context)))


if __name__ == "__main__":
    typer.run(main)
