"""The graph of a function as MLX would run it on a Mac, traced on any machine.

Nothing in it is evaluated, so arrays may be larger than RAM.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta, ssm

VIEWS = {
    *("Reshape", "Broadcast", "BroadcastAxes", "Transpose", "ExpandDims", "Squeeze", "Flatten"),
    *("Unflatten", "Slice", "Split", "AsStrided", "View", "StopGradient", "Depends", "Copy"),
}
FUSABLE = {  # of MLX's elementwise operations those that occur
    *("Abs", "AsType", "Exp", "Expm1", "Log", "Log1p", "LogicalNot", "Negative", "Sigmoid", "Sign"),
    *("Square", "Sqrt", "Rsqrt", "Tanh", "Erf", "Add", "Divide", "Equal", "Greater", "Less"),
    *("GreaterEqual", "LessEqual", "LogAddExp", "Maximum", "Minimum", "Multiply", "NotEqual"),
    *("Power", "Subtract", "Select", "Broadcast"),
}
COMPILED = type(mx.compile(lambda x: x))
METAL_KERNEL = mx.fast.metal_kernel  # which a trace takes without Metal
MODULES = ("mlx.nn", "mlx_lm", "mlx_flash")


@dataclass(frozen=True)
class Node:
    """An operation: its name and the names of the arrays it takes and makes."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass
class Graph:
    """Operations in an order in which they can run, and the bytes of all arrays."""

    nodes: list[Node] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    nbytes: dict[str, int] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)


def traced(function: Callable[..., Sequence[mx.array]], inputs: Sequence[mx.array]) -> Graph:
    """The graph of a function. Its arrays are never evaluated."""
    graph = Graph()

    def follow(event: dict[str, Any]) -> None:
        if event["type"] == "constants":
            graph.constants.update(name for name, _ in event["constants"])
            graph.nbytes.update((name, array.nbytes) for name, array in event["constants"])
            return
        ends = {key: event.get(key, ()) for key in ("inputs", "outputs")}
        for name, shape, dtype in (*ends["inputs"], *ends["outputs"]):
            graph.nbytes[name] = prod(shape) * dtype.size
        names = {key: [name for name, *_ in arrays] for key, arrays in ends.items()}
        if event["type"] == "primitive":
            kind = event["name"]
            if kind == "CustomKernel":
                kind = event["arguments"][0].removeprefix("custom_kernel_")
            graph.nodes.append(Node(kind, tuple(names["inputs"]), tuple(names["outputs"])))
        elif event["type"] in ends:
            getattr(graph, event["type"]).extend(names[event["type"]])

    mx.export_function(follow, function, *inputs)
    return graph


def fused(graph: Graph) -> list[Node]:
    """The launches of a compiled function, in order.

    As MLX does it: from the end, an elementwise operation takes in those that make its inputs, if
    nobody else needs what they make.
    """
    maker = {name: node for node in graph.nodes for name in node.outputs}
    users: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
    taken: set[Node] = set()
    made: list[Node] = []
    for node in reversed(graph.nodes):
        if node in taken:
            continue
        if node.name not in FUSABLE - {"Broadcast"}:
            made.append(node)
            continue
        section, inputs, found = {node}, list[str](), list(node.inputs)
        while found:
            name = found.pop(0)
            other = maker.get(name)
            elementwise = other is not None and other.name in FUSABLE
            if elementwise and all(user in section for user in users[name]):
                section.add(other)
                found.extend(other.inputs)
            else:
                inputs.append(name)
        taken |= section
        outside = tuple(dict.fromkeys(i for i in inputs if maker.get(i) not in section))
        inner = tuple(o for o in graph.outputs if maker.get(o) in section - {node})
        made.append(Node("fused", outside, node.outputs + inner))
    return made[::-1]


class Mac:
    """MLX and mlx-lm as they are on a Mac, for a trace: what is one kernel there is one node.

    So is what ``mx.compile`` made, which a trace would take apart; ``compiled`` has its graph, by
    the number in the node's name.
    """

    def __init__(self) -> None:
        self.compiled: list[Graph] = []
        self._inside = False

    @contextlib.contextmanager
    def stands_in(self) -> Iterator[None]:
        """Until it ends, models trace so."""
        with contextlib.ExitStack() as stack:

            def put(owner: Any, name: str, value: Any) -> None:
                stack.enter_context(patch.object(owner, name, value))

            put(mx, "default_device", lambda: mx.gpu)
            put(mx.metal, "is_available", lambda: True)
            put(mx, "contiguous", lambda x, **_: x)
            put(mx, "dequantize", _dequantize)
            put(mx.fast, "metal_kernel", METAL_KERNEL)
            put(mx.fast, "rms_norm", lambda x, weight, eps: _alike("rms_norm", x, weight))
            put(mx.fast, "rope", lambda x, *_, **rest: _alike("rope", x, rest.get("freqs")))
            put(mx.fast, "scaled_dot_product_attention", _attention)
            put(ssm, "_ssm_kernel", ssm.make_ssm_kernel())
            put(gated_delta, "_gated_delta_kernel", gated_delta._make_gated_delta_kernel())
            packed = gated_delta._make_gated_delta_packed_kernel()
            put(gated_delta, "_gated_delta_kernel_packed", packed)
            for owner, name, function in _compiled_functions():
                put(owner, name, self._as_one(function))
            for cls, function in _compiled_modules():
                put(cls, "__call__", self._as_module(function))
            yield

    def _as_one(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **rest: Any) -> Any:
            if self._inside:
                return function(*args, **rest)
            at = [i for i, arg in enumerate(args) if isinstance(arg, mx.array)]

            def run(*arrays: mx.array) -> list[mx.array]:
                filled = dict(enumerate(args)) | dict(zip(at, arrays, strict=True))
                made = function(*filled.values(), **rest)
                shapes[:] = [made] if isinstance(made, mx.array) else made
                return list(shapes)

            shapes: list[mx.array] = []
            self._inside = True
            try:
                graph = traced(run, [mx.zeros(args[i].shape, args[i].dtype) for i in at])
            finally:
                self._inside = False
            outputs = [(x.shape, x.dtype) for x in shapes]
            self.compiled.append(graph)
            name = f"compiled_{len(self.compiled) - 1}"
            made = _launch(name, [args[i] for i in at], outputs)
            return made[0] if len(made) == 1 else tuple(made)

        return call

    def _as_module(self, function: Callable[..., Any]) -> Callable[[Any, mx.array], Any]:
        one = self._as_one(function)
        return lambda _, x: one(x)


def _compiled_functions() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    for module in [m for name, m in sys.modules.items() if name.startswith(MODULES)]:
        yield from ((module, n, f) for n, f in list(vars(module).items()) if type(f) is COMPILED)


def _compiled_modules() -> Iterator[tuple[type, Callable[..., Any]]]:
    for cls in [c for c in vars(nn).values() if isinstance(c, type)]:
        for cell in getattr(cls.__call__, "__closure__", None) or ():
            if type(cell.cell_contents) is COMPILED:
                yield cls, cell.cell_contents


def _launch(
    name: str,
    inputs: Sequence[mx.array | None],
    outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
) -> list[mx.array]:
    given = [x for x in inputs if x is not None]
    kernel = METAL_KERNEL(
        name=name,
        input_names=[f"in{i}" for i in range(len(given))],
        output_names=[f"out{i}" for i in range(len(outputs))],
        source=";",
    )
    made: list[mx.array] = kernel(
        inputs=given,
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[tuple(shape) for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )
    return made


def _alike(name: str, x: mx.array, *others: mx.array | None) -> mx.array:
    return _launch(name, [x, *others], [(x.shape, x.dtype)])[0]


def _attention(q: mx.array, k: mx.array, v: mx.array, **rest: Any) -> mx.array:
    others = [x for x in rest.values() if isinstance(x, mx.array)]
    return _launch("attention", [q, k, v, *others], [((*q.shape[:-1], v.shape[-1]), q.dtype)])[0]


def _dequantize(
    w: mx.array, scales: mx.array, biases: mx.array | None = None, *, bits: int, **_: Any
) -> mx.array:
    dtype = mx.bfloat16 if biases is None else scales.dtype
    shape = (*w.shape[:-1], w.shape[-1] * 32 // bits)
    return _launch("dequantize", [w, scales, biases], [(shape, dtype)])[0]
