"""The promise: streamed says what resident says, token for token and bit for bit."""

from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from forms import FORMS
from mlx_lm.generate import batch_generate, generate_step

import mlx_flash
from mlx_flash import demo
from mlx_flash.kernels import native
from mlx_flash.streaming.checkpoint import Checkpoint
from mlx_flash.streaming.eviction import POLICIES

SHARES = (0.25, 0.5, 0.75, 1.0)
DEMO_PROMPTS = (
    "Tell me a story.",
    "Tell me a story about a lantern.",
    "Where does Mira live?",
    "Who lives by the mill?",
    "What is 17 plus 25?",
    "What is 60 minus 14?",
    "Hello, who are you?",
    "What does the baker like to eat?",
    "Which animals live in the village?",
    "Write a short tale about a lost kite.",
)


def decode(model, prompt, tokens, **options):
    """Greedy tokens and the log-probabilities each was chosen from."""
    steps = list(generate_step(mx.array(list(prompt)), model, max_tokens=tokens, **options))
    return [token for token, _ in steps], mx.stack([logprobs for _, logprobs in steps])


def slots_for(model, share):
    """Slots per layer that hold this share of the experts."""
    most = max(e.count for e in model.plan.layers.values())
    return max(round(most * share), max(e.top_k for e in model.plan.layers.values()))


def load_resident(folder):
    """The same kernels with every expert in RAM: mlx-lm itself where they are its own."""
    if native() is None:
        return mlx_lm.load(str(folder))
    return mlx_flash.load(folder, ram="4GB", slots=1000, context=512)


@pytest.fixture(scope="module")
def resident(checkpoints):
    """The resident model's answer for a form, computed once."""
    answers = {}

    def answer(form):
        if form not in answers:
            model, _ = load_resident(checkpoints(form))
            answers[form] = decode(model, range(40, 100), 64, prefill_step_size=24)
        return answers[form]

    return answer


@pytest.mark.skipif(native() is None, reason="SKIPPED LOUDLY: the native kernels are not built")
@pytest.mark.parametrize("form", [f for f in FORMS if "bf16" not in f])
def test_native_kernels_say_what_mlx_lm_says(checkpoints, resident, form):
    stock, _ = mlx_lm.load(str(checkpoints(form)))
    expected_tokens, expected = decode(stock, range(40, 100), 64, prefill_step_size=24)
    tokens, logprobs = resident(form)
    assert tokens == expected_tokens
    assert mx.max(mx.abs(logprobs - expected)).item() < 1e-3


@pytest.mark.skipif(native() is None, reason="SKIPPED LOUDLY: the native kernels are not built")
def test_native_bfloat16_is_nearer_to_float32_than_mlx_is(checkpoints):
    # MLX's CPU sums bfloat16 products in bfloat16; ours in float32. Same weights in all three.
    form = "qwen3_5_moe-4bit-bf16"
    prompts = [range(start, start + 40) for start in range(0, 280, 40)]

    def first_logprobs(model):
        return mx.concatenate([decode(model, prompt, 1)[1] for prompt in prompts])

    stock, _ = mlx_lm.load(str(checkpoints(form)))
    ours, theirs = first_logprobs(load_resident(checkpoints(form))[0]), first_logprobs(stock)
    stock.set_dtype(mx.float32)
    exact = first_logprobs(stock)
    assert mx.abs(ours - exact).mean().item() < 0.6 * mx.abs(theirs - exact).mean().item()


@pytest.mark.skipif(native() is None, reason="SKIPPED LOUDLY: the native kernels are not built")
@pytest.mark.parametrize("form", [f for f in FORMS if "bf16" not in f and "raw" not in f])
def test_fetching_in_the_graph_says_what_mlx_lm_says(checkpoints, form):
    stock, _ = mlx_lm.load(str(checkpoints(form)))
    expected_tokens, expected = decode(stock, range(40, 100), 32, prefill_step_size=24)
    slots = slots_for(mlx_flash.load(checkpoints(form), slots=1000, context=512)[0], 0.5)
    model, _ = mlx_flash.load(checkpoints(form), slots=slots, context=512, kernels="graph")
    tokens, logprobs = decode(model, range(40, 100), 32, prefill_step_size=24)
    assert model.stats().evictions > 0
    assert tokens == expected_tokens
    assert mx.array_equal(logprobs, expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("form", FORMS)
def test_tiny_models_decode_bitwise_as_resident(checkpoints, resident, form, share, policy):
    tokens, logprobs = resident(form)
    model, _ = mlx_flash.load(
        checkpoints(form), ram="4GB", slots=round(16 * share), policy=policy, context=256
    )
    streamed_tokens, streamed_logprobs = decode(model, range(40, 100), 64, prefill_step_size=24)
    assert streamed_tokens == tokens
    assert mx.array_equal(streamed_logprobs, logprobs)
    assert len(set(tokens)) > 8, "a model that says one thing would hide a broken store"
    stats = model.stats()
    if share < 1:
        assert stats.evictions > 0
        assert stats.hits > 0
    else:
        assert stats.evictions == stats.misses == 0, "what fits whole has no lookup at all"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["qwen3_5_moe-4bit", "nemotron_h-mxfp4"])
def test_tiny_models_decode_bitwise_as_resident_in_full(checkpoints, form):
    prompts = [range(10 * i + 5, 10 * i + 12 + 5 * i) for i in range(10)]
    whole, _ = load_resident(checkpoints(form))
    expected = [decode(whole, prompt, 256) for prompt in prompts]
    for share in SHARES:
        for policy in POLICIES:
            model, _ = mlx_flash.load(
                checkpoints(form), ram="4GB", slots=round(16 * share), policy=policy, context=512
            )
            for prompt, (tokens, logprobs) in zip(prompts, expected, strict=True):
                ours, our_logprobs = decode(model, prompt, 256)
                assert ours == tokens
                assert mx.array_equal(our_logprobs, logprobs)
            assert (model.stats().evictions > 0) == (share < 1)


@pytest.mark.parametrize("slots", [4, 9])
def test_raw_bfloat16_of_hugging_face_streams_on_any_backend(tmp_path, slots):
    # MLX's CPU cannot gather bfloat16 matrices, so stock mlx-lm is no oracle here: the same
    # model with everything resident is, and float32 bounds the rounding.
    import tiny

    folder = tiny.write_hf_qwen(tmp_path / "bf16", dtype=mx.bfloat16)
    whole, _ = mlx_flash.load(folder, ram="4GB", slots=16, context=256)
    tokens, logprobs = decode(whole, range(40, 100), 40)
    model, _ = mlx_flash.load(folder, ram="4GB", slots=slots, context=256)
    streamed_tokens, streamed_logprobs = decode(model, range(40, 100), 40)
    assert model.stats().evictions > 0
    assert streamed_tokens == tokens
    assert mx.array_equal(streamed_logprobs, logprobs)
    exact, _ = mlx_lm.load(str(tiny.write_hf_qwen(tmp_path / "f32", dtype=mx.float32)))
    _, reference = decode(exact, range(40, 100), 1)
    assert mx.max(mx.abs(reference[0] - logprobs[0])).item() < 0.3


def test_a_long_prompt_in_one_call_is_split_and_changes_nothing(checkpoints, resident):
    folder = checkpoints("qwen3_5_moe-4bit")
    model, _ = mlx_flash.load(folder, ram="4GB", slots=5, context=256, prefill_step_size=16)
    assert model.plan.prefill_tokens == 16
    tokens, logprobs = decode(model, range(40, 100), 64, prefill_step_size=2048)
    expected_tokens, expected = resident("qwen3_5_moe-4bit")
    assert tokens == expected_tokens
    assert mx.array_equal(logprobs, expected)


def test_batches_share_one_store(checkpoints):
    folder = checkpoints("qwen3_5_moe-4bit")
    prompts = [list(range(40, 60)), list(range(90, 130)), [7, 8, 9]]
    whole, tokenizer = load_resident(folder)
    expected = batch_generate(whole, tokenizer, prompts, max_tokens=24, return_token_ids=True)
    model, tokenizer = mlx_flash.load(folder, ram="4GB", slots=4, context=256)
    streamed = batch_generate(model, tokenizer, prompts, max_tokens=24, return_token_ids=True)
    assert streamed.token_ids == expected.token_ids
    assert model.stats().evictions > 0


def test_an_abandoned_graph_keeps_its_own_slots(checkpoints):
    # Logits of one prompt are left unevaluated while another evicts what they need.
    folder = checkpoints("qwen3_5_moe-4bit")
    whole, _ = load_resident(folder)
    model, _ = mlx_flash.load(folder, ram="4GB", slots=4, context=256)
    first, second = mx.array([[41]]), mx.array([[200]])
    lazy = model(first)
    mx.eval(model(second))
    assert mx.array_equal(lazy, whole(first))


def demo_answers(model, tokenizer, prompts, tokens):
    answers = []
    for text in prompts:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        answers.append(decode(model, prompt, tokens))
    return answers


def check_demo(prompts, tokens, cases):
    whole, tokenizer = load_resident(demo.FOLDER)
    expected = demo_answers(whole, tokenizer, prompts, tokens)
    for share, policy in cases:
        slots = round(32 * share)
        model, tokenizer = mlx_flash.load(demo.FOLDER, ram="4GB", slots=slots, policy=policy)
        streamed = demo_answers(model, tokenizer, prompts, tokens)
        for (ours, our_logprobs), (theirs, their_logprobs) in zip(streamed, expected, strict=True):
            assert ours == theirs
            assert mx.array_equal(our_logprobs, their_logprobs)
        assert (model.stats().evictions > 0) == (share < 1)


def test_demo_model_decodes_bitwise_as_resident():
    check_demo(DEMO_PROMPTS[:2], 64, [(0.25, "lru"), (0.5, "lfu")])


@pytest.mark.slow
def test_demo_model_decodes_bitwise_as_resident_in_full():
    cases = [(share, policy) for share in SHARES for policy in POLICIES]
    check_demo(DEMO_PROMPTS, 256, cases)


def test_loading_reads_the_resident_weights_and_the_headers_only(checkpoints):
    # rchar counts every byte this process asks the kernel for, from disk or page cache.
    io = Path("/proc/self/io")
    if not io.exists():
        pytest.skip("SKIPPED LOUDLY: no /proc/self/io here, so bytes read cannot be counted")

    def bytes_read():
        return int(io.read_text().split()[1])

    folder = checkpoints("qwen3_5_moe-f32")
    mlx_flash.load(folder, ram="4GB", slots=4, context=64)  # modules imported, pages warm
    before = bytes_read()
    model, _ = mlx_flash.load(folder, ram="4GB", slots=4, context=64)
    read = bytes_read() - before
    small = sum(p.stat().st_size for p in folder.iterdir() if p.suffix != ".safetensors")
    headers = 2 * Checkpoint(folder).header_bytes  # ours to check them, MLX's to map them
    resident = model.plan.fixed.resident_bytes
    assert resident <= read <= resident + headers + 6 * small + 100_000
    assert read < model.plan.expert_bytes
