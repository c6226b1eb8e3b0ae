"""Arrays as views of tensors on disk, and what rearranging them does to such views."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from .streaming.checkpoint import Span, TensorInfo


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


Source = tuple[View, ...]
"""An array as what lies on disk, one part after the other along the first axis."""


def whole(info: TensorInfo) -> View:
    """A tensor as it lies on disk."""
    itemsize = info.span.nbytes // max(math.prod(info.shape), 1)
    return View(info, 0, info.shape, _strides(info.shape, itemsize), itemsize)


def _strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) * itemsize for i in range(len(shape)))


def rearranged(
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
