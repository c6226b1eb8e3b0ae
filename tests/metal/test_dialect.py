"""The checker of the Metal dialect: what it catches, and what it leaves alone."""

from functools import partial
from pathlib import Path

import emulator
import mlx.core as mx
import our_kernels
import pytest
from dialect import THREADGROUP_BYTES, check, threadgroup_bytes
from generate import generated
from mlx_lm_kernels import calls

from mlx_flash.kernels.metal import sources

HEADERS = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"

# What MLX makes of a body: a template, its arguments, and one instance.
SOURCE = """
{header}
template <typename T, int N, bool B>
[[kernel]] void k(
  const device T* x [[buffer(0)]],
  const constant int* x_shape [[buffer(1)]],
  const constant float& s [[buffer(2)]],
  device T* y [[buffer(3)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {{
{body}
}}

template [[host_name("k")]] [[kernel]] decltype(k<float, 8, 1>) k<float, 8, 1>;
"""


def rules(body: str = "", header: str = "") -> list[str]:
    return [finding.rule for finding in check(SOURCE.format(header=header, body=body))]


# rule, body that breaks it, body that does not
BODIES = [
    ("double", "double a = 1;", "float a = 1.0;"),
    ("double", "float a = 1.0L;", "float a = 1.0; long b = 1L;"),
    ("allocation", "thread int* a = new int;", "int news = 1;"),
    ("allocation", "thread void* a = malloc(4);", "int malloc_size = 4;"),
    ("exception", "try { y[0] = 1; } catch (...) {}", "int retry = 1;"),
    ("exception", "throw 1;", "int thrown = 1;"),
    ("rtti", "auto a = typeid(s);", "auto a = s;"),
    ("goto", "goto end; end: y[0] = 1;", "// goto is not in Metal\n y[0] = 1;"),
    ("lambda", "auto f = [&](int a) { return a; };", "T a[2] = {x[0], x[1]}; y[0] = (a)[1];"),
    ("lambda", "y[0] = each([=](int a) { return a; });", "y[0] = each(x[1]);"),
    ("c++17", "auto [a, b] = pair;", "auto a = pair[0];"),
    ("std", "y[0] = std::max(x[0], x[1]);", "y[0] = metal::max(x[0], x[1]);"),
    ("asm", 'asm("nop");', "float asm_ = 1;"),
    ("static", "static int a = 0;", "static constexpr int a = 0;"),
    ("static", "thread_local int a = 0;", "thread int a = 0;"),
    ("function-pointer", "float (*f)(float) = g;", "float f = (*x) * (2);"),
    ("address-space", "float* p = y;", "device float* p = y;"),
    ("address-space", "const float *p = x, *q = x;", "const device float *p = x, *q = x;"),
    ("address-space", "auto& a = y[0];", "device auto& a = y[0];"),
    ("address-space", "struct S { T* a; };", "struct S { device T* a; T b; };"),
    ("address-space", "int n = 0, *p = y;", "int n = N & 3, p = (N) * (s);"),
    ("address-space", "switch (N) { case 1: T* p = y; }", "switch (N) { case 1: T p = N * s; }"),
    ("address-space", "auto* a = y;", "auto a = y;"),
    ("address-space", "if (N) for (const T* p = x; p < y; p++) {}", "for (auto p = x; ; ) {}"),
    ("address-space", "float v = *(float*)(x);", "float v = *(device float*)(x);"),
    ("address-space", "float v = *(const uint *)x;", "float v = (s) * x[0], w = (s * N);"),
    (
        "address-space",
        "auto v = reinterpret_cast<const uint4*>(x);",
        "auto v = reinterpret_cast<const device uint4*>(x); uint w = as_type<uint>(s);",
    ),
    ("address-space", "using P = T*;", "using P = device T*; using C = A<N * 2>;"),
    ("address-space", "typedef T* P;", "typedef device T* P;"),
    ("address-space", "vec<T, 4>* v = 0;", "bool a = N < 4, b = N > 4 && N * 4; y[0] = N * s;"),
    ("array-size", "uint n = x_shape[0]; float a[n];", "constexpr uint n = N * 2; float a[n];"),
    ("array-size", "const int n = x_shape[0]; T a[n];", "const int n = N; T a[n];"),
    ("array-size", "threadgroup T a[s];", "threadgroup T a[N + sizeof(T)];"),
    ("array-size", "for (int i = 0; i < 4; i++) { T a[2][i]; }", "T a[2][N]; a[0][1] = x[1];"),
    ("threadgroup", "threadgroup float a[4] = {0};", "threadgroup float a[4]; a[0] = 1;"),
    ("threadgroup-bytes", "threadgroup T a[8193];", "threadgroup T a[8192];"),
    ("threadgroup-bytes", "alignas(16) threadgroup T a[8193];", "threadgroup T a[8000], *p = a;"),
    (
        "threadgroup-bytes",
        "constexpr int n = (N + 1) / 2 * 1024; threadgroup float4 a[N > 4 ? n : 1];",
        "constexpr int n = (N + 1) / 2 * 512; threadgroup float4 a[N > 4 ? n : 1];",
    ),
]
# rule, header that breaks it, header that does not
HEADS = [
    ("virtual", "struct S { virtual void f(); };", "struct S { void f(); };"),
    ("include", "#include <vector>", "#include <metal_stdlib>"),
    ("include", '#include "mine.h"', "#include <simd/simd.h>"),
    ("program-scope", "constexpr int n = 4;", "constant constexpr int n = 4;"),
    ("program-scope", "static const float t[2] = {1, 2};", "constant float t[2] = {1, 2};"),
    ("program-scope", "struct S { static constexpr int n = 4; };", "struct S { int n = 4; };"),
    ("program-scope", "int n;", "#define HERE constant\nHERE int n = 4; int f(int a);"),
    ("address-space", "void f(float* p) {}", "void f(thread float* p, float q[4]) {}"),
    ("address-space", "void f(const T& p = 1) {}", "void f(const thread T& p, int b = 2 * 3) {}"),
    ("address-space", "float* f(int n) { return 0; }", "device float* f(int n) { return 0; }"),
    ("address-space", "struct S { float* p; };", "struct S { device float* p; };"),
    ("address-space", "using P = float&;", "using P = thread float&;"),
    ("address-space", "void f(vec<T, 4> & v) {}", "void f(vec<T, 4 * 2> v) {}"),
    ("recursion", "int f(int n) { return f(n - 1); }", "int f(int n) { return g(n - 1); }"),
    (
        "recursion",
        "int g(int n); int f(int n) { return g(n); } int g(int n) { return f(n); }",
        "int g(int n) { return h.f(n); } int f(int n) { return g(n); }",
    ),
    (
        "recursion",
        "template <int N> int f(int n) { return f<N>(n); }",
        "template <int N> int f(int n) { return f<N / 2>(n); }",
    ),
    ("recursion", "int f(int a, int b = 1) { return f(a); }", "int f(int a) { return f(a, 1); }"),
    (
        "threadgroup",
        "void f() { threadgroup float a[4]; }",
        "void f(threadgroup float* a) { threadgroup float* b = a; }",
    ),
    (
        "template",
        "template <float F> [[kernel]] void h(device int* a [[buffer(0)]]) {}",
        "template <typename A, class C, uint U = 3, short S = 1> [[kernel]] void h() {}",
    ),
    (
        "buffers",
        "[[kernel]] void h(device int* a [[buffer(31)]]) {}",
        "[[kernel]] void h(device int* a [[buffer(30)]]) {}",
    ),
    ("c++20", "consteval int f() { return 1; }", "constant bool requires_ = true;"),
]


@pytest.mark.parametrize(("rule", "bad", "good"), BODIES)
def test_a_body_that_breaks_a_rule_is_found_and_its_twin_is_not(
    rule: str, bad: str, good: str
) -> None:
    assert set(rules(body=bad)) == {rule}
    assert rules(body=good) == []


@pytest.mark.parametrize(("rule", "bad", "good"), HEADS)
def test_a_header_that_breaks_a_rule_is_found_and_its_twin_is_not(
    rule: str, bad: str, good: str
) -> None:
    assert set(rules(header=bad)) == {rule}
    assert rules(header=good) == []


def test_a_finding_names_its_line() -> None:
    source = SOURCE.format(header="/* two\n lines */", body="\nT a = 1; \\\n\ndouble b = a;")
    (finding,) = check(source)
    assert source.splitlines()[finding.line - 1] == "double b = a;"


def test_threadgroup_memory_of_an_instance() -> None:
    body = """
        using U = float;
        constexpr int M = sizeof(T) == 4 ? 1 << 3 : 0;
        constexpr int R = (N * 3 + 31) / 32;
        threadgroup U a[M][R], b[4];
        if (R > 1) { threadgroup half4 c[static_cast<int>(N)]; threadgroup bool d; }
        threadgroup float* p = b;
        float e[N];
    """
    assert threadgroup_bytes(SOURCE.format(header="", body=body)) == {"k": 32 + 16 + 64 + 1}
    unknown = SOURCE.format(header="", body="threadgroup Block a[4];")
    assert threadgroup_bytes(unknown) == {"k": None}
    assert THREADGROUP_BYTES == 32768


def test_what_mlx_ships_has_no_findings() -> None:
    """Apple's compiler takes these files; the NAX ones need Metal 4."""
    files = [f for f in sorted(HEADERS.rglob("*.h")) if "nax" not in f.name]
    assert len(files) > 50
    for file in files:
        found = [f for f in check(file.read_text()) if f.rule != "include"]
        assert not found, file
    metal4 = check((HEADERS / "quantized_nax.h").read_text())
    assert {finding.rule for finding in metal4} == {"lambda"}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_mlx_lm_kernels_have_no_findings(dtype: mx.Dtype) -> None:
    made = [generated(call) for call in calls(emulator.metal_kernel, dtype)]
    assert [len(sources) for sources in made] == [1] * 15
    for (source,) in made:
        assert check(source) == []
        assert None not in threadgroup_bytes(source).values()


@pytest.mark.parametrize("number", range(len(our_kernels.CASES)), ids=our_kernels.NAMES)
def test_our_kernels_have_no_findings(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    (source,) = generated(partial(our_kernels.run, number, mx.bfloat16))
    assert check(source) == []
    assert None not in threadgroup_bytes(source).values()


def test_all_of_our_kernels_are_checked() -> None:
    files = {file.stem for file in sources().glob("*.metal")}
    assert files == {kernel for kernel, *_ in our_kernels.CASES}
