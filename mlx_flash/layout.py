"""Where each weight of a model lies on disk, read off mlx-lm's own ``sanitize``.

A checkpoint in Hugging Face's layout becomes a model's weights by a function of each mlx-lm
class. Traced on arrays that hold nothing, it says which bytes of which tensors make a weight.
So no family needs a table of names here, and what mlx-lm learns to load, streams.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import CheckpointError, brief
from .streaming.checkpoint import Checkpoint, Span, TensorInfo

DTYPES = {
    "BOOL": mx.bool_, "U8": mx.uint8, "I8": mx.int8,
    "F8_E4M3": mx.uint8, "F8_E5M2": mx.uint8, "F8_E8M0": mx.uint8,  # as mx.load has them
    "U16": mx.uint16, "I16": mx.int16, "F16": mx.float16, "BF16": mx.bfloat16,
    "U32": mx.uint32, "I32": mx.int32, "F32": mx.float32,
    "U64": mx.uint64, "I64": mx.int64, "F64": mx.float64, "C64": mx.complex64,
}  # fmt: skip

UNTRACEABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class View:
    """Elements of one tensor on disk, by byte offset from its start and byte strides."""

    tensor: TensorInfo
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    def rows(self) -> Iterator["View"]:
        for i in range(self.shape[0]):
            offset = self.offset + i * self.strides[0]
            yield replace(self, offset=offset, shape=self.shape[1:], strides=self.strides[1:])

    def span(self) -> Span | None:
        """The bytes, if they are one piece or equal pieces at equal distances."""
        piece, apart = self.itemsize, list[tuple[int, int]]()
        for size, stride in reversed(list(zip(self.shape, self.strides, strict=True))):
            if size == 1:
                continue
            if not apart and stride == piece:
                piece *= size
            elif apart and stride == apart[-1][0] * apart[-1][1]:
                apart[-1] = (apart[-1][0] * size, apart[-1][1])
            else:
                apart.append((size, stride))
        at = self.tensor.span.offset + self.offset
        nbytes = math.prod(self.shape) * self.itemsize
        if not apart:
            return Span(self.tensor.span.path, at, nbytes)
        if len(apart) > 1:
            return None
        return Span(self.tensor.span.path, at, nbytes, piece, apart[0][1])


Sanitize = Callable[[dict[str, mx.array]], Mapping[str, mx.array]]
Source = tuple[View, ...]
"""An array as what lies on disk, one part after the other along the first axis."""


class Layout:
    """The spans of a model's weights.

    Args:
        checkpoint (Checkpoint): The tensors on disk.
        model (nn.Module): An mlx-lm model. What tracing changes in it is put back.
        own: The ``sanitize`` of the model's class, where the model has another by now.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: nn.Module, own: Callable[..., Any] | None = None
    ):
        self._folder = checkpoint.folder
        self._why_not = ""
        self._sources: dict[str, Source | None]
        self._origins: dict[str, frozenset[str]]
        self.conversion = f"mlx_lm.convert --hf-path {checkpoint.folder} --mlx-path CONVERTED"
        try:
            with _followable(model, own) as sanitize:
                self._sources, self._origins = _trace(checkpoint, sanitize)
        except UNTRACEABLE as error:
            # What mlx-lm saved has the model's names, and its sanitize changes none of it.
            self._sources = {name: (_whole(info),) for name, info in checkpoint.items()}
            self._origins = {name: frozenset([name]) for name in checkpoint}
            self._why_not = f" (its sanitize cannot be followed: {brief(error)})"

    def rows(self, name: str, count: int, row_bytes: int) -> list[Span]:
        """The bytes of a weight, one span per index of its first axis: expert by expert.

        Raises:
            CheckpointError: If a row is not where it could be read into place from.
        """
        found = [row.span() for view in self._source(name) for row in view.rows()]
        spans = [span for span in found if span is not None and span.nbytes == row_bytes]
        if len(spans) != len(found) or len(spans) != count:
            raise self._needs_conversion(name)
        return spans

    def span(self, name: str, nbytes: int) -> Span | None:
        """The bytes of a whole weight, or None where they are computed or scattered."""
        source = () if self._why_not else self._sources.get(name) or ()
        span = source[0].span() if len(source) == 1 else None
        return span if span is not None and span.nbytes == nbytes else None

    def origins(self, name: str) -> frozenset[str]:
        """The tensors on disk that a weight is made of, moved or computed."""
        return self._origins.get(name, frozenset())

    def _source(self, name: str) -> Source:
        source = self._sources.get(name)
        if not source or not all(view.shape for view in source):
            raise self._needs_conversion(name)
        return source

    def _needs_conversion(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self._folder}: {name} is not stored expert by expert as the model computes with "
            f"it{self._why_not}. Convert the checkpoint: `{self.conversion}`"
        )


@contextmanager
def _followable(model: nn.Module, own: Sanitize | None) -> Iterator[Sanitize]:
    """The model's ``sanitize`` and those it calls, without what a trace cannot hold.

    MLX exports no copy into contiguous memory, which moves no element: to these functions
    alone, ``mx.contiguous`` gives back what it is given. Afterwards the model is as before:
    a ``sanitize`` may take out of it an output layer that turns out to be tied.
    """
    modules: list[nn.Module] = model.modules()
    before = [(module, dict(module), dict(module.__dict__)) for module in modules]
    copies = {id(m): _with_plain_mx(getattr(type(m), "sanitize", None)) for m in modules}
    try:
        for module in modules:
            if copy := copies[id(module)]:
                object.__setattr__(module, "sanitize", partial(copy, module))
        if own is not None:
            yield partial(_with_plain_mx(own) or own, model)
        else:
            yield getattr(model, "sanitize", dict)
    finally:
        for module, items, attributes in before:
            dict.clear(module)
            dict.update(module, items)
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _with_plain_mx(function: Any) -> Callable[..., Any] | None:
    """A copy of a function of mlx-lm to which ``mx`` is another name space."""
    if not isinstance(function, FunctionType) or function.__globals__.get("mx") is not mx:
        return None
    plain = SimpleNamespace(**{**vars(mx), "contiguous": _identity, "eval": _identity})
    names = {**function.__globals__, "mx": plain}
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _identity(first: Any = None, *_: Any, **__: Any) -> Any:
    return first


def _trace(
    checkpoint: Checkpoint, sanitize: Sanitize
) -> tuple[dict[str, Source | None], dict[str, frozenset[str]]]:
    """Run ``sanitize`` on arrays without values, and follow what it does to them.

    Returns:
        By name of a weight: the bytes that it is, and the names of all tensors it is made of.
    """
    names, weights = list(checkpoint), list[str]()
    empty = [mx.zeros(checkpoint[n].shape, DTYPES[checkpoint[n].dtype]) for n in names]

    def run(*arrays: mx.array) -> list[mx.array]:
        sanitized = sanitize(dict(zip(names, arrays, strict=True)))
        weights[:] = sanitized
        return list(sanitized.values())

    sources: dict[str, Source | None] = {}
    origins: dict[str, frozenset[str]] = {}
    outputs: list[str] = []

    def follow(event: dict[str, Any]) -> None:
        match event["type"]:
            case "inputs":
                ids = [name for name, *_ in event["inputs"]]
                found = [(_whole(checkpoint[n]),) for n in names]
                sources.update(zip(ids, found, strict=True))
                origins.update(zip(ids, (frozenset([n]) for n in names), strict=True))
            case "outputs":
                outputs.extend(name for name, *_ in event["outputs"])
            case "constants":
                constants.update(event["constants"])
            case "primitive":
                results = _apply(event, sources, constants)
                made_of = _union(origins.get(name) for name, *_ in event["inputs"])
                for (name, *_), source in zip(event["outputs"], results, strict=True):
                    sources[name], origins[name] = source, made_of

    constants: dict[str, mx.array] = {}
    mx.export_function(follow, run, *empty)
    ids = dict(zip(weights, outputs, strict=True))
    return (
        {name: sources.get(id_) for name, id_ in ids.items()},
        {name: origins.get(id_, frozenset()) for name, id_ in ids.items()},
    )


def _union(sets: Iterable[frozenset[str] | None]) -> frozenset[str]:
    found = [s for s in sets if s]
    return found[0] if len(found) == 1 else frozenset().union(*found)


def _whole(info: TensorInfo) -> View:
    itemsize = info.span.nbytes // max(math.prod(info.shape), 1)
    return View(info, 0, info.shape, _strides(info.shape, itemsize), itemsize)


def _strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) * itemsize for i in range(len(shape)))


def _apply(
    event: Mapping[str, Any],
    sources: Mapping[str, Source | None],
    constants: Mapping[str, mx.array],
) -> list[Source | None]:
    """What one operation makes of its inputs. None: a value, and no longer bytes on disk."""
    inputs = [sources.get(name) for name, *_ in event["inputs"]]
    shapes = [tuple(shape) for _, shape, _ in event["outputs"]]
    move, first = MOVES.get(event["name"]), inputs[0] if inputs else None
    if event["name"] == "Concatenate":
        return [_concatenate(inputs, event["arguments"][0])]
    if move is None or not first:
        return [None] * len(shapes)
    index = [constants.get(name) for name, *_ in event["inputs"][1:]]
    return move(first, event, shapes, index)


def _concatenate(inputs: Sequence[Source | None], axis: int) -> Source | None:
    if axis != 0 or not all(inputs):
        return inputs[0] if len(inputs) == 1 else None
    return tuple(view for source in inputs for view in source or ())


def _reshape(source: Source, _: Any, shapes: list[tuple[int, ...]], __: Any) -> list[Source | None]:
    (shape,) = shapes
    if len(source) == 1:
        return [_one(_reshaped(source[0], shape))]
    # Several parts keep their rows, or their elements are not enough for the new shape.
    parts = [_reshaped(view, (view.shape[0], *shape[1:])) for view in source]
    return [tuple(p for p in parts if p is not None) if all(parts) else None]


def _reshaped(view: View, shape: tuple[int, ...]) -> View | None:
    """The same elements in order by another shape, if strides can say it."""
    if math.prod(shape) != math.prod(view.shape):
        return None
    strides, left = (
        list[int](),
        [(n, s) for n, s in zip(view.shape, view.strides, strict=True) if n != 1],
    )
    for size in reversed(shape):
        if size == 1:
            strides.append(0)
            continue
        # Join axes of the view that follow one another until they hold this one.
        while left and left[-1][0] % size and len(left) > 1:
            (n0, s0), (n1, s1) = left[-2:]
            if s0 != n1 * s1:
                return None
            left[-2:] = [(n0 * n1, s1)]
        if not left or left[-1][0] % size:
            return None
        n, stride = left.pop()
        strides.append(stride)
        if n != size:
            left.append((n // size, stride * size))
    return replace(view, shape=shape, strides=tuple(reversed(strides)))


def _slice(source: Source, event: Any, shapes: Any, __: Any) -> list[Source | None]:
    starts, _, steps = event["arguments"]
    return [_cut(source, starts, shapes[0], steps)]


def _split(source: Source, event: Any, shapes: Any, _: Any) -> list[Source | None]:
    at, axis = event["arguments"]
    starts = [[0] * len(shapes[0]) for _ in shapes]
    for start, where in zip(starts[1:], at, strict=True):
        start[axis] = where
    ones = [1] * len(shapes[0])
    return [_cut(source, s, shape, ones) for s, shape in zip(starts, shapes, strict=True)]


def _gather(source: Source, event: Any, shapes: Any, index: Any) -> list[Source | None]:
    # x[3] and the like: one index, known by now, along the first axis.
    axes, sizes = event["arguments"]
    if list(axes) != [0] or len(index) != 1 or index[0] is None or index[0].size != 1:
        return [None]
    rank = len(sizes)
    picked = _cut(source, [index[0].item(), *[0] * (rank - 1)], sizes, [1] * rank)
    return _reshape(picked, event, shapes, index) if picked else [None]


def _cut(
    source: Source, starts: Sequence[int], shape: Sequence[int], steps: Sequence[int]
) -> Source | None:
    """``x[start::step]`` of every axis, ``shape`` elements of it."""
    if min(steps) < 1:
        return None
    if len(source) > 1:
        whole = starts[0] == 0 and shape[0] == sum(v.shape[0] for v in source)
        if not whole:
            source = tuple(row for v in source for row in _rows_kept(v))
            last = starts[0] + (shape[0] - 1) * steps[0] + 1
            source = source[starts[0] : last : steps[0]]
        parts = [_cut((v,), [0, *starts[1:]], [v.shape[0], *shape[1:]], steps) for v in source]
        return tuple(view for part in parts for view in part or ())
    (view,) = source
    offset = view.offset + sum(a * s for a, s in zip(starts, view.strides, strict=True))
    strides = tuple(s * step for s, step in zip(view.strides, steps, strict=True))
    return (replace(view, offset=offset, shape=tuple(shape), strides=strides),)


def _rows_kept(view: View) -> Iterator[View]:
    for row in view.rows():
        yield replace(row, shape=(1, *row.shape), strides=(0, *row.strides))


def _transpose(source: Source, event: Any, shapes: Any, _: Any) -> list[Source | None]:
    (axes,) = event["arguments"]
    if len(source) > 1 and axes[0] != 0:
        return [None]
    return [
        tuple(
            replace(
                view,
                shape=tuple(view.shape[a] for a in axes),
                strides=tuple(view.strides[a] for a in axes),
            )
            for view in source
        )
    ]


def _view(source: Source, event: Any, shapes: Any, _: Any) -> list[Source | None]:
    """The same bytes as another dtype: the last axis shrinks or grows."""
    (dtype,) = event["arguments"]
    views = []
    for view in source:
        if not view.shape or (view.itemsize != dtype.size and view.strides[-1] != view.itemsize):
            return [None]
        shape = (*view.shape[:-1], view.shape[-1] * view.itemsize // dtype.size)
        strides = (*view.strides[:-1], dtype.size)
        if view.itemsize == dtype.size:
            strides = view.strides
        views.append(replace(view, shape=shape, strides=strides, itemsize=dtype.size))
    return [tuple(views)]


def _same(source: Source, *_: Any) -> list[Source | None]:
    return [source]


def _one(view: View | None) -> Source | None:
    return None if view is None else (view,)


Move = Callable[[Source, Any, Any, Any], list[Source | None]]

MOVES: dict[str, Move] = {
    "Contiguous": _same,
    "Copy": _same,
    "StopGradient": _same,
    "ExpandDims": _reshape,
    "Flatten": _reshape,
    "Reshape": _reshape,
    "Squeeze": _reshape,
    "Unflatten": _reshape,
    "Gather": _gather,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
    "View": _view,
}
