"""Products by the compiled kernels against float64, over shapes, formats and instruction sets.

The bound: every weight is rounded once, every product and every sum of a row once more, so an
error is at most (K + 8) eps sum |w||x| with eps = 2^-24, and then the answer is rounded to the
dtype of x. `w` is scale * q + bias, and some kernels round the two terms apart.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from patience import PATIENT

from mlx_flash.kernels import native

if native() is None:
    pytest.skip("SKIPPED LOUDLY: the native kernels are not built", allow_module_level=True)

from mlx_flash.kernels import linear

KERNELS = native()
EPS = 2.0**-24
HALF_ULP = {mx.float32: EPS, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
TINY = {mx.float32: 2.0**-126, mx.float16: 2.0**-24, mx.bfloat16: 2.0**-126}
FLOATS = list(HALF_ULP)
FORMATS = [
    *(("affine", group, bits) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    ("mxfp4", 32, 4),
    ("mxfp8", 32, 8),
    ("nvfp4", 16, 4),
]


def available(name):
    try:
        KERNELS.set_isa(name)
    except ValueError:
        return False
    return True


BEST = KERNELS.isa()
NAMES = ("amx", "avx512bf16", "avx512", "avx2", "neon", "portable")
ISAS = [name for name in NAMES if available(name)]
KERNELS.set_isa(BEST)
THREADS = KERNELS.threads()
each_isa = pytest.mark.parametrize("isa", ISAS)
examples = settings(PATIENT, max_examples=25)


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    KERNELS.set_isa(BEST)
    KERNELS.set_threads(THREADS)


def test_the_tiles_are_tested_here():
    if "amx" not in ISAS:
        pytest.skip("SKIPPED LOUDLY: no AMX products of bfloat16 that this process may use")
    assert BEST == "amx"


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
_e, _m = np.divmod(np.arange(128), 8)
E4M3 = np.where(_e > 0, (8.0 + _m) * 2.0 ** (_e - 10), _m * 2.0**-9)
E4M3 = np.concatenate([E4M3, -E4M3])
E8M0 = 2.0 ** (np.arange(256) - 127.0)


class Weights:
    """Random codes in a format, and what they stand for in float64."""

    def __init__(self, rng, mode, group, bits, shape, scale_type=mx.float32):
        *stack, k = shape
        self.format = (group, bits, mode)
        packed = rng.integers(0, 256, (*stack, k * bits // 8), dtype=np.uint8)
        if mode == "mxfp8":
            packed[packed % 128 == 127] = 0  # not a number; no quantizer writes it
        self.weight = mx.array(packed.view(np.uint32))
        stream = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*shape, bits)
        codes = stream @ (1 << np.arange(bits))
        groups = (*stack, k // group)
        self.biases = None
        biases = 0
        if mode == "affine":
            self.scales = mx.array(rng.uniform(-0.1, 0.1, groups)).astype(scale_type)
            self.biases = mx.array(rng.uniform(-1, 1, groups)).astype(scale_type)
            scales, biases = float64(self.scales), float64(self.biases)
            biases = np.repeat(biases, group, axis=-1)
        else:
            low, high, table = (0, 80, E4M3) if mode == "nvfp4" else (107, 119, E8M0)
            self.scales = mx.array(rng.integers(low, high, groups, dtype=np.uint8))
            scales = table[np.array(self.scales)]
            codes = (E4M3 if mode == "mxfp8" else E2M1)[codes]
        scaled = codes * np.repeat(scales, group, axis=-1)
        self.dense = scaled + biases
        self.size = np.abs(scaled) + np.abs(biases)

    @property
    def arrays(self):
        return self.weight, self.scales, self.biases


class Dense:
    def __init__(self, rng, shape, dtype):
        self.weight = normal(rng, shape, dtype)
        self.dense = float64(self.weight)
        self.size = np.abs(self.dense)


def float64(a):
    return np.array(a.astype(mx.float32)).astype(np.float64)


def normal(rng, shape, dtype):
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def check(y, x, dense, size, bias=None):
    """That y is x @ dense.T + bias within the bound; x and dense already broadcast."""
    x = float64(x)
    exact = x @ np.swapaxes(dense, -1, -2)
    sums = np.abs(x) @ np.swapaxes(size, -1, -2)
    if bias is not None:
        exact = exact + bias
        sums = sums + np.abs(bias)
    assert y.shape == exact.shape
    bound = (dense.shape[-1] + 8) * EPS * sums
    bound = bound + HALF_ULP[y.dtype] * (np.abs(exact) + bound) + TINY[y.dtype]
    error = np.abs(float64(y) - exact)
    assert (error <= bound).all(), (error / bound).max()


def bits_of(y):
    return np.array(y.view(mx.uint32 if y.dtype == mx.float32 else mx.uint16))


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f[0]}{f[2]}-{f[1]}")
def test_this_file_and_mlx_read_the_same_weights(form):
    w = Weights(np.random.default_rng(0), *form, (16, 256), mx.bfloat16)
    scales, biases = (
        None if a is None else a if a.dtype == mx.uint8 else a.astype(mx.float32)
        for a in w.arrays[1:]
    )
    wide = float64(mx.dequantize(w.weight, scales, biases, *w.format, dtype=mx.float32))
    if form[0] == "affine":
        assert (np.abs(wide - w.dense) <= 2 * EPS * w.size).all()
    else:
        assert np.array_equal(wide, w.dense)


leads = st.sampled_from([(), (1,), (2,), (7,), (33,), (3, 1), (2, 5), (1, 13), (2, 1, 9)])
seeds = st.integers(0, 2**32 - 1)


@each_isa
@examples
@given(
    seed=seeds,
    form=st.sampled_from(FORMATS),
    groups=st.integers(1, 12),
    out=st.integers(1, 70),
    lead=leads,
    dtype=st.sampled_from(FLOATS),
    scale_type=st.sampled_from(FLOATS),
    bias_type=st.sampled_from([None, *FLOATS]),
)
def test_quantized_matmul(isa, seed, form, groups, out, lead, dtype, scale_type, bias_type):
    KERNELS.set_isa(isa)
    rng = np.random.default_rng(seed)
    k = max(groups * form[1], 32)
    w = Weights(rng, *form, (out, k), scale_type)
    x = normal(rng, (*lead, k), dtype)
    bias = None if bias_type is None else normal(rng, (out,), bias_type)
    y = KERNELS.quantized_matmul(x, *w.arrays, *w.format, bias)
    assert y.dtype == dtype
    check(y, x, w.dense, w.size, None if bias is None else float64(bias))


@each_isa
@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f[0]}{f[2]}-{f[1]}")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_every_format_beyond_one_block_of_weights(isa, form, dtype):
    KERNELS.set_isa(isa)
    rng = np.random.default_rng(form[1] * form[2])
    w = Weights(rng, *form, (50, 512 + 2 * 128), mx.bfloat16)
    for lead in [(1,), (4,), (19,)]:
        x = normal(rng, (*lead, 768), dtype)
        check(KERNELS.quantized_matmul(x, *w.arrays, *w.format), x, w.dense, w.size)


@each_isa
@examples
@given(
    seed=seeds,
    k=st.integers(1, 1200),
    out=st.integers(1, 70),
    lead=leads,
    dtype=st.sampled_from(FLOATS),
    weight_type=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
)
def test_dense_matmul(isa, seed, k, out, lead, dtype, weight_type, with_bias):
    KERNELS.set_isa(isa)
    rng = np.random.default_rng(seed)
    w = Dense(rng, (out, k), weight_type)
    x = normal(rng, (*lead, k), dtype)
    bias = normal(rng, (out,), weight_type) if with_bias else None
    y = KERNELS.dense_matmul(x, w.weight, bias)
    check(y, x, w.dense, w.size, float64(bias) if with_bias else None)


# Batch axes of x, indices; rows of each.
GATHERS = [
    ((1, 1, 1), (1, 1, 8), 1),
    ((2, 5, 1), (2, 5, 3), 1),
    ((70,), (70,), 1),
    ((4,), (4,), 6),
    ((1,), (3, 9), 2),
    ((2, 1), (4,), 3),
    ((), (5,), 1),
    ((3,), (), 2),
]


@each_isa
@examples
@given(
    seed=seeds,
    form=st.sampled_from([None, ("affine", 64, 4), ("affine", 32, 3), ("nvfp4", 16, 4)]),
    out=st.integers(1, 40),
    gather=st.sampled_from(GATHERS),
    dtype=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    prefill=st.sampled_from([None, False, True]),
    index_type=st.sampled_from([mx.uint32, mx.int32, mx.int64]),
)
def test_gather(isa, seed, form, out, gather, dtype, with_bias, prefill, index_type):
    KERNELS.set_isa(isa)
    rng = np.random.default_rng(seed)
    experts, k = 6, 128
    batch, picked, rows = gather
    chosen = rng.integers(0, experts, picked)
    indices = mx.array(chosen).astype(index_type)
    x = normal(rng, (*batch, rows, k), dtype)
    bias = normal(rng, (experts, out), dtype) if with_bias else None
    if form is None:
        w = Dense(rng, (experts, out, k), dtype)
        y = KERNELS.gather_mm(x, w.weight, indices, bias, prefill)
    else:
        w = Weights(rng, *form, (experts, out, k), dtype)
        y = KERNELS.gather_qmm(x, *w.arrays, indices, *w.format, bias, prefill)
    shape = np.broadcast_shapes(batch, picked)
    each = np.broadcast_to(chosen, shape)
    wide = mx.broadcast_to(x, (*shape, rows, k))
    added = float64(bias)[each][..., None, :] if with_bias else None
    check(y, wide, w.dense[each], w.size[each], added)


@each_isa
@pytest.mark.parametrize("form", FORMATS[-3:], ids=lambda f: f[0])
@pytest.mark.parametrize("rows", [1, 3, 64], ids=["decode", "few", "many"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_every_code_and_scale_of_the_small_floats_is_exact(isa, form, rows, dtype):
    KERNELS.set_isa(isa)
    mode, group, bits = form
    out, k = 16, 512
    codes = np.resize(np.arange(256, dtype=np.uint8), (out, k * bits // 8))
    codes[codes % 128 == 127] = 0 if mode == "mxfp8" else 255
    scales = np.resize(np.arange(256, dtype=np.uint8), (out, k // group))
    if mode == "nvfp4":
        scales[scales % 128 == 127] = 0
    else:
        scales[scales > 246] = 0  # times the largest code, beyond float32
    w, scales = mx.array(codes.view(np.uint32)), mx.array(scales)
    exact = mx.dequantize(w, scales, None, group, bits, mode, dtype=mx.float32)
    one_hot = mx.eye(k).astype(dtype)
    got = [
        KERNELS.quantized_matmul(one_hot[i : i + rows], w, scales, None, *form[1:], mode)
        for i in range(0, k, rows)
    ]
    assert np.array_equal(float64(mx.concatenate(got)), float64(exact.astype(dtype)).T)


@each_isa
@pytest.mark.parametrize("form", [None, *FORMATS[::4], *FORMATS[-3:]], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_no_bit_depends_on_the_number_of_rows(isa, form, dtype):
    KERNELS.set_isa(isa)
    rng = np.random.default_rng(5)
    k, out = 640, 150
    if form is None:
        w = Dense(rng, (out, k), dtype)
        product = lambda x, **how: KERNELS.dense_matmul(x, w.weight, **how)  # noqa: E731
    else:
        w = Weights(rng, *form, (out, k), mx.bfloat16)
        product = lambda x, **how: KERNELS.quantized_matmul(x, *w.arrays, *w.format, **how)  # noqa: E731
    x = normal(rng, (150, k), dtype)
    prompt = bits_of(product(x))
    for count in (*range(2, 15), 19, 33, 100):
        assert np.array_equal(bits_of(product(x[:count])), prompt[:count]), count
        assert np.array_equal(bits_of(product(x[-count:])), prompt[-count:]), count
    assert np.array_equal(bits_of(product(x[:1], prefill=True)), prompt[:1])
    batch = bits_of(product(x[:30, None]))
    one_by_one = np.stack([bits_of(product(x[i])) for i in range(30)])
    assert np.array_equal(batch[:, 0], one_by_one)


@each_isa
@pytest.mark.parametrize("form", [("affine", 64, 4), ("nvfp4", 16, 4)], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_no_bit_depends_on_where_the_rows_lie(isa, form, dtype):
    KERNELS.set_isa(isa)
    rng = np.random.default_rng(13)
    w = Weights(rng, *form, (2, 150, 576), mx.bfloat16)
    x = normal(rng, (230, 1, 576), dtype)
    chosen = rng.integers(0, 2, 230)
    got = bits_of(KERNELS.gather_qmm(x, *w.arrays, mx.array(chosen), *w.format, prefill=True))
    for expert in range(2):
        arrays = [None if a is None else a[expert] for a in w.arrays]
        rows = mx.array(np.flatnonzero(chosen == expert))
        alone = KERNELS.quantized_matmul(x[rows, 0], *arrays, *w.format, prefill=True)
        assert np.array_equal(got[chosen == expert, 0], bits_of(alone))


@pytest.mark.parametrize("isa", ISAS[:3])
@pytest.mark.parametrize("form", [None, ("affine", 64, 4), ("mxfp8", 32, 8)], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("lead", [(1,), (40,), (6, 1)])
def test_no_bit_depends_on_the_number_of_threads(isa, form, dtype, lead):
    KERNELS.set_isa(isa)
    rng = np.random.default_rng(6)
    experts, out, k = 5, 300, 512
    if form is None:
        w = Dense(rng, (experts, out, k), dtype)
        stack = (w.weight,)
    else:
        w = Weights(rng, *form, (experts, out, k), mx.float16)
        stack = w.arrays
    x = normal(rng, (*lead, k), dtype)
    indices = mx.array(rng.integers(0, experts, (lead[0], 3)))
    pairs = x.reshape(lead[0], 1, 1, k)

    def everything():
        first = [None if a is None else a[0] for a in stack]
        if form is None:
            ys = [KERNELS.dense_matmul(x, *first), KERNELS.gather_mm(pairs, *stack, indices)]
        else:
            ys = [
                KERNELS.quantized_matmul(x, *first, *w.format),
                KERNELS.gather_qmm(pairs, *stack, indices, *w.format),
                KERNELS.gather_qmm(pairs, *stack, indices, *w.format, prefill=True),
            ]
        return [bits_of(y) for y in ys]

    KERNELS.set_threads(1)
    alone = everything()
    KERNELS.set_threads(2)
    for y, z in zip(alone, everything(), strict=True):
        assert np.array_equal(y, z)


def test_strided_activations_and_a_slice_of_a_stack():
    rng = np.random.default_rng(7)
    w = Weights(rng, "affine", 64, 4, (3, 24, 128))
    x = normal(rng, (128, 6, 5), mx.float32).transpose(2, 1, 0)
    arrays = [a[1] for a in w.arrays]
    check(KERNELS.quantized_matmul(x, *arrays, *w.format), x, w.dense[1], w.size[1])
    every_other = x[:, ::2]
    y = KERNELS.quantized_matmul(every_other, *arrays, *w.format)
    check(y, every_other, w.dense[1], w.size[1])
    flipped = [mx.contiguous(a.swapaxes(0, 1)).swapaxes(0, 1) for a in arrays]
    assert np.array_equal(
        KERNELS.quantized_matmul(x, *flipped, *w.format),
        KERNELS.quantized_matmul(x, *arrays, *w.format),
    )


def test_nothing_times_something_is_nothing():
    w = Weights(np.random.default_rng(8), "affine", 32, 4, (2, 24, 64))
    arrays = [a[0] for a in w.arrays]
    for lead in [(0,), (0, 1), (3, 0, 2)]:
        y = KERNELS.quantized_matmul(mx.zeros((*lead, 64)), *arrays, *w.format)
        assert y.shape == (*lead, 24)
        mx.eval(y)
    none = mx.zeros((0, 2), mx.uint32)
    y = KERNELS.gather_qmm(mx.zeros((0, 1, 1, 64)), *w.arrays, none, *w.format)
    assert y.shape == (0, 2, 1, 24)
    mx.eval(y)


def test_a_graph_outlives_what_it_was_built_from():
    w = Weights(np.random.default_rng(9), "affine", 64, 4, (256, 256))
    x = normal(np.random.default_rng(9), (4, 256), mx.float32)
    y = KERNELS.quantized_matmul(x + 0, *(a + 0 for a in w.arrays), *w.format)
    y = y.sum()
    mx.synchronize()
    again = KERNELS.quantized_matmul(x, *w.arrays, *w.format).sum()
    assert y.item() == again.item()


def refusal(call):
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_wrong_arguments_are_refused_at_the_call():
    rng = np.random.default_rng(10)
    w = Weights(rng, "affine", 64, 4, (24, 128), mx.float16)
    weight, scales, biases = w.arrays
    x = mx.zeros((2, 128))
    multiply = KERNELS.quantized_matmul

    assert "(2,64)" in refusal(lambda: multiply(x[:, :64], *w.arrays, *w.format))
    assert "int32" in refusal(lambda: multiply(x.astype(mx.int32), *w.arrays, *w.format))
    assert "groups of 48" in refusal(lambda: multiply(x, *w.arrays, 48, 4, "affine"))
    assert "7 bits" in refusal(lambda: multiply(x, *w.arrays, 64, 7, "affine"))
    assert "mxfp3" in refusal(lambda: multiply(x, *w.arrays, 32, 4, "mxfp3"))
    assert "(24,4)" in refusal(lambda: multiply(x, *w.arrays, 32, 4, "affine"))
    assert "biases" in refusal(lambda: multiply(x, weight, scales, None, 64, 4, "affine"))
    assert "float16" in refusal(
        lambda: multiply(x, weight, scales, biases.astype(mx.float32), 64, 4, "affine")
    )
    assert "uint8" in refusal(lambda: multiply(x, weight, mx.zeros((24, 4)), None, 32, 4, "mxfp4"))
    assert "uint32" in refusal(
        lambda: multiply(x, weight.astype(mx.int32), scales, biases, 64, 4, "affine")
    )
    assert "(25)" in refusal(lambda: multiply(x, *w.arrays, *w.format, mx.zeros(25)))
    assert "out, in" in refusal(lambda: multiply(x, *(a[None] for a in w.arrays), *w.format))
    assert "dense" in refusal(lambda: KERNELS.dense_matmul(x, weight)).lower()
    stack = [a[None] for a in w.arrays]
    indices = mx.zeros((2,), mx.uint32)
    gather = KERNELS.gather_qmm
    assert "rows" in refusal(lambda: gather(x[0], *stack, indices, *w.format))
    assert "integers" in refusal(lambda: gather(x[:, None], *stack, indices * 1.0, *w.format))
    with pytest.raises(ValueError):
        gather(x[:, None], *stack, mx.zeros((3,), mx.uint32), *w.format)


@pytest.mark.parametrize("index", [3, 2**32 - 1])
def test_an_index_beyond_the_stack_is_an_error(index):
    w = Dense(np.random.default_rng(11), (3, 4, 32), mx.float32)
    y = KERNELS.gather_mm(mx.zeros((1, 32)), w.weight, mx.array([index], dtype=mx.uint32))
    with pytest.raises(RuntimeError, match="into 3 matrices"):
        mx.eval(y)


class Stock(nn.Module):
    """One of each layer that has a native form."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(128, 96)
        self.bare = nn.Linear(128, 96, bias=False)
        self.switch = SwitchLinear(128, 96, 4)
        self.embedding = nn.Embedding(96, 128)

    def __call__(self, x, indices):
        return [
            self.plain(x),
            self.bare(x),
            self.switch(mx.expand_dims(x, (-2, -3)), indices),
            self.embedding.as_linear(x),
        ]


@pytest.mark.parametrize("form", [None, *FORMATS[2::6], *FORMATS[-3:]], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 128), (1, 9, 128)], ids=["decode", "prefill"])
def test_native_layers_answer_as_the_layers_they_stand_for(form, shape):
    mx.random.seed(12)
    model = Stock()
    for part in (model.plain, model.switch):
        part.bias = mx.random.normal(part.bias.shape)
    if form:
        mode, group, bits = form
        nn.quantize(model, group_size=group, bits=bits, mode=mode)
    x = mx.random.normal(shape)
    indices = mx.random.randint(0, 4, (*shape[:-1], 3))
    expected = model(x, indices)
    linear.use_native(model)
    assert all(type(part) in linear.CLASSES.values() for part in model.children().values())
    parts = ("plain", "bare", "switch", "embedding")
    for name, a, b in zip(parts, model(x, indices), expected, strict=True):
        a, b = np.array(a), np.array(b)
        assert a.shape == b.shape, name
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), name


def test_layers_without_a_native_form_stay_as_they_are():
    class Own(nn.Linear):
        def __call__(self, x):
            return super().__call__(x) * 2

    model = nn.Module()
    model.own = Own(64, 64)
    model.norm = nn.RMSNorm(64)
    model.whole = nn.Linear(64, 64)
    model.whole.weight = mx.zeros((64, 64), mx.int32)
    model.globally = QuantizedSwitchLinear(
        64, 64, 2, group_size=16, bits=4, mode="nvfp4", global_scale=True
    )
    linear.use_native(model)
    kinds = {name: type(part) for name, part in model.children().items()}
    assert kinds == {
        "own": Own,
        "norm": nn.RMSNorm,
        "whole": nn.Linear,
        "globally": QuantizedSwitchLinear,
    }
