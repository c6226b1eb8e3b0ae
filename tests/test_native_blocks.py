"""The fused experts and decode blocks against the stock modules they stand for."""

import types

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gemma4_text
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.cache import ArraysCache, KVCache
from mlx_lm.models.deepseek_v41 import DeepseekV41SwiGLU, SharedMLP
from mlx_lm.models.gemma4_text import GeGLU
from mlx_lm.models.kimi_k3 import SiTU
from mlx_lm.models.muse_spark import PreciseSwiGLU
from mlx_lm.models.qwen3_5 import DecoderLayer, TextModelArgs
from mlx_lm.models.qwen3_next import Qwen3NextMLP
from mlx_lm.models.step3p5 import ClampedSwiGLU
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU, SwitchLinear, SwitchMLP

from mlx_flash.kernels import experts, native, qwen3_5
from mlx_flash.kernels import mlp as mlp_door

pytestmark = pytest.mark.skipif(
    native() is None, reason="SKIPPED LOUDLY: the native kernels are not built"
)

FORMATS = [
    None,
    *({"bits": bits, "group_size": 32} for bits in (2, 3, 4, 5, 6, 8)),
    *({"bits": 4, "group_size": group} for group in (64, 128)),
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    {"bits": 4, "group_size": 16, "mode": "nvfp4"},
]
GATED = {
    "swiglu": SwiGLU,
    "clamped": SwigluOAI,
    "limited": lambda: DeepseekV41SwiGLU(0.7),
    "no limit": lambda: DeepseekV41SwiGLU(0.0),
    "capped": lambda: ClampedSwiGLU(0.3),
    "situ": lambda: SiTU(1.5, 2.5),
    "situ, linear": lambda: SiTU(0.5),
    "geglu": GeGLU,
}
OTHERS = {"relu2": nn.ReLU2, "silu": nn.SiLU, "gelu": lambda: nn.GELU("precise")}
BIASED = ("clamped", "geglu", "gelu")
KINDS = [*GATED, *OTHERS]


def switch_of(kind, form, dtype=mx.float32, sizes=(128, 256, 12)):
    mx.random.seed(7)
    activation = (GATED | OTHERS)[kind]()
    switch = (SwitchGLU if kind in GATED else SwitchMLP)(
        *sizes, activation=activation, bias=kind in BIASED
    )
    for _, part in switch.named_modules():
        if "bias" in part:
            part.bias = mx.random.normal(part.bias.shape)
    switch.set_dtype(dtype)
    if form:
        nn.quantize(switch, **form)
    mx.eval(switch.parameters())
    return switch


def close(a, b, tolerance=2e-6):
    """Largest difference, as a share of the largest value."""
    a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
    return np.abs(a - b).max() <= tolerance * np.abs(b).max()


def check(switch, x, indices, tolerance=1e-5):
    assert experts.supports(switch)
    fused = experts.NativeSwitch(switch, native())
    scores = mx.softmax(mx.random.normal(indices.shape), axis=-1)
    expected = switch(x, indices)
    assert close(fused(x, indices), expected, tolerance)
    summed = (expected * scores[..., None]).sum(axis=-2)
    assert close(fused.weighted(x, indices, scores), summed, tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 128), (3, 1, 128), (1, 5, 128), (2, 40, 128), (9, 128)])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["swiglu", "clamped", "relu2"])
def test_experts_compute_what_the_stock_switch_computes(kind, form, shape):
    x = mx.random.normal(shape)
    check(switch_of(kind, form), x, mx.random.randint(0, 12, (*shape[:-1], 3)))


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("form", [None, {"bits": 4, "group_size": 32, "mode": "mxfp4"}])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_every_activation(kind, form, tokens):
    # Large enough that limits are met: gates and ups are of the size of x.
    x = 3 * mx.random.normal((1, tokens, 128))
    check(switch_of(kind, form), x, mx.random.randint(0, 12, (1, tokens, 3)))


@pytest.mark.parametrize("form", [None, *({"bits": b, "group_size": 32} for b in (3, 4, 5, 6))])
@pytest.mark.parametrize("tokens", [1, 20])
def test_sizes_that_are_no_multiples_of_64(form, tokens):
    for dims, middle in ((96, 160), (32, 224)) if form else ((37, 51), (1, 3)):
        for kind in ("swiglu", "gelu"):
            switch = switch_of(kind, form, sizes=(dims, middle, 5))
            indices = mx.random.randint(0, 5, (1, tokens, 2))
            check(switch, mx.random.normal((1, tokens, dims)), indices)


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.int64, mx.uint8, mx.int16])
@pytest.mark.parametrize("leading", [(1, 1), (1,), (7,), (2, 3, 1), (2, 1, 2, 4)])
@pytest.mark.parametrize("top_k", [1, 12])
def test_indices_of_any_integers_and_leading_sizes(dtype, leading, top_k):
    shuffled = mx.argsort(mx.random.normal((*leading, 12)), axis=-1)[..., :top_k]
    x = mx.random.normal((*leading, 128))
    check(switch_of("clamped", {"bits": 4, "group_size": 64}), x, shuffled.astype(dtype))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("form", FORMATS[-3:])
@pytest.mark.parametrize("kind", BIASED)
def test_biases_in_a_float_of_their_own(kind, form, dtype):
    switch = switch_of(kind, form)
    for _, part in switch.named_modules():
        if "bias" in part:
            part.bias = part.bias.astype(dtype)
    for tokens in (1, 20):
        indices = mx.random.randint(0, 12, (1, tokens, 3))
        check(switch, mx.random.normal((1, tokens, 128)), indices)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_scores_in_another_dtype_than_x(dtype):
    switch = switch_of("swiglu", {"bits": 4, "group_size": 64}, dtype)
    fused = experts.NativeSwitch(switch, native())
    x = mx.random.normal((1, 5, 128)).astype(dtype)
    indices = mx.random.randint(0, 12, (1, 5, 3))
    scores = mx.softmax(mx.random.normal(indices.shape), axis=-1)
    y = fused.weighted(x, indices, scores)
    switch.set_dtype(mx.float32)
    expected = (switch(x.astype(mx.float32), indices) * scores[..., None]).sum(axis=-2)
    assert y.dtype == dtype
    assert close(y, expected, 2 ** (-7 if dtype == mx.bfloat16 else -9))


def test_layers_whose_forward_is_not_known_are_left_alone():
    class Own(SwitchGLU):
        def __call__(self, x, indices):
            return 2 * super().__call__(x, indices)

    class OwnActivation(SwiGLU):
        def __call__(self, x, gate):
            return super().__call__(x, gate) * x

    class OwnLinear(SwitchLinear):
        pass

    odd = SwitchGLU(32, 32, 2)
    odd.up_proj = OwnLinear(32, 32, 2)
    normed = SwitchGLU(32, 32, 2)
    normed.post_expert_norm = nn.RMSNorm(32)  # as in muse_spark, which calls it by this path
    scaled = SwitchGLU(32, 32, 2)
    scaled.scale = mx.ones(2)
    refused = [
        Own(32, 32, 2),
        SwitchGLU(32, 32, 2, activation=OwnActivation()),
        SwitchGLU(32, 32, 2, activation=PreciseSwiGLU()),
        SwitchGLU(32, 32, 2, activation=nn.GELU("precise")),
        SwitchMLP(32, 32, 2, activation=nn.GELU()),
        SwitchMLP(32, 32, 2, activation=nn.GELU("fast")),
        SwitchMLP(32, 32, 2, activation=SwiGLU()),
        odd,
        normed,
        scaled,
    ]
    assert not any(map(experts.supports, refused))
    assert experts.supports(SwitchGLU(32, 32, 2)) and experts.supports(SwitchMLP(32, 32, 2))
    with pytest.raises(TypeError, match="no native experts for Own"):
        experts.experts_of(refused[0], native())


def test_only_gated_mlps_that_are_known_count_as_swiglu():
    # All have gate_proj, up_proj and down_proj, and another activation between them.
    args = types.SimpleNamespace(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_kv_shared_layers=0,
        use_double_wide_mlp=False,
        moe_intermediate_size=32,
        swiglu_limit=1.0,
    )
    for mlp in (gemma4_text.MLP(args, 0), SharedMLP(args)):
        assert not experts.supports(mlp)
        with pytest.raises(TypeError, match="no native experts"):
            experts.experts_of(mlp, native())
        before = {name: type(part) for name, part in mlp.named_modules()}
        mlp_door.use_native(mlp)
        assert before == {name: type(part) for name, part in mlp.named_modules()}
    assert experts.supports(Qwen3NextMLP(32, 32))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("tokens", [1, 30])
def test_experts_keep_the_dtype_of_half_precision_and_its_accuracy(dtype, tokens):
    switch = switch_of("swiglu", {"bits": 4, "group_size": 64}, dtype)
    fused = experts.NativeSwitch(switch, native())
    x = mx.random.normal((1, tokens, 128)).astype(dtype)
    indices = mx.random.randint(0, 12, (1, tokens, 3))
    y = fused(x, indices)
    assert y.dtype == dtype
    switch.set_dtype(mx.float32)
    expected = switch(x.astype(mx.float32), indices)
    assert close(y, expected, 2 ** (-7 if dtype == mx.bfloat16 else -9))


def test_experts_take_no_tokens_and_refuse_what_does_not_fit():
    fused = experts.NativeSwitch(switch_of("swiglu", None), native())
    assert fused(mx.zeros((1, 0, 128)), mx.zeros((1, 0, 3), mx.uint32)).shape == (1, 0, 3, 128)
    with pytest.raises(ValueError, match=r"x \[\.\.\., in\]"):
        fused(mx.zeros((1, 2, 64)), mx.zeros((1, 2, 3), mx.uint32))
    for routed in ((1, 1, 3), (2, 2, 3), (3,)):  # of fewer tokens than x, or of more
        with pytest.raises(ValueError, match=r"indices \[\.\.\., top_k\]"):
            fused(mx.zeros((1, 2, 128)), mx.zeros(routed, mx.uint32))
    with pytest.raises(ValueError, match=r"indices \[\.\.\., top_k\]"):
        fused.weighted(mx.zeros((1, 2, 128)), mx.zeros((1, 2, 3), mx.uint32), mx.zeros((1, 2, 2)))
    with pytest.raises(RuntimeError, match="No such expert"):
        mx.eval(fused(mx.zeros((1, 1, 128)), mx.array([[[3, 12]]], mx.uint32)))


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_results_do_not_depend_on_the_number_of_threads(tokens):
    fused = experts.NativeSwitch(switch_of("swiglu", {"bits": 4, "group_size": 64}), native())
    x = mx.random.normal((1, tokens, 128))
    indices = mx.random.randint(0, 12, (1, tokens, 3))
    before = native().threads()
    try:
        answers = []
        for threads in (1, 2):
            native().set_threads(threads)
            answers.append(np.array(fused(x, indices)))
    finally:
        native().set_threads(before)
    assert np.array_equal(*answers)


def layer_of(linear, form, dtype=mx.float32):
    mx.random.seed(3)
    args = TextModelArgs(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=48,
        linear_conv_kernel_dim=4,
        num_experts=12,
        num_experts_per_tok=3,
        shared_expert_intermediate_size=96,
        moe_intermediate_size=64,
        rope_parameters={"type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    )
    layer = DecoderLayer(args, 0 if linear else 3)
    for name, part in layer.named_modules():
        if name.endswith("norm"):
            part.weight = 1 + 0.2 * mx.random.normal(part.weight.shape)
    if linear:
        layer.linear_attn.dt_bias = mx.random.normal((4,))
    layer.set_dtype(dtype)
    if form:
        nn.quantize(layer, class_predicate=lambda _, m: hasattr(m, "to_quantized"), **form)
    mx.eval(layer.parameters())
    return layer


def fused_of(layer):
    layer.mlp.switch_mlp = experts.NativeSwitch(layer.mlp.switch_mlp, native())
    qwen3_5.use_native(layer, native())
    assert isinstance(layer, qwen3_5.NativeDecoderLayer)
    return layer


def cache_of(linear):
    return ArraysCache(2) if linear else KVCache()


def states(cache):
    if isinstance(cache, ArraysCache):
        return [cache[0], cache[1]]
    return [cache.keys[..., : cache.offset, :], cache.values[..., : cache.offset, :]]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", [None, {"bits": 4, "group_size": 32}])
@pytest.mark.parametrize("linear", [True, False], ids=["delta", "attention"])
def test_a_decoder_layer_decodes_what_the_stock_layer_decodes(linear, form, batch):
    mx.random.seed(11)
    prompt = mx.random.normal((batch, 6, 128))
    steps = [mx.random.normal((batch, 1, 128)) for _ in range(5)]
    outcomes = []
    for make in (lambda: layer_of(linear, form), lambda: fused_of(layer_of(linear, form))):
        layer, cache = make(), cache_of(linear)
        answers = [layer(prompt, None if linear else "causal", cache)]
        answers += [layer(x, None, cache) for x in steps]
        mx.eval(answers)
        outcomes.append((answers, states(cache)))
    (expected, expected_states), (ours, our_states) = outcomes
    for a, b in zip(ours + our_states, expected + expected_states, strict=True):
        assert close(a, b, 2e-5)


@pytest.mark.parametrize("linear", [True, False], ids=["delta", "attention"])
def test_a_snapshot_of_the_cache_survives_what_is_decoded_after_it(linear):
    # The blocks write states in place when nobody else holds them. A snapshot holds them.
    layer, cache = fused_of(layer_of(linear, {"bits": 4, "group_size": 32})), cache_of(linear)
    mx.eval(layer(mx.random.normal((1, 6, 128)), None if linear else "causal", cache))
    x = mx.random.normal((1, 1, 128))
    mx.eval(layer(x, None, cache))
    snapshot = [cache[0], cache[1]] if linear else [cache.keys, cache.values]
    before = [np.array(s) for s in snapshot]
    mx.eval(layer(2 * x, None, cache))
    assert all(np.array_equal(s, b) for s, b in zip(snapshot, before, strict=True))


@pytest.mark.parametrize("linear", [True, False], ids=["delta", "attention"])
def test_states_that_nobody_else_holds_are_written_in_place(linear):
    layer, cache = fused_of(layer_of(linear, {"bits": 4, "group_size": 32})), cache_of(linear)
    mx.eval(layer(mx.random.normal((1, 6, 128)), None if linear else "causal", cache))
    places = []
    for _ in range(3):
        mx.eval(layer(mx.random.normal((1, 1, 128)), None, cache))
        held = [cache[0], cache[1]] if linear else [cache.keys, cache.values]
        places.append([np.frombuffer(a, np.uint8).ctypes.data for a in held])
        del held
    assert places[0] == places[1] == places[2]


def test_blocks_refuse_a_state_that_is_not_theirs():
    layer = fused_of(layer_of(True, None))
    block = layer._blocks["mixer"]
    h = mx.zeros((1, 1, 128))
    with pytest.raises(ValueError, match="one token"):
        block(mx.zeros((1, 2, 128)), mx.zeros((1, 3, 320)), mx.zeros((1, 4, 48, 32)))
    with pytest.raises(ValueError, match="recurrent state"):
        block(h, mx.zeros((1, 3, 320)), mx.zeros((1, 4, 32, 48)))
