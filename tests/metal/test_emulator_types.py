"""The emulated library against numpy and MLX: numbers of 16 bits, vectors, simdgroups, atomics."""

import mlx.core as mx
import numpy as np
import pytest

LANES = 32
FLOATS = {"half": mx.float16, "bfloat16_t": mx.bfloat16}


def run(metal, source, inputs, shape, dtype=mx.float32, threads=None, group=LANES, **options):
    names = [f"in{i}" for i in range(len(inputs))]
    kernel = mx.fast.metal_kernel("probe", names, ["out"], source, **options)
    grid = (threads or int(np.prod(shape)), 1, 1)
    return kernel(
        inputs=inputs,
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=grid,
        threadgroup=(group, 1, 1),
        init_value=0,
    )[0]


def floats(n):
    """Of every magnitude, ties between two neighbours of 16 bits among them."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, n, dtype=np.uint32)
    bits[: n // 4] &= 0xFFFF8000  # a tie between two bfloats
    bits[n // 4 : n // 2] = (bits[n // 4 : n // 2] & 0x8FFFF000) | 0x38000000  # between halves
    bits[n // 2 : n // 2 + 64] = (
        np.array([0.0, 65504, 65519.99, 65520, 6e-8, 2.9e-8] * 11)[:64]
        .astype(np.float32)
        .view(np.uint32)
    )
    return bits.view(np.float32)


@pytest.mark.parametrize("name", FLOATS)
def test_every_float_of_16_bits_is_read_as_mlx_reads_it(metal, name):
    bits = mx.arange(65536).astype(mx.uint16)
    values = bits.view(FLOATS[name])
    got = run(metal, "uint i = thread_position_in_grid.x; out[i] = in0[i];", [values], (65536,))
    want = np.array(values.astype(mx.float32))
    assert np.array_equal(
        np.array(got).view(np.uint32) & ~nan(want), want.view(np.uint32) & ~nan(want)
    )


def nan(values):
    return np.where(np.isnan(values), 0x007FFFFF, 0).astype(np.uint32)  # a payload is free


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_is_rounded_to_16_bits_as_mlx_rounds_it(metal, name):
    values = floats(65536)
    source = f"uint i = thread_position_in_grid.x; out[i] = static_cast<{name}>(in0[i]);"
    got = run(metal, source, [mx.array(values)], (65536,), FLOATS[name])
    want = mx.array(values).astype(FLOATS[name])
    same = np.array(got.view(mx.uint16)) == np.array(want.view(mx.uint16))
    assert np.all(same | np.isnan(values))


def test_half_is_rounded_as_numpy_rounds_it(metal):
    values = floats(65536)
    with np.errstate(over="ignore"):
        want = values.astype(np.float16)
    source = "uint i = thread_position_in_grid.x; out[i] = in0[i];"
    got = np.array(run(metal, source, [mx.array(values)], (65536,), mx.float16))
    assert np.all((got.view(np.uint16) == want.view(np.uint16)) | np.isnan(values))


@pytest.mark.parametrize(("name", "sum_bits"), [("half", 0x3C01), ("bfloat16_t", 0x3F80)])
def test_two_of_16_bits_are_added_in_16_bits(metal, name, sum_bits):
    # 1 + 0.0009 lies above half of a step of half, and below half of one of bfloat.
    a = mx.full((LANES,), 1.0, FLOATS[name])
    b = mx.full((LANES,), 0.0009, FLOATS[name])
    source = "uint i = thread_position_in_grid.x; out[i] = in0[i] + in1[i];"
    narrow = run(metal, source, [a, b], (LANES,), FLOATS[name])
    assert narrow.view(mx.uint16)[0].item() == sum_bits
    wide = run(metal, source.replace("in1[i]", "float(in1[i])"), [a, b], (LANES,))
    assert wide[0].item() == 1.0 + b[0].astype(mx.float32).item()


def test_a_float_becomes_a_bfloat_only_when_cast(metal):
    ones = mx.ones((LANES,), mx.float32)
    source = "uint i = thread_position_in_grid.x; out[i] = in0[i];"
    with pytest.raises(metal.CompileError):
        run(metal, source, [ones], (LANES,), mx.bfloat16)


def test_vectors(metal):
    source = """
        uint i = thread_position_in_grid.x;
        float4 a = ((const device float4*)in0)[i];
        packed_float3 p = ((const device packed_float3*)in0)[0];
        uint2 u = uint2(i, 3u) << 2u;
        float4 b = fma(a, float4(2.0f), float4(a.zw, a.xy));
        half4 h = half4(a);
        out[i] = dot(b, float4(1, 10, 100, 1000)) + p[2] + float(u.x + u.y) + float(h.z)
            + (any(float2(a.xy) > float2(1e9f)) ? 1e6f : 0.0f) + max(a, a.x).y;
    """
    rows = np.arange(LANES * 4, dtype=np.float32).reshape(LANES, 4) % 23
    got = run(metal, source, [mx.array(rows.reshape(-1))], (LANES,))
    b = rows * 2 + rows[:, [2, 3, 0, 1]]
    want = b @ np.array([1, 10, 100, 1000]) + rows[0, 2] + (np.arange(LANES) + 3) * 4
    want += rows[:, 2] + np.maximum(rows[:, 1], rows[:, 0])
    assert np.array_equal(np.array(got), want)


LANE = np.arange(LANES)
OPERATIONS = {
    "simd_sum(x)": lambda x: np.full(LANES, x.sum()),
    "simd_max(x)": lambda x: np.full(LANES, x.max()),
    "simd_min(x)": lambda x: np.full(LANES, x.min()),
    "simd_product(x > 40 ? 2.0f : 1.0f)": lambda x: np.full(LANES, 2.0 ** (x > 40).sum()),
    "float(simd_and(uint(x) | 8u))": lambda x: np.full(
        LANES, np.bitwise_and.reduce(x.astype(int) | 8)
    ),
    "float(simd_or(uint(x)))": lambda x: np.full(LANES, np.bitwise_or.reduce(x.astype(int))),
    "float(simd_xor(uint(x)))": lambda x: np.full(LANES, np.bitwise_xor.reduce(x.astype(int))),
    "simd_broadcast(x, 7)": lambda x: np.full(LANES, x[7]),
    "simd_broadcast_first(x)": lambda x: np.full(LANES, x[0]),
    "simd_shuffle(x, (lane * 5) % 32)": lambda x: x[LANE * 5 % 32],
    "simd_shuffle_xor(x, 8)": lambda x: x[LANE ^ 8],
    "simd_shuffle_down(x, 3)": lambda x: np.where(LANE + 3 < 32, x[(LANE + 3) % 32], x),
    "simd_shuffle_up(x, 3)": lambda x: np.where(LANE >= 3, x[LANE - 3], x),
    "simd_shuffle_rotate_down(x, 3)": lambda x: x[(LANE + 3) % 32],
    "simd_shuffle_rotate_up(x, 3)": lambda x: x[LANE - 3],
    "simd_shuffle_and_fill_up(x, -x, 2)": lambda x: np.where(LANE >= 2, x[LANE - 2], -x[LANE - 2]),
    "simd_shuffle_and_fill_down(x, -x, 2)": lambda x: np.where(
        LANE < 30, x[(LANE + 2) % 32], -x[(LANE + 2) % 32]
    ),
    "simd_prefix_inclusive_sum(x)": np.cumsum,
    "simd_prefix_exclusive_sum(x)": lambda x: np.cumsum(x) - x,
    "float(simd_vote::vote_t(simd_ballot(lane % 5 == 0)) & 0x3ff)": lambda x: np.full(
        LANES, sum(1 << i for i in range(10) if i % 5 == 0)
    ),
    "float(simd_any(x > 60))": lambda x: np.full(LANES, float((x > 60).any())),
    "float(simd_all(x > 60))": lambda x: np.full(LANES, float((x > 60).all())),
    "quad_sum(x)": lambda x: x.reshape(8, 4).sum(1).repeat(4),
    "quad_max(x)": lambda x: x.reshape(8, 4).max(1).repeat(4),
    "quad_broadcast(x, 2)": lambda x: x.reshape(8, 4)[:, 2].repeat(4),
    "quad_shuffle_xor(x, 1)": lambda x: x[LANE ^ 1],
}


def test_simdgroups_one_operation_after_another(metal):
    """All in one kernel: values of one must not leak into the next."""
    lines = [f"out[{i} * 32 + lane] = {o};" for i, o in enumerate(OPERATIONS)]
    source = "uint lane = thread_index_in_simdgroup; float x = in0[lane];" + "\n".join(lines)
    x = np.random.default_rng(1).permutation(64)[:LANES].astype(np.float32)
    got = run(metal, source, [mx.array(x)], (len(OPERATIONS), LANES), threads=LANES)
    for row, (operation, want) in zip(np.array(got), OPERATIONS.items(), strict=True):
        assert np.array_equal(row, want(x)), operation


def test_lanes_that_ended_give_nothing(metal):
    source = """
        uint i = thread_position_in_grid.x;
        if (i % 3 == 0) { out[i] = -1; return; }
        out[i] = simd_sum(1.0f);
    """
    got = np.array(run(metal, source, [mx.zeros((8,))], (LANES,)))
    assert np.array_equal(got, np.where(LANE % 3 == 0, -1, 21))


def test_simd_sum_takes_the_order_of_a_butterfly(metal):
    x = np.random.default_rng(2).normal(size=LANES).astype(np.float32)
    source = "uint i = thread_position_in_grid.x; out[i] = simd_sum(in0[i]);"
    tree = x
    for step in (1, 2, 4, 8, 16):
        tree = tree + tree[LANE ^ step]
    assert run(metal, source, [mx.array(x)], (LANES,))[0].item() == tree[0]


def test_atomics(metal):
    source = """
        uint i = thread_position_in_grid.x;
        atomic_fetch_add_explicit(&out[i % 2], 1u, memory_order_relaxed);
        atomic_fetch_max_explicit(&out[2], i, memory_order_relaxed);
        uint seen = 0;
        while (!atomic_compare_exchange_weak_explicit(
            &out[3], &seen, seen + i, memory_order_relaxed, memory_order_relaxed)) {}
    """
    out = run(metal, source, [mx.zeros((8,))], (4,), mx.uint32, 100, atomic_outputs=True)
    assert out.tolist() == [50, 50, 99, 99 * 50]


def test_attributes_of_a_grid_that_does_not_divide(metal):
    source = """
        uint3 at = thread_position_in_grid;
        uint i = (at.z * 5 + at.y) * 7 + at.x;
        out[i * 8 + 0] = threadgroup_position_in_grid.x + 10 * threadgroup_position_in_grid.y;
        out[i * 8 + 1] = thread_position_in_threadgroup.x + 10 * thread_position_in_threadgroup.y;
        out[i * 8 + 2] = threads_per_threadgroup.x + 10 * threads_per_threadgroup.y;
        out[i * 8 + 3] = dispatch_threads_per_threadgroup.x;
        out[i * 8 + 4] = thread_index_in_threadgroup;
        out[i * 8 + 5] = threadgroups_per_grid.x + 10 * threadgroups_per_grid.y;
        out[i * 8 + 6] = threads_per_grid.x + 10 * threads_per_grid.y + 100 * threads_per_grid.z;
        out[i * 8 + 7] = threads_per_simdgroup + simdgroup_index_in_threadgroup;
    """
    kernel = mx.fast.metal_kernel("probe", ["in0"], ["out"], source)
    (got,) = kernel(
        inputs=[mx.zeros((8,))],
        output_shapes=[(2, 5, 7, 8)],
        output_dtypes=[mx.uint32],
        grid=(7, 5, 2),
        threadgroup=(4, 2, 1),
    )
    for z, y, x in np.ndindex(2, 5, 7):
        width, height = min(4, 7 - x // 4 * 4), min(2, 5 - y // 2 * 2)
        index = y % 2 * width + x % 4
        assert got[z, y, x].tolist() == [
            x // 4 + 10 * (y // 2),
            x % 4 + 10 * (y % 2),
            width + 10 * height,
            4,
            index,
            2 + 10 * 3,
            7 + 50 + 200,
            32,
        ]
