"""Each fault that a GPU forbids is found and named, and its twin without the fault runs."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import MetalFault

# The cases of one kernel, chosen by an input: name, fault, code that has it, code that has not.
# 64 threads as two simdgroups; t and i are the same unless a case runs in groups of 32.
CASES = [
    (
        "a thread returns before a barrier",
        "divergent barrier: 1 of 64 threads have ended",
        "y[i] = 1; if (t == 5) { return; } threadgroup_barrier(mem_flags::mem_threadgroup);",
        "y[i] = 1; threadgroup_barrier(mem_flags::mem_threadgroup); if (t == 5) { return; }",
    ),
    (
        "a simdgroup passes by a barrier",
        "divergent barrier: 32 of 64 threads have ended",
        "if (t < 32) { threadgroup_barrier(mem_flags::mem_threadgroup); } y[i] = 1;",
        "if (x_shape[0] == 64) { threadgroup_barrier(mem_flags::mem_threadgroup); } y[i] = 1;",
    ),
    (
        "a lane waits at a barrier and its simdgroup at a sum",
        "divergent simdgroup",
        "if (t == 3) { threadgroup_barrier(mem_flags::mem_none); } y[i] = simd_sum(x[i]);",
        "if (x[0] == x[0]) { threadgroup_barrier(mem_flags::mem_none); } y[i] = simd_sum(x[i]);",
    ),
    (
        "threads wait at two barriers",
        "divergent barrier: threads wait at lines",
        """if (t < 32) { threadgroup_barrier(mem_flags::mem_none); } else {
           threadgroup_barrier(mem_flags::mem_none); } y[i] = 1;""",
        "if (t < 32) { y[i] = 1; } else { y[i] = 2; } threadgroup_barrier(mem_flags::mem_none);",
    ),
    (
        "half a simdgroup sums",
        "divergent simdgroup: one lane is at simd_",
        "float v = x[i]; if (lane < 16) { v = simd_sum(v); } v = simd_max(v); y[i] = v;",
        "float v = x[i]; if (t < 32) { v = simd_sum(v); } v = simd_max(v); y[i] = v;",
    ),
    (
        "half a simdgroup sums in a function that all call later",
        "divergent simdgroup: two lanes are at simd_sum of line . by different calls",
        "float v = x[i]; if (lane < 16) { v = total(v); } v = total(v); y[i] = v;",
        "float v = x[i]; if (t < 32) { v = total(v); } v = total(v); y[i] = v;",
    ),
    (
        "half a simdgroup sums in a loop",
        "divergent simdgroup: two lanes are at simd_sum of line . by different calls",
        """float v = x[i]; for (int k = 0; k < (lane < 16 ? 2 : 1); k++) { v = total(v); }
           y[i] = total(v);""",
        """float v = x[i]; for (int k = 0; k < (t < 32 ? 2 : 1); k++) { v = total(v); }
           y[i] = total(v);""",
    ),
    (
        "a shuffle from a lane that has ended",
        "simd_shuffle from lane 20, which has ended",
        "y[i] = 1; if (lane >= 16) { return; } y[i] = simd_shuffle(x[i], 20);",
        "y[i] = 1; if (lane >= 16) { return; } y[i] = simd_shuffle(x[i], 15);",
    ),
    (
        "an exchange with a lane that has ended",
        "simd_shuffle_xor from lane 16, which has ended",
        "y[i] = 1; if (lane >= 16) { return; } y[i] = simd_shuffle_xor(x[i], 16);",
        "y[i] = 1; if (lane >= 16) { return; } y[i] = simd_shuffle_xor(x[i], 8);",
    ),
    (
        "a read behind an input",
        "out of range: read of 4 bytes at byte 256 of x, which has 256",
        "y[i] = x[i + 1];",
        "y[i] = x[63 - i];",
    ),
    (
        "a read before an input",
        "out of range: read of 4 bytes at byte -4 of x",
        "y[i] = x[int(i) - 1];",
        "y[i] = x[(i + 63) % 64];",
    ),
    (
        "a vector that ends behind an input",
        "out of range: read of .* bytes at byte 2.. of x, which has 256",
        "y[i] = (*(const device float4*)(x + i / 2 * 2)).w;",
        "y[i] = (*(const device float4*)(x + i / 4 * 4)).w;",
    ),
    (
        "a word that ends behind an input",
        "out of range: read of 8 bytes at byte 252 of x, which has 256",
        "y[i] = *(const device ulong*)(x + i) & 1;",
        "y[i] = *(const device ulong*)(x + i / 2 * 2) & 1;",
    ),
    (
        "a read through no buffer",
        "out of range: read of 4 bytes in no buffer",
        "y[i] = x[1 << 28];",
        "y[i] = x[1 << 5];",
    ),
    (
        "a write behind an output",
        "out of range: write of 4 bytes at byte 256 of y, which has 256",
        "y[i] = 1; if (i == 63) { y[i + 1] = 2; }",
        "y[i] = 1; if (i == 63) { y[i] = 2; }",
    ),
    (
        "a write to an input",
        "write to x, an input",
        "y[i] = 1; ((device float*)x)[i] = 1;",
        "y[i] = 1; ((device float*)y)[i] = 1;",
    ),
    (
        "a write behind threadgroup memory",
        "out of range: write of 4 bytes at byte .* of threadgroup memory",
        "y[i] = 1; a[t + 8192] = 1;",
        "y[i] = 1; a[t] = 1;",
    ),
    (
        "threadgroup memory that nobody wrote",
        "uninitialized: read of byte .* of threadgroup memory",
        "y[i] = a[t];",
        "a[t] = 1; y[i] = a[t];",
    ),
    (
        "threadgroup memory that another threadgroup wrote",
        "uninitialized: read of byte .* of threadgroup memory",
        "if (i < 32) { a[t] = 1; } y[i] = a[t];",
        "a[t] = 1; y[i] = a[t];",
    ),
    (
        "an output that nobody wrote",
        "uninitialized: read of byte .* of y",
        "y[i] = y[i] + 1;",
        "y[i] = 1; y[i] = y[i] + 1;",
    ),
    (
        "an element that is never written",
        "unwritten: 4 bytes of output",
        "if (i != 7) { y[i] = 1; }",
        "if (i != 7) { y[i] = 1; } else { y[i] = 2; }",
    ),
    (
        "a read without a barrier",
        "race: read of byte .* of threadgroup memory that another thread wrote",
        "a[t] = x[i]; y[i] = a[t & 31];",
        "a[t] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[t & 31];",
    ),
    (
        "a read without a barrier inside a simdgroup",
        "race: read of byte .* of threadgroup memory that another thread wrote",
        "a[t] = x[i]; y[i] = a[t & ~1];",
        "a[t] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[t & ~1];",
    ),
    (
        "a simdgroup's barrier between two simdgroups",
        "race: read of byte .* of threadgroup memory that another thread wrote",
        "a[t] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[t & 1];",
        "a[t] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[t & 1];",
    ),
    (
        "a barrier that does not order this memory",
        "race: read of byte .* of threadgroup memory that another thread wrote",
        "a[t] = x[i]; threadgroup_barrier(mem_flags::mem_device); y[i] = a[t ^ 1];",
        """a[t] = x[i]; y[i] = 0;
           threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
           y[i] = a[t ^ 1];""",
    ),
    (
        "a write too soon after another's read",
        "race: write of byte .* of threadgroup memory that another thread read",
        """a[t] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup);
           y[i] = a[t | 1]; a[t] = 2;""",
        """a[t] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup);
           y[i] = a[t | 1]; threadgroup_barrier(mem_flags::mem_threadgroup); a[t] = 2;""",
    ),
    (
        "a write too soon after another lane's read",
        "race: write of byte .* of threadgroup memory that another thread read",
        """a[t] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup);
           y[i] = a[t | 1]; simdgroup_barrier(mem_flags::mem_none); a[t] += 2;""",
        """a[t] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup);
           y[i] = a[t | 1]; simdgroup_barrier(mem_flags::mem_threadgroup); a[t] += 2;""",
    ),
    (
        "a read of two simdgroups, and only one waits for the other",
        "race: write of byte .* of threadgroup memory that another thread read",
        """a[t] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[32 + lane];
           simdgroup_barrier(mem_flags::mem_threadgroup); if (t >= 32) { a[t] += 2; }""",
        """a[t] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[t ^ 1];
           simdgroup_barrier(mem_flags::mem_threadgroup); if (t >= 32) { a[t] += 2; }""",
    ),
    (
        "two threads that write one place",
        "race: write of byte .* of threadgroup memory that another thread wrote",
        "a[t / 2] = 1; y[i] = 1;",
        "if (t % 2 == 0) { a[t / 2] = 1; } y[i] = 1;",
    ),
    (
        "an output passed on without a barrier",
        "race: read of byte .* of y that another thread wrote",
        "y[i] = 1; threadgroup_barrier(mem_flags::mem_threadgroup); if (t == 9) { y[t] += y[0]; }",
        "y[i] = 1; threadgroup_barrier(mem_flags::mem_device); if (t == 9) { y[t] += y[0]; }",
    ),
    (
        "two threadgroups that write one place",
        "race: write of byte .* of y that another thread wrote",
        "y[i] = 1; threadgroup_barrier(mem_flags::mem_device); if (i >= 32) { y[t] = 2; }",
        "y[i] = 1; threadgroup_barrier(mem_flags::mem_device); if (i >= 32) { y[i] = 2; }",
    ),
    (
        "a threadgroup that reads another's output",
        "race: read of byte .* of y that another thread wrote",
        "y[i] = 1; threadgroup_barrier(mem_flags::mem_device); if (i >= 32) { y[i] += y[t]; }",
        "y[i] = 1; threadgroup_barrier(mem_flags::mem_device); if (i >= 32) { y[i] += y[i]; }",
    ),
]
IN_GROUPS_OF_32 = (
    "two threadgroups",
    "a threadgroup that reads",
    "memory that another threadgroup",
)

BRANCHES = [
    f"      case {2 * n + twin}: {{ {case[2 + twin]} }} break;\n"
    for n, case in enumerate(CASES)
    for twin in range(2)
]
BODY = f"""
    uint i = thread_position_in_grid.x;
    uint t = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup;
    threadgroup float a[64];
    switch (which) {{
{"".join(BRANCHES)}
      default: y[i] = x_shape[0];
    }}
"""


HEADER = "inline float total(float v) { return simd_sum(v); }\n"


def launch(which: int, group: int) -> mx.array:
    kernel = mx.fast.metal_kernel("faults", ["x", "which"], ["y"], BODY, header=HEADER)
    return kernel(
        inputs=[mx.arange(64).astype(mx.float32), mx.array(which)],
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
        grid=(64, 1, 1),
        threadgroup=(group, 1, 1),
    )[0]


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0] for case in CASES])
def test_a_fault_is_found_and_its_twin_is_not(number: int) -> None:
    name, fault, _, _ = CASES[number]
    group = 32 if any(words in name for words in IN_GROUPS_OF_32) else 64
    with pytest.raises(MetalFault, match=fault):
        launch(2 * number, group)
    launch(2 * number + 1, group)


@pytest.mark.usefixtures("metal")
def test_a_fault_names_its_thread() -> None:
    number = [case[0] for case in CASES].index("a read behind an input")
    with pytest.raises(MetalFault, match=r"thread 63 0 0 of threadgroup 0 0 0"):
        launch(2 * number, 64)


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("group", [(1025, 1, 1), (32, 33, 1), (0, 1, 1)])
def test_a_threadgroup_has_1_to_1024_threads(group: tuple[int, int, int]) -> None:
    kernel = mx.fast.metal_kernel("faults", ["x", "which"], ["y"], BODY, header=HEADER)
    with pytest.raises(MetalFault, match="1 to 1024"):
        kernel(
            inputs=[mx.zeros((64,)), mx.array(-1)], output_shapes=[(64,)],
            output_dtypes=[mx.float32], grid=(64, 1, 1), threadgroup=group,
        )  # fmt: skip


@pytest.mark.usefixtures("metal")
def test_a_variable_that_nobody_set_is_not_zero() -> None:
    body = "float sum[4]; for (int k = 0; k < 4; k++) { sum[k] += k; } y[0] = sum[0] + sum[3];"
    (y,) = mx.fast.metal_kernel("unset", [], ["y"], body)(
        inputs=[], output_shapes=[(1,)], output_dtypes=[mx.float32], grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
    )  # fmt: skip
    assert not abs(y.item()) < 1e30


# Atomics ------------------------------------------------------------------------------------------

ATOMICS = """
    threadgroup atomic_uint shared[1];
    threadgroup uint plain[1];
    uint t = thread_position_in_threadgroup.x;
    if (t == 0) { atomic_store_explicit(&shared[0], 0u, memory_order_relaxed); plain[0] = 0; }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    device atomic_uint* total = (device atomic_uint*)y;
    switch (which) {
      case 0: y[0] += 1; break;
      case 1: atomic_fetch_add_explicit(total, 1u, memory_order_relaxed); break;
      case 2: plain[0] += 1; break;
      case 3: atomic_fetch_add_explicit(&shared[0], 1u, memory_order_relaxed); break;
      case 4: atomic_fetch_add_explicit(total, 1u, memory_order_relaxed); y[1] = y[0]; break;
      case 5:
        atomic_fetch_add_explicit(total, 1u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_device);
        if (y[0] == 1000) { atomic_fetch_add_explicit(total, 1u, memory_order_relaxed); }
        break;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (which == 3 && t == 0) {
      uint sum = atomic_load_explicit(&shared[0], memory_order_relaxed);
      atomic_fetch_add_explicit(total, sum, memory_order_relaxed);
    }
"""


def count(which: int, threads: int = 200) -> int:
    kernel = mx.fast.metal_kernel("atomics", ["which"], ["y"], ATOMICS)
    (y,) = kernel(
        inputs=[mx.array(which)],
        output_shapes=[(2,)],
        output_dtypes=[mx.uint32],
        grid=(threads, 1, 1),
        threadgroup=(64, 1, 1),
        init_value=0,
    )
    return y[0].item()


@pytest.mark.usefixtures("metal")
def test_atomics_count_where_the_plain_form_races() -> None:
    with pytest.raises(MetalFault, match=r"race: .* of byte . of y that another thread wrote"):
        count(0)
    assert count(1) == 200
    with pytest.raises(MetalFault, match=r"race: .* of threadgroup memory that another thread"):
        count(2)
    assert count(3) == 200
    with pytest.raises(MetalFault, match=r"race: read of byte . of y that another thread wrote"):
        count(4)
    assert count(5, threads=64) == 64  # a barrier orders them for their own threadgroup
    with pytest.raises(MetalFault, match=r"race: read of byte . of y that another thread wrote"):
        count(5)


# Places -------------------------------------------------------------------------------------------

THREE = [
    "thread_position_in_grid", "threads_per_grid", "thread_position_in_threadgroup",
    "threads_per_threadgroup", "dispatch_threads_per_threadgroup",
    "threadgroup_position_in_grid", "threadgroups_per_grid",
]  # fmt: skip
ONE = [
    "thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup", "threads_per_simdgroup", "thread_index_in_quadgroup",
    "quadgroup_index_in_threadgroup",
]  # fmt: skip


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(
    ("grid", "group"),
    [
        ((128, 1, 1), (64, 1, 1)),
        ((70, 1, 1), (64, 1, 1)),
        ((5, 1, 1), (64, 1, 1)),
        ((10, 7, 1), (4, 3, 1)),
        ((3, 5, 9), (2, 4, 8)),
        ((1, 1, 40), (1, 1, 33)),
    ],
)
def test_a_thread_knows_its_place(grid: Any, group: Any) -> None:
    """Also in threadgroups that the grid does not fill."""
    fields = [f"{name}.{axis}" for name in THREE for axis in "xyz"] + ONE
    at = "thread_position_in_grid"
    body = f"uint i = ({at}.z * threads_per_grid.y + {at}.y) * threads_per_grid.x + {at}.x;\n"
    body += "".join(f"y[i * {len(fields)} + {k}] = {f};\n" for k, f in enumerate(fields))
    total = int(np.prod(grid))
    (y,) = mx.fast.metal_kernel("places", [], ["y"], body)(
        inputs=[], output_shapes=[(total, len(fields))], output_dtypes=[mx.uint32],
        grid=grid, threadgroup=group,
    )  # fmt: skip
    size, per = np.array(grid), np.array(group)
    position = np.stack(np.unravel_index(np.arange(total), grid[::-1])[::-1], -1)
    own = position // per
    inside = position - own * per
    present = np.minimum(per, size - own * per)
    index = inside[:, 0] + present[:, 0] * (inside[:, 1] + present[:, 1] * inside[:, 2])
    same = np.ones_like(position)
    wanted = [
        position, same * size, inside, present, same * per, own, same * -(-size // per),
        np.stack(
            [
                index, index % 32, index // 32, -(-present.prod(-1) // 32), index * 0 + 32,
                index % 4, index // 4,
            ],
            -1,
        ),
    ]  # fmt: skip
    np.testing.assert_array_equal(np.array(y), np.concatenate(wanted, -1))


@pytest.mark.usefixtures("metal")
def test_a_simdgroup_sums_the_lanes_that_it_has() -> None:
    body = "y[thread_position_in_grid.x] = simd_sum(thread_position_in_threadgroup.x + 1);"
    (y,) = mx.fast.metal_kernel("sums", [], ["y"], body)(
        inputs=[], output_shapes=[(70,)], output_dtypes=[mx.uint32],
        grid=(70, 1, 1), threadgroup=(64, 1, 1),
    )  # fmt: skip
    whole = sum(range(1, 33)), sum(range(33, 65))
    assert y.tolist() == [whole[0]] * 32 + [whole[1]] * 32 + [1 + 2 + 3 + 4 + 5 + 6] * 6
