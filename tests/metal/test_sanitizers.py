"""Kernels as programs of their own, under AddressSanitizer and UndefinedBehaviorSanitizer.

The checks of the emulator do not know where one array ends and the next begins, nor what the
numbers may do. These do.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import emulator
import mlx.core as mx
import our_kernels
import pytest
from emulator import MetalFault
from mlx.utils import tree_flatten
from mlx_lm_kernels import calls


@pytest.fixture
def sanitized(metal: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mx.fast, "metal_kernel", partial(metal.metal_kernel, mode="sanitized"))
    yield


# name, what is reported, code that is wrong, code that is right: cases of one kernel
CASES = [
    (
        "an index behind one threadgroup array, in another",
        "index 64 out of bounds for type 'float \\[64\\]'",
        "a[t + 1] = x[t]; b[t] = 1; y[t] = b[t];",
        "a[t] = x[t]; b[t] = 1; y[t] = b[t];",
    ),
    (
        "a pointer behind one threadgroup array, in another",
        "AddressSanitizer: global-buffer-overflow",
        "b[t] = 1; a[t] = 1; put(a + t + 1, x[t]); y[t] = b[t];",
        "b[t] = 1; a[t] = 1; put(a + t, x[t]); y[t] = b[t];",
    ),
    (
        "an index behind a thread's own array",
        "index 4 out of bounds for type 'float \\[4\\]'",
        "float v[4]; for (int k = 0; k < 5; k++) { v[k] = x[k]; } y[t] = v[t & 3];",
        "float v[4]; for (int k = 0; k < 4; k++) { v[k] = x[k]; } y[t] = v[t & 3];",
    ),
    (
        "a read behind an input",
        "AddressSanitizer: heap-buffer-overflow",
        "y[t] = x[t + 1];",
        "y[t] = x[t];",
    ),
    (
        "a shift by all the bits",
        "shift exponent 32 is too large for 32-bit type",
        "y[t] = 1u << (t / 2 + 1);",
        "y[t] = 1u << (t / 2);",
    ),
    (
        "an int that overflows",
        "signed integer overflow",
        "y[t] = w[7] + int(t);",
        "y[t] = uint(w[7]) + t;",
    ),
    (
        "a division by zero",
        "division by zero",
        "y[t] = w[7] / int(t);",
        "y[t] = w[7] / int(t + 1);",
    ),
    (
        "a vector at an odd place",
        "misaligned address .* requires 8 byte alignment",
        "y[t] = ((const device float2*)(x + 1))[t / 4].x;",
        "y[t] = ((const device float2*)(x + 2))[t / 4].x;",
    ),
    (
        "a word at an odd place",
        "misaligned address .* requires 4 byte alignment",
        "y[t] = *(const device uint*)((const device uchar*)x + t);",
        "y[t] = *(const device uint*)((const device uchar*)x + t / 4 * 4);",
    ),
]
BRANCHES = [
    f"      case {2 * n + twin}: {{ {case[2 + twin]} }} break;\n"
    for n, case in enumerate(CASES)
    for twin in range(2)
]
BODY = f"""
    uint t = thread_position_in_grid.x;
    threadgroup float a[64];
    threadgroup float b[64];
    switch (which) {{
{"".join(BRANCHES)}
    }}
"""
HEADER = "inline void put(threadgroup float* to, float value) { *to = value; }\n"


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0] for case in CASES])
def test_a_fault_is_reported_and_its_twin_runs(number: int) -> None:
    def launch(which: int) -> None:
        mx.fast.metal_kernel("faults", ["x", "w", "which"], ["y"], BODY, header=HEADER)(
            inputs=[mx.ones((64,)), mx.full((8,), 2**31 - 2), mx.array(which)],
            output_shapes=[(64,)], output_dtypes=[mx.float32], grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
        )  # fmt: skip

    with pytest.raises(MetalFault, match=CASES[number][1]):
        launch(2 * number)
    launch(2 * number + 1)


@pytest.mark.usefixtures("sanitized")
def test_the_emulators_own_faults_are_reported_too() -> None:
    body = "if (thread_position_in_grid.x) { threadgroup_barrier(mem_flags::mem_none); } y[0] = 1;"
    with pytest.raises(MetalFault, match="divergent barrier"):
        mx.fast.metal_kernel("faults", [], ["y"], body)(
            inputs=[], output_shapes=[(1,)], output_dtypes=[mx.float32], grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
        )  # fmt: skip


def arrays(made: Any) -> list[mx.array]:
    return [array for _, array in tree_flatten(made) if array is not None]


@pytest.mark.slow
@pytest.mark.usefixtures("metal")
def test_mlx_lm_kernels_are_clean() -> None:
    def both(make: Callable[..., Any], mode: str) -> list[Any]:
        return [arrays(call()) for call in calls(partial(make, mode=mode), mx.bfloat16)]

    quick, sane = (both(emulator.metal_kernel, mode) for mode in ("plain", "sanitized"))
    for one, two in zip(quick, sane, strict=True):
        assert all(mx.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        pytest.param(n, dtype, id=f"{name} {dtype}", marks=[] if short else [pytest.mark.slow])
        for n, name in enumerate(our_kernels.NAMES)
        for dtype in (mx.bfloat16, mx.float32)
        for short in [name in our_kernels.SHORT and dtype == mx.bfloat16]
    ],
)
def test_our_kernels_are_clean(
    number: int, dtype: mx.Dtype, metal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(mode: str) -> list[mx.array]:
        monkeypatch.setattr(mx.fast, "metal_kernel", partial(metal.metal_kernel, mode=mode))
        return our_kernels.run(number, dtype)

    for one, two in zip(run("plain"), run("sanitized"), strict=True):
        assert mx.array_equal(one, two)
