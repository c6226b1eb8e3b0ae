"""Gated norms of the recurrent layers against float64, and their classes against mlx-lm's."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.nemotron_h import MambaRMSNormGated
from mlx_lm.models.qwen3_next import Qwen3NextRMSNormGated
from recurrences import bits, exact, mutated, near, silu

from mlx_flash.kernels.metal import Kernel, norm

SIZES = [1, 30, 128, 512]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
EPS = 1e-5
NEAR = 3e-6
calmly = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def arguments(shape, seed, dtype, gate_dtype=None, scale=1.0):
    rng = np.random.default_rng(seed)
    x, z = (mx.array((scale * rng.standard_normal(shape)).astype(np.float32)) for _ in range(2))
    weight = mx.array(rng.uniform(0.5, 1.5, shape[-1:]).astype(np.float32))
    return x.astype(dtype), z.astype(gate_dtype or dtype), weight.astype(dtype)


def normed64(x, weight, size):
    parts = x.reshape(*x.shape[:-1], -1, size)
    parts = parts / np.sqrt((parts * parts).mean(-1, keepdims=True) + EPS)
    return parts.reshape(x.shape) * exact(weight)


def by_group(y, size):
    return y.reshape(*y.shape[:-1], -1, size)


def agrees(got, want, size):
    near(by_group(got, size), by_group(want, size), -1, NEAR)


@settings(max_examples=8, deadline=None, suppress_health_check=calmly)
@given(
    form=st.sampled_from(list(zip(SIZES, DTYPES + DTYPES[:1], strict=True))),
    rows=st.integers(1, 19),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_a_norm_then_a_gate_is_float64s(metal, form, rows, seed, scale):
    size, dtype = form
    x, z, weight = arguments((1, rows, size), seed, dtype, scale=scale)
    got = norm.gated_norm(x, z, weight, EPS)
    assert got.dtype == dtype
    agrees(got, normed64(exact(x), weight, size) * silu(exact(z)), size)


@settings(max_examples=8, deadline=None, suppress_health_check=calmly)
@given(
    form=st.sampled_from(list(zip(SIZES, DTYPES + DTYPES[:1], [1, 3, 4, 2], strict=True))),
    rows=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_a_gate_then_a_norm_by_groups_is_float64s(metal, form, rows, seed, scale):
    size, dtype, groups = form
    x, z, weight = arguments((rows, 1, groups * size), seed, dtype, scale=scale)
    got = norm.group_norm(x, z, weight, EPS, size, dtype)
    agrees(got, normed64(exact(x) * silu(exact(z)), weight, size), size)


def test_no_gate_and_another_dtype(metal):
    """What follows ``mamba2_step``: float32 that is gated already, to the activations' dtype."""
    x, _, weight = arguments((2, 1, 1024), 0, mx.float32)
    got = norm.group_norm(x, None, weight.astype(mx.bfloat16), EPS, 512, mx.bfloat16)
    assert got.dtype == mx.bfloat16
    agrees(got, normed64(exact(x), weight.astype(mx.bfloat16), 512), 512)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 127, 129, 255, 256, 257, 1000, 4096, norm.MAX_SIZE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_is_float64s(metal, size, dtype):
    for rows in (1, 8, 9):
        x, z, weight = arguments((rows, 2 * size), size, dtype, mx.float32)
        got = norm.group_norm(x, z, weight, EPS, size, dtype)
        agrees(got, normed64(exact(x) * silu(exact(z)), weight, size), size)
        x, z, weight = arguments((rows, size), size, dtype, mx.float32)
        got = norm.gated_norm(x, z, weight, EPS)
        agrees(got, normed64(exact(x), weight, size) * silu(exact(z)), size)


def test_gates_beyond_exp_and_rows_of_zeros(metal):
    x, z, weight = arguments((4, 128), 0, mx.float32)
    z = mx.broadcast_to(mx.array([[1e4], [-1e4], [89.0], [-89.0]]), (4, 128))
    x = mx.concatenate([x[:3], mx.zeros((1, 128))])
    got = norm.gated_norm(x, z, weight, EPS)
    agrees(got, normed64(exact(x), weight, 128) * silu(exact(z)), 128)


def test_a_row_is_the_same_beside_others_and_in_a_view(metal):
    x, z, weight = arguments((9, 2, 128), 0, mx.bfloat16)
    together = norm.gated_norm(x, z, weight, EPS)
    alone = norm.gated_norm(x[4:5, 1:], z[4:5, 1:], weight, EPS)
    assert bits(alone) == bits(together[4:5, 1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_references_are_mlx_lms(dtype):
    rounding = {mx.float32: NEAR, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
    x, z, weight = arguments((3, 256), 0, dtype)
    want = normed64(exact(x), weight, 256) * silu(exact(z))
    near(norm.reference(x, z, weight, EPS), want, -1, rounding)
    want = normed64(exact(x) * silu(exact(z)), weight, 64)
    got = norm.group_reference(x, z, weight, EPS, 64, dtype)
    near(got, want, -1, rounding)


def test_bytes_are_those_of_a_launch(metal):
    """But for the weight and eps."""
    x, z, weight = arguments((9, 128), 0, mx.bfloat16)
    with metal.recording() as launches:
        norm.gated_norm(x, z, weight, EPS)
    (launch,) = launches
    small = weight.nbytes + 4
    assert norm.norm_bytes(x.size, 2) == launch.input_bytes + launch.output_bytes - small


@pytest.mark.parametrize("kind", ["gated delta net", "mamba"])
def test_the_classes_are_mlx_lms(metal, kind):
    made = {"gated delta net": lambda: Qwen3NextRMSNormGated(128, EPS)}
    made["mamba"] = lambda: MambaRMSNormGated(256, EPS, 128)
    stock, ours = made[kind](), made[kind]()
    x, z, weight = arguments((1, 2, stock.weight.size), 0, mx.float32)
    for one in (stock, ours):
        one.weight = weight
        one.eval()
    norm.use_metal(ours)
    assert type(ours) is norm.CLASSES[type(stock)]
    with metal.recording() as launches:
        near(ours(x, z), exact(stock(x, z)), -1, NEAR)
        assert len(launches) == 1
        half = x.astype(mx.float16)
        assert mx.array_equal(ours(half, z), stock(half, z)), "another dtype is mlx-lm's"
        ours.train()
        assert mx.array_equal(ours(x, z), stock(x, z))
        assert len(launches) == 1
    ours.eval()
    near(ours(x), exact(stock(x)), -1, NEAR)


def test_what_is_too_large_stays():
    large = Qwen3NextRMSNormGated(norm.MAX_SIZE + 1)
    norm.use_metal(large)
    assert type(large) is Qwen3NextRMSNormGated


MUTATIONS = {
    "the barrier": ("  threadgroup_barrier(mem_flags::mem_threadgroup);\n", ""),
    "a stride": ("4 * me + (i / 4) * 4 * THREADS + i % 4;", "4 * me + (i / 4) * THREADS + i % 4;"),
    "the last of a row": ("const bool in_part = WHOLE || at < SIZE", "const bool in_part = true"),
    "another part's weight": ("(part % PARTS) * SIZE", "0"),
    "what is whole": ("SIZE % (4 * THREADS) == 0", "SIZE % THREADS != 0"),
    "the mean": ("squares / SIZE + eps", "squares / THREADS + eps"),
    "the other order": ("if (MODE == 2)", "if (MODE == 1)"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_found(metal, mutation, tmp_path, monkeypatch):
    times = 2 if mutation == "a stride" else 1
    mutated(tmp_path, monkeypatch, "gated_norm", *MUTATIONS[mutation], times=times)
    kernel = norm.KERNEL
    broken = Kernel(kernel.name, kernel.inputs, kernel.outputs, kernel.headers)
    monkeypatch.setattr(norm, "KERNEL", broken)
    x, z, weight = arguments((2, 1, 2 * 300), 0, mx.float32)
    with pytest.raises(AssertionError):
        got = norm.group_norm(x, z, weight, EPS, 300, mx.float32)
        agrees(got, normed64(exact(x) * silu(exact(z)), weight, 300), 300)
