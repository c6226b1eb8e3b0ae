"""Each pointer in the address space that its use says: clang knows, by way of OpenCL C++.

OpenCL C++ has Metal's four address spaces under other names and converts between none of them
where the generic one is switched off. ``opencl.h`` declares what kernels call.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import emulator
import mlx.core as mx
import our_kernels
import pytest
from generate import generated
from mlx_lm_kernels import calls

PRELUDE = Path(__file__).parent / "opencl.h"
OFF = ("cl_khr_fp64", *(f"__opencl_c_{name}" for name in ("fp64", "generic_address_space")))
OFF = (*OFF, "__opencl_c_pipes", "__opencl_c_device_enqueue")
FLAGS = [
    "-cc1", "-triple", "spir64-unknown-unknown", "-x", "cl", "-cl-std=clc++2021",
    "-cl-single-precision-constant", "-fsyntax-only", "-Wno-everything",
    f"-cl-ext=+cl_khr_fp16,{','.join(f'-{name}' for name in OFF)}",
]  # fmt: skip


def clang() -> list[str]:
    """The command of a clang, of ziglang's if the machine has none; empty if there is neither."""
    if found := shutil.which("clang"):
        return [found]
    zig = importlib.util.find_spec("ziglang")
    return [sys.executable, "-m", "ziglang", "clang"] if zig else []


CLANG = clang()
needs_clang = pytest.mark.skipif(
    not CLANG, reason="SKIPPED LOUDLY: no clang, so nothing knows address spaces here"
)


def errors(source: str) -> str:
    """What clang says of a complete Metal source; empty if it takes it."""
    text = re.sub(r"//[^\n]*", "", source)
    for _ in range(2):  # neighbours share a semicolon
        text = emulator.THREADGROUP_VARIABLES.sub(_referred, text)
    instance = re.compile(r"template\s*\[\[host_name[^;]*?decltype\((.*?)\)[^;]*;")
    text = instance.sub(r"template decltype(\1) \1;", text)
    text = re.sub(r"\[\[[^\]]*\]\]", "", text)
    text = f'{PRELUDE.read_text()}\n#line 1 "kernel"\n{text}'
    done = subprocess.run([*CLANG, *FLAGS, "-"], input=text, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def _referred(match: re.Match[str]) -> str:
    # OpenCL has such variables in kernels only, and no templates of kernels.
    text = match[1]
    for variable in re.findall(emulator.ARRAY, match[3]):
        name, size = re.fullmatch(r"(\w+)(.*)", variable, re.S).groups()
        text += f"typedef{match[2]}{name}_t{size}; "
        text += f"threadgroup {name}_t& {name} = *(threadgroup {name}_t*)0; "
    return text


KERNEL = """
template <int N>
inline float total(float v, threadgroup float* shared) {{ shared[N] = v; return shared[0]; }}
template <typename T>
[[kernel]] void k(const device T* x [[buffer(0)]], const constant int& n [[buffer(1)]],
                  device T* y [[buffer(2)]], uint i [[thread_index_in_threadgroup]]) {{
  threadgroup float a[2][32], b[32];
  thread float own[4];
  {}
}}
template [[host_name("k")]] [[kernel]] decltype(k<bfloat16_t>) k<bfloat16_t>;
"""


@needs_clang
@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("device float* p = b;", "threadgroup float* p = b;"),
        ("float* p = b;", "auto p = b + 1; p[0] = 1;"),
        ("threadgroup float* p = own;", "thread float* p = own;"),
        ("const device float* p = (const device float*)a[1];", "auto p = a[1]; y[0] = p[0];"),
        ("y[0] = total<2>(x[0], x);", "y[0] = total<2>(x[0], a[1]);"),
        ("y[0] = total<2>(x[0], own);", "y[0] = total<2>(own[0], b);"),
        ("device const T& v = n;", "const device T& v = x[n];"),
        ("x[0] = 1;", "y[0] = *(const device ushort*)(x + n);"),
        ("double d = x[0]; y[0] = d;", "float d = x[0] * 0.5; y[0] = d;"),
        ("y[0] = missing(x[0]);", "y[0] = metal::precise::exp(x[0]);"),
    ],
)
def test_clang_knows_a_wrong_address_space(bad: str, good: str) -> None:
    assert "error: " in errors(KERNEL.format(bad))
    assert errors(KERNEL.format(good)) == ""


@needs_clang
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_mlx_lm_kernels_are_right(dtype: mx.Dtype) -> None:
    for call in calls(emulator.metal_kernel, dtype):
        for source in generated(call):
            assert errors(source) == ""


@needs_clang
@pytest.mark.parametrize("number", range(len(our_kernels.CASES)), ids=our_kernels.NAMES)
def test_our_kernels_are_right(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        for source in generated(partial(our_kernels.run, number, dtype)):
            assert errors(source) == ""
