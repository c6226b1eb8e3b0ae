"""A state goes with the tokens it has seen: restored, it says what a fresh run says."""

import copy

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import ArraysCache, KVCache, LRUPromptCache, make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from patience import PATIENT

import mlx_flash
from mlx_flash import KVSettings, PrefixCache
from mlx_flash.errors import UsageError
from mlx_flash.kernels import native
from mlx_flash.states import arrays, copied, prefill
from mlx_flash.streaming.store import NativeStore

ROOMY = 1 << 30
COMMON = list(range(40, 64))
ONE = COMMON + list(range(100, 113))
OTHER = COMMON + list(range(200, 217))
STEP = 8  # of which COMMON is a multiple: cut the same way, with a snapshot after it or without
FORMS = ("qwen3_5_moe-4bit", "nemotron_h-8bit")  # GatedDeltaNet, Mamba2
KERNELS = ("native", "reference")


@pytest.fixture(scope="module", params=[(f, k) for f in FORMS for k in KERNELS], ids="-".join)
def model(request, checkpoints):
    return load(checkpoints, *request.param)


def load(checkpoints, form, kernels="auto"):
    if kernels == "native" and native() is None:
        pytest.skip("SKIPPED LOUDLY: the native kernels are not built")
    folder = checkpoints(form)
    return mlx_flash.load(folder, ram="4GB", slots=5, context=512, kernels=kernels)[0]


def dense():
    """A model of keys and values alone, which nothing here streams: mlx-lm's own."""
    config = {
        "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2,
        "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6, "vocab_size": tiny.VOCAB, "tie_word_embeddings": False,
    }  # fmt: skip
    return tiny.build(config)


def run(model, prompt, tokens=24, cache=None, step=STEP, **options):
    """Greedy tokens, and the log-probabilities each was chosen from."""
    steps = generate_step(
        mx.array(prompt), model, max_tokens=tokens, prompt_cache=cache,
        prefill_step_size=step, **options,
    )  # fmt: skip
    said = list(steps)
    return [token for token, _ in said], mx.stack([logprobs for _, logprobs in said])


def same(one, other):
    return one[0] == other[0] and bool(mx.array_equal(one[1], other[1]))


def contents(layers):
    mx.eval(list(arrays(layers)))
    return [np.array(a.view(mx.uint8)) for a in arrays(layers)]


def places(layers):
    return [np.frombuffer(a, np.uint8).ctypes.data for a in arrays(layers)]


def stored(prefixes):
    return [snapshot.layers for snapshot in prefixes._snapshots.values()]


def test_a_restored_state_goes_on_bitwise_as_a_fresh_run(model):
    fresh = {tuple(prompt): run(model, prompt) for prompt in (ONE, OTHER)}
    assert fresh[tuple(ONE)][0] != fresh[tuple(OTHER)][0]
    assert len(set(fresh[tuple(ONE)][0])) > 4, (
        "a model that says one thing would hide a wrong state"
    )
    prefixes = PrefixCache(model, ROOMY)
    cache, rest = prefixes.restore(ONE)
    assert rest == ONE, "there is nothing yet"
    prefill(model, cache, COMMON, KVSettings(), STEP)
    assert prefixes.take(COMMON, cache)
    assert same(run(model, ONE[24:], cache=cache), fresh[tuple(ONE)]), "the original goes on"
    for prompt in (OTHER, ONE, OTHER):
        cache, rest = prefixes.restore(prompt)
        assert rest == prompt[24:]
        assert same(run(model, rest, cache=cache), fresh[tuple(prompt)])
    assert model.stats().evictions > 0


def test_native_bits_do_not_depend_on_where_a_snapshot_cuts(checkpoints):
    for form in FORMS:
        model = load(checkpoints, form, "native")
        expected = run(model, ONE, step=2048)
        for length in (2, 7, 23, 34, 36):  # not 35: of two tokens left, one is a step alone
            prefixes = PrefixCache(model, ROOMY)
            prefixes.prefill(ONE[:length], prefill_step_size=5)
            cache, rest = prefixes.restore(ONE)
            assert len(rest) == 37 - length
            assert same(run(model, rest, cache=cache, step=2048), expected), length


def test_a_snapshot_in_the_middle_of_an_answer(model):
    # Tokens that were decoded: bitwise what an uninterrupted run goes on to say.
    tokens, logprobs = run(model, ONE, 40)
    prefixes = PrefixCache(model, ROOMY)
    cache, rest = prefixes.restore(ONE)
    said, _ = run(model, rest, 20, cache=cache)
    assert prefixes.take(ONE + said, cache)
    answers = [decode(model, prefixes, ONE + said, tokens[20]) for _ in range(2)]
    for ours in answers:
        assert ours[0] == tokens[21:]
        assert mx.array_equal(ours[1], logprobs[21:])


def decode(model, prefixes, seen, token):
    cache, rest = prefixes.restore([*seen, token])
    assert rest == [token]
    return run(model, rest, 19, cache=cache)


def test_states_are_shared_until_they_are_written_and_then_written_in_place(model):
    prefixes = PrefixCache(model, ROOMY)
    cache, _ = prefixes.restore(COMMON)
    prefill(model, cache, COMMON, KVSettings(), STEP)
    prefixes.take(COMMON, cache)
    (snapshot,) = stored(prefixes)
    before = contents(snapshot)
    assert not set(places(snapshot)) & set(places(cache)), "a snapshot holds its own bytes"
    both = [prefixes.restore(ONE)[0] for _ in range(2)]
    assert places(both[0]) == places(both[1]) == places(snapshot), "restoring copies nothing"
    for running, first in ((cache, 100), (both[0], 100), (both[1], 200)):
        seen = []
        for token in range(first, first + 4):
            mx.eval(model(mx.array([[token]]), cache=running))
            seen.append(places(running))
        assert not set(seen[-1]) & set(places(snapshot))
        if type(model.layers[0]).__name__ == "NativeDecoderLayer":
            assert seen[1] == seen[2] == seen[3], "from the second token on, in place"
    assert all(map(np.array_equal, contents(snapshot), before))
    assert all(map(np.array_equal, contents(both[0]), contents(cache)))
    assert not all(map(np.array_equal, contents(both[1]), contents(cache)))


@pytest.mark.parametrize("place", [0, 3, 22, 23])
def test_a_prompt_that_differs_in_one_token_gets_no_recurrent_state(model, place):
    prefixes = PrefixCache(model, ROOMY)
    prefixes.prefill(COMMON[:20], 4)
    prefixes.prefill(COMMON, 4)
    wrong = [*ONE[:place], 7, *ONE[place + 1 :]]
    cache, rest = prefixes.restore(wrong)
    assert rest == (wrong if place < 20 else wrong[20:])
    assert same(run(model, rest, 8, cache=cache, step=4), run(model, wrong, 8, step=4))


def test_at_least_one_token_is_left_to_compute(model):
    prefixes = PrefixCache(model, ROOMY)
    prefixes.prefill(COMMON, STEP)
    assert prefixes.restore(COMMON)[1] == COMMON, "a recurrent state cannot be taken back"
    assert prefixes.restore([*COMMON, 5])[1] == [5]
    with pytest.raises(UsageError, match="no tokens"):
        prefixes.restore([])


def test_the_longest_state_is_restored(model):
    prefixes = PrefixCache(model, ROOMY)
    for length in (16, 24, 8):
        prefixes.prefill(ONE[:length], STEP)
    assert len(prefixes) == 3
    for length, left in ((37, 13), (20, 4), (24, 8), (9, 1), (8, 8)):
        assert len(prefixes.restore(ONE[:length])[1]) == left


@pytest.mark.parametrize("most", [None, 100])  # which is not reached, so nothing rotates
def test_keys_and_values_alone_are_trimmed_to_what_is_common(most):
    model = dense()
    prefixes = PrefixCache(model, ROOMY, KVSettings(max_kv_size=most))
    prefixes.prefill(ONE, STEP)
    for prompt, left in ((OTHER, 17), (ONE, 1), ([*ONE, 9], 1), ([7, *ONE], 38)):
        cache, rest = prefixes.restore(prompt)
        assert len(rest) == left
        assert same(run(model, rest, cache=cache), run(model, prompt))
    (snapshot,) = stored(prefixes)
    assert snapshot[0].offset == len(ONE), "the stored one is not trimmed"


def test_keys_and_values_that_have_rotated_are_not_trimmed():
    model = dense()
    prefixes = PrefixCache(model, ROOMY, KVSettings(max_kv_size=30))
    prefixes.prefill(ONE, STEP)
    assert prefixes.restore(OTHER)[1] == OTHER
    cache, rest = prefixes.restore([*ONE, 9, 10])
    assert rest == [9, 10]
    fresh = run(model, [*ONE, 9, 10], max_kv_size=30)
    assert run(model, rest, cache=cache)[0] == fresh[0]


@pytest.mark.parametrize("form", FORMS)
def test_quantized_keys_and_values(checkpoints, form):
    model = load(checkpoints, form)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 16}
    fresh = run(model, ONE, **options)
    assert not same(fresh, run(model, ONE))
    prefixes = PrefixCache(model, ROOMY, KVSettings(**options))
    prefixes.prefill(COMMON, STEP)
    for _ in range(2):
        cache, rest = prefixes.restore(ONE)
        assert rest == ONE[24:]
        assert same(run(model, rest, cache=cache, **options), fresh)
    for wrong in ({}, options | {"kv_bits": 4}):
        cache, rest = prefixes.restore([7, *ONE])
        said, _ = run(model, rest, 4, cache=cache, **wrong)
        with pytest.raises(UsageError, match="--kv-bits 8 --kv-group-size 32"):
            prefixes.take([7, *ONE, *said], cache)
    cache, rest = PrefixCache(model, ROOMY).restore(ONE)
    said, _ = run(model, rest, 4, cache=cache, **options)
    with pytest.raises(UsageError, match="no --kv-bits"):
        cache.owner.take(ONE + said, cache)


def test_quantized_keys_and_values_are_not_trimmed():
    # Before the token from which they are quantized, a fresh run has them whole.
    model = dense()
    prefixes = PrefixCache(model, ROOMY, KVSettings(None, 8, 32, 30))
    prefixes.prefill(ONE, STEP)
    assert prefixes.restore(OTHER)[1] == OTHER


def test_a_state_is_not_taken_for_tokens_it_has_not_seen(model):
    prefixes = PrefixCache(model, ROOMY)
    prefixes.prefill(COMMON, STEP)
    cache, rest = prefixes.restore(ONE)
    said, _ = run(model, rest, 300, cache=cache)
    seen = ONE + said
    for place in (0, 23, 24, 36, 37, 100, 335, 336):
        wrong = [*seen[:place], (seen[place] + 1) % 300, *seen[place + 1 :]]
        with pytest.raises(UsageError, match="other tokens than the 337"):
            prefixes.take(wrong, cache)
    for wrong in (seen[:-1], [*seen, 5], ONE):
        with pytest.raises(UsageError, match=f"other tokens than the {len(wrong)}"):
            prefixes.take(wrong, cache)
    assert len(prefixes) == 1
    assert prefixes.take(seen, cache)
    assert prefixes.restore([*seen, 5])[1] == [5]


def test_a_state_of_another_model_is_not_taken(checkpoints, model):
    prefixes, others = PrefixCache(model, ROOMY), PrefixCache(dense(), ROOMY)
    foreign, _ = others.restore(ONE)
    own = make_prompt_cache(model)
    copied = copy.copy(prefixes.restore(ONE)[0])
    for cache in (foreign, own, list(copied), PrefixCache(model, ROOMY).restore(ONE)[0]):
        with pytest.raises(UsageError, match="not handed out by this"):
            prefixes.take(ONE, cache)
    with pytest.raises(UsageError, match="other tokens"):
        prefixes.take(ONE, prefixes.restore(ONE)[0])  # which has seen none yet


def test_an_adapter_ends_the_use_of_older_states():
    model = dense()
    prefixes = PrefixCache(model, ROOMY)
    prefixes.prefill(COMMON, STEP)
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 1.0, "dropout": 0.0})
    for use in (prefixes.restore, prefixes.prefill):
        with pytest.raises(UsageError, match="other weights"):
            use(ONE)


def test_several_sequences_are_refused():
    model = dense()
    prefixes = PrefixCache(model, ROOMY)
    cache, _ = prefixes.restore(COMMON)
    mx.eval(model(mx.array([COMMON, COMMON]), cache=cache))
    with pytest.raises(UsageError, match="one sequence"):
        prefixes.take(COMMON, cache)


def test_bytes_are_those_that_memory_holds(model):
    prefixes = PrefixCache(model, ROOMY)
    tokens = list(range(200))
    prefixes.prefill(tokens, 200)  # mlx-lm's states may be windows on what 200 tokens made
    mx.clear_cache()
    held, counted = mx.get_active_memory(), prefixes.nbytes
    prefixes._snapshots.clear()
    released = held - mx.get_active_memory()
    assert counted == released + 8 * len(tokens)
    assert released > 100_000


def test_the_least_recently_used_make_room(model):
    one, two, three, long = ([n, *COMMON] for n in (1, 2, 3, 4))
    long = long * 15  # longer than one step of KVCache, so larger
    prefixes = PrefixCache(model, ROOMY)
    prefixes.prefill(one, STEP)
    prefixes.max_bytes = 2 * prefixes.nbytes
    prefixes.prefill(two, STEP)
    assert len(prefixes.restore([*one, 5])[1]) == 1
    prefixes.prefill(three, STEP)
    assert len(prefixes) == 2
    assert prefixes.nbytes <= prefixes.max_bytes
    assert [len(prefixes.restore([*p, 5])[1]) for p in (one, two, three)] == [1, 26, 1]
    prefixes.prefill(one, STEP)  # is used, not made again
    prefixes.prefill(two, STEP)
    assert [len(prefixes.restore([*p, 5])[1]) for p in (one, two, three)] == [1, 1, 26]
    assert prefixes.prefill(one, STEP)
    prefixes.max_bytes -= 1 + prefixes.nbytes // 2
    assert not prefixes.prefill(long, STEP)
    assert len(prefixes) == 2, "what has no room makes none"


def test_a_copy_is_bit_for_bit():
    mx.random.seed(0)
    for dtype in (mx.float32, mx.bfloat16, mx.float16, mx.int32, mx.uint32):
        bits = mx.random.randint(0, 256, (1, 3, 2, 8), mx.int32).astype(mx.uint8)
        held = bits.view(mx.uint8).view(mx.uint32).astype(mx.uint32).view(dtype)
        again = copied(held)
        assert again.dtype == held.dtype
        assert mx.array_equal(again.view(mx.uint8), held.view(mx.uint8))
    cache = KVCache()
    cache.keys = cache.values = mx.zeros((1, 1, 8, 4))
    assert copied([cache, None, 3, (mx.array([-0.0]),)])[0].keys.shape == (1, 1, 8, 4)


class Transcript:
    """A model whose state is the tokens it has seen, so that a state tells what it is of."""

    def __init__(self, recurrent):
        self.recurrent = recurrent

    def make_cache(self):
        return [KVCache(), *([ArraysCache(1)] if self.recurrent else [])]

    def parameters(self):
        return {}

    def __call__(self, inputs, cache):
        rows = inputs[:, None, :, None].astype(mx.float32)
        cache[0].update_and_fetch(rows, rows)
        if self.recurrent:
            seen = rows if cache[1][0] is None else mx.concatenate([cache[1][0], rows], axis=2)
            cache[1][0] = seen

    def seen(self, cache):
        keys = [] if cache[0].empty() else cache[0].keys_and_values()[0].flatten().tolist()
        if self.recurrent:
            assert keys == ([] if cache[1].empty() else cache[1][0].flatten().tolist())
        return keys


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=9)


@PATIENT
@given(
    recurrent=st.booleans(),
    steps=st.lists(st.tuples(prompts, st.integers(1, 9), st.integers(1, 4)), max_size=12),
    room=st.integers(0, 20_000),
)
def test_a_state_has_seen_exactly_what_is_not_left(recurrent, steps, room):
    model = Transcript(recurrent)
    prefixes = PrefixCache(model, room)
    taken = []
    for prompt, length, step in steps:
        cache, rest = prefixes.restore(prompt)
        seen = model.seen(cache)
        assert seen + rest == prompt
        assert rest
        possible = [_common(t, prompt[:-1]) for t in taken]
        exact = [n for n, t in zip(possible, taken, strict=True) if n == len(t)]
        assert len(seen) <= max(exact if recurrent else possible, default=0)
        if room == 20_000:  # nothing was evicted
            assert len(seen) == max(exact if recurrent else possible, default=0)
        now = rest[:length]
        prefill(model, cache, now, KVSettings(), step)
        if prefixes.take(seen + now, cache):
            taken.append(seen + now)
        model(mx.array([[9] * 3]), cache=cache)  # the original goes on
        assert prefixes.nbytes <= room


def _common(one, other):
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def test_mlx_lms_server_cache_never_trims_a_recurrent_state(model):
    # LRUPromptCache as mlx_lm.server uses it: fetch, generate, insert under all tokens seen.
    server = LRUPromptCache()

    def answer(prompt, tokens=16):
        cache, rest = server.fetch_nearest_cache("model", prompt)
        reused = len(prompt) - len(rest)
        cache = cache or make_prompt_cache(model)
        said = run(model, rest, tokens, cache=cache)
        server.insert_cache("model", prompt + said[0], cache)
        return said, reused

    first, reused = answer(ONE)
    assert (reused, same(first, run(model, ONE, 16))) == (0, True)
    # Another answer to the same beginning: nothing that has seen more is of use.
    for prompt in (OTHER, COMMON, [*ONE[:3], 7, *ONE[4:]]):
        said, reused = answer(prompt)
        assert reused == 0
        assert same(said, run(model, prompt, 16))
    # The conversation goes on, twice and differently: bitwise as if it had never been stored.
    for more in ([5, 6, 7], [8, 9, 10, 11]):
        said, reused = answer(ONE + first[0] + more)
        assert reused == len(ONE) + 16
        cache = make_prompt_cache(model)
        run(model, ONE, 16, cache=cache)
        assert same(said, run(model, more, 16, cache=cache))
        assert said[0] == run(model, ONE + first[0] + more, 16)[0], "and the tokens of a fresh run"


def test_mlx_lms_batched_server_goes_on_from_a_shared_prefix(model):
    # Segments and caches as mlx_lm.server hands them to its batch generator.
    server, generator = LRUPromptCache(), BatchGenerator(model)

    def answer(prompt, tokens=12):
        cache, rest = server.fetch_nearest_cache("model", prompt)
        reused = len(prompt) - len(rest)
        segments = [rest] if reused else [COMMON, rest[len(COMMON) :]]
        generator.insert_segments(
            [segments], [tokens], caches=[cache], all_tokens=[prompt[:reused]]
        )
        said, logprobs = [], []
        while len(said) < tokens:
            begun, responses = generator.next()
            ended = [r.uid for r in begun if r.end_of_segment and not r.end_of_prompt]
            for state, seen in generator.extract_cache(ended).values():
                server.insert_cache("model", seen[:], state, cache_type="system")
            said += [r.token for r in responses]
            logprobs += [r.logprobs for r in responses]
        return said, mx.stack(logprobs), reused

    alone = answer(OTHER)
    server = LRUPromptCache()
    first, second = answer(ONE), answer(OTHER)
    generator.close()
    assert [alone[2], first[2], second[2]] == [0, 0, len(COMMON)]
    assert second[0] == alone[0] == run(model, OTHER, 12)[0]
    assert first[0] == run(model, ONE, 12)[0]
    if not isinstance(
        model.stores[0], NativeStore
    ):  # a new batch has a mask, which the kernels leave to MLX
        assert mx.array_equal(second[1], alone[1])
