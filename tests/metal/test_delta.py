"""The decode step of gated delta nets against float64, and its classes against mlx-lm's."""

import dataclasses

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from family_configs import QWEN3_5_MOE, QWEN3_NEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache
from recurrences import FLOAT32, bits, delta64, exact, mutated, near, same_answers

from mlx_flash.kernels.metal import Kernel, delta
from mlx_flash.kernels.metal.recurrence import simdgroups, state_fits

FORMS = {  # key heads, value heads, key dim, value dim, taps, dtype, grouped
    "smallest": (1, 1, 32, 4, 2, mx.float32, False),
    "one to one": (2, 2, 64, 32, 3, mx.float16, False),
    "one to two": (2, 4, 128, 128, 4, mx.bfloat16, False),
    "one to four": (1, 4, 32, 128, 4, mx.float32, False),
    "odd": (1, 2, 96, 40, 4, mx.float32, False),
    "grouped": (2, 4, 64, 32, 4, mx.float32, True),
    "grouped bfloat16": (1, 4, 128, 64, 4, mx.bfloat16, True),
}
EPS = 1e-6
STATE, TOKEN = (-2, -1), -1
calmly = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def arguments(form, batch, seed=0, scale=1.0, fresh=False):
    keys, heads, row, rows, taps, dtype, grouped = FORMS[form]
    rng = np.random.default_rng(seed)
    channels = 2 * keys * row + heads * rows

    def some(*shape, dtype=dtype):
        return mx.array((scale * rng.standard_normal(shape)).astype(np.float32)).astype(dtype)

    if grouped:
        qkv = z = some(batch, 1, channels + heads * rows)
        a = b = some(batch, 1, 2 * heads)
    else:
        qkv, z = some(batch, 1, channels), some(batch, 1, heads, rows)
        a, b = some(batch, 1, heads), some(batch, 1, heads)
    history = some(batch, taps - 1, channels)
    state = some(batch, heads, rows, row, dtype=mx.float32)
    if fresh:
        history, state = mx.zeros_like(history), mx.zeros_like(state)
    return [
        *(qkv, z, a, b, history, some(channels, taps, 1)),
        mx.array(np.log(rng.uniform(0.01, 16, heads)).astype(np.float32)),
        *(some(heads), 1 + 0.1 * some(rows), state, EPS, grouped),
    ]


def agrees(got, want, form, bound=FLOAT32):
    y, history, state = got
    heads, rows = FORMS[form][1], FORMS[form][3]
    by_head = (y.shape[0], heads, rows)
    summed = want[3].reshape(by_head)
    near(y.reshape(by_head), want[0].reshape(by_head), TOKEN, bound, summed)
    assert np.array_equal(exact(history), want[1])
    near(state, want[2], STATE, bound)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=6, deadline=None, suppress_health_check=calmly)
@given(
    batch=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    fresh=st.booleans(),
)
def test_a_step_is_float64s(metal, form, batch, seed, scale, fresh):
    given = arguments(form, batch, seed, scale, fresh)
    agrees(delta.delta_step(*given), delta64(*given), form)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=100, deadline=None, suppress_health_check=calmly)
@given(
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.05, 8.0),
    fresh=st.booleans(),
)
def test_many_steps_are_float64s(metal, form, batch, seed, scale, fresh):
    given = arguments(form, batch, seed, scale, fresh)
    agrees(delta.delta_step(*given), delta64(*given), form)


@pytest.mark.parametrize("form", ["one to two", "one to four", "grouped"])
def test_sixteen_tokens_stay_near_float64(metal, form):
    """Each with a state of its own: what the kernel loses in a step must not add up."""
    got = want = None
    for step in range(16):
        given = arguments(form, 1, seed=step)
        wanted = list(given)
        if got and want:
            given[4], given[9] = got[1:]
            wanted[4], wanted[9] = want[1:3]
        got, want = delta.delta_step(*given), delta64(*wanted)
        agrees(got, want, form, bound=2 * FLOAT32)


@pytest.mark.parametrize("value", [1e4, 89.0, -17.0, -89.0, -1e4])
def test_gates_beyond_exp(metal, value):
    """exp(a) overflows, exp(-b) does: the gates are 0 and 1 there, not a number that is none."""
    given = arguments("one to four", 1)
    for i, sign in ((2, 1), (3, 1), (3, -1)):
        extreme = list(given)
        extreme[i] = mx.full(given[i].shape, sign * value)
        agrees(delta.delta_step(*extreme), delta64(*extreme), "one to four")


def test_a_gate_near_one_keeps_its_last_bits(metal):
    """softplus(-12) is 6e-6: a log(1 + x) without care is 2 % off, and so is what is forgotten."""
    given = arguments("one to four", 1)
    given[2] = mx.full(given[2].shape, -12.0) - given[7]
    given[6] = mx.full(given[6].shape, 9.0)
    agrees(delta.delta_step(*given), delta64(*given), "one to four", bound=2e-6)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e15])
def test_states_of_any_size(metal, size):
    given = arguments("one to four", 1)
    given[9] = given[9] * size
    agrees(delta.delta_step(*given), delta64(*given), "one to four")


def test_nothing_but_zeros_gives_zeros(metal):
    given = arguments("one to four", 1)
    for i in (0, 4, 9):
        given[i] = mx.zeros_like(given[i])
    y, history, state = delta.delta_step(*given)
    assert not exact(y).any() and not exact(history).any() and not exact(state).any()


def test_views_are_read_and_nothing_given_is_written(metal):
    """The history of a cache may be a slice of what another array holds."""
    given = arguments("one to two", 3)
    plain = delta.delta_step(*given)
    longer = mx.concatenate([given[4], given[0]], axis=1)
    given[4] = longer[:, :-1]
    given[9] = mx.concatenate([given[9], given[9]], axis=1)[:, :4]
    before = bits(longer), bits(given[9])
    for got, same in zip(delta.delta_step(*given), plain, strict=True):
        assert bits(got) == bits(same)
    assert (bits(longer), bits(given[9])) == before


def test_a_sequence_is_computed_alone(metal):
    given = arguments("one to four", 3)
    together = delta.delta_step(*given)
    alone = [x[1:2] if i in (0, 1, 2, 3, 4, 9) else x for i, x in enumerate(given)]
    for got, same in zip(delta.delta_step(*alone), together, strict=True):
        assert bits(got) == bits(same[1:2])


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_mlx_lms(form):
    given = arguments(form, 2)
    rounding = {mx.float32: FLOAT32, mx.float16: 1e-2, mx.bfloat16: 6e-2}[FORMS[form][5]]
    agrees(delta.reference(*given), delta64(*given), form, bound=rounding)


def test_bytes_are_those_of_a_launch(metal):
    """Of the arrays; only a float's four bytes of eps are not counted."""
    keys, heads, row, rows, taps, dtype, _ = FORMS["one to two"]
    given = arguments("one to two", 2)
    given[6:9] = [x.astype(dtype) for x in given[6:9]]
    with metal.recording() as launches:
        mx.eval(delta.delta_step(*given))
    (launch,) = launches
    counted = delta.delta_step_bytes(2, keys, heads, row, rows, taps, dtype.size)
    assert counted == launch.input_bytes + launch.output_bytes - 4


def test_a_head_that_does_not_fit_is_refused():
    given = arguments("smallest", 1)
    given[9] = mx.zeros((1, 1, 4, 48))
    with pytest.raises(ValueError, match="4 x 48"):
        delta.delta_step(*given)


def test_what_fits_has_a_thread_for_every_row():
    fitting = [(d, k) for d in range(260) for k in range(0, 260, 16) if state_fits(d, k)]
    assert (128, 128) in fitting and (64, 128) in fitting and (256, 64) in fitting
    for rows, row in fitting:
        assert rows % (4 * simdgroups(rows)) == 0 and row % 32 == 0
        assert rows <= 32 * simdgroups(rows) <= 512


# The classes -------------------------------------------------------------------------------------

CONFIG = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}


def net_of(kind, **changes):
    mx.random.seed(5)
    if kind == "qwen3_5":
        net = qwen3_5.GatedDeltaNet(qwen3_5.TextModelArgs(**(CONFIG | changes)))
    else:
        names = {f.name: 1 for f in dataclasses.fields(qwen3_next.ModelArgs)}
        args = names | {"model_type": kind, "mlp_only_layers": []} | CONFIG | changes
        net = qwen3_next.Qwen3NextGatedDeltaNet(qwen3_next.ModelArgs(**args))
    net.norm.weight = mx.random.uniform(0.5, 1.5, net.norm.weight.shape)
    net.dt_bias = mx.random.normal(net.dt_bias.shape)
    net.eval()
    return net


KINDS = {
    "qwen3_5": delta.MetalGatedDeltaNet,
    "qwen3_next": delta.MetalQwen3NextGatedDeltaNet,
}


def swapped(kind, **changes):
    net = net_of(kind, **changes)
    delta.use_metal(net)
    return net


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_is_mlx_lms(metal, kind, batch):
    stock, net = net_of(kind), swapped(kind)
    assert type(net) is KINDS[kind]
    caches = ArraysCache(2), ArraysCache(2)
    with metal.recording() as launches:
        for tokens in (5, 1, 1, 1, 3, 1):
            x = mx.random.normal((batch, tokens, 64))
            want, got = stock(x, None, caches[0]), net(x, None, caches[1])
            near(got, exact(want), TOKEN)
            assert np.array_equal(exact(caches[1][0]), exact(caches[0][0]))
            near(caches[1][1], exact(caches[0][1]), STATE)
    assert [launch.name for launch in launches] == ["delta_step"] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_first_tokens(metal, kind):
    """With an empty cache, and with none."""
    stock, net = net_of(kind), swapped(kind)
    x = mx.random.normal((2, 1, 64))
    cache = ArraysCache(2)
    with metal.recording() as launches:
        near(net(x, None, cache), exact(stock(x)), TOKEN)
        near(net(x), exact(stock(x)), TOKEN)
    assert len(launches) == 2
    assert cache[1].dtype == mx.float32 and cache[0].shape == (2, 3, 256)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_kernel_does_not_take_is_mlx_lms(metal, kind):
    stock, net = net_of(kind), swapped(kind)
    x = mx.random.normal((2, 1, 64))
    mask = mx.array([[True], [False]])
    ragged = ArraysCache(2), ArraysCache(2)
    for cache in ragged:
        cache.lengths = mx.array([1, 0])
    with metal.recording() as launches:
        assert mx.array_equal(net(x, mask), stock(x, mask))
        assert mx.array_equal(net(x, None, ragged[1]), stock(x, None, ragged[0]))
        half = ArraysCache(2), ArraysCache(2)
        for cache in half:
            cache[1] = mx.ones((2, 4, 32, 32), mx.bfloat16)
        assert mx.array_equal(net(x, None, half[1]), stock(x, None, half[0]))
        stock.train(), net.train()
        assert mx.array_equal(net(x), stock(x))
    assert launches == []


@pytest.mark.parametrize("config", [QWEN3_5_MOE, QWEN3_NEXT], ids=lambda c: c["model_type"])
def test_a_model_says_what_it_says_without(metal, config, tmp_path):
    folder = tiny.write(tmp_path / "model", config=config)
    stock, model = mlx_lm.load(str(folder))[0], mlx_lm.load(str(folder))[0]
    delta.use_metal(model)
    with metal.recording() as launches:
        same_answers(stock, model)
    assert {launch.name for launch in launches} == {"delta_step"}


def test_use_metal_swaps_what_it_supports(metal):
    class Other(qwen3_5.GatedDeltaNet):
        pass

    assert type(swapped("qwen3_5", linear_value_head_dim=6)) is qwen3_5.GatedDeltaNet
    assert type(swapped("qwen3_5", linear_key_head_dim=48)) is qwen3_5.GatedDeltaNet
    assert type(swapped("qwen3_5", linear_key_head_dim=128)) is delta.MetalGatedDeltaNet
    assert state_fits(32, 256) and not delta.fits(32, 256), "q and k need registers too"
    assert type(swapped("qwen3_5", linear_key_head_dim=256)) is qwen3_5.GatedDeltaNet
    net = net_of("qwen3_5")
    net.__class__ = Other
    delta.use_metal(net)
    assert type(net) is Other


# The tests themselves ----------------------------------------------------------------------------

MUTATIONS = {
    "a tap": ("weight[channel * TAPS + t]", "weight[channel * TAPS + t + 1]"),
    "history not shifted": ("new_history[at - CHANNELS] = past", "new_history[at] = past"),
    "every head writes history": ("value || sub == 0", "true"),
    "the first barrier": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n\nfloat4 q[N]",
        "\nfloat4 q[N]",
    ),
    "the second barrier": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n\nif (me < Dv)",
        "\nif (me < Dv)",
    ),
    "a stride of the state": ("row * 8 * N + 8 * n + in_row", "row * 8 * N + 4 * n + in_row"),
    "q for k": ("shared_mixed[Dk / 4 + 8 * n + in_row]", "shared_mixed[8 * n + in_row]"),
    "eps of q": ("(sum8(qq) + 1e-6f) * Dk", "sum8(qq) * Dk + 1e-6f"),
    "the old value": ("mixed[2 * Dk + row] - sk", "mixed[2 * Dk + row]"),
    "the decay of y": ("sum8(sq) * q_scale * g", "sum8(sq) * q_scale"),
    "another key head": ("head / REPEAT", "head % Hk"),
    "the mean": ("total / Dv + eps", "total + eps"),
    "half of a row": ("return x + simd_shuffle_xor(x, ushort(4))", "return x"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_found(metal, mutation, tmp_path, monkeypatch):
    file = "recurrence.h" if mutation == "half of a row" else "delta_step"
    mutated(tmp_path, monkeypatch, file, *MUTATIONS[mutation])
    broken = Kernel("delta_step", delta.INPUTS, delta.OUTPUTS, headers=["recurrence"])
    # Small keys, so that the eps of their lengths matters.
    given = arguments("grouped", 2, scale=0.05)
    with pytest.raises(AssertionError):
        agrees(delta.delta_step(*given, launch=broken), delta64(*given), "grouped")
