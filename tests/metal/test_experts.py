"""The Metal kernels of routed experts, on the emulator, against float64.

Tolerance: half a unit in the last place of the output's dtype, and of the largest output 5e-6, for
sums in float32 whose terms cancel.
"""

import collections
import functools
import shutil
import types

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from emulator import MetalFault, recording
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models import (
    deepseek_v3,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    nemotron_h,
    qwen3_moe,
    qwen3_next,
    switch_layers,
)
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from mlx_flash.kernels import metal as room
from mlx_flash.kernels.metal import experts as door
from mlx_flash.kernels.metal import moe

FEW = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ULP = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])
SWIGLU = ("swiglu", 0.0, 0.0)


def projection(rng, slots, rows, inner, bits=4, group=64, mode="affine", dtype=mx.float32, bias=0):
    """A switch layer of random bits: every code of every format."""
    layer = QuantizedSwitchLinear(group, 1, 1, False, group, bits, mode)
    words = rng.integers(0, 2**32, (slots, rows, inner * bits // 32), dtype=np.uint32)
    layer.weight = mx.array(words)
    shape = (slots, rows, inner // group)
    if mode == "affine":
        scales = rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape) / 2**bits
        layer.scales = mx.array(scales.astype(np.float32)).astype(dtype)
        layer.biases = mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)
    else:
        layer.scales = mx.array(rng.integers(118, 126, shape).astype(np.uint8))
    if bias:
        layer.bias = floats(rng, (slots, rows), dtype)
    return layer


def floats(rng, shape, dtype=mx.float32, scale=1):
    return mx.array(rng.normal(size=shape).astype(np.float32) * np.float32(scale)).astype(dtype)


def exact(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def weights(layer):
    """The weights of a quantized switch layer, unpacked by numpy: [S, rows, inner] float64."""
    words = np.array(layer.weight)
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    fields = bits.reshape(*words.shape[:-1], -1, layer.bits)
    codes = fields @ (1 << np.arange(layer.bits))
    if layer.mode == "mxfp4":
        scales = 2.0 ** (np.array(layer.scales).astype(np.float64) - 127)
        return E2M1[codes] * np.repeat(scales, layer.group_size, axis=-1)
    scales, zeros = (
        np.repeat(exact(a), layer.group_size, axis=-1) for a in (layer.scales, layer.biases)
    )
    return codes * scales + zeros


def product(layer, x, slots):
    """[T, K, rows] of x [T, K or 1, inner]."""
    y = np.einsum(
        "tkri,tki->tkr", weights(layer)[slots], np.broadcast_to(x, (*slots.shape, x.shape[-1]))
    )
    return y + exact(layer.bias)[slots] if "bias" in layer else y


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# g and u are gate and up, m and a limit and alpha.
ACTIVATED = {
    "swiglu": lambda g, u, m, a: g * sigmoid(g) * u,
    "clamped": lambda g, u, m, a: (
        np.minimum(g, m) * sigmoid(a * np.minimum(g, m)) * (np.clip(u, -m, m) + 1)
    ),
    "limited": lambda g, u, m, a: np.minimum(g, m) * sigmoid(np.minimum(g, m)) * np.clip(u, -m, m),
    "capped": lambda g, u, m, a: np.minimum(g * sigmoid(g), m) * np.clip(u, -m, m),
    "situ": lambda g, u, m, a: m * np.tanh(g / m) * sigmoid(g) * (a * np.tanh(u / a) if a else u),
    "geglu": lambda g, u, m, a: gelu(g) * u,
    "relu2": lambda g, u, m, a: np.maximum(u, 0) ** 2,
    "silu": lambda g, u, m, a: u * sigmoid(u),
    "gelu": lambda g, u, m, a: gelu(u),
}


def close(found, wanted, loose=5e-6):
    bound = ULP[found.dtype] * np.abs(wanted) + loose * np.abs(wanted).max()
    worst = (np.abs(exact(found) - wanted) - bound).max()
    return bool(np.isfinite(exact(found)).all() and worst <= 0)


def routed(rng, tokens, top_k, slots):
    return mx.array(rng.integers(0, slots, (tokens, top_k)).astype(np.uint32))


def gate_up_case(
    seed, form, kind=SWIGLU, sizes=(3, 4, 5, 20, 768), dtype=mx.float32, gated=True, bias=False
):
    tokens, top_k, slots, rows, inner = sizes
    rng = np.random.default_rng(seed)
    gate, up = (
        projection(rng, slots, rows, inner, *form, dtype=dtype, bias=bias) for _ in range(2)
    )
    x = floats(rng, (tokens, inner), dtype, inner**-0.5)
    ids = routed(rng, tokens, top_k, slots)
    return x, ids, gate if gated else None, up, kind


def gate_up_exact(x, ids, gate, up, kind):
    x, ids = exact(x)[:, None], np.array(ids)
    name, limit, alpha = kind
    g = 0 if gate is None else product(gate, x, ids)
    return ACTIVATED[name](g, product(up, x, ids), limit, alpha)


def down_case(seed, form, sizes=(3, 4, 5, 38, 512), dtype=mx.float32, bias=False, shared=2):
    tokens, top_k, slots, rows, inner = sizes
    rng = np.random.default_rng(seed)
    return (
        floats(rng, (tokens, top_k, inner), dtype, inner**-0.5),
        routed(rng, tokens, top_k, slots),
        mx.array(rng.uniform(size=(tokens, top_k)).astype(np.float32)),
        projection(rng, slots, rows, inner, *form, dtype=dtype, bias=bias),
        floats(rng, (tokens, rows), dtype) if shared else None,
        floats(rng, (tokens, 1), dtype) if shared > 1 else None,
    )


def down_exact(h, ids, scores, layer, shared, shared_gate):
    y = (product(layer, exact(h), np.array(ids)) * exact(scores)[..., None]).sum(axis=1)
    if shared is not None:
        y = y + exact(shared) * (1 if shared_gate is None else sigmoid(exact(shared_gate)))
    return y


FORMS = [
    (2, 32),
    (3, 32),
    (4, 32),
    (5, 32),
    (6, 32),
    (8, 32),
    (4, 64),
    (4, 128),
    (4, 32, "mxfp4"),
]
KINDS = [
    ("capped", 0.3, 0.0),
    ("limited", 0.7, 0.0),
    ("situ", 1.5, 2.5),
    ("relu2", 0.0, 0.0),
    ("silu", 0.0, 0.0),
    ("gelu", 0.0, 0.0),
    ("geglu", 0.0, 0.0),
    SWIGLU,
    ("clamped", 0.7, 1.702),
]


@pytest.mark.parametrize(("form", "kind"), list(zip(FORMS, KINDS, strict=True)), ids=str)
def test_gate_up_reads_every_format_and_knows_every_activation(metal, form, kind):
    gated = kind[0] not in ("relu2", "silu", "gelu")
    case = gate_up_case(1, form, kind, gated=gated, bias=kind[0] in ("clamped", "gelu"))
    assert close(door.gate_up(*case), gate_up_exact(*case))
    assert close(door.gate_up_reference(*case), gate_up_exact(*case))


# The others are read by the same lines, in gate_up.
@pytest.mark.parametrize("form", [(3, 32), (4, 64), (8, 32), (4, 32, "mxfp4")], ids=str)
def test_down_reads_other_formats(metal, form):
    case = down_case(2, form)
    assert close(door.down(*case), down_exact(*case))
    assert close(door.down_reference(*case), down_exact(*case))


def test_sums_are_float32_whatever_goes_in(metal):
    case = gate_up_case(3, (4, 64), dtype=mx.bfloat16)
    assert close(door.gate_up(*case), gate_up_exact(*case))
    case = down_case(4, (4, 64), dtype=mx.float16, bias=True)
    assert close(door.down(*case), down_exact(*case))


def few(inner):
    """Of every way to share a row among lanes, with idle lanes and without."""
    return st.builds(
        lambda *sizes: sizes,
        st.integers(2, 4),
        st.integers(4, 6),
        st.integers(1, 6),
        st.integers(8, 40),
        st.sampled_from(inner),
    )


# Of 8, 16 and 32 lanes; 90 chunks are gpt-oss's, 58 Nemotron-H's.
INNER = (64, 512, 1856, 2048, 2880)


@given(sizes=few(INNER), seed=st.integers(0, 99))
@FEW
def test_gate_up_takes_any_size(metal, sizes, seed):
    case = gate_up_case(seed, (4, 64), sizes=sizes)
    assert close(door.gate_up(*case), gate_up_exact(*case))


@given(sizes=few(INNER), seed=st.integers(0, 99))
@FEW
def test_down_takes_any_size(metal, sizes, seed):
    case = down_case(seed, (4, 64), sizes=sizes)
    assert close(door.down(*case), down_exact(*case))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_format_and_dtype_at_any_size(metal, form, dtype):
    for seed, inner in enumerate((384, 2944)):
        sizes = (1 + seed, 6 - seed, 3, 13 + 8 * seed, inner)
        case = gate_up_case(seed, form, sizes=sizes, dtype=dtype, bias=seed % 2)
        assert close(door.gate_up(*case), gate_up_exact(*case))
        case = down_case(seed, form, sizes=sizes, dtype=dtype, bias=seed % 2, shared=seed % 3)
        assert close(door.down(*case), down_exact(*case))


def test_scales_may_be_of_another_dtype_than_tokens(metal):
    x, ids, gate, up, kind = gate_up_case(6, (4, 64), dtype=mx.bfloat16)
    case = (x.astype(mx.float32), ids, gate, up, kind)
    assert close(door.gate_up(*case), gate_up_exact(*case))


def test_one_expert_of_one_token_without_a_shared_one(metal):
    sizes = (1, 1, 3, 8, 64)
    case = gate_up_case(7, (4, 32), sizes=sizes)
    assert close(door.gate_up(*case), gate_up_exact(*case))
    case = down_case(8, (4, 32), sizes=sizes, shared=0)
    assert close(door.down(*case), down_exact(*case))


def test_more_experts_than_simdgroups_take_turns(metal):
    case = down_case(9, (4, 64), sizes=(2, 22, 30, 12, 256), bias=True)
    assert close(door.down(*case), down_exact(*case))


# The kernels' text with one thing wrong: a comparison fails, or the emulator finds it.
WRONG = [
    ("gate_up", "dequantize.h", "10 - BITS - BITS * J", "10 - BITS - BITS * (J ^ 1)"),
    ("gate_up", "dequantize.h", "apart > 0", "apart > 1"),
    ("gate_up", "gate_up.metal", "chunk += LANES", "chunk += 32"),
    ("gate_up", "gate_up.metal", " && first + r * TEAMS < rows", ""),
    ("gate_up", "gate_up.metal", "pair / uint(slots_shape[1])", "pair"),
    ("down", "down.metal", "threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    ("down", "down.metal", "k += SIMDS", "k += 1"),
    ("down", "down.metal", "simd * TILE + uint(r * TEAMS) + team", "simd * TILE + uint(r) + team"),
]
ALSO_WRONG = [
    ("gate_up", "dequantize.h", "float(1 << BITS) * s", "float(1 << BITS)"),
    ("gate_up", "dequantize.h", "x[i * 2 * PER_HALF + J]", "x[i * PER_HALF + J]"),
    ("gate_up", "activations.h", "gate * sigmoid(gate) * up", "up * sigmoid(up) * gate"),
    ("gate_up", "gate_up.metal", "rows - 1));", "rows));"),
    ("gate_up", "gate_up.metal", "chunk * CHUNK / GROUP", "chunk"),
    ("gate_up", "gate_up.metal", "ulong(slots[pair])", "ulong(pair)"),
    ("down", "down.metal", "mine < TILE && ", ""),
    ("down", "down.metal", "fma(score, part, total[r])", "total[r] + part"),
    ("down", "down.metal", "sigmoid(float(shared_gate[token])) * part", "part"),
    ("down", "down.metal", "mine < TILE && tile + int(mine) < rows", "mine < TILE"),
]
SLOWLY = [pytest.param(*change, marks=pytest.mark.slow) for change in ALSO_WRONG]


@pytest.mark.parametrize(("kernel", "file", "right", "wrong"), [*WRONG, *SLOWLY])
def test_a_wrong_kernel_is_found(metal, monkeypatch, tmp_path, kernel, file, right, wrong):
    shutil.copytree(room.sources(), tmp_path / "metal")
    text = (tmp_path / "metal" / file).read_text()
    assert text.count(right) == 1
    (tmp_path / "metal" / file).write_text(text.replace(right, wrong))
    monkeypatch.setattr(room, "sources", lambda: tmp_path / "metal")
    try:
        if kernel == "gate_up":
            case = gate_up_case(1, (4, 64))
            right = close(door.gate_up(*case), gate_up_exact(*case))
        else:
            case = down_case(2, (4, 64), bias=True)
            right = close(door.down(*case), down_exact(*case))
    except MetalFault:
        return
    assert not right


# Layers and blocks -----------------------------------------------------------------------------


def switch_of(make=SwitchGLU, activation=None, sizes=(128, 64, 12), bias=False, **form):
    mx.random.seed(3)
    more = {} if activation is None else {"activation": activation}
    switch = make(*sizes, bias=bias, **more)
    nn.quantize(switch, **({"group_size": 32, "bits": 4} | form))
    return switch


SWITCHES = {
    "swiglu": switch_of,
    "gpt-oss": lambda: switch_of(activation=SwigluOAI(), bias=True, mode="mxfp4"),
    "relu2": lambda: switch_of(SwitchMLP, nn.ReLU2()),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_decodes_as_the_stock_one(metal, name):
    switch = SWITCHES[name]()
    metal_switch = door.MetalSwitch(switch)
    rng = np.random.default_rng(0)
    x, ids = floats(rng, (2, 1, 128)), routed(rng, 2, 4, 12)[:, None]
    scores, shared, gate = (floats(rng, (2, 1, n)) for n in (4, 128, 1))
    each = switch(x, ids)
    with recording() as launches:
        found = metal_switch(x, ids)
        assert found.shape == (2, 1, 4, 128)
        assert close(found, exact(each), 1e-5)
        found = metal_switch.weighted(x, ids, scores, shared, gate)
    assert [launch.name for launch in launches] == ["gate_up", "gate_up", "down"]
    wanted = (each * scores[..., None]).sum(axis=-2) + mx.sigmoid(gate) * shared
    assert close(found, exact(wanted), 1e-5)


def test_down_may_have_more_bits_than_gate_and_up(metal):
    switch = switch_of()
    switch.down_proj = QuantizedSwitchLinear(64, 128, 12, False, 64, 8)
    rng = np.random.default_rng(0)
    x, ids, scores = floats(rng, (2, 128)), routed(rng, 2, 4, 12), floats(rng, (2, 4))
    found = door.MetalSwitch(switch).weighted(x, ids, scores)
    assert close(found, exact((switch(x, ids) * scores[..., None]).sum(axis=-2)), 1e-5)


def test_prompts_stay_with_mlx(metal):
    switch = switch_of()
    metal_switch = door.MetalSwitch(switch)
    rng = np.random.default_rng(0)
    tokens = door.DECODE_TOKENS + 1
    x, ids = floats(rng, (1, tokens, 128)), routed(rng, tokens, 4, 12)[None]
    scores, shared = floats(rng, (1, tokens, 4)), floats(rng, (1, tokens, 128))
    with recording() as launches:
        assert mx.array_equal(metal_switch(x, ids), switch(x, ids))
        found = metal_switch.weighted(x, ids, scores, shared)
    assert not launches
    wanted = (switch(x, ids) * scores[..., None]).sum(axis=-2) + shared
    assert mx.array_equal(found, wanted)


def test_tokens_that_are_broadcast_stay_with_mlx(metal):
    switch = switch_of()
    rng = np.random.default_rng(0)
    x, ids = floats(rng, (1, 1, 128)), routed(rng, 3, 4, 12)[None]
    with recording() as launches:
        assert mx.array_equal(door.MetalSwitch(switch)(x, ids), switch(x, ids))
    assert not launches


def test_parameters_stay_with_the_wrapped_switch():
    switch = switch_of()
    wrapped = door.MetalSwitch(switch)
    assert wrapped.switch is switch
    assert set(wrapped.parameters()) == {"switch"}


class Other(SwitchGLU):
    pass


@pytest.mark.parametrize(
    ("switch", "taken"),
    [
        (switch_of, True),
        (SWITCHES["gpt-oss"], True),
        (SWITCHES["relu2"], True),
        (functools.partial(switch_of, bits=3), True),
        (functools.partial(switch_of, mode="mxfp8", bits=8), False),
        (functools.partial(switch_of, mode="nvfp4", group_size=16), False),
        (lambda: SwitchGLU(128, 64, 12), False),
        (lambda: switch_of(Other), False),
        (lambda: switch_of(activation=nn.Tanh()), False),
        (lambda: extended(switch_of()), False),
        (lambda: mixed(switch_of()), False),
        (lambda: switch_of(sizes=(128, 32, 12)), True),
    ],
)
def test_supports_says_which_layers_the_kernels_take(switch, taken):
    assert door.supports(switch()) is taken
    if not taken:
        with pytest.raises(TypeError, match="no Metal kernels"):
            door.MetalSwitch(switch())


def test_too_few_rows_for_a_pointer_to_device_memory():
    for rows, taken in ((4, False), (8, True)):
        mlp = qwen3_next.Qwen3NextMLP(128, rows)
        nn.quantize(mlp, 32, 4, class_predicate=lambda path, _: path in ("gate_proj", "up_proj"))
        assert door.supports_mlp(mlp) is taken


def extended(switch):
    switch.norm = nn.RMSNorm(128)
    return switch


def mixed(switch):
    switch.gate_proj = QuantizedSwitchLinear(128, 64, 12, False, 32, 8)
    return switch


def qwen(kind=qwen3_next.Qwen3NextSparseMoeBlock, **more):
    sizes = {
        "hidden_size": 128,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_experts": 20,
        "num_experts_per_tok": 4,
    }
    return kind(types.SimpleNamespace(**sizes | more))


def nemotron(latent=None, **more):
    sizes = {
        "hidden_size": 128,
        "num_experts_per_tok": 4,
        "moe_latent_size": latent,
        "moe_intermediate_size": 64,
        "n_routed_experts": 20,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 64,
        "mlp_bias": False,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
    }
    block = nemotron_h.NemotronHMoE(types.SimpleNamespace(**sizes | more))
    block.gate.weight = mx.random.normal(block.gate.weight.shape) / 10
    block.gate.e_score_correction_bias = mx.random.normal((20,)) / 5
    return block


def grouped(kind):
    sizes = {
        "hidden_size": 128,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "n_routed_experts": 20,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 5,
        "topk_group": 2,
        "topk_method": "noaux_tc",
    }
    block = kind(types.SimpleNamespace(**sizes))
    block.gate.weight = mx.random.normal(block.gate.weight.shape) / 10
    block.gate.e_score_correction_bias = mx.random.normal((20,)) / 5
    return block


def gpt_oss_block():
    sizes = {
        "hidden_size": 128,
        "num_local_experts": 20,
        "num_experts_per_tok": 4,
        "intermediate_size": 64,
    }
    return gpt_oss.MLPBlock(types.SimpleNamespace(**sizes))


STOCK = {
    "qwen3_next": qwen,
    "qwen3_next, not normalized": functools.partial(qwen, norm_topk_prob=False),
    "qwen3_moe": functools.partial(qwen, qwen3_moe.Qwen3MoeSparseMoeBlock),
    "qwen3_moe, not normalized": functools.partial(
        qwen, qwen3_moe.Qwen3MoeSparseMoeBlock, norm_topk_prob=False
    ),
    "nemotron_h": nemotron,
    "nemotron_h, latent": functools.partial(nemotron, 64),
    "nemotron_h, groups": functools.partial(nemotron, n_group=5, topk_group=2),
    "deepseek_v3": functools.partial(grouped, deepseek_v3.DeepseekV3MoE),
    "glm4_moe": functools.partial(grouped, glm4_moe.MoE),
    "glm4_moe_lite": functools.partial(grouped, glm4_moe_lite.Glm4MoeLiteMoE),
    "gpt_oss": gpt_oss_block,
    "nemotron_h, no shared": functools.partial(nemotron, n_shared_experts=None),
}


def block_of(name):
    mx.random.seed(11)
    block = STOCK[name]()
    nn.quantize(
        block, group_size=32, bits=4, class_predicate=lambda path, m: isinstance(m, SwitchLinear)
    )
    return block


@pytest.mark.parametrize("name", STOCK)
def test_a_block_decodes_as_the_stock_one(metal, name):
    stock, block = block_of(name), block_of(name)
    moe.use_metal(block)
    assert type(block) is moe.metal_class(type(stock))
    assert isinstance(block, type(stock))
    assert type(block) is not type(stock)
    x = mx.random.normal((3, 1, 128))
    with recording() as launches:
        found = block(x)
    assert [launch.name for launch in launches] == ["route", "gate_up", "down"]
    assert close(found, exact(stock(x)), 1e-5)
    prompt = mx.random.normal((1, 40, 128))
    with recording() as launches:
        assert mx.array_equal(block(prompt), stock(prompt))
    assert not launches


def test_a_shared_expert_of_one_token_is_decoded_too(metal):
    stock, block = qwen(), qwen()
    block.update(stock.parameters())
    for each in (stock, block):
        nn.quantize(each, group_size=32, bits=4)
    moe.use_metal(block)
    assert type(block.shared_expert) is door.MetalMLP
    x = mx.random.normal((1, 1, 128))
    with recording() as launches:
        found = block(x)
    assert sorted(launch.name for launch in launches) == ["down", "gate_up", "gate_up", "route"]
    assert close(found, exact(stock(x)), 1e-5)
    x = mx.random.normal((1, 2, 128))
    with recording() as launches:
        found = block(x)
    assert len(launches) == 3
    assert close(found, exact(stock(x)), 1e-5)


class Slots:
    """A layer whose experts lie in slots of another order, as a streamed layer's do."""

    def __init__(self, switch, order):
        self.switch = switch
        self.order = order

    def weighted(self, x, indices, scores, *rest):
        return self.switch.weighted(x, self.order[indices], scores, *rest)


def test_a_block_decodes_on_slots(metal):
    stock, block = block_of("qwen3_next"), block_of("qwen3_next")
    switch = block.pop("switch_mlp")
    order = np.random.default_rng(1).permutation(20)
    for _, layer in switch.named_modules():
        if isinstance(layer, QuantizedSwitchLinear):
            for name, array in layer.items():
                layer[name] = array[mx.array(np.argsort(order))]
    object.__setattr__(block, "switch_mlp", Slots(door.MetalSwitch(switch), mx.array(order)))
    moe.use_metal(block)
    assert type(block) is moe.MetalSparseMoeBlock
    x = mx.random.normal((1, 1, 128))
    assert close(block(x), exact(stock(x)), 1e-5)


def test_other_blocks_stay_as_they_are():
    class Own(qwen3_next.Qwen3NextSparseMoeBlock):
        pass

    unquantized, many = qwen(), qwen(num_experts=600)
    nn.quantize(many, group_size=32, bits=4)
    own = qwen(Own)
    nn.quantize(own, group_size=32, bits=4)
    for block in (unquantized, many, own):
        before = type(block)
        moe.use_metal(block)
        assert type(block) is before
        assert type(block.switch_mlp) is SwitchGLU


VIEWS = ("Broadcast", "ExpandDims", "Reshape", "Slice", "Squeeze", "StopGradient")


def launches_of(block, x):
    """Nodes of MLX's graph that are work on a GPU, by name."""
    mx.eval(block.parameters())
    names = []
    mx.export_function(
        lambda event: names.append(event["name"]) if event["type"] == "primitive" else None,
        lambda x: block(x),
        x,
    )
    return collections.Counter(name for name in names if name not in VIEWS)


def test_a_block_is_seven_launches_where_mlx_has_twenty_three(monkeypatch):
    # Compiled, a swiglu is one node; traced it would be three.
    for module in (qwen3_next, switch_layers):
        monkeypatch.setattr(module, "swiglu", mx.maximum)
    block = qwen()
    nn.quantize(block, group_size=32, bits=4)
    block.set_dtype(mx.bfloat16)
    x = mx.zeros((1, 1, 128), mx.bfloat16)
    assert launches_of(block, x).total() == 23
    moe.use_metal(block)
    found = launches_of(block, x)
    assert found["CustomKernel"] == 4
    assert found.total() == 7


def test_bytes_are_those_of_the_chosen_experts():
    x, ids, gate, up, _ = gate_up_case(0, (4, 64), sizes=(2, 3, 9, 16, 128))
    expert = 16 * (128 // 2 + 128 // 64 * 2 * 4)
    assert door.expert_bytes(up) == expert
    arrays = 2 * 128 * 4 + 6 * 4 + 6 * 16 * 4
    assert door.gate_up_bytes(x, ids, gate, up) == 6 * 2 * expert + arrays
    assert door.gate_up_bytes(x, ids, None, up) == 6 * expert + arrays
    h, ids, scores, layer, shared, _ = down_case(0, (4, 64), sizes=(2, 3, 9, 16, 128))
    arrays = 6 * 128 * 4 + 6 * 4 + 6 * 4 + 2 * 16 * 4
    assert door.down_bytes(h, ids, scores, layer) == 6 * expert + arrays
    assert door.down_bytes(h, ids, scores, layer, shared) == 6 * expert + arrays + 2 * 16 * 4
