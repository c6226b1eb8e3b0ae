"""The router's Metal kernel, on the emulator, against float64 and mlx-lm's own routers.

Tolerance: 2e-6 of a score's scale. A choice is right if no expert left out is better than one
chosen by more than that, and in the order of what they are chosen by.
"""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from emulator import MetalFault
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models import deepseek_v3, nemotron_h

from mlx_flash.kernels import metal as room
from mlx_flash.kernels.metal import router as door

NEAR = 2e-6
FEW = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DEEPSEEK = {
    "score": "sigmoid",
    "groups": 8,
    "top_groups": 4,
    "group_score": "top2sum",
    "eps": 1e-20,
    "scale": 2.5,
}
HOW = {
    "qwen": (8, 256, {}),
    "qwen, not normalized": (8, 512, {"normalize": False}),
    "deepseek_v3": (8, 256, DEEPSEEK | {"correction": 0.3}),
    "deepseek_v2": (6, 160, {"groups": 8, "top_groups": 3, "normalize": False, "scale": 16.0}),
    "nemotron_h": (6, 128, {"score": "sigmoid", "correction": 0.2, "eps": 1e-20, "scale": 2.5}),
    "gpt-oss": (4, 32, {"score": "softmax_topk"}),
    "odd": (5, 45, {"score": "sigmoid"}),
    "groups of two": (3, 14, DEEPSEEK | {"groups": 7, "top_groups": 2}),
    "all": (7, 7, {}),
}


def exact(
    logits,
    *,
    score="softmax",
    correction=None,
    groups=1,
    top_groups=1,
    group_score="max",
    **_,
):
    """Each expert's own score and what it is chosen by, [T, E] float64."""
    if score == "softmax":
        own = np.exp(logits - logits.max(axis=-1, keepdims=True))
        own /= own.sum(axis=-1, keepdims=True)
    elif score == "sigmoid":
        own = 1 / (1 + np.exp(-logits))
    else:
        own = logits
    choice = logits if correction is None and groups == 1 else own
    if correction is not None:
        choice = choice + np.array(correction).astype(np.float64)
    if groups > 1:
        grouped = np.sort(choice.reshape(len(logits), groups, -1), axis=-1)
        ranks = grouped[..., -(1 if group_score == "max" else 2) :].sum(axis=-1)
        kept = np.argsort(-ranks, axis=-1, kind="stable")[:, :top_groups]
        inside = np.zeros(ranks.shape, bool)
        np.put_along_axis(inside, kept, True, axis=-1)
        choice = np.where(np.repeat(inside, grouped.shape[-1], axis=-1), choice, 0)
    return own, choice


def check(found, logits, top_k, **how):
    """Raise unless ids and scores are those of this router."""
    ids, scores = (np.array(a) for a in found)
    assert ids.shape == scores.shape == (len(logits), top_k)
    assert (ids.dtype, scores.dtype) == (np.uint32, np.float32)
    own, choice = exact(logits, **how)
    assert all(len(set(row)) == top_k for row in ids)
    chosen = np.take_along_axis(choice, ids.astype(np.int64), axis=-1)
    assert (np.diff(chosen, axis=-1) <= NEAR).all()
    best = -np.sort(-choice, axis=-1)[:, :top_k]
    assert np.abs(chosen - best).max() <= NEAR
    wanted = np.take_along_axis(own, ids.astype(np.int64), axis=-1)
    if how.get("score") == "softmax_topk":
        wanted = np.exp(wanted - wanted.max(axis=-1, keepdims=True))
        wanted /= wanted.sum(axis=-1, keepdims=True)
    elif how.get("normalize", True):
        wanted = wanted / (wanted.sum(axis=-1, keepdims=True) + how.get("eps", 0))
    scale = how.get("scale", 1.0)
    assert np.abs(scores - wanted * scale).max() <= NEAR * scale


def case(name, seed=0, tokens=5, dtype=mx.float32):
    top_k, experts, how = HOW[name]
    rng = np.random.default_rng(seed)
    logits = mx.array(rng.normal(0, 2, (tokens, experts)).astype(np.float32)).astype(dtype)
    if "correction" in how:
        correction = rng.normal(0, how["correction"], experts).astype(np.float32)
        how = how | {"correction": mx.array(correction)}
    return logits, top_k, how


def numbers(logits):
    return np.array(logits.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("name", HOW)
def test_a_router_chooses_as_float64_does(metal, name):
    logits, top_k, how = case(name)
    found = door.route(logits, top_k, **how)
    check(found, numbers(logits), top_k, **how)
    stated = door.reference(logits, top_k, **how)
    check(stated, numbers(logits), top_k, **how)
    assert mx.array_equal(found[0], stated[0])


@pytest.mark.parametrize("correction", [None, mx.array([0.5, 0.0, -0.5, 0.1])])
def test_fewer_experts_than_mlx_hands_over_as_device_memory(metal, correction):
    logits = mx.array([[0.3, 0.2, 0.4, 0.1]])
    how = {"score": "sigmoid", "correction": correction}
    check(door.route(logits, 2, **how), numbers(logits), 2, **how)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", HOW)
def test_a_router_takes_logits_of_16_bits(metal, name, dtype):
    for seed in range(5):
        logits, top_k, how = case(name, seed, tokens=9, dtype=dtype)
        found = door.route(logits, top_k, **how)
        check(found, numbers(logits), top_k, **how)
        assert mx.array_equal(found[0], door.reference(logits, top_k, **how)[0])


# All of these are in the same lanes: one kernel.
@given(
    experts=st.integers(225, 256),
    tokens=st.integers(1, 20),
    few=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@FEW
def test_of_equals_the_smaller_id_is_first(metal, experts, tokens, few, seed):
    values = np.random.default_rng(seed).integers(0, few, (tokens, experts)).astype(np.float32)
    ids, scores = (np.array(a) for a in door.route(mx.array(values).astype(mx.bfloat16), 8))
    assert np.array_equal(ids, np.argsort(-values, axis=-1, kind="stable")[:, :8])
    check((ids, scores), values.astype(np.float64), 8)


@pytest.mark.parametrize("name", ["qwen", "deepseek_v3", "gpt-oss"])
def test_a_router_ends_whatever_it_is_given(metal, name):
    logits, top_k, how = case(name, tokens=7)
    values = np.array(logits)
    values[0] = np.nan
    values[1] = -np.inf
    values[2] = np.inf
    values[3, ::2] = np.nan
    values[4] = 0.0
    values[5, 1::2] = -np.inf
    ids = np.array(door.route(mx.array(values), top_k, **how)[0])
    assert all(len(set(row)) == top_k for row in ids)
    assert ids.max() < values.shape[1]
    if not how:
        assert (ids[3] % 2 == 1).all()
    assert np.array_equal(ids[6:], np.array(door.route(logits, top_k, **how)[0])[6:])


def test_a_router_is_mlx_lms(metal):
    logits, top_k, how = case("deepseek_v3", tokens=12)
    plain = {name: how[name] for name in ("score", "correction", "scale")}
    for gate, groups, kept, eps in (
        (deepseek_v3, 8, 4, 0.0),
        (nemotron_h, 8, 4, 1e-20),
        (nemotron_h, 1, 1, 1e-20),
    ):
        ids, scores = gate.group_expert_select(
            logits, how["correction"], top_k, groups, kept, 2.5, True
        )
        found = door.route(
            logits, top_k, groups=groups, top_groups=kept, group_score="top2sum", eps=eps, **plain
        )
        for mine, theirs in zip(in_order(*found), in_order(ids, scores), strict=True):
            assert np.allclose(mine, theirs, rtol=0, atol=5e-6)


def in_order(ids, scores):
    order = mx.argsort(ids, axis=-1)
    return (np.array(mx.take_along_axis(a, order, axis=-1)) for a in (ids, scores))


@pytest.mark.parametrize(
    ("shape", "top_k", "how", "says"),
    [
        ((2, 3, 8), 2, {}, "logits are"),
        ((2, 513), 2, {}, "up to 512 experts"),
        ((2, 64), 33, {}, "top 32"),
        ((2, 4), 5, {}, "top 5 of 4"),
        ((2, 8), 0, {}, "top 0"),
        ((2, 9), 2, {"groups": 2}, "equal groups"),
        ((2, 8), 2, {"groups": 2, "top_groups": 3}, "3 of 2 groups"),
        ((2, 8), 2, {"score": "tanh"}, "'tanh'"),
        ((2, 8), 2, {"group_score": "mean"}, "'mean'"),
        ((2, 8), 2, {"groups": 8, "group_score": "top2sum"}, "two experts"),
    ],
)
def test_a_router_that_cannot_be_is_refused(shape, top_k, how, says):
    for route in (door.route, door.reference):
        with pytest.raises(ValueError, match=says):
            route(mx.zeros(shape), top_k, **how)


def test_bytes_are_logits_in_and_choices_out():
    logits = mx.zeros((3, 256), mx.bfloat16)
    assert door.route_bytes(logits, 8) == 3 * (256 * 2 + 8 * 8)
    assert door.route_bytes(logits, 8, mx.zeros(256)) == 3 * (256 * 2 + 8 * 8) + 1024


WRONG = [
    ("qwen, not normalized", "route.metal", "own[i] /= total", "own[i] *= total"),
    ("qwen", "route.metal", "      keys[i] = 0;\n", ""),
    ("qwen", "ordered.h", "? ~bits :", "? bits :"),
    ("odd", "route.metal", "e < experts ? float(logits[token * experts + e]) : -INFINITY", "0"),
    ("odd", "route.metal", "token * experts + e", "token * 32 * HELD + e"),
    ("deepseek_v3", "route.metal", " && lane + 32 * i != at", ""),
    ("deepseek_v3", "route.metal", "if (lane == g) rank = 0;", ""),
    ("deepseek_v3", "route.metal", "choice[i] += float(correction[e])", "own[i] += 0"),
    ("nemotron_h", "route.metal", "score * scale;", "score;"),
    ("gpt-oss", "route.metal", "lane < TOP_K ? metal::precise::exp(score - first) : 0.0f", "1"),
]


@pytest.mark.parametrize(("name", "file", "right", "wrong"), WRONG)
def test_a_wrong_router_is_found(metal, monkeypatch, tmp_path, name, file, right, wrong):
    shutil.copytree(room.sources(), tmp_path / "metal")
    text = (tmp_path / "metal" / file).read_text()
    assert text.count(right) == 1
    (tmp_path / "metal" / file).write_text(text.replace(right, wrong))
    monkeypatch.setattr(room, "sources", lambda: tmp_path / "metal")
    logits, top_k, how = case(name)
    with pytest.raises((AssertionError, MetalFault)):
        check(door.route(logits, top_k, **how), numbers(logits), top_k, **how)
