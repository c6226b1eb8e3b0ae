"""The compiled kernels of what is not a weight matrix, and the modules that call them.

Each kernel against float64, on every instruction set of the machine; then bit for bit against
itself under other threads, chunks, heads and strides; then mlx-lm's modules with the kernels
swapped in against the same modules without.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import nemotron_h, qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache, RotatingKVCache

from mlx_flash.kernels import attention as attention_door
from mlx_flash.kernels import gated_delta, mlp, native, norm, ssm, why_not

if native() is None:
    pytest.skip(f"SKIPPED LOUDLY: no compiled kernels: {why_not()}", allow_module_level=True)
kernels: Any = native()

ISAS = ["portable", "avx2", "avx512", "neon"]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
ROUNDING = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
TINY = 2.0**-24  # half precision has no finer values
EPS = 2.0**-24
DOORS = (norm, gated_delta, ssm, attention_door, mlp)

few = settings(max_examples=30, deadline=None)
every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).rpartition(".")[2])


@contextmanager
def running(isa: str) -> Iterator[None]:
    before = kernels.isa()
    try:
        kernels.set_isa(isa)
    except ValueError:
        pytest.skip(f"SKIPPED LOUDLY: this machine has no {isa}")
    try:
        yield
    finally:
        kernels.set_isa(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def some(rng: np.random.Generator, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def exact(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def bits(x: mx.array) -> bytes:
    return np.array(mx.contiguous(x).view(mx.uint8)).tobytes()


def near(got: mx.array, want: np.ndarray, bound: Any) -> None:
    """Every element within ``bound``, and within the rounding of its dtype."""
    assert got.shape == want.shape
    allowed = bound + ROUNDING[got.dtype] * np.abs(want) * 1.01 + TINY * (got.dtype == mx.float16)
    assert (np.abs(exact(got) - want) <= allowed + 1e-37).all()


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


# --- norms, activations, router -------------------------------------------------------------


@every_isa
@few
@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    size=st.sampled_from([1.0, 1e-3]),  # the second is as small as eps
)
def test_rms_norm(isa: str, rows: int, width: int, dtype: Any, weighted: bool, size: float) -> None:
    rng = np.random.default_rng(width)
    x = some(rng, rows, width, dtype=dtype) * size
    weight = some(rng, width, dtype=dtype) if weighted else None
    with running(isa):
        y = kernels.rms_norm(x, weight, 1e-6)
        mx.eval(y)
    want = exact(x) / np.sqrt((exact(x) ** 2).mean(-1, keepdims=True) + 1e-6)
    want = want * exact(weight) if weight is not None else want
    # A sum of n squares is off by n roundings at most, its root by half of that.
    near(y, want, (width / 2 + 6) * EPS * np.abs(want))
    assert y.dtype == dtype


@every_isa
@few
@given(rows=st.integers(0, 4), width=st.integers(1, 200), dtype=st.sampled_from(DTYPES))
def test_gates_and_gated_norms(isa: str, rows: int, width: int, dtype: Any) -> None:
    rng = np.random.default_rng(width)
    x, gate = some(rng, rows, 2 * width, dtype=dtype), some(rng, rows, 2 * width, dtype=dtype) * 4
    weight = some(rng, 2 * width, dtype=dtype)
    with running(isa):
        got = [
            kernels.swiglu(gate, x),
            kernels.sigmoid_gate(x, gate),
            kernels.rms_norm_gated(x, gate, weight, 1e-5),
            kernels.gated_rms_norm(x, gate, weight, 1e-5, width),
        ]
        mx.eval(got)
    a, g, w = exact(x), exact(gate), exact(weight)
    inner = (silu(g) * a).reshape(rows, 2, width)
    groups = inner / np.sqrt((inner**2).mean(-1, keepdims=True) + 1e-5)
    want = [
        silu(g) * a,
        a / (1 + np.exp(-g)),
        a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-5) * w * silu(g),
        groups.reshape(rows, 2 * width) * w,
    ]
    for y, z in zip(got, want, strict=True):
        near(y, z, (width + 16) * EPS * np.abs(z))


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    # (1 + tanh(z)) / 2 is sigmoid(2 z), which has a tail where the sum cancels.
    return x * sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]] = {
    "swiglu": lambda g, u, limit, alpha: silu(g) * u,
    "clamped": lambda g, u, limit, alpha: (
        np.minimum(g, limit)
        * sigmoid(alpha * np.minimum(g, limit))
        * (np.clip(u, -limit, limit) + 1)
    ),
    "limited": lambda g, u, limit, alpha: silu(np.minimum(g, limit)) * np.clip(u, -limit, limit),
    "capped": lambda g, u, limit, alpha: np.minimum(silu(g), limit) * np.clip(u, -limit, limit),
    "situ": lambda g, u, limit, alpha: (
        limit * np.tanh(g / limit) * sigmoid(g) * (alpha * np.tanh(u / alpha) if alpha else u)
    ),
    "geglu": lambda g, u, limit, alpha: gelu(g) * u,
    "relu2": lambda g, u, limit, alpha: np.maximum(u, 0) ** 2,
    "silu": lambda g, u, limit, alpha: silu(u),
    "gelu": lambda g, u, limit, alpha: gelu(u),
}


def activated(name: str, gate: mx.array, up: mx.array, limit: float, alpha: float) -> mx.array:
    """An activation alone: of an expert whose matrices pass on what they get."""
    width = gate.shape[-1]
    one, none = mx.eye(width), mx.zeros((width, width))
    first, second, down = (
        kernels.Weights(w[None], None, None, None, 0, 0, "dense")
        for w in (mx.concatenate([one, none], 1), mx.concatenate([none, one], 1), one)
    )
    gated = name not in ("relu2", "silu", "gelu")
    expert = kernels.Experts(first if gated else None, second, down, name, limit, alpha)
    x = mx.concatenate([gate, up], axis=-1)
    return expert(x, mx.zeros((*x.shape[:-1], 1), mx.uint32))[..., 0, :]


@every_isa
@pytest.mark.parametrize("name", FORMULAS)
@few
@given(
    rows=st.sampled_from([1, 9]),  # by row, and by the matrix kernel
    width=st.integers(1, 70),
    size=st.sampled_from([0.01, 1.0, 8.0]),
    limit=st.sampled_from([0.5, 1.0, 7.0]),
    alpha=st.sampled_from([0.0, 1.702, 4.0]),
)
def test_activations(
    isa: str, name: str, rows: int, width: int, size: float, limit: float, alpha: float
) -> None:
    rng = np.random.default_rng(width)
    gate, up = some(rng, 1, rows, width) * size, some(rng, 1, rows, width) * size
    with running(isa):
        y = activated(name, gate, up, limit, alpha)
        mx.eval(y)
    g, u = exact(gate), exact(up)
    want = FORMULAS[name](g, u, float(np.float32(limit)), float(np.float32(alpha)))
    # A few roundings of each factor, and those of an exponent: |z| of e^z reaches 2 z(|g|).
    exponent = 2 * np.abs(u if name in ("silu", "gelu") else g) * (1 + alpha)
    exponent = exponent + 0.08 * np.abs(exponent / 2) ** 3 * ("gelu" in name or name == "geglu")
    # Where e^z is beyond float32 its reciprocal is 0: below 1e-38 of what it is multiplied with.
    near(y, want, (16 + 3 * exponent) * EPS * np.abs(want) + 1e-34)
    assert np.abs(exact(y) - want).max() <= 1e-6 * np.abs(want).max() + 1e-30


@every_isa
@pytest.mark.parametrize("name", FORMULAS)
def test_activations_of_numbers_without_bounds(isa: str, name: str) -> None:
    ends = [-3e38, -1e13, -200.0, -104.0, -88.8, -1e-30, 0.0, 1e-30, 20.0, 88.8, 104.0, 1e13]
    gate = mx.array(ends)[None, None]
    with running(isa):
        y = activated(name, gate, mx.ones_like(gate), 7.0, 1.5)
        mx.eval(y)
    with np.errstate(over="ignore"):
        want = FORMULAS[name](exact(gate), np.ones((1, 1, len(ends))), 7.0, 1.5)
    np.testing.assert_allclose(exact(y), want, rtol=2e-6, atol=1e-24)


@every_isa
def test_activations_at_the_ends_of_float(isa: str) -> None:
    x = mx.array([-np.inf, -3e38, -104.0, -88.8, -87.0, -1e-30, 0.0, 1e-30, 20.0, 88.8, 3e38])
    ones = mx.ones_like(x)
    with running(isa):
        gate = np.array(kernels.sigmoid_gate(ones, x))
        nan = np.array(kernels.sigmoid_gate(mx.ones(3), mx.array([np.nan, np.inf, 1.0])))
    with np.errstate(over="ignore"):
        want = 1 / (1 + np.exp(-exact(x)))
    assert gate[0] == 0 and gate[1] == 0 and gate[-1] == 1
    np.testing.assert_allclose(gate[4:], want[4:], rtol=4 * EPS)
    assert np.isnan(nan[0]) and nan[1] == 1 and 0.7 < nan[2] < 0.8


@every_isa
def test_the_exponential_is_good_to_two_units(isa: str) -> None:
    # beta = 1 / (1 + e^-b) is e^b for b far below zero, and g = exp(-e^0 softplus(a)).
    b = mx.array(np.linspace(-86, -18, 20001, dtype=np.float32)).reshape(-1, 1)
    a = mx.array(np.linspace(-80, 80, 20001, dtype=np.float32)).reshape(-1, 1)
    with running(isa):
        g, beta = kernels.gated_delta_gates(a, b, mx.zeros(1), mx.zeros(1))
        mx.eval(g, beta)
    want = 1 / (1 + np.exp(-exact(b)))
    assert (np.abs(exact(beta) - want) <= 4 * EPS * want).all()
    softplus = np.logaddexp(exact(a), 0)
    want = np.exp(-softplus)
    # softplus is good to 4 roundings, which its exponential multiplies by softplus itself.
    assert (np.abs(exact(g) - want) <= (4 + 4 * softplus) * EPS * want + 1e-37).all()


@every_isa
@few
@given(
    rows=st.integers(0, 4),
    experts=st.integers(1, 300),
    k=st.integers(0, 12),
    norm=st.booleans(),
    levels=st.sampled_from([3, 10**6]),
)
def test_softmax_topk(isa: str, rows: int, experts: int, k: int, norm: bool, levels: int) -> None:
    rng = np.random.default_rng(experts)
    k = min(k, experts)
    logits = rng.integers(-levels, levels, (rows, experts)).astype(np.float32) * (4 / levels)
    with running(isa):
        indices, scores = kernels.softmax_topk(mx.array(logits), k, norm)
        mx.eval(indices, scores)
    want = np.argsort(-logits, axis=-1, kind="stable")[:, :k]  # ties: the lower index first
    assert (np.array(indices).reshape(rows, k) == want).all()
    weights = np.exp(logits - logits.max(-1, keepdims=True, initial=-1e9).astype(np.float64))
    weights /= weights.sum(-1, keepdims=True)
    best = np.take_along_axis(weights, want, -1)
    if norm and k:
        best = best / best.sum(-1, keepdims=True)
    near(scores, best, (experts + 16) * EPS * best)


def test_the_router_without_kernels_chooses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = mx.array(np.random.default_rng(0).integers(-3, 3, (50, 40)).astype(np.float32))
    ours = mlp.softmax_topk(logits, 6, True)
    monkeypatch.setattr(mlp, "kernels_for", lambda *arrays: None)
    indices, scores = mlp.softmax_topk(logits, 6, True)
    assert (ours[0] == indices).all()
    assert mx.allclose(ours[1], scores, rtol=1e-6)


# --- recurrences ----------------------------------------------------------------------------


@every_isa
@few
@given(
    batch=st.integers(0, 2),
    tokens=st.integers(0, 70),
    channels=st.integers(1, 600),
    taps=st.integers(2, 6),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    with_silu=st.booleans(),
)
def test_conv1d(
    isa: str,
    batch: int,
    tokens: int,
    channels: int,
    taps: int,
    dtype: Any,
    biased: bool,
    with_silu: bool,
) -> None:
    rng = np.random.default_rng(channels)
    history = some(rng, batch, taps - 1, channels, dtype=dtype)
    x = some(rng, batch, tokens, channels, dtype=dtype)
    weight = some(rng, channels, taps, 1, dtype=dtype)
    bias = some(rng, channels, dtype=dtype) if biased else None
    with running(isa):
        y, after = kernels.conv1d(history, x, weight, bias, with_silu)
        mx.eval(y, after)
    seen = np.concatenate([exact(history), exact(x)], axis=1)
    w = exact(weight)[:, :, 0]
    parts = [seen[:, j : j + tokens] * w[:, j] for j in range(taps)]
    size = sum(np.abs(p) for p in parts) + (0 if bias is None else np.abs(exact(bias)))
    want = sum(parts) + (0 if bias is None else exact(bias))
    # |silu'| is below 1.1.
    near(y, silu(want) if with_silu else want, (taps + 9) * EPS * 1.1 * size)
    assert (exact(after) == seen[:, tokens:]).all() and after.dtype == dtype


def delta_inputs(
    rng: np.random.Generator,
    batch: int,
    tokens: int,
    key_heads: int,
    each: int,
    dk: int,
    dv: int,
    dtype: mx.Dtype = mx.float32,
) -> tuple[mx.array, ...]:
    heads = key_heads * each
    q = some(rng, batch, tokens, key_heads, dk, dtype=dtype)
    k = some(rng, batch, tokens, key_heads, dk, dtype=dtype)
    v = some(rng, batch, tokens, heads, dv, dtype=dtype)
    g, beta = (mx.array(rng.uniform(0, 1, (batch, tokens, heads)), mx.float32) for _ in range(2))
    return q, k, v, g, beta, some(rng, batch, heads, dv, dk)


@every_isa
@few
@given(
    batch=st.integers(0, 2),
    tokens=st.integers(0, 40),
    key_heads=st.integers(1, 2),
    each=st.integers(1, 2),
    dk=st.sampled_from([16, 20, 64, 100, 128, 192, 256]),
    dv=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_gated_delta(
    isa: str, batch: int, tokens: int, key_heads: int, each: int, dk: int, dv: int, dtype: Any
) -> None:
    rng = np.random.default_rng(dk)
    inputs = delta_inputs(rng, batch, tokens, key_heads, each, dk, dv, dtype)
    q, k, v, g, beta = (exact(x) for x in inputs[:5])
    with running(isa):
        y, after = kernels.gated_delta(*inputs, True)
        mx.eval(y, after)
    q = q / np.sqrt((q**2).sum(-1, keepdims=True) + 1e-6) * dk**-0.5
    k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
    q, k = np.repeat(q, each, axis=2), np.repeat(k, each, axis=2)
    state, size = exact(inputs[5]), 1.0
    want = np.zeros(v.shape)
    for t in range(tokens):
        state = state * g[:, t, :, None, None]
        learned = (v[:, t] - np.einsum("bhvk,bhk->bhv", state, k[:, t])) * beta[:, t, :, None]
        state = state + learned[..., None] * k[:, t, :, None]
        want[:, t] = np.einsum("bhvk,bhk->bhv", state, q[:, t])
        size = max(size, np.sqrt((state**2).sum(-1)).max(initial=0), np.abs(v[:, t]).max(initial=0))
    # The rule is a contraction (|k| = 1, g and beta at most 1): each token adds one product's
    # error, dk roundings of at most |S| |k|, and what came before does not grow.
    bound = (tokens + 1) * 4 * (dk + 16) * EPS * size
    near(y, want, bound)
    near(after, state, bound)


def ssm_inputs(
    rng: np.random.Generator,
    batch: int,
    tokens: int,
    groups: int,
    each: int,
    dim: int,
    n: int,
    dtype: mx.Dtype = mx.float32,
) -> tuple[mx.array, ...]:
    heads = groups * each
    x = some(rng, batch, tokens, heads, dim, dtype=dtype)
    b, c = (some(rng, batch, tokens, groups, n, dtype=dtype) for _ in range(2))
    log_a, skip, dt_bias = (some(rng, heads) for _ in range(3))
    dt = some(rng, batch, tokens, heads, dtype=dtype)
    return x, log_a, b, c, skip, dt, dt_bias, some(rng, batch, heads, dim, n)


@every_isa
@few
@given(
    batch=st.integers(0, 2),
    tokens=st.integers(0, 40),
    groups=st.integers(1, 2),
    each=st.integers(1, 2),
    dim=st.integers(1, 9),
    n=st.sampled_from([16, 20, 64, 100, 128, 256]),
    dtype=st.sampled_from(DTYPES),
)
def test_ssm(
    isa: str, batch: int, tokens: int, groups: int, each: int, dim: int, n: int, dtype: Any
) -> None:
    rng = np.random.default_rng(n)
    inputs = ssm_inputs(rng, batch, tokens, groups, each, dim, n, dtype)
    x, log_a, b, c, skip, dt, dt_bias, state = (exact(i) for i in inputs)
    with running(isa):
        y, after = kernels.ssm(*inputs, (0.01, 2.0))
        mx.eval(y, after)
    dt = np.clip(np.logaddexp(dt + dt_bias, 0), 0.01, 2.0)
    b, c = np.repeat(b, each, axis=2), np.repeat(c, each, axis=2)
    want, size, state_size = np.zeros(x.shape), np.zeros(x.shape), np.abs(state)
    for t in range(tokens):
        decay = np.exp(-np.exp(log_a) * dt[:, t])[..., None, None]
        add = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = state * decay + add
        state_size = state_size * decay + np.abs(add)
        want[:, t] = np.einsum("bhdn,bhn->bhd", state, c[:, t]) + skip[:, None] * x[:, t]
        size[:, t] = np.einsum("bhdn,bhn->bhd", state_size, np.abs(c[:, t]))
        size[:, t] += np.abs(skip[:, None] * x[:, t])
    # Every factor of a term is good to some roundings (the decay's exponent reaches 2 e^3), and
    # a term is multiplied once a token.
    steps = (tokens + 1) * (16 + 2 * np.exp(np.abs(log_a).max()))
    near(y, want, (steps + n) * EPS * size)
    near(after, state, steps * EPS * state_size)


# --- rotary embeddings and attention --------------------------------------------------------


def turned(x: np.ndarray, dims: int, traditional: bool, theta: np.ndarray) -> np.ndarray:
    # theta: [..., T, dims / 2]
    y = x.copy()
    first = np.s_[..., 0:dims:2] if traditional else np.s_[..., : dims // 2]
    second = np.s_[..., 1:dims:2] if traditional else np.s_[..., dims // 2 : dims]
    y[first] = x[first] * np.cos(theta) - x[second] * np.sin(theta)
    y[second] = x[first] * np.sin(theta) + x[second] * np.cos(theta)
    return y


@every_isa
@few
@given(
    tokens=st.integers(0, 5),
    half=st.integers(1, 40),
    rest=st.integers(0, 30),
    traditional=st.booleans(),
    offset=st.sampled_from([0, 5, 30000, "scalar", "each"]),
    given_freqs=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_rope(
    isa: str,
    tokens: int,
    half: int,
    rest: int,
    traditional: bool,
    offset: Any,
    given_freqs: bool,
    dtype: Any,
) -> None:
    rng = np.random.default_rng(half)
    x = some(rng, 2, 3, tokens, 2 * half + rest, dtype=dtype)
    offsets = {"scalar": mx.array(9), "each": mx.array([4, 700])}.get(offset, offset)
    freqs = mx.array(rng.uniform(1, 50, half), mx.float32) if given_freqs else None
    base = None if given_freqs else 10000.0
    with running(isa):
        y = kernels.rope(x, 2 * half, traditional, base, 0.5, offsets, freqs)
        mx.eval(y)
    # Angles are float32 by definition, as in MLX: beyond that, everything is exact here.
    if given_freqs:
        turn = np.float32(1) / np.array(freqs)
    else:
        step = np.log(np.float32(10000)) / np.float32(half)
        turn = np.array(mx.exp(mx.arange(0, -half, -1, mx.float32) * mx.array(step)))
    start = np.array(offsets, np.float32).reshape(-1, 1)
    positions = (start + np.arange(tokens, dtype=np.float32)) * np.float32(0.5)
    theta = (positions[..., None] * turn).astype(np.float64)[:, None]
    size = np.abs(exact(x)).max(initial=0)
    near(y, turned(exact(x), 2 * half, traditional, theta), 6 * EPS * size)


@pytest.mark.parametrize("offset", [0, 3, 4000, mx.array([1, 2])], ids=str)
def test_rope_agrees_with_mlx(rng: np.random.Generator, offset: Any) -> None:
    x = some(rng, 2, 3, 9, 64).transpose(0, 1, 2, 3)
    want = mx.fast.rope(x, 32, traditional=False, base=1e6, scale=1.0, offset=offset)
    assert mx.allclose(kernels.rope(x, 32, False, 1e6, 1.0, offset), want, atol=2e-6)


@every_isa
@few
@given(
    kv=st.integers(1, 2),
    group=st.integers(1, 9),
    tokens=st.integers(0, 20),
    more=st.integers(0, 150),
    dim=st.integers(1, 140),
    vdim=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    sinks=st.booleans(),
)
def test_attention(
    isa: str,
    kv: int,
    group: int,
    tokens: int,
    more: int,
    dim: int,
    vdim: int,
    dtype: Any,
    causal: bool,
    sinks: bool,
) -> None:
    rng = np.random.default_rng(dim)
    length = more + (tokens if causal else 0)
    q = some(rng, 2, tokens, kv * group, dim, dtype=dtype).transpose(0, 2, 1, 3)
    k = some(rng, 2, kv, length + 3, dim, dtype=dtype)[:, :, :length]
    v = some(rng, 2, kv, length + 3, vdim, dtype=dtype)[:, :, :length]
    sink = some(rng, kv * group) if sinks else None
    scale = dim**-0.5
    with running(isa):
        y = kernels.attention(q, k, v, scale, "causal" if causal else None, sink)
        mx.eval(y)
    keys, values = (np.repeat(exact(x), group, axis=1) for x in (k, v))
    logits = np.einsum("bhld,bhnd->bhln", exact(q), keys) * scale
    if causal:
        past = np.arange(length) <= np.arange(length - tokens, length)[:, None]
        logits = np.where(past, logits, -np.inf)
    if sink is not None:
        extra = np.broadcast_to(exact(sink)[None, :, None, None], (*logits.shape[:3], 1))
        logits = np.concatenate([logits, extra], axis=-1)
    if logits.shape[-1] == 0:
        assert (exact(y) == 0).all()
        return
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True))[..., :length]
    want = np.einsum("bhln,bhnv->bhlv", weights, values)
    # A logit is off by dim roundings of |q| |k|, a weight by as much times itself; then sums.
    sizes = np.einsum("bhld,bhnd->bhln", np.abs(exact(q)), np.abs(keys)).max(initial=0) * scale
    size = np.einsum("bhln,bhnv->bhlv", weights, np.abs(values))
    near(y, want, 2 * ((dim + 8) * sizes + length + 32) * EPS * size)


def test_attention_agrees_with_mlx(rng: np.random.Generator) -> None:
    for tokens, length, mask in ((1, 300, None), (40, 90, "causal"), (9, 9, "causal")):
        q, k, v = (some(rng, 2, h, n, 64) for h, n in ((8, tokens), (2, length), (2, length)))
        want = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=mask)
        assert mx.allclose(kernels.attention(q, k, v, 0.1, mask), want, atol=3e-6)


# --- the same bits, whatever the circumstances ----------------------------------------------


def mix_of_all(rng: np.random.Generator, dtype: mx.Dtype) -> list[mx.array]:
    """One result of every kernel, large enough for several threads."""
    x, gate = some(rng, 60, 700, dtype=dtype), some(rng, 60, 700, dtype=dtype)
    weight, log_a = some(rng, 700, dtype=dtype), some(rng, 4)
    q, k = some(rng, 1, 4, 50, 64, dtype=dtype), some(rng, 1, 2, 90, 64, dtype=dtype)
    delta = delta_inputs(rng, 1, 50, 2, 2, 128, 21, dtype)
    results = [
        kernels.rms_norm(x, weight, 1e-6),
        kernels.rms_norm_gated(x, gate, weight, 1e-6),
        kernels.gated_rms_norm(x, gate, weight, 1e-6, 70),
        kernels.swiglu(x, gate),
        kernels.sigmoid_gate(x, gate),
        *kernels.softmax_topk(x, 8, True),
        *kernels.conv1d(
            some(rng, 1, 3, 700, dtype=dtype),
            x[None],
            some(rng, 700, 4, 1),
            weight,
            True,
        ),
        *kernels.gated_delta_gates(x[:, :4], gate[:, :4], log_a, log_a),
        *kernels.gated_delta(*delta, True),
        *kernels.ssm(*ssm_inputs(rng, 1, 50, 2, 2, 21, 128, dtype), (0.001, 100.0)),
        kernels.rope(q, 32, False, 1e4, 1.0, 3),
        kernels.attention(q, k, k, 0.1, "causal", log_a),
    ]
    mx.eval(results)
    return results


@every_isa
@every_dtype
def test_threads_change_no_bit(isa: str, dtype: Any) -> None:
    before = kernels.threads()
    try:
        with running(isa):
            kernels.set_threads(1)
            one = mix_of_all(np.random.default_rng(3), dtype)
            kernels.set_threads(2)
            two = mix_of_all(np.random.default_rng(3), dtype)
    finally:
        kernels.set_threads(before)
    assert all(bits(a) == bits(b) for a, b in zip(one, two, strict=True))


Step = Callable[[slice, Any], tuple[mx.array, Any]]


def delta_steps(rng: np.random.Generator, width: int, dtype: mx.Dtype) -> tuple[Step, Any]:
    *inputs, state = delta_inputs(rng, 1, 64, 1, 2, width, 17, dtype)
    return lambda s, now: kernels.gated_delta(*(x[:, s] for x in inputs), now, True), state


def ssm_steps(rng: np.random.Generator, width: int, dtype: mx.Dtype) -> tuple[Step, Any]:
    x, log_a, b, c, skip, dt, bias, state = ssm_inputs(rng, 1, 64, 1, 2, 17, width, dtype)

    def step(s: slice, now: Any) -> tuple[mx.array, Any]:
        limit = (0.0, np.inf)
        return kernels.ssm(x[:, s], log_a, b[:, s], c[:, s], skip, dt[:, s], bias, now, limit)

    return step, state


def conv_steps(rng: np.random.Generator, width: int, dtype: mx.Dtype) -> tuple[Step, Any]:
    x, weight = some(rng, 1, 64, width, dtype=dtype), some(rng, width, 4, 1)
    history = some(rng, 1, 3, width, dtype=dtype)
    return lambda s, now: kernels.conv1d(now, x[:, s], weight, None, True), history


def attention_steps(rng: np.random.Generator, width: int, dtype: mx.Dtype) -> tuple[Step, Any]:
    queries = some(rng, 1, 64, 6, width, dtype=dtype)
    keys = some(rng, 1, 2, 94, width, dtype=dtype)

    def step(s: slice, now: Any) -> tuple[mx.array, Any]:
        seen = keys[:, :, : 30 + s.stop]
        y = kernels.attention(queries[:, s].swapaxes(1, 2), seen, seen, 0.1, "causal")
        return y.swapaxes(1, 2), now

    return step, mx.zeros(0)


@every_isa
@every_dtype
@pytest.mark.parametrize("width", [128, 52])
@pytest.mark.parametrize("make", [delta_steps, ssm_steps, conv_steps, attention_steps])
def test_chunks_change_no_bit(isa: str, dtype: Any, width: int, make: Any) -> None:
    step, start = make(np.random.default_rng(5), width, dtype)
    results = []
    with running(isa):
        for size in (64, 16, 1):
            parts, state = [], start
            for t in range(0, 64, size):
                y, state = step(slice(t, t + size), state)
                parts.append(y)
            y = mx.concatenate(parts, axis=1)
            mx.eval(y, state)
            results.append((bits(y), bits(state)))
    assert results[0] == results[1] == results[2]


@every_isa
def test_heads_and_strides_change_no_bit(isa: str, rng: np.random.Generator) -> None:
    q, k, v, g, beta, state = delta_inputs(rng, 1, 5, 2, 2, 64, 9)
    wide = mx.concatenate([q, q, k], axis=-1)  # rows of q and k as a split leaves them
    queries, keys = some(rng, 1, 6, 7, 40), some(rng, 1, 2, 50, 40)
    with running(isa):
        y, after = kernels.gated_delta(q, k, v, g, beta, state, True)
        left, left_after = kernels.gated_delta(
            wide[:, :, :1, 64:128],
            wide[:, :, :1, 128:],
            mx.swapaxes(mx.contiguous(mx.swapaxes(v, 1, 3)), 1, 3)[:, :, :2],
            g[:, :, :2],
            beta[:, :, :2],
            state[:, :2],
            True,
        )
        assert bits(left) == bits(y[:, :, :2]) and bits(left_after) == bits(after[:, :2])
        all_heads = kernels.attention(queries, keys, keys, 0.1, "causal")
        columns = mx.swapaxes(mx.contiguous(mx.swapaxes(keys, 2, 3)), 2, 3)  # rows in pieces
        one = kernels.attention(queries[:, 4:5], columns[:, 1:], columns[:, 1:], 0.1, "causal")
        assert bits(one) == bits(all_heads[:, 4:5])


def test_a_state_that_others_hold_is_not_written(rng: np.random.Generator) -> None:
    *inputs, state = delta_inputs(rng, 1, 3, 1, 1, 64, 8)
    before = bits(state)
    mx.eval(kernels.gated_delta(*inputs, state))
    assert bits(state) == before
    *inputs, state = ssm_inputs(rng, 1, 3, 1, 1, 8, 64)
    before = bits(state)
    mx.eval(kernels.ssm(*inputs, state, (0.0, 1.0)))
    assert bits(state) == before


def test_wrong_shapes_are_refused(rng: np.random.Generator) -> None:
    q, k, v, g, beta, state = delta_inputs(rng, 1, 3, 2, 2, 16, 8)
    x = some(rng, 1, 3, 8)
    calls = [
        lambda: kernels.rms_norm(x, mx.ones(7), 1e-6),
        lambda: kernels.rms_norm(x.astype(mx.int32), None, 1e-6),
        lambda: kernels.swiglu(x, x[:, :2]),
        lambda: kernels.softmax_topk(x, 9, True),
        lambda: kernels.gated_rms_norm(x, x, mx.ones(8), 1e-6, 3),
        lambda: kernels.conv1d(x, x, mx.ones((8, 3, 1)), None, True),
        lambda: kernels.conv1d(x[:, :2], x, mx.ones((8, 3, 2)), None, True),
        lambda: kernels.gated_delta(q, k, v, g, beta, state[:, :1]),
        lambda: kernels.gated_delta(q, k, v, g, beta, state.astype(mx.float16)),
        lambda: kernels.gated_delta(q, k[..., :8], v, g, beta, state),
        lambda: kernels.rope(x, 3, False, 1e4, 1.0, 0),
        lambda: kernels.rope(x, 4, False, None, 1.0, 0),
        lambda: kernels.attention(q, q, q, 1.0, "other"),
        lambda: kernels.attention(q, q[:, :2], k, 1.0),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()


# --- modules --------------------------------------------------------------------------------

QWEN3_5 = qwen3_5.TextModelArgs(
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=24,
    linear_value_head_dim=16,
)
QWEN3_NEXT = qwen3_next.ModelArgs(
    model_type="qwen3_next",
    hidden_size=48,
    num_hidden_layers=1,
    intermediate_size=40,
    num_attention_heads=6,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=24,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
    num_experts=0,
    num_experts_per_tok=0,
    decoder_sparse_step=1,
    shared_expert_intermediate_size=0,
    mlp_only_layers=[],
    moe_intermediate_size=0,
    rms_norm_eps=1e-6,
    vocab_size=10,
    num_key_value_heads=2,
    rope_theta=1e6,
    partial_rotary_factor=0.25,
    max_position_embeddings=1000,
    head_dim=32,
)
NEMOTRON_H = nemotron_h.ModelArgs(
    model_type="nemotron_h",
    vocab_size=10,
    hidden_size=48,
    intermediate_size=40,
    max_position_embeddings=1000,
    num_attention_heads=6,
    num_key_value_heads=2,
    attention_bias=True,
    head_dim=32,
    mamba_num_heads=4,
    mamba_head_dim=12,
    mamba_proj_bias=False,
    ssm_state_size=20,
    conv_kernel=4,
    n_groups=2,
    mlp_bias=False,
    layer_norm_epsilon=1e-5,
    use_bias=False,
    use_conv_bias=True,
    hybrid_override_pattern=["M"],
)

MIXERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "qwen3_5-delta": (lambda: qwen3_5.GatedDeltaNet(QWEN3_5), lambda: ArraysCache(2)),
    "qwen3_next-delta": (
        lambda: qwen3_next.Qwen3NextGatedDeltaNet(QWEN3_NEXT),
        lambda: ArraysCache(2),
    ),
    "nemotron_h-mamba2": (
        lambda: nemotron_h.NemotronHMamba2Mixer(NEMOTRON_H),
        lambda: ArraysCache(2),
    ),
    "qwen3_next-attention": (lambda: qwen3_next.Qwen3NextAttention(QWEN3_NEXT), KVCache),
    "nemotron_h-attention": (lambda: nemotron_h.NemotronHAttention(NEMOTRON_H), KVCache),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)


def pair(name: str, dtype: mx.Dtype = mx.float32) -> tuple[nn.Module, nn.Module]:
    """A module of random weights, and the same with the kernels swapped in."""
    rng = np.random.default_rng(11)
    stock, ours = MIXERS[name][0](), MIXERS[name][0]()
    weights = tree_map(lambda w: some(rng, *w.shape) * 0.3 + 0.2, stock.parameters())
    for module in (stock, ours):
        module.update(tree_map(lambda w: w.astype(dtype), weights))
        module.eval()
    for door in DOORS:
        door.use_native(ours)
    assert type(ours) is not type(stock) and isinstance(ours, type(stock))
    return stock, ours


def mask_of(name: str, tokens: int) -> str | None:
    return "causal" if name.endswith("attention") and tokens > 1 else None


def state_of(cache: Any) -> list[mx.array]:
    return [x for _, x in tree_flatten(cache.state) if isinstance(x, mx.array)]


@every_mixer
def test_a_swapped_mixer_answers_as_before(name: str, rng: np.random.Generator) -> None:
    stock, ours = pair(name)
    caches = [MIXERS[name][1]() for _ in range(2)]
    for tokens in (37, 1, 1, 70, 1):  # prefill, decode, another chunk, decode
        x = some(rng, 2, tokens, 48)
        want, got = (
            module(x, mask_of(name, tokens), cache)
            for module, cache in zip((stock, ours), caches, strict=True)
        )
        mx.eval(want, got)
        assert mx.allclose(got, want, rtol=1e-4, atol=2e-5), float(mx.abs(got - want).max())
        for a, b in zip(state_of(caches[1]), state_of(caches[0]), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert mx.allclose(a, b, rtol=1e-4, atol=2e-5)
    assert mx.allclose(ours(x, None, None), stock(x, None, None), rtol=1e-4, atol=2e-5)


@every_mixer
def test_a_mixer_in_bfloat16_is_nearer_to_the_truth_than_before(
    name: str, rng: np.random.Generator
) -> None:
    stock, ours = pair(name, mx.bfloat16)
    x, mask = some(rng, 8, 40, 48, dtype=mx.bfloat16), mask_of(name, 40)
    answers = ours(x, mask, None), stock(x, mask, None)
    stock.update(tree_map(lambda w: w.astype(mx.float32), stock.parameters()))
    truth = stock(x.astype(mx.float32), mask, None)
    ours_off, stock_off = (float(mx.abs(y - truth).mean()) for y in answers)
    assert answers[0].dtype == mx.bfloat16
    assert ours_off < stock_off


@every_mixer
def test_what_kernels_do_not_take_goes_the_old_way(name: str, rng: np.random.Generator) -> None:
    stock, ours = pair(name)
    x = some(rng, 2, 9, 48)
    if name.endswith("attention"):
        causal = mx.tril(mx.ones((9, 9), mx.bool_))
        caches: list[Callable[[], Any]] = [
            KVCache,
            lambda: RotatingKVCache(4),
            lambda: QuantizedKVCache(32, 8),
        ]
        masks: list[Any] = [causal, causal, "causal"]
    else:
        caches = [lambda: ArraysCache(2), lambda: ArraysCache(2, left_padding=[0, 3])]
        masks = [mx.array([[True] * 9, [False] * 4 + [True] * 5])] * 2
    for make, mask in zip(caches, masks, strict=True):
        a, b = make(), make()
        assert mx.allclose(ours(x, mask, a), stock(x, mask, b), rtol=1e-4, atol=2e-5)
        for got, want in zip(state_of(a), state_of(b), strict=True):
            assert mx.allclose(got.astype(mx.float32), want.astype(mx.float32), atol=2e-5)
    if not name.endswith("attention"):
        a, b = ArraysCache(2), ArraysCache(2)
        a.prepare([9, 5]), b.prepare([9, 5])
        assert mx.allclose(ours(x, None, a), stock(x, None, b), rtol=1e-4, atol=2e-5)
        assert (a.lengths == b.lengths).all()
        assert mx.allclose(a[0], b[0], atol=2e-5)


@every_dtype
def test_small_modules_answer_as_before(dtype: Any, rng: np.random.Generator) -> None:
    x, gate = some(rng, 2, 5, 48, dtype=dtype), some(rng, 2, 5, 48, dtype=dtype)
    heads = some(rng, 2, 3, 5, 48, dtype=dtype)
    calls: list[tuple[nn.Module, tuple[Any, ...]]] = [
        (nn.RMSNorm(48), (x,)),
        (qwen3_next.Qwen3NextRMSNormGated(48), (x, gate)),
        (qwen3_next.Qwen3NextRMSNormGated(48), (x,)),
        (nemotron_h.MambaRMSNormGated(48, 1e-5, 16), (x, gate)),
        (nn.RoPE(32), (heads, 5)),
        (nn.RoPE(48, traditional=True, base=100.0, scale=0.5), (heads, mx.array([4, 8]))),
        (qwen3_next.Qwen3NextMLP(48, 64), (x,)),
    ]
    for module, inputs in calls:
        module.update(tree_map(lambda w: w.astype(dtype), module.parameters()))
        want = module(*inputs)
        for door in DOORS:
            door.use_native(module)
        assert type(module).__name__.startswith("Native")
        got = module(*inputs)
        assert got.dtype == want.dtype == dtype
        assert mx.allclose(got, want, rtol=4 * ROUNDING[dtype], atol=8 * ROUNDING[dtype])


def test_a_swap_leaves_subclasses_alone() -> None:
    class Own(nn.RMSNorm):
        pass

    model = nn.Sequential(Own(4), nn.RMSNorm(4))
    norm.use_native(model)
    assert [type(layer) for layer in model.layers] == [Own, norm.NativeRMSNorm]
