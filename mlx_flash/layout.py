"""Where each weight of a model lies on disk, read off mlx-lm's own ``sanitize``.

A checkpoint in Hugging Face's layout becomes a model's weights by a function of each mlx-lm
class. Traced on arrays that hold nothing, it says which bytes of which tensors make a weight.
So no family needs a table of names here, and what mlx-lm learns to load, streams.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import CheckpointError, brief
from .streaming.checkpoint import Checkpoint, Span
from .views import Source, rearranged, whole

DTYPES = {
    "BOOL": mx.bool_, "U8": mx.uint8, "I8": mx.int8,
    "F8_E4M3": mx.uint8, "F8_E5M2": mx.uint8, "F8_E8M0": mx.uint8,  # as mx.load has them
    "U16": mx.uint16, "I16": mx.int16, "F16": mx.float16, "BF16": mx.bfloat16,
    "U32": mx.uint32, "I32": mx.int32, "F32": mx.float32,
    "U64": mx.uint64, "I64": mx.int64, "F64": mx.float64, "C64": mx.complex64,
}  # fmt: skip

UNTRACEABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

Sanitize = Callable[[dict[str, mx.array]], Mapping[str, mx.array]]


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
            saved = checkpoint.items() if checkpoint.is_saved_by_mlx else ()
            self._sources = {name: (whole(info),) for name, info in saved}
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
                found = [(whole(checkpoint[n]),) for n in names]
                sources.update(zip(ids, found, strict=True))
                origins.update(zip(ids, (frozenset([n]) for n in names), strict=True))
            case "outputs":
                outputs.extend(name for name, *_ in event["outputs"])
            case "constants":
                constants.update(event["constants"])
            case "primitive":
                results = rearranged(event, sources, constants)
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
