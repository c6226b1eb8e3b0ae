"""What a model is made of and how it lies on disk, told from headers and classes alone.

Knows no family: kinds of layers and purposes of weights are read off class names and places.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import cache as kv

from .errors import CheckpointError
from .opening import LazyModel

MIXERS = (
    ("GatedDelta|DeltaNet|DeltaAttention|KDA", "gated delta"),
    ("Mamba2", "mamba2"),
    ("Mamba|SSM", "mamba"),
    ("RWKV|TimeMix", "rwkv"),
    ("LinearAttention|Lightning", "linear attention"),
    ("ShortConv", "short convolution"),
    ("Recurrent", "recurrence"),
    ("MLA", "latent attention"),
    ("Attention", "attention"),
)
"""How class names tell what mixes tokens. The first that fits."""

ROUTERS = re.compile("Router|TopK|Gate$")
CACHES = {"RotatingKVCache": "sliding ", "ChunkedKVCache": "chunked "}


@dataclass(frozen=True)
class Format:
    """How weights are stored: quantized, or as numbers of a type."""

    dtype: str
    bits: int = 0
    group_size: int = 0
    mode: str = ""

    def __str__(self) -> str:
        if not self.bits:
            return self.dtype
        return f"{self.bits}-bit g{self.group_size}" if self.mode == "affine" else self.mode


@dataclass
class Part:
    """Weights of one purpose, in bytes by format."""

    formats: Counter[Format] = field(default_factory=Counter)

    @property
    def nbytes(self) -> int:
        return sum(self.formats.values())


@dataclass(frozen=True)
class Anatomy:
    """What there is to say of a model without reading a weight.

    Args:
        layers: How many there are of each kind, by what mixes tokens in them.
        experts: Routed experts, all of them.
        parts: What every token needs, by purpose.
        in_mlx_layout: Whether the tensors on disk have the names of the model's weights.
        reads: How an expert's bytes lie: ``whole``, ``strided``, or nothing where they do not.
        conversion: The command that helps where experts cannot be read as they lie.
        unused: Bytes of the tensors on disk that nothing of the model is made of, by what
            begins their names and no other's.
        unused_tensors: How many those are.
    """

    layers: Counter[str]
    experts: Part
    parts: dict[str, Part]
    in_mlx_layout: bool
    reads: str
    conversion: str
    unused: dict[str, int]
    unused_tensors: int


def anatomy(lazy: LazyModel) -> Anatomy:
    """Look at a model that is built and not read."""
    experts, parts = Part(), dict[str, Part]()
    places = _Places(lazy)
    weights = dict(tree_flatten(lazy.model.parameters()))
    for name, array in weights.items():
        path, module = places.holder(name)
        purpose = places.purpose(path)
        part = parts.setdefault(purpose, Part()) if purpose else experts
        part.formats[_format(module, name.removeprefix(f"{path}."), array)] += array.nbytes
    reads, conversion = _reads(lazy)
    unused = _unused(lazy, weights)
    return Anatomy(
        layers=places.kinds(),
        experts=experts,
        parts=dict(sorted(parts.items(), key=lambda item: -item[1].nbytes)),
        in_mlx_layout=all(name in lazy.checkpoint for name in weights),
        reads=reads,
        conversion=conversion,
        unused=_grouped(lazy, unused),
        unused_tensors=len(unused),
    )


class _Places:
    """Where in a model a module is: in which layer, beside which experts."""

    def __init__(self, lazy: LazyModel):
        self._lazy = lazy
        self._modules: dict[str, Any] = dict(lazy.model.named_modules())
        paths = {id(module): path for path, module in self._modules.items()}
        layers = getattr(lazy.model, "layers", None) or ()
        self._layers = [paths[id(layer)] for layer in layers if id(layer) in paths]

    def holder(self, name: str) -> tuple[str, Any]:
        """The module that has a weight, and its path."""
        path = next(a for a in [*_ancestors(name)[::-1][1:], ""] if a in self._modules)
        return path, self._modules[path]

    def purpose(self, path: str) -> str:
        """What a module's own weights are for; empty for routed experts."""
        module = self._modules[path]
        if any(path == s or path.startswith(f"{s}.") for s in self._lazy.switches):
            return ""
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
            return "embeddings"
        layer = next((p for p in self._layers if path.startswith(f"{p}.")), None)
        if layer is None:
            return self._beside_layers(module)
        inside = [a for a in _ancestors(path) if len(a) > len(layer)]
        for ancestor in inside:
            if kind := _mixer(self._modules.get(ancestor)):
                return kind
        steps = path[len(layer) + 1 :].split(".")
        classes = [type(self._modules.get(a)).__name__ for a in inside]
        if {"gate", "router"} & set(steps) or any(map(ROUTERS.search, classes)):
            return "routers"
        if self._routes(path):  # a bias that a MoE block adds to its router's scores
            return "routers"
        if "norm" in type(module).__name__.lower():
            return "norms"
        return "shared experts" if any(map(self._routes, inside)) else "dense layers"

    def kinds(self) -> Counter[str]:
        """How many layers there are of each kind."""
        mixers = {path: list(self._mixers(path)) for path in self._layers}
        caches = kv.make_prompt_cache(self._lazy.model)
        cached = [path for path, found in mixers.items() if found]
        ranges = dict.fromkeys(self._layers, "")
        if len(caches) in (len(cached), len(self._layers)):
            among = cached if len(caches) == len(cached) else self._layers
            for path, cache in zip(among, caches, strict=True):
                ranges[path] = CACHES.get(type(cache).__name__, "")
        return Counter(
            ranges[path] + " + ".join(found)
            if found
            else "experts alone"
            if self._routes(path)
            else "dense alone"
            for path, found in mixers.items()
        )

    def _mixers(self, layer: str) -> Iterator[str]:
        """The outermost modules of a layer that mix tokens."""
        seen: list[str] = []
        for path, module in self._modules.items():
            if not path.startswith(f"{layer}.") or any(path.startswith(f"{s}.") for s in seen):
                continue
            if kind := _mixer(module):
                seen.append(path)
                yield kind

    def _routes(self, path: str) -> bool:
        return any(switch.startswith(f"{path}.") for switch in self._lazy.switches)

    def _beside_layers(self, module: Any) -> str:
        if "norm" in type(module).__name__.lower():
            return "norms"
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2 and weight.shape[0] == self._lazy.step.vocab:
            return "output layer"
        return "other"


def _ancestors(path: str) -> list[str]:
    """A path, and what it goes through, outermost first."""
    steps = path.split(".")
    return [".".join(steps[: i + 1]) for i in range(len(steps))]


def _mixer(module: Any) -> str:
    name = type(module).__name__
    kind = next((kind for pattern, kind in MIXERS if re.search(pattern, name)), "")
    return "latent attention" if kind == "attention" and hasattr(module, "kv_lora_rank") else kind


def _format(module: Any, name: str, array: mx.array) -> Format:
    dtype = str(array.dtype).rpartition(".")[2]
    if "scales" in module and name in ("weight", "scales", "biases") and hasattr(module, "bits"):
        return Format("", module.bits, module.group_size, getattr(module, "mode", "affine"))
    return Format(dtype)


def _reads(lazy: LazyModel) -> tuple[str, str]:
    """How experts lie on disk, and the command that helps where they do not."""
    try:
        found = [
            span
            for path in lazy.switches
            for spans in lazy.expert_spans(path).values()
            for span in spans
        ]
    except CheckpointError:
        return "", lazy.layout.conversion
    return "strided" if any(span.is_strided for span in found) else "whole", ""


def _unused(lazy: LazyModel, names: Iterable[str]) -> list[str]:
    used = frozenset[str]().union(*(lazy.layout.origins(name) for name in names))
    return [name for name in lazy.checkpoint if name not in used]


def _grouped(lazy: LazyModel, unused: Iterable[str]) -> dict[str, int]:
    """Bytes by the shortest beginning of a name that no used tensor shares."""
    away = set(unused)
    kept = {a for name in lazy.checkpoint if name not in away for a in _ancestors(name)}
    groups: Counter[str] = Counter()
    for name in away:
        group = next((a for a in _ancestors(name) if a not in kept), name)
        groups[group] += lazy.checkpoint[name].span.nbytes
    return dict(sorted(groups.items()))


def as_json(part: Part) -> Mapping[str, Any]:
    """A part as JSON has it: the format of most bytes first."""
    formats = [
        {"dtype": f.dtype or None, "bits": f.bits or None, "group_size": f.group_size or None,
         "mode": f.mode or None, "bytes": nbytes}
        for f, nbytes in part.formats.most_common()
    ]  # fmt: skip
    return {"bytes": part.nbytes, "formats": formats}
