"""The emulator runs kernels that nobody here wrote, and says what MLX says on a CPU.

First mlx-lm's kernels against its own operations, then kernels of MLX's headers against MLX.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import Buffer, MetalFault, run_source
from mlx_lm.models.gated_delta import gated_delta_ops
from mlx_lm.models.ssm import ssm_attn
from mlx_lm_kernels import built

LONG = pytest.mark.slow
HEADERS = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"


def close(got: mx.array, wanted: mx.array, tolerance: float) -> None:
    """Within ``tolerance`` of the largest value wanted."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    a, b = (np.array(x.astype(mx.float32), np.float64) for x in (got, wanted))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-30, np.abs(b).max()))


def rounding(dtype: mx.Dtype) -> float:
    """Two roundings of a 16-bit result, or float32 sums in another order."""
    return {mx.float32: 4e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}[dtype]


# mlx-lm -----------------------------------------------------------------------------------------


@pytest.fixture(
    params=[mx.bfloat16, pytest.param(mx.float32, marks=LONG)], ids=["bfloat16", "float32"]
)
def dtype(request: pytest.FixtureRequest) -> mx.Dtype:
    return request.param


@pytest.mark.usefixtures("metal")
class TestOfMlxLm:
    def module(self, name: str) -> Any:
        mx.random.seed(7)
        return built(name, mx.fast.metal_kernel)

    def recurrence(
        self, dtype: mx.Dtype, vector: bool = False, dims: tuple[int, int] = (128, 16)
    ) -> tuple[mx.array, ...]:
        keys, values = dims
        q, k = (mx.random.normal((2, 3, 2, keys)).astype(dtype) / keys**0.5 for _ in range(2))
        v = mx.random.normal((2, 3, 4, values)).astype(dtype)
        g = mx.random.uniform(0.5, 1, (2, 3, 4, keys) if vector else (2, 3, 4))
        beta = mx.random.uniform(0, 1, (2, 3, 4))
        state = mx.random.normal((2, 4, values, keys))
        return q, k, v, g, beta, state

    @pytest.mark.parametrize("vector", [False, True])
    def test_gated_delta(self, dtype: mx.Dtype, vector: bool) -> None:
        inputs = self.recurrence(dtype, vector, (64, 8))
        y, state = self.module("models.gated_delta").gated_delta_kernel(*inputs)
        wanted, wanted_state = gated_delta_ops(*inputs)
        close(y, wanted, rounding(dtype))
        close(state, wanted_state, rounding(mx.float32))

    @pytest.mark.parametrize("vector", [False, True])
    def test_gated_delta_of_a_masked_token_is_zero(
        self, vector: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = self.recurrence(mx.float32, vector, (64, 8))
        mask = mx.array([[True, False, True], [False, True, True]])
        with pytest.raises(MetalFault, match=r"race: write of byte \d+ of y"):
            # All lanes of a row write that zero: a race, and one that nobody can see.
            self.module("models.gated_delta").gated_delta_kernel(*inputs, mask)
        unchecked = partial(mx.fast.metal_kernel, mode="plain")
        monkeypatch.setattr(mx.fast, "metal_kernel", unchecked)
        y, state = self.module("models.gated_delta").gated_delta_kernel(*inputs, mask)
        wanted, wanted_state = gated_delta_ops(*inputs, mask)
        close(y, mx.where(mask[..., None, None], wanted, 0), rounding(mx.float32))
        close(state, wanted_state, rounding(mx.float32))

    def test_gated_delta_packed_in_fewer_lanes_is_bitwise_the_same(self, dtype: mx.Dtype) -> None:
        """Its authors say so: the shuffles of one are sums inside a lane of the other."""
        module = self.module("models.gated_delta")
        inputs = self.recurrence(dtype)
        packed = module.gated_delta_kernel(*inputs)
        for other in (module.gated_delta_kernel_xtree, module.gated_delta_kernel_unpacked):
            for one, two in zip(packed, other(*inputs), strict=True):
                assert mx.array_equal(one, two)
        close(packed[0], gated_delta_ops(*inputs)[0], rounding(dtype))

    def test_ssm(self, dtype: mx.Dtype) -> None:
        module = self.module("models.ssm")
        x = mx.random.normal((2, 1, 4, 16)).astype(dtype)
        b, c = (mx.random.normal((2, 1, 2, 64)).astype(dtype) for _ in range(2))
        a_log, d, bias = (mx.random.normal((4,)) for _ in range(3))
        dt, state = mx.random.normal((2, 1, 4)), mx.random.normal((2, 4, 16, 64))
        inputs = (x, a_log, b, c, d, dt, bias, state, (0.001, 100.0))
        y, new = module.ssm_update_kernel(*inputs)
        wide = [i.astype(mx.float32) if isinstance(i, mx.array) else i for i in inputs]
        wanted, wanted_state = ssm_attn(*wide)
        close(y, wanted.astype(dtype), rounding(dtype))
        close(new, wanted_state, rounding(mx.float32))

    def test_expert_routing(self, dtype: mx.Dtype) -> None:
        logits = mx.random.normal((5, 40)).astype(dtype)
        logits[1] = logits[1, 0]  # ties: the first expert wins
        bias = mx.random.normal((40,)) * (mx.arange(40) > 20)
        inds, weights = self.module("kernels.expert_routing").expert_routing(
            logits, bias, top_k=4, multiplier=0.5, score_eps=1e-6, route_scale=2.0
        )
        score = 1 / (1 + np.exp(-0.5 * np.array(logits.astype(mx.float32), np.float64)))
        wanted = np.argsort(-(score + np.array(bias)), axis=-1, kind="stable")[:, :4]
        assert np.array_equal(np.array(inds), wanted)
        chosen = np.take_along_axis(score, wanted, -1)
        share = chosen / (chosen.sum(-1, keepdims=True) + 1e-6) * 2
        close(weights, mx.array(share, mx.float32), rounding(mx.float32))

    # One simdgroup, and four with a tail.
    @pytest.mark.parametrize(("dim", "scaled"), [(96, False), (1056, True)])
    def test_norm_add_norm(self, dtype: mx.Dtype, dim: int, scaled: bool) -> None:
        module = self.module("kernels.norm_add_norm")
        branch = mx.random.normal((3, dim)).astype(dtype)
        stream = mx.random.normal((3, dim))
        alpha, beta, scale, weight = (mx.random.normal((dim,)) for _ in range(4))
        norm = type("Norm", (), {"weight": weight, "eps": 1e-5})
        new, normed = module.norm_add_norm(
            branch, stream, alpha=alpha, beta=beta, post_weight=scale if scaled else None,
            post_eps=1e-6, next_norm=norm,
        )  # fmt: skip
        posted = branch * scale.astype(dtype) if scaled else branch
        post = mx.fast.rms_norm(posted.astype(mx.float32), None, 1e-6)
        wanted = alpha * stream + beta * post.astype(dtype)
        close(new, wanted, rounding(dtype))
        close(normed, mx.fast.rms_norm(new, weight, 1e-5).astype(dtype), rounding(dtype))
        assert mx.array_equal(module.pre_norm(new, norm, dtype=dtype), normed)
        alone, nothing = module.norm_add_norm(
            branch, stream, alpha=alpha, beta=beta, post_weight=scale if scaled else None,
            post_eps=1e-6, next_norm=None,
        )  # fmt: skip
        assert mx.array_equal(alone, new)
        assert nothing is None

    @pytest.mark.parametrize("dim", [96, 1056])
    def test_post_expert_norm_combine(self, dtype: mx.Dtype, dim: int) -> None:
        experts = mx.random.normal((3, 4, dim)).astype(dtype)
        weights = mx.random.uniform(0, 1, (3, 4))
        weight = mx.random.normal((dim,))
        got = self.module("kernels.post_expert_norm_combine").post_expert_norm_combine(
            experts, weights, norm_weight=weight, eps=1e-5
        )
        normed = mx.fast.rms_norm(experts.astype(mx.float32) * weight, None, 1e-5)
        wanted = (normed * weights.astype(dtype).astype(mx.float32)[..., None]).sum(-2)
        close(got, wanted.astype(dtype), rounding(dtype))

    @pytest.mark.parametrize("rotated", [False, True])
    def test_qk_norm(self, dtype: mx.Dtype, rotated: bool) -> None:
        heads, kv_heads, dim = 3, 1, 48
        qkvg = mx.random.normal((2, 3, 2 * (heads + kv_heads) * dim)).astype(dtype)
        how: dict[str, Any] = {
            "n_heads": heads, "n_kv_heads": kv_heads, "head_dim": dim, "eps": 1e-5,
            "query_scale": 0.5,
        }  # fmt: skip
        if rotated:
            module = self.module("kernels.qk_norm_rope")
            q, k = module.qk_norm_rope(qkvg, **how, rope_base=1e4, offset=7)
        else:
            q, k = self.module("kernels.qk_norm").qk_norm(qkvg, **how)
        split = qkvg.reshape(2, 3, -1, dim)
        normed = mx.fast.rms_norm(split.astype(mx.float32), None, 1e-5).astype(dtype)
        wanted_q, wanted_k = normed[:, :, :heads] * 0.5, normed[:, :, heads : heads + kv_heads]
        if rotated:
            rope = {"traditional": True, "base": 1e4, "scale": 1.0, "offset": 7}
            wanted_q, wanted_k = (
                mx.fast.rope(x.swapaxes(1, 2).astype(mx.float32), dim, **rope)
                .swapaxes(1, 2)
                .astype(dtype)
                for x in (wanted_q, wanted_k)
            )
        close(q, wanted_q, rounding(dtype))
        close(k, wanted_k, rounding(dtype))

    def test_rms_norm_sigmoid_gate(self, dtype: mx.Dtype) -> None:
        x = mx.random.normal((2, 3, 5, 40)).astype(dtype)
        gate = mx.random.normal((2, 5, 120)).astype(dtype)
        module = self.module("kernels.rms_norm_sigmoid_gate")
        wide = x.astype(mx.float32)
        normed = mx.fast.rms_norm(wide, None, 1e-5).swapaxes(1, 2).flatten(2)
        wanted = (normed * mx.sigmoid(gate.astype(mx.float32))).astype(dtype)
        close(module.rms_norm_sigmoid_gate(x, gate, eps=1e-5), wanted, rounding(dtype))
        turned = mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)  # with strides of its own
        close(module.rms_norm_sigmoid_gate(turned, gate, eps=1e-5), wanted, rounding(dtype))


# MLX --------------------------------------------------------------------------------------------


NOT_HERE = """
namespace metal {  // Metal's own library has it, as C++'s
template <typename... T> using _disjunction = std::disjunction<T...>;
}
struct LogAddExp { template <typename T> T operator()(T, T); };  // of a header with all operations
namespace mlx::steel {  // products of matrices, which nothing here instantiates
template <typename T, short, short, short, short, short, short = 1, short = 1> struct BlockLoader;
template <typename T, typename U, short, short, short, short, short, bool, bool, short, short>
struct BlockMMA;
}
"""


class Shipped:
    """Kernels of MLX's headers, as its host code prepares them.

    Args:
        *files: Headers, in the order of their includes.
        function_constants: What the host sets before it compiles; the others are false.
    """

    def __init__(self, *files: str, **function_constants: int):
        text = "".join((HEADERS / file).read_text() for file in files)
        # g++ has no specializations inside a class; these are of complex numbers.
        text = re.sub(
            r"(?s)  template <>\n  complex64_t operator.*?\n  \};?\n|#include[^\n]*|#pragma once",
            "",
            text,
        )
        text = re.sub(r"\[\[(buffer\(\d+\)), function_constant\(\w+\)\]\]", r"[[\1]]", text)
        text = re.sub(r"\[\[kernel, \w+\(\w+\)\]\]", "[[kernel]]", text)
        text = re.sub(r"\[\[threadgroup\(\d\)\]\]", "", text)
        self.text = NOT_HERE + re.sub(
            r"constant (\w+) (\w+) \[\[function_constant\(\d+\)\]\];",
            lambda m: f"constant constexpr {m[1]} {m[2]} = {int(function_constants.get(m[2], 0))};",
            text,
        )

    def __call__(
        self,
        instance: str,
        inputs: list[Any],
        outputs: dict[int, tuple[tuple[int, ...], mx.Dtype]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
    ) -> list[mx.array]:
        """Run ``instance``; ``outputs`` are by their places among the buffers."""
        name = instance.split("<")[0]
        head = re.search(rf"\[\[kernel\]\] void {name}\((.*?)\) \{{", self.text, re.S)
        assert head is not None
        numbered = re.sub(r"(?m)^((?:(?!\[\[).)*\w),$", r"\1 [[buffer(0)]],", head[1])
        source = self.text.replace(head[1], numbered)
        source += f'template [[host_name("k")]] [[kernel]] decltype({instance}) {instance};\n'
        made = {
            place: np.full(int(np.prod(shape)) * dtype.size, 0xA5, np.uint8)
            for place, (shape, dtype) in outputs.items()
        }
        given = iter(inputs)
        count = len(inputs) + len(outputs)
        buffers = [
            Buffer(f"output {i}", made[i], writable=True, initialized=False)
            if i in made
            else Buffer(f"buffer {i}", bytes_of(next(given)))
            for i in range(count)
        ]
        run_source(source, buffers, grid, threadgroup)
        return [
            mx.array(made[place]).view(dtype).reshape(shape)
            for place, (shape, dtype) in outputs.items()
        ]


def bytes_of(value: Any) -> np.ndarray:
    if isinstance(value, mx.array):
        return np.frombuffer(mx.contiguous(value).view(mx.uint8), np.uint8).copy()
    return np.atleast_1d(np.asarray(value, np.int32 if isinstance(value, int) else None)).copy()


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


NAMES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}


@pytest.mark.parametrize("rows", ["softmax_single_row", "softmax_looped"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_softmax(rows: str, dtype: mx.Dtype) -> None:
    x = (mx.random.normal((5, 301)) * 4).astype(dtype)
    threads = 96 if rows == "softmax_single_row" else 1024
    (got,) = Shipped("softmax.h")(
        f"{rows}<{NAMES[dtype]}, float>", [x, 301], {1: (x.shape, dtype)}, (5 * threads, 1, 1),
        (threads, 1, 1),
    )  # fmt: skip
    close(got, mx.softmax(x.astype(mx.float32), axis=-1).astype(dtype), rounding(dtype))


@pytest.mark.parametrize("rows", ["logsumexp", "logsumexp_looped"])
def test_logsumexp(rows: str) -> None:
    x = mx.random.normal((5, 301)) * 4
    x[2] = -mx.inf
    threads = 96 if rows == "logsumexp" else 1024
    (got,) = Shipped("logsumexp.h")(
        f"{rows}<float>", [x, 301], {1: ((5,), mx.float32)}, (5 * threads, 1, 1), (threads, 1, 1)
    )
    assert got[2] == -mx.inf
    got[2] = 0
    x[2] = 0
    wanted = mx.logsumexp(x, axis=-1)
    wanted[2] = 0
    close(got, wanted, rounding(mx.float32))


@pytest.mark.parametrize(
    "op", ["Sum", "Min", *(pytest.param(op, marks=LONG) for op in ("Max", "Prod"))]
)
def test_row_reduce(op: str) -> None:
    x = mx.random.normal((12, 300))  # of 10 rows two would be reduced twice, and written so
    shipped = Shipped("atomic.h", "reduction/ops.h", "reduction/reduce_row.h")
    (got,) = shipped(
        f"row_reduce_simple<float, float, {op}<float>>",
        [x, np.uint64(300), np.int64(12)],
        {1: ((12,), mx.float32)},
        (64, 3, 1),
        (64, 1, 1),
    )
    close(got, getattr(mx, op.lower())(x, axis=-1), rounding(mx.float32))


@pytest.mark.parametrize(
    ("inclusive", "reverse"),
    [(False, True), (True, False), *(pytest.param(b, b, marks=LONG) for b in (False, True))],
)
def test_scan(inclusive: bool, reverse: bool) -> None:
    """Of 1024 threads: with fewer its lanes read sums that nobody wrote, and drop them."""
    x = mx.random.randint(-9, 9, (3, 5000))
    flags = f"{str(inclusive).lower()}, {str(reverse).lower()}"
    (got,) = Shipped("scan.h")(
        f"contiguous_scan<int, int, CumSum<int>, 4, {flags}>",
        [x, np.uint64(5000)],
        {1: (x.shape, mx.int32)},
        (1024, 3, 1),
        (1024, 1, 1),
    )
    assert mx.array_equal(got, mx.cumsum(x, axis=-1, inclusive=inclusive, reverse=reverse))


@pytest.mark.parametrize("length", [256, 300])
def test_sort(length: int) -> None:
    x = mx.random.normal((3, length))
    (got,) = Shipped("sort.h")(
        "block_sort<float, uint, true, 128, 4>",
        [x, length, 1, 1, length, length],
        {1: (x.shape, mx.uint32)},
        (128, 3, 1),
        (128, 1, 1),
    )
    assert mx.array_equal(got, mx.argsort(x, axis=-1))


class TestOfQuantizedProducts:
    K, N = 1024, 24

    def weights(self, bits: int, experts: int = 1) -> tuple[mx.array, ...]:
        mx.random.seed(bits)
        wide = mx.random.normal((experts, self.N, self.K))
        return mx.quantize(wide, group_size=64, bits=bits)

    def batch(self, experts: int, bits: int, group: int = 64) -> list[Any]:
        """The arguments that say how x, the weights, scales and biases lie."""
        words, groups = self.K * bits // 32, self.K // group
        return [
            1, int32(2, 1), int64(self.K, self.K), 1, int32(experts), int64(self.N * words),
            int64(self.N * groups), int64(self.N * groups),
        ]  # fmt: skip

    @pytest.mark.parametrize("bits", [3, 4, *(pytest.param(b, marks=LONG) for b in (2, 5, 6, 8))])
    def test_qmv_fast(self, bits: int) -> None:
        w, s, b = self.weights(bits)
        x = mx.random.normal((1, self.K))
        (y,) = Shipped("steel/utils.h", "quantized_utils.h", "quantized.h")(
            f"affine_qmv_fast<float, 64, {bits}, false>",
            [w, s, b, x, self.K, self.N, *self.batch(1, bits)],
            {4: ((1, self.N), mx.float32)},
            (32, 2 * self.N // 8, 1),
            (32, 2, 1),
        )
        wanted = mx.quantized_matmul(x, w[0], s[0], b[0], group_size=64, bits=bits)
        close(y, wanted, 1e-5)

    @pytest.mark.parametrize(
        "rows", ["affine_gather_qmv_fast", pytest.param("affine_gather_qmv", marks=LONG)]
    )
    def test_gather_qmv(self, rows: str) -> None:
        experts = 5
        w, s, b = self.weights(4, experts)
        x = mx.random.normal((2, 1, self.K))
        rhs = mx.array([4, 0, 2, 2, 1, 3], mx.uint32)
        lhs = mx.array([0, 0, 0, 1, 1, 1], mx.uint32)
        (y,) = Shipped("steel/utils.h", "quantized_utils.h", "quantized.h")(
            f"{rows}<float, 64, 4>",
            [
                w, s, b, x, lhs, rhs, self.K, self.N, *self.batch(experts, 4),
                1, int32(6), int64(1), int64(1),
            ],
            {6: ((6, 1, self.N), mx.float32)},
            (32, 2 * self.N // 8, 6),
            (32, 2, 1),
        )  # fmt: skip
        how = {"transpose": True, "group_size": 64, "bits": 4}
        close(y, mx.gather_qmm(x, w, s, b, lhs, rhs, **how), 1e-5)

    @pytest.mark.parametrize("bits", [2, *(pytest.param(b, marks=LONG) for b in (4, 8))])
    def test_quantize_and_back(self, bits: int) -> None:
        wide = mx.random.normal((self.N, self.K))
        w, s, b = mx.quantize(wide, group_size=64, bits=bits)
        shipped = Shipped("steel/utils.h", "quantized_utils.h", "quantized.h")
        lanes = wide.size // 2  # each takes two of a group of 64
        words = (w.size * 4,)
        packed, scales, biases = shipped(
            f"affine_quantize<float, 64, {bits}>",
            [wide],
            {1: (words, mx.uint8), 2: (s.shape, mx.float32), 3: (b.shape, mx.float32)},
            (lanes, 1, 1),
            (256, 1, 1),
        )
        close(scales, s, 1e-6)
        close(biases, b, 1e-6)
        assert mx.array_equal(packed, w.view(mx.uint8).flatten())
        (back,) = shipped(
            f"affine_dequantize<float, 64, {bits}>",
            [w, s, b],
            {3: (wide.shape, mx.float32)},
            (w.size * 4, 1, 1),
            (256, 1, 1),
        )
        close(back, mx.dequantize(w, s, b, group_size=64, bits=bits), 1e-6)

    @pytest.mark.parametrize(
        ("mode", "group", "bits"),
        [
            ("mxfp4", 32, 4),
            pytest.param("nvfp4", 16, 4, marks=LONG),
            pytest.param("mxfp8", 32, 8, marks=LONG),
        ],
    )
    def test_gather_qmv_of_floats(self, mode: str, group: int, bits: int) -> None:
        experts = 5
        w, s = mx.quantize(mx.random.normal((experts, self.N, self.K)), mode=mode)
        x = mx.random.normal((2, 1, self.K))
        rhs = mx.array([4, 0, 2, 2, 1, 3], mx.uint32)
        lhs = mx.array([0, 0, 0, 1, 1, 1], mx.uint32)
        (y,) = Shipped("fp4.h", "fp8.h", "steel/utils.h", "quantized_utils.h", "fp_quantized.h")(
            f"fp_gather_qmv_fast<float, {group}, {bits}>",
            [
                w, s, mx.ones((1,)), x, lhs, rhs, self.K, self.N,
                *self.batch(experts, bits, group)[:-1], 1, int32(6), int64(1), int64(1),
            ],
            {6: ((6, 1, self.N), mx.float32)},
            (32, 2 * self.N // 8, 6),
            (32, 2, 1),
        )  # fmt: skip
        close(y, mx.gather_qmm(x, w, s, None, lhs, rhs, mode=mode, transpose=True), 1e-5)


@pytest.mark.parametrize(
    ("dtype", "causal"),
    [(mx.float32, False), (mx.float16, True), pytest.param(mx.float16, False, marks=LONG)],
)
def test_sdpa_vector(dtype: mx.Dtype, causal: bool) -> None:
    heads, kv_heads, length, dim, queries = 4, 2, 70, 64, 3
    q = mx.random.normal((1, heads, queries, dim)).astype(dtype)
    k, v = (mx.random.normal((1, kv_heads, length, dim)).astype(dtype) for _ in range(2))
    nothing = mx.zeros((1,))
    (got,) = Shipped("sdpa_vector.h", do_causal=causal)(
        f"sdpa_vector<{NAMES[dtype]}, {dim}>",
        [
            q, k, v, heads // kv_heads, length, np.uint64(length * dim), np.uint64(dim),
            np.uint64(length * dim), np.uint64(dim), np.float32(dim**-0.5),
            nothing, nothing, 0, 0, 0, nothing, heads,
        ],
        {3: (q.shape, dtype)},
        (1024 * heads, queries, 1),
        (1024, 1, 1),
    )  # fmt: skip
    wide = [x.astype(mx.float32) for x in (q, k, v)]
    wanted = mx.fast.scaled_dot_product_attention(
        *wide, scale=dim**-0.5, mask="causal" if causal else None
    )
    close(got, wanted.astype(dtype), rounding(dtype))
