"""What the tests of recurrent steps share: inputs, float64 references, and how near is near."""

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.kernels import metal

ROUNDING = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
FLOAT32 = 1e-5
"""Relative to the largest element of a head: what sums of a few hundred float32 products lose."""
FLUSHED = 1e-36
"""Apple's GPUs may take denormals for zero."""


def exact(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def bits(x):
    return np.array(mx.contiguous(x).view(mx.uint8)).tobytes()


def near(got, want, axes, bound=FLOAT32, summed=None):
    """Every element within ``bound`` of the largest along ``axes``, and its dtype's rounding.

    ``summed`` are the sizes of what was added up, where that may be more than the sum.
    """
    assert got.shape == want.shape
    found = exact(got)
    assert np.isfinite(found).all()
    largest = np.abs(want if summed is None else summed).max(axis=axes, keepdims=True)
    finest = 2.0**-24 if got.dtype == mx.float16 else FLUSHED
    allowed = bound * largest + ROUNDING[got.dtype] * np.abs(want) + finest
    wrong = np.abs(found - want) > allowed
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} are off, first {np.argwhere(wrong)[0]}"


def same_answers(stock, model, tokens=8):
    """A prompt, and then what each of two float32 models says by itself."""
    answers = []
    for one in (stock, model):
        cache, x = make_prompt_cache(one), mx.arange(40, 51)[None]
        said, logits = [], []
        for _ in range(tokens):
            logits.append(exact(one(x, cache=cache)[:, -1]))
            said.append(int(logits[-1].argmax()))
            x = mx.array([[said[-1]]])
        answers.append((said, np.stack(logits)))
    (want, sizes), (got, found) = answers
    assert got == want and len(set(got)) > 3
    assert np.abs(found - sizes).max() <= 1e-4 * np.abs(sizes).max()


def mutated(folder: Path, monkeypatch, name, old, new, times=1):
    """Copy the kernels with one text of ``name`` replaced, and have doors read the copy."""
    suffix = "" if "." in name else ".metal"
    for file in metal.sources().iterdir():
        text = file.read_text()
        if file.name == name + suffix:
            assert text.count(old) == times, f"{old!r} is there {text.count(old)} times"
            text = text.replace(old, new)
        (folder / file.name).write_text(text)
    monkeypatch.setattr(metal, "sources", lambda: folder)


def silu(x):
    return x * sigmoid(x)


def sigmoid(x):
    return np.where(x < 0, np.exp(np.minimum(x, 0)), 1) / (1 + np.exp(-np.abs(x)))


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def convolved(history, token, conv, bias=0.0):
    """[B, taps - 1, C], [B, 1, C], [C, taps] -> silu of the convolution [B, C], and the tokens."""
    tokens = np.concatenate([history, token], axis=1)
    return silu(np.einsum("btc,ct->bc", tokens, conv) + bias), tokens[:, 1:]


def delta64(qkv, z, a, b, history, conv, a_log, dt_bias, norm, state, eps, grouped=False):
    """One token of a gated delta net in float64; takes what ``delta_step`` does, or float64."""
    qkv, z, a, b, history, conv, a_log, dt_bias, norm, state = (
        exact(x) if isinstance(x, mx.array) else x
        for x in (qkv, z, a, b, history, conv, a_log, dt_bias, norm, state)
    )
    batch, heads, rows, row = state.shape
    channels = len(conv)
    keys = (channels - heads * rows) // (2 * row)
    each = heads // keys
    if grouped:
        by_key = qkv.reshape(batch, keys, -1)
        parts = np.split(by_key, [row, 2 * row, 2 * row + each * rows], axis=-1)
        *parts, z = (part.reshape(batch, 1, -1) for part in parts)
        qkv = np.concatenate(parts, axis=-1)
        b, a = (x.reshape(batch, heads) for x in np.split(a.reshape(batch, keys, -1), 2, axis=-1))
    mixed, history = convolved(history, qkv, conv[..., 0])
    q, k, v = np.split(mixed, [keys * row, 2 * keys * row], axis=-1)
    q, k = (x.reshape(batch, keys, row) for x in (q, k))
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (np.repeat(x, each, axis=1) for x in (q / np.sqrt(row), k))
    g = np.exp(-np.exp(a_log) * softplus(a.reshape(batch, heads) + dt_bias))[..., None]
    beta = sigmoid(b.reshape(batch, heads))[..., None]
    state = state * g[..., None]
    delta = beta * (v.reshape(batch, heads, rows) - np.einsum("bhvk,bhk->bhv", state, k))
    state = state + delta[..., None] * k[:, :, None]
    y = np.einsum("bhvk,bhk->bhv", state, q)
    y = y / np.sqrt((y * y).mean(-1, keepdims=True) + eps) * norm
    return (y * silu(z.reshape(y.shape))).reshape(batch, 1, -1), history, state


def mamba64(projected, history, conv, bias, a_log, d, dt_bias, state, limits):
    """One token of a Mamba2 mixer in float64; takes what ``mamba2_step`` does, or float64.

    Returns what it does, and the sizes of what makes up ``y``.
    """
    projected, history, conv, a_log, d, dt_bias, state = (
        exact(x) if isinstance(x, mx.array) else x
        for x in (projected, history, conv, a_log, d, dt_bias, state)
    )
    batch, heads, rows, row = state.shape
    channels, inner = len(conv), heads * rows
    groups = (channels - inner) // (2 * row)
    gate, token, dt = np.split(projected, [inner, inner + channels], axis=-1)
    mixed, history = convolved(history, token, conv[..., 0], 0.0 if bias is None else exact(bias))
    x, b, c = np.split(mixed, [inner, inner + groups * row], axis=-1)
    x = x.reshape(batch, heads, rows)
    b, c = (np.repeat(t.reshape(batch, groups, row), heads // groups, axis=1) for t in (b, c))
    dt = np.clip(softplus(dt.reshape(batch, heads) + dt_bias), *limits)[..., None]
    state = state * np.exp(-np.exp(a_log)[:, None] * dt)[..., None]
    state = state + (x * dt)[..., None] * b[:, :, None]
    y = np.einsum("bhds,bhs->bhd", state, c) + d[:, None] * x
    summed = np.einsum("bhds,bhs->bhd", np.abs(state), np.abs(c)) + np.abs(d[:, None] * x)
    y, summed = (silu(gate) * part.reshape(batch, 1, inner) for part in (y, summed))
    return y, history, state, np.abs(summed)
