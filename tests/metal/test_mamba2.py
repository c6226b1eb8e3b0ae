"""The decode step of Mamba2 mixers against float64, and its class against mlx-lm's."""

import dataclasses

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models import nemotron_h
from mlx_lm.models.cache import ArraysCache
from recurrences import FLOAT32, bits, exact, mamba64, mutated, near, same_answers

from mlx_flash.kernels.metal import Kernel, ssm

FORMS = {  # heads, groups, head dim, state dim, taps, dtype, convolution has a bias
    "smallest": (1, 1, 4, 32, 2, mx.float32, True),
    "no bias": (4, 4, 32, 64, 3, mx.float16, False),
    "Nemotron 3 Nano's": (4, 2, 64, 128, 4, mx.bfloat16, True),
    "one group": (4, 1, 40, 96, 4, mx.float32, True),
    "long": (2, 1, 128, 64, 4, mx.float32, False),
}
LIMITS = (0.001, 100.0)
FREE = (0.0, float("inf"))
STATE, TOKEN = (-2, -1), -1
calmly = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def arguments(form, batch, seed=0, scale=1.0, fresh=False, limits=LIMITS):
    heads, groups, rows, row, taps, dtype, biased = FORMS[form]
    rng = np.random.default_rng(seed)
    inner = heads * rows
    channels = inner + 2 * groups * row

    def some(*shape, dtype=dtype):
        return mx.array((scale * rng.standard_normal(shape)).astype(np.float32)).astype(dtype)

    history = some(batch, taps - 1, channels)
    state = some(batch, heads, rows, row, dtype=mx.float32)
    if fresh:
        history, state = mx.zeros_like(history), mx.zeros_like(state)
    return [
        *(some(batch, 1, inner + channels + heads), history, some(channels, taps, 1)),
        some(channels) if biased else None,
        mx.array(np.log(rng.uniform(0.01, 16, heads)).astype(np.float32)),
        *(some(heads), some(heads), state, limits),
    ]


def agrees(got, want, form, bound=FLOAT32):
    y, history, state = got
    by_head = (y.shape[0], FORMS[form][0], FORMS[form][2])
    near(y.reshape(by_head), want[0].reshape(by_head), TOKEN, bound, want[3].reshape(by_head))
    assert np.array_equal(exact(history), want[1])
    near(state, want[2], STATE, bound)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=6, deadline=None, suppress_health_check=calmly)
@given(
    batch=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    fresh=st.booleans(),
    limits=st.sampled_from([LIMITS, FREE, (0.1, 0.7), (0, 1)]),
)
def test_a_step_is_float64s(metal, form, batch, seed, scale, fresh, limits):
    given = arguments(form, batch, seed, scale, fresh, limits)
    agrees(ssm.mamba2_step(*given), mamba64(*given), form)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=100, deadline=None, suppress_health_check=calmly)
@given(
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.05, 4.0),
    fresh=st.booleans(),
)
def test_many_steps_are_float64s(metal, form, batch, seed, scale, fresh):
    given = arguments(form, batch, seed, scale, fresh)
    agrees(ssm.mamba2_step(*given), mamba64(*given), form)


@pytest.mark.parametrize("form", ["Nemotron 3 Nano's", "one group"])
def test_sixteen_tokens_stay_near_float64(metal, form):
    """Each with a state of its own: what the kernel loses in a step must not add up."""
    got = want = None
    for step in range(16):
        given = arguments(form, 1, seed=step)
        wanted = list(given)
        if got and want:
            given[1], given[7] = got[1:]
            wanted[1], wanted[7] = want[1:3]
        got, want = ssm.mamba2_step(*given), mamba64(*wanted)
        agrees(got, want, form, bound=2 * FLOAT32)


@pytest.mark.parametrize("value", [1e4, 89.0, -17.0, -89.0, -1e4])
@pytest.mark.parametrize("limits", [LIMITS, (0.0, 1e6)])
def test_time_steps_beyond_exp(metal, value, limits):
    given = arguments("one group", 1, limits=limits)
    given[6] = mx.full(given[6].shape, value)
    agrees(ssm.mamba2_step(*given), mamba64(*given), "one group")


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30])
def test_states_of_any_size(metal, size):
    given = arguments("one group", 1)
    given[7] = given[7] * size
    agrees(ssm.mamba2_step(*given), mamba64(*given), "one group")


def test_views_are_read_and_nothing_given_is_written(metal):
    """The history of a cache is a slice of what mlx-lm's convolution took."""
    given = arguments("one group", 3)
    plain = ssm.mamba2_step(*given)
    longer = mx.concatenate([given[1], given[1][:, :1]], axis=1)
    given[1] = longer[:, :-1]
    given[7] = mx.concatenate([given[7], given[7]], axis=1)[:, :4]
    before = bits(longer), bits(given[7])
    for got, same in zip(ssm.mamba2_step(*given), plain, strict=True):
        assert bits(got) == bits(same)
    assert (bits(longer), bits(given[7])) == before


def test_a_sequence_is_computed_alone(metal):
    given = arguments("one group", 3)
    together = ssm.mamba2_step(*given)
    alone = [x[1:2] if i in (0, 1, 7) else x for i, x in enumerate(given)]
    for got, same in zip(ssm.mamba2_step(*alone), together, strict=True):
        assert bits(got) == bits(same[1:2])


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_mlx_lms(form):
    given = arguments(form, 2)
    rounding = {mx.float32: FLOAT32, mx.float16: 1e-2, mx.bfloat16: 5e-2}[FORMS[form][5]]
    agrees(ssm.reference(*given), mamba64(*given), form, bound=rounding)


def test_bytes_are_those_of_a_launch(metal):
    """Of the arrays; only the limits' eight bytes are not counted."""
    heads, groups, rows, row, taps, dtype, _ = FORMS["Nemotron 3 Nano's"]
    given = arguments("Nemotron 3 Nano's", 2)
    given[4] = given[4].astype(dtype)
    with metal.recording() as launches:
        mx.eval(ssm.mamba2_step(*given))
    (launch,) = launches
    counted = ssm.mamba2_step_bytes(2, heads, groups, rows, row, taps, dtype.size)
    assert counted == launch.input_bytes + launch.output_bytes - 8


def test_a_head_that_does_not_fit_is_refused():
    given = arguments("smallest", 1)
    given[7] = mx.zeros((1, 1, 4, 16))
    with pytest.raises(ValueError, match="4 x 16"):
        ssm.mamba2_step(*given)


# The class ---------------------------------------------------------------------------------------

CONFIG = {
    "hidden_size": 64,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "conv_kernel": 4,
    "n_groups": 2,
    "use_conv_bias": True,
    "mamba_proj_bias": False,
    "layer_norm_epsilon": 1e-5,
    "hybrid_override_pattern": ["M"],
    "time_step_limit": (0.01, 0.5),
}


def mixer_of(**changes):
    mx.random.seed(5)
    required = {
        f.name: 1
        for f in dataclasses.fields(nemotron_h.ModelArgs)
        if f.default is dataclasses.MISSING
    }
    mixer = nemotron_h.NemotronHMamba2Mixer(nemotron_h.ModelArgs(**(required | CONFIG | changes)))
    mixer.norm.weight = mx.random.uniform(0.5, 1.5, mixer.norm.weight.shape)
    mixer.dt_bias = mx.random.normal(mixer.dt_bias.shape)
    mixer.D = mx.random.normal(mixer.D.shape)
    if "bias" in mixer.conv1d:
        mixer.conv1d.bias = mx.random.normal(mixer.conv1d.bias.shape)
    mixer.eval()
    return mixer


def swapped(**changes):
    mixer = mixer_of(**changes)
    ssm.use_metal(mixer)
    return mixer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_is_mlx_lms(metal, batch, bias):
    stock, mixer = mixer_of(use_conv_bias=bias), swapped(use_conv_bias=bias)
    assert type(mixer) is ssm.MetalMamba2Mixer
    caches = ArraysCache(2), ArraysCache(2)
    with metal.recording() as launches:
        for tokens in (5, 1, 1, 1, 3, 1):
            x = mx.random.normal((batch, tokens, 64))
            want, got = stock(x, None, caches[0]), mixer(x, None, caches[1])
            near(got, exact(want), TOKEN)
            assert np.array_equal(exact(caches[1][0]), exact(caches[0][0]))
            near(caches[1][1], exact(caches[0][1]), STATE)
    assert [launch.name for launch in launches] == ["mamba2_step", "gated_norm"] * 4


def test_first_tokens(metal):
    """With an empty cache, and with none."""
    stock, mixer = mixer_of(), swapped()
    x = mx.random.normal((2, 1, 64))
    cache = ArraysCache(2)
    with metal.recording() as launches:
        near(mixer(x, None, cache), exact(stock(x, None)), TOKEN)
        near(mixer(x), exact(stock(x, None)), TOKEN)
    assert len(launches) == 4
    assert cache[1].dtype == mx.float32 and cache[0].shape == (2, 3, 256)


def test_what_the_kernel_does_not_take_is_mlx_lms(metal):
    stock, mixer = mixer_of(), swapped()
    x = mx.random.normal((2, 1, 64))
    mask = mx.array([[True], [False]])
    ragged = ArraysCache(2), ArraysCache(2)
    for cache in ragged:
        cache.lengths = mx.array([1, 0])
    with metal.recording() as launches:
        assert mx.array_equal(mixer(x, mask), stock(x, mask))
        assert mx.array_equal(mixer(x, None, ragged[1]), stock(x, None, ragged[0]))
        stock.train(), mixer.train()
        assert mx.array_equal(mixer(x), stock(x, None))
        stock.eval(), mixer.eval()
        for one in (stock, mixer):
            one.norm.weight = one.norm.weight.astype(mx.float16)
        assert mx.array_equal(mixer(x), stock(x, None)), "another dtype is mlx-lm's"
    assert launches == []


def test_a_model_says_what_it_says_without(metal, tmp_path):
    folder = tiny.write(tmp_path / "model", "nemotron_h")
    stock, model = mlx_lm.load(str(folder))[0], mlx_lm.load(str(folder))[0]
    ssm.use_metal(model)
    with metal.recording() as launches:
        same_answers(stock, model)
    assert {launch.name for launch in launches} == {"mamba2_step", "gated_norm"}


def test_use_metal_swaps_what_it_supports(metal):
    stock = nemotron_h.NemotronHMamba2Mixer
    assert type(swapped(mamba_head_dim=6)) is stock
    assert type(swapped(ssm_state_size=16)) is stock
    assert type(swapped(conv_kernel=9)) is stock
    other = type("Other", (stock,), {})
    mixer = mixer_of()
    mixer.__class__ = other
    ssm.use_metal(mixer)
    assert type(mixer) is other


MUTATIONS = {
    "a tap": ("weight[channel * TAPS + t]", "weight[channel * TAPS + t + 1]"),
    "history not shifted": ("new_history[at - CHANNELS] = past", "new_history[at] = past"),
    "every head writes history": ("of_head || head % (H / G) == 0", "true"),
    "the barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);\n", ""),
    "a stride of the state": (
        "new_rows[row * 8 * N + 8 * n + in_row]",
        "new_rows[row * 8 * N + 4 * n + in_row]",
    ),
    "B for C": ("shared_mixed[Ds / 4 + 8 * n + in_row]", "shared_mixed[8 * n + in_row]"),
    "no least step": ("low, high);", "0.0f, high);"),
    "no greatest step": ("low, high);", "low, 1e9f);"),
    "another group": ("head / (H / G)", "head % G"),
    "the skip": ("sum + float(D[head]) * x", "sum + float(D[head])"),
    "another gate": ("ROW + head * Dh + row]", "ROW + INNER + head * Dh + row]"),
    "no bias": ("BIASED ?", "!BIASED ?"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_found(metal, mutation, tmp_path, monkeypatch):
    mutated(tmp_path, monkeypatch, "mamba2_step", *MUTATIONS[mutation])
    broken = Kernel("mamba2_step", ssm.INPUTS, ssm.OUTPUTS, headers=["recurrence"])
    given = arguments("Nemotron 3 Nano's", 2, limits=(0.6, 0.7))
    with pytest.raises(AssertionError):
        agrees(ssm.mamba2_step(*given, launch=broken), mamba64(*given), "Nemotron 3 Nano's")
