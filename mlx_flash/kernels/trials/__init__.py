"""What `mlx-flash selftest` runs: each kernel beside MLX's own operation, as data.

A file here has the trials of one backend, at the sizes that it is given. Nothing reads a
checkpoint: weights are drawn at random.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.switch_layers import SwitchLinear

Arrays = mx.array | tuple[mx.array, ...]
Call = Callable[..., Arrays]
Form = dict[str, Any] | None
"""What ``nn.quantize`` is told, or None: not quantized."""

BUDGET_S = 0.2  # for the repetitions of one side, where its first run is not longer
REPETITIONS = (3, 15)
FAULT_LENGTH = 800
FAULTS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, MemoryError)
"""What MLX raises, what one that lacks an operation does, and a kernel whose text is missing."""
CHAIN = 16  # calls in a row on a GPU, where submitting work costs more than a small kernel
TOLERANCES = {mx.float32: 3e-5, mx.float16: 2e-3, mx.bfloat16: 1.2e-2}
"""Of the largest value. Sums in float32; one rounding of the answer, some of what is between."""


@dataclass(frozen=True)
class Sizes:
    """How large the trials are.

    Args:
        hidden: Width of what goes from layer to layer.
        middle: Width inside an expert.
        experts: Experts in a layer.
        top_k: Experts of a token.
        prompt: Tokens of a prompt.
        context: Keys and values that a decoded token looks at.
        heads: Heads, of attention and of recurrences; a quarter of them have keys of their own.
        head_dim: Width of one.
    """

    hidden: int
    middle: int
    experts: int
    top_k: int
    prompt: int
    context: int
    heads: int
    head_dim: int


FULL = Sizes(2048, 512, 64, 8, 16, 2048, 16, 128)
"""A layer of Qwen3.5-35B-A3B, with a quarter of its experts."""
QUICK = Sizes(256, 128, 8, 3, 9, 60, 8, 64)


@dataclass(frozen=True)
class Case:
    """One computation and the ways to do it, which take the same arguments.

    Args:
        ours: By our kernel.
        stock: By MLX's own operations, or mlx-lm's.
        variants: Arguments of one call each, the first of them floats.
        nbytes: What one call has to move.
        exact: ``stock`` for arguments in float32. None: that is ``stock`` itself.
    """

    ours: Call
    stock: Call
    variants: Sequence[tuple[mx.array, ...]]
    nbytes: int
    exact: Call | None = None


@dataclass(frozen=True)
class Trial:
    """A kernel, what it is tried on, and how the arrays for that are made."""

    kernel: str
    shape: str
    dtype: mx.Dtype
    make: Callable[[], Case]

    @property
    def tolerance(self) -> float:
        """The largest error that is right, as a share of the largest value."""
        return TOLERANCES[self.dtype]


@dataclass(frozen=True)
class Verdict:
    """What a trial found.

    Args:
        trial: Which.
        error: Largest difference from MLX's operations in float32, as a share of the largest
            value. NaN if there is no answer.
        ours_s: Median time of a call by our kernel.
        stock_s: The same by MLX's own operations.
        nbytes: What one call has to move.
        fault: What was raised, and by whose operation; empty if nothing.
    """

    trial: Trial
    error: float
    ours_s: float = 0.0
    stock_s: float = 0.0
    nbytes: int = 0
    fault: str = ""

    @property
    def right(self) -> bool:
        return self.error <= self.trial.tolerance  # NaN is not

    @property
    def ratio(self) -> float | None:
        """How many times faster than MLX's own; None where no time was taken."""
        return self.stock_s / self.ours_s if self.ours_s else None

    @property
    def bytes_per_s(self) -> float | None:
        return self.nbytes / self.ours_s if self.ours_s else None


def judge(trial: Trial, timed: bool = True) -> Verdict:
    """Run a trial: is the kernel right, and how fast is it beside MLX's own operations?

    The answer is held to float32 on the CPU, which no kernel of a GPU has a part in.
    """
    whose = "its arrays"
    try:
        case = trial.make()
        whose = "ours"
        got = _flat(case.ours(*case.variants[0]))
        mx.eval(got)
        whose = "MLX's own"
        with mx.stream(mx.cpu):
            arguments = (_float32(a) if _is_float(a) else a for a in case.variants[0])
            want = _flat((case.exact or case.stock)(*arguments))
            mx.eval(want)
        off = float(np.max([_error(a, b) for a, b in zip(got, want, strict=True)]))
        if not timed:
            return Verdict(trial, off, nbytes=case.nbytes)
        linked = mx.default_device() != mx.cpu
        whose = "ours"
        ours_s = seconds(case.ours, case.variants, linked)
        whose = "MLX's own"
        stock_s = seconds(case.stock, case.variants, linked)
    except FAULTS as error:
        # What Metal's compiler has to say takes several lines.
        said = " ".join(str(error).split())[:FAULT_LENGTH]
        return Verdict(trial, float("nan"), fault=f"{whose}: {type(error).__name__}: {said}")
    return Verdict(trial, off, ours_s, stock_s, case.nbytes)


def computes() -> bool:
    """Whether MLX still computes. After one fault of a GPU its stream answers with that fault."""
    try:
        mx.eval(mx.ones(1) + 1)
    except RuntimeError:
        return False
    return True


def in_float32(module: Any) -> Any:
    """A module of the same values in float32: itself, if it has no others."""
    floats = {a.dtype for _, a in tree_flatten(module.parameters()) if _is_float(a)}
    if floats <= {mx.float32}:
        return module
    wide = copy.deepcopy(module)
    wide.set_dtype(mx.float32)
    return wide


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Normally distributed numbers, the same on every backend."""
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return mx.array(drawn).astype(dtype)


def routes(seed: int, rows: int, sizes: Sizes) -> mx.array:
    """Different experts for each row: [1, rows, top_k] uint32."""
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(sizes.experts)[: sizes.top_k] for _ in range(rows)]
    return mx.array(np.array(drawn, np.uint32)[None])


def filled(module: Any, form: Form, dtype: mx.Dtype, experts: int = 1, seed: int = 5) -> Any:
    """A module with random weights in ``dtype``, its linear layers quantized as told.

    The matrices of a stack are those of its first, with their rows shifted: to draw and quantize
    all of them would take longer than what they are for.
    """
    stacks = {path for path, part in module.named_modules() if isinstance(part, SwitchLinear)}

    def drawn(path: str, array: mx.array) -> mx.array:
        stacked = path.rpartition(".")[0] in stacks
        noise = normal(seed, *((1, *array.shape[1:]) if stacked else array.shape))
        return 1 + 0.1 * noise if array.ndim < 2 else noise * array.shape[-1] ** -0.5

    module.update(tree_map_with_path(drawn, module.parameters()))
    module.set_dtype(dtype)
    if form:
        nn.quantize(module, class_predicate=_quantizes, **form)
    for path, part in module.named_modules():
        if path in stacks:
            for name, array in part.parameters().items():
                rolled = [mx.roll(array, 37 * e, 1) for e in range(experts)]
                part[name] = mx.concatenate(rolled)
    module.eval()
    mx.eval(module.parameters())
    return module


def weight_bytes(module: Any, share: float = 1.0) -> int:
    """Bytes of a module's weights, or of such a share of them."""
    return int(share * sum(a.nbytes for _, a in tree_flatten(module.parameters())))


def _quantizes(path: str, module: Any) -> bool:
    return hasattr(module, "to_quantized")


def _is_float(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


def _flat(arrays: Arrays) -> list[mx.array]:
    return [arrays] if isinstance(arrays, mx.array) else list(arrays)


def _error(got: mx.array, want: mx.array) -> float:
    if got.shape != want.shape:
        return float("nan")
    a, b = (np.array(array.astype(mx.float32)) for array in (got, want))
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30))


def seconds(call: Call, variants: Sequence[tuple[mx.array, ...]], linked: bool) -> float:
    """Median seconds of one call among others of its kind.

    Args:
        call: What is timed.
        variants: Its arguments, one call after the other, from the first again.
        linked: Whether each call waits for the one before, as in a model. A GPU would overlap
            them, a CPU does not; what the waiting itself takes is measured and left out.
    """
    _chain_s(call, variants[:1], linked)  # what is compiled on the way does not count
    once = _chain_s(call, variants[:1], linked)
    calls = CHAIN if linked else len(variants)
    calls = max(1, min(calls, int(BUDGET_S / once)))
    chain = [variants[i % len(variants)] for i in range(calls)]
    least, most = REPETITIONS
    repetitions = min(max(int(BUDGET_S / once / calls), least), most)
    taken = statistics.median(_chain_s(call, chain, linked) for _ in range(repetitions))
    if linked:
        bare = statistics.median(_chain_s(_nothing, chain, linked) for _ in range(most))
        taken -= min(bare, 0.9 * taken)
    return taken / calls


def _nothing(x: mx.array, *_: mx.array) -> mx.array:
    return x


def _chain_s(call: Call, chain: Sequence[tuple[mx.array, ...]], linked: bool) -> float:
    """Seconds from a graph that is built to its last answer."""
    answers: list[mx.array] = []
    for x, *rest in chain:
        if linked and answers:
            x = x + 0 * answers[0].reshape(-1)[:1].astype(x.dtype)
        made = _flat(call(x, *rest))
        answers = made if linked else answers + made
    begun = time.perf_counter()
    mx.eval(answers)
    return time.perf_counter() - begun
