"""Random values for a checkpoint's tensors, as a stream of bytes.

Every tensor has its own generator, seeded by its name, so its values do not depend on the
shard it lands in. Raw bit streams only: numpy keeps those stable.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import topics
from .shapes import Quantized, Tensor
from .topics import Routing

PIECE_BYTES = 1 << 20  # divisible by every element size

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Variance that all layers together add to an embedding's 1. With more, what all tokens share
# grows from layer to layer until most of them choose the same experts.
CONTEXT = 0.3

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # positive half of E2M1


@dataclass(frozen=True)
class Recipe:
    """What the values depend on.

    Args:
        depth: Layers; what each adds to the residual stream shrinks by the root of it.
    """

    seed: int
    depth: int
    routing: Routing

    def deviation(self, module: str, fan_in: int) -> float:
        """Of a weight, so that embeddings and projections have outputs of deviation 1."""
        if module.endswith(EMBEDDINGS):
            return math.sqrt(topics.own_share(self.routing))
        return math.sqrt((CONTEXT / self.depth if module.endswith(ADDING) else 1) / fan_in)


def choose_routing(tensors: list[Tensor], asked: Routing | None) -> Routing:
    """What was asked for, or real routing where the embeddings can hold it.

    Raises:
        ValueError: If topics are asked of embeddings without biases to hold them.
    """
    groups = (t.shape[-1] for t in tensors if t.module.endswith(EMBEDDINGS) and t.kind == "biases")
    possible = next(groups, 0) > 1
    if asked is Routing.REAL and not possible:
        raise ValueError("Real routing needs affine embeddings: --mode affine, or uniform routing.")
    return asked or (Routing.REAL if possible else Routing.UNIFORM)


def stream(tensor: Tensor, recipe: Recipe) -> Iterator[Bytes]:
    """The bytes of one tensor, in order, in pieces of at most ``PIECE_BYTES``."""
    pieces: Iterator[NDArray]
    if (q := tensor.quantized) is None:
        pieces = _plain(tensor, recipe)
    elif tensor.kind == "weight":
        pieces = _words(tensor, q, recipe)
    elif q.mode == "affine":
        pieces = _affine(tensor, q, recipe)
    else:
        pieces = _codes(tensor, q, recipe)
    for piece in pieces:
        yield piece.reshape(-1).view(np.uint8)


def _raw(recipe: Recipe, name: str, nbytes: int) -> Iterator[Bytes]:
    digest = hashlib.sha256(f"{recipe.seed}/{name}".encode()).digest()
    bits = np.random.SFC64(int.from_bytes(digest, "big"))
    for start in range(0, nbytes, PIECE_BYTES):
        size = min(PIECE_BYTES, nbytes - start)
        yield bits.random_raw(-(-size // 8)).view(np.uint8)[:size]


def _uniform(recipe: Recipe, name: str, count: int, low: float, high: float) -> Iterator[Floats]:
    for piece in _raw(recipe, name, 4 * count):
        unit = piece.view(np.uint32) * np.float32(2**-32)
        yield unit * np.float32(high - low) + np.float32(low)


def _words(tensor: Tensor, q: Quantized, recipe: Recipe) -> Iterator[Bytes]:
    for piece in _raw(recipe, tensor.name, tensor.nbytes):
        if q.mode == "mxfp8":
            piece &= 0xBF  # without its top exponent bit, no E4M3 code is NaN or huge
        yield piece


def _affine(tensor: Tensor, q: Quantized, recipe: Recipe) -> Iterator[NDArray]:
    """Scales, or the biases that centre them: ``scale * q + bias`` has zero mean."""
    if tensor.kind == "scales":
        yield from (encode(scales, tensor.dtype) for scales in _scales(tensor, q, recipe))
        return
    start = 0
    middles = _middles(tensor, q, recipe)
    for scales in _scales(tensor, q, recipe):
        stored = decode(encode(scales, tensor.dtype), tensor.dtype).reshape(-1)
        ids = np.arange(start, start + stored.size)
        start += stored.size
        biases = _topics(tensor, q, recipe, ids)
        yield encode(biases - next(middles)[: stored.size] * stored, tensor.dtype)


def _middles(tensor: Tensor, q: Quantized, recipe: Recipe) -> Iterator[Floats]:
    """What q is centred on, a group: its expectation, or in the output layer its mean.

    There the topics are then all that a direction constant over groups can mean, so no token
    is the favourite of a topic.
    """
    if not tensor.module.endswith(OUTPUTS) or recipe.routing is Routing.UNIFORM:
        while True:
            yield np.full(PIECE_BYTES // 4, (2**q.bits - 1) / 2, np.float32)
    words = _raw(recipe, f"{tensor.module}.weight", tensor.count * q.group_size * q.bits // 8)
    pieces = q.group_size * q.bits // 32  # of words that go with a piece of scales
    while batch := list(itertools.islice(words, pieces)):
        yield _sums(np.concatenate(batch), q) / np.float32(q.group_size)


def _sums(words: Bytes, q: Quantized) -> Floats:
    """Of the integers of each group."""
    if q.bits == 4:  # most of a checkpoint: without a float for each
        pairs = (words & 15) + (words >> 4)
        return pairs.reshape(-1, q.group_size // 2).sum(axis=1, dtype=np.float32)
    return _unpack(words, q).reshape(-1, q.group_size).sum(axis=1)


def _unpack(words: Bytes, q: Quantized) -> Floats:
    """The integers in packed bytes. words: [n] -> [n * 8 / bits]."""
    bits = np.unpackbits(words, bitorder="little").reshape(-1, q.bits)
    return bits @ (np.float32(2) ** np.arange(q.bits, dtype=np.float32))


def _topics(tensor: Tensor, q: Quantized, recipe: Recipe, ids: NDArray[np.int64]) -> Floats:
    """What topics add to the biases at flat places ``ids``, which are consecutive."""
    groups = tensor.shape[-1]
    if recipe.routing is Routing.UNIFORM or not tensor.module.endswith(EMBEDDINGS + OUTPUTS):
        return np.zeros(1, np.float32)
    first = ids[0] // groups
    rows = np.arange(first, ids[-1] // groups + 1)
    if tensor.module.endswith(EMBEDDINGS):
        table = topics.of_embedding(rows, groups)
    else:
        table = topics.of_output(rows, groups, groups * q.group_size)
    return table.reshape(-1)[ids - first * groups]


def _scales(tensor: Tensor, q: Quantized, recipe: Recipe) -> Iterator[Floats]:
    fan_in = tensor.shape[-1] * q.group_size
    if tensor.module.endswith(ROUTERS):
        yield _router_scales(tensor, q, recipe)
        return
    uniform_q = math.sqrt((4**q.bits - 1) / 12)  # deviation of a uniform q
    scale = recipe.deviation(tensor.module, fan_in) / uniform_q
    # Groups differ, so a scale read from the wrong place changes the output.
    spread = _uniform(recipe, f"{tensor.module}.scales", tensor.count, 0.75, 1.25)
    yield from (scale * piece for piece in spread)


def _router_scales(tensor: Tensor, q: Quantized, recipe: Recipe) -> Floats:
    """One scale a row, such that all rows have the same norm: no expert is favoured."""
    rows, groups = tensor.shape
    nbytes = rows * groups * q.group_size * q.bits // 8
    words = np.concatenate(list(_raw(recipe, f"{tensor.module}.weight", nbytes)))
    values = _unpack(words, q).reshape(rows, -1) - (2**q.bits - 1) / 2
    scale = 1 / np.linalg.norm(values, axis=1, keepdims=True)
    return np.repeat(scale.astype(np.float32), groups, axis=1)


def _codes(tensor: Tensor, q: Quantized, recipe: Recipe) -> Iterator[Bytes]:
    """8-bit float scales: the two codes around the wanted scale, mixed to its mean square."""
    codes = np.arange(1, 255 if q.mode != "nvfp4" else 127)
    scales = np.exp2(codes - 127.0) if q.mode != "nvfp4" else _e4m3(codes)
    elements = _e4m3(np.arange(64)) if q.mode == "mxfp8" else FP4
    wanted = recipe.deviation(tensor.module, tensor.shape[-1] * q.group_size)
    wanted /= math.sqrt(np.mean(elements.astype(np.float64) ** 2))
    low = max(int(np.searchsorted(scales, wanted)) - 1, 0)
    square = scales[low : low + 2] ** 2
    share = np.clip((wanted**2 - square[0]) / (square[1] - square[0]), 0, 1)
    for piece in _raw(recipe, tensor.name, tensor.nbytes):
        yield np.where(piece < 256 * share, codes[low + 1], codes[low]).astype(np.uint8)


def _e4m3(codes: NDArray) -> NDArray:
    exponent, mantissa = codes >> 3, (codes & 7) / 8
    return np.where(exponent, (1 + mantissa) * np.exp2(exponent - 7.0), mantissa * 2**-6)


def _plain(tensor: Tensor, recipe: Recipe) -> Iterator[NDArray]:
    if tensor.kind == "weight" and len(tensor.shape) > 1:
        pieces = _dense(tensor, recipe)
    elif tensor.kind == "A_log":  # decay rates of a fresh Mamba2 or gated delta net
        rates = _uniform(recipe, tensor.name, tensor.count, 1, 16)
        pieces = (np.log(piece) for piece in rates)
    elif tensor.kind == "dt_bias":  # softplus(dt_bias) is log-uniform in [0.001, 0.1]
        steps = _uniform(recipe, tensor.name, tensor.count, math.log(1e-3), math.log(1e-1))
        pieces = (np.log(np.expm1(np.exp(piece))) for piece in steps)
    else:
        ones = tensor.kind in ("weight", "D")
        sizes = range(0, tensor.count, PIECE_BYTES // 4)
        pieces = (np.full(min(PIECE_BYTES // 4, tensor.count - s), ones, "f4") for s in sizes)
    yield from (encode(piece, tensor.dtype) for piece in pieces)


def _dense(tensor: Tensor, recipe: Recipe) -> Iterator[Floats]:
    convolution = "conv1d" in tensor.module
    fan_in = math.prod(tensor.shape[1:]) if convolution else tensor.shape[-1]
    bound = math.sqrt(3) * recipe.deviation(tensor.module, fan_in)
    pieces = _uniform(recipe, tensor.name, tensor.count, -bound, bound)
    if not tensor.module.endswith(ROUTERS):
        yield from pieces
        return
    rows = np.concatenate(list(pieces)).reshape(tensor.shape)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    yield rows / norms


def encode(values: Floats, dtype: str) -> NDArray:
    """Float32 to a stored dtype; bfloat16 (round to nearest even) as uint16 words."""
    if dtype == "F32":
        return values.astype(np.float32, copy=False)
    if dtype == "F16":
        return values.astype(np.float16)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(stored: NDArray, dtype: str) -> Floats:
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


ROUTERS = (".mlp.gate", ".mixer.gate")
ADDING = (".o_proj", ".out_proj", ".down_proj", ".fc2")  # end in the residual stream
EMBEDDINGS = (".embed_tokens", ".embeddings")
OUTPUTS = ("lm_head",)
