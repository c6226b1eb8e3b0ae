"""A family that mlx-lm has and no test of ours does: it streams, and is said to be untested."""

import warnings

import door
import mlx.core as mx
import mlx_lm
import pytest
import tiny
from test_exactness import decode

import mlx_flash
from mlx_flash import architectures

PHIMOE = {
    "model_type": "phimoe",
    "vocab_size": tiny.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
LINE = "model type 'phimoe' is untested here: compare its answers with mlx-lm's."
FILE = "FILE"
BRIEFLY = ("--slots", 4, "--ram", "4GB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    assert not architectures.lookup("phimoe").tested, "take another that has no parity test"
    return tiny.write(tmp_path_factory.mktemp("untested") / "phimoe", config=PHIMOE)


def test_it_says_what_mlx_lm_says_and_warns(folder):
    stock, _ = mlx_lm.load(str(folder))
    tokens, logprobs = decode(stock, range(40, 100), 40, prefill_step_size=24)
    with pytest.warns(mlx_flash.UntestedModelWarning) as caught:
        model, _ = mlx_flash.load(folder, ram="4GB", slots=4, context=256, kernels="reference")
    assert [str(one.message) for one in caught] == [LINE]
    assert caught[0].filename == __file__, "it is said of who loads"
    streamed_tokens, streamed = decode(model, range(40, 100), 40, prefill_step_size=24)
    assert streamed_tokens == tokens
    assert mx.array_equal(streamed, logprobs)
    assert len(set(tokens)) > 3
    assert model.stats().evictions > 0


@pytest.mark.parametrize(
    "command",
    [
        ("generate", *BRIEFLY, "-m", 3, "--verbose", "F", "hi", "--model"),
        ("bench", *BRIEFLY, "--tokens", 2, "--prompt-tokens", 4, "--repeats", 1, "--warm"),
        ("cache-prompt", *BRIEFLY, "--prompt", "hi", "--prompt-cache-file", FILE, "--model"),
        ("inspect",),
        ("inspect", "--json"),
    ],
    ids=lambda words: " ".join(map(str, words[:2])),
)
def test_the_command_says_it_once(folder, command, tmp_path):
    command = [tmp_path / "cache.safetensors" if word == FILE else word for word in command]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Python's warning would be the second time
        said = door.run(*command, folder)
    assert said.code == 0, said.err
    assert [line for line in said.err.splitlines() if "untested" in line] == [f"mlx-flash: {LINE}"]


def test_nothing_is_said_of_a_tested_one(checkpoints):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlx_flash.load(checkpoints("qwen3_5_moe-4bit"), ram="4GB", slots=5, context=64)
    said = door.run("inspect", checkpoints("qwen3_5_moe-4bit"))
    assert (said.code, said.err) == (0, "")
