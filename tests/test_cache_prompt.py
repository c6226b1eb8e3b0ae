"""`mlx-flash cache-prompt` writes what mlx-lm reads, and what `generate` can hold it to."""

import json
import os
import resource
import shutil
import sys

import door
import mlx.core as mx
import mlx_lm.cache_prompt
import mlx_lm.generate
import pytest
import tiny
import typer
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache
from test_bad_input import check_refusal
from test_generate_cli import STOCK, adapter, stock  # noqa: F401

import mlx_flash
from mlx_flash import cli, prompt_file

STREAMED = ("--slots", 6, "--ram", "4GB")
PREFIX, PROMPT = "Once there was a fox.", "Where is it?"
FORMS = ("qwen3_5_moe-4bit", "nemotron_h-8bit")
KV = ["--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "4"]


def cache_prompt(*args, **said):
    return door.run("cache-prompt", *STREAMED, "--prompt", PREFIX, *args, **said)


def generate(*args):
    return door.run("generate", *STREAMED, "--prompt", PROMPT, "--max-tokens", 24, *args)


def written(path, *args):
    said = cache_prompt("--prompt-cache-file", path, *args)
    assert said.code == 0, said.err
    assert said.out == ""
    assert list(path.parent.iterdir()) == [path], "nothing beside it"
    return said


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    path = tmp_path_factory.mktemp("cached") / "model"
    return shutil.copytree(checkpoints(FORMS[0]), path)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "prefix.safetensors"


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "prefix.safetensors"
    written(path, "--model", folder)
    return path


@pytest.fixture
def sound(made, file):
    """A file that is as it should be, to be damaged."""
    return shutil.copy(made, file)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv", [[], KV], ids=["", "quantized"])
def test_mlx_lm_goes_on_from_our_file_and_we_from_its(checkpoints, file, form, kv):
    folder = checkpoints(form)
    said = written(file, "--model", folder, *kv)
    assert [line.split()[0] for line in said.err.splitlines()] == ["prompt", "state", "memory"]
    ours = ["--prompt-cache-file", file]
    expected = stock(STOCK, *ours, "--prompt", PROMPT, "--max-tokens", 24, "--verbose", "F")
    said = generate(*ours, *kv)
    assert (said.code, said.out) == (0, expected), said.err
    assert generate(*ours, *kv, "--model", folder).out == expected
    theirs = file.with_name("theirs.safetensors")
    args = ["--model", folder, "--prompt", PREFIX, "--prompt-cache-file", theirs, *kv]
    stock(mlx_lm.cache_prompt, *args)
    assert generate("--prompt-cache-file", theirs).out == expected
    assert expected != generate("--model", folder, "--prompt", PROMPT).out
    assert len(set(expected)) > 3


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_a_state_from_a_file_goes_on_bitwise_as_a_fresh_run(checkpoints, file, form, kernels):
    options = ["--kernels", kernels, "--prefill-step-size", "6"]
    written(file, "--model", checkpoints(form), *options)
    read = prompt_file.read(str(file))
    seen = read.origin.tokens
    assert bytes(seen).decode() if max(seen) < 256 else seen
    assert len(seen) % 6 > 1
    rest = list(range(60, 73))
    model, _ = mlx_flash.load(checkpoints(form), slots=5, ram="4GB", context=256, kernels=kernels)

    def run(prompt, cuts, cache=None):
        cache = cache or model.make_cache()
        for cut in cuts:
            mx.eval(model(mx.array([prompt[:cut]]), cache=cache))
            prompt = prompt[cut:]
        said = list(generate_step(mx.array(prompt), model, max_tokens=20, prompt_cache=cache))
        return [t for t, _ in said], mx.stack([p for _, p in said])

    cuts = [6] * (len(seen) // 6) + [len(seen) % 6]
    fresh = run(seen + rest, cuts)
    again = run(rest, [], read.layers)
    assert model.stats().evictions > 0
    assert again[0] == fresh[0]
    assert mx.array_equal(again[1], fresh[1])


def test_our_file_says_what_was_computed(folder, file):
    written(file, "--model", folder, "--eos-token", "<|endoftext|>")
    layers, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert metadata["model"] == str(folder)
    assert json.loads(metadata["tokenizer_config"]) == {
        "trust_remote_code": False,
        "eos_token": "<|endoftext|>",
    }
    held = json.loads(metadata["mlx_flash"])
    alphabet = mlx_lm.utils.load_tokenizer(folder)
    assert alphabet.decode(held["tokens"]) == f"<|im_start|>user\n{PREFIX}"
    assert max(c.offset for c in layers if hasattr(c, "offset")) == len(held["tokens"])


def test_an_ending_is_added_as_mlx_lm_does(folder, file):
    said = cache_prompt("--model", folder, "--prompt-cache-file", file.with_suffix(""))
    assert said.code == 0, said.err
    assert str(file) in said.err
    assert generate("--prompt-cache-file", file).code == 0


def test_without_a_model_it_is_the_demo(file):
    written(file)
    assert generate("--prompt-cache-file", file).code == 0


def test_a_model_that_has_moved_is_still_the_same(folder, file, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "before")
    written(file, "--model", moved)
    moved = moved.rename(tmp_path / "after")
    assert generate("--prompt-cache-file", file, "--model", moved).code == 0
    check_refusal(generate("--prompt-cache-file", file), "before")  # as mlx-lm's files do


def change_weights(folder):
    """The same names and shapes, with other values: no header tells."""
    other = tiny.write(folder.parent / "other", quantization={"group_size": 64, "bits": 4}, seed=1)
    assert (other / "model.safetensors").stat().st_size == (
        folder / "model.safetensors"
    ).stat().st_size
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")


def change_config(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    path.write_text(json.dumps(config))


def change_quantization(folder):
    shutil.rmtree(folder)
    tiny.write(folder, quantization={"group_size": 32, "bits": 4})


@pytest.mark.parametrize(
    ("change", "named"),
    [(change_weights, "weights"), (change_config, "config"), (change_quantization, "config and")],
)
def test_a_state_of_another_model_is_refused(folder, file, tmp_path, change, named):
    model = shutil.copytree(folder, tmp_path / "model")
    written(file, "--model", model)
    assert generate("--prompt-cache-file", file).code == 0
    change(model)
    said = generate("--prompt-cache-file", file)
    check_refusal(said, file, f"another {named}", model, "mlx-flash cache-prompt")


def test_a_state_with_another_adapter_is_refused(folder, file, adapter):  # noqa: F811
    written(file, "--model", folder, "--adapter-path", adapter)
    ours = ["--prompt-cache-file", file]
    with_it = generate(*ours, "--adapter-path", adapter)
    assert with_it.code == 0, with_it.err
    check_refusal(generate(*ours), file, "with an adapter", "--adapter-path is none")
    weights = adapter / "adapters.safetensors"
    os.utime(weights, ns=(1, 1))
    check_refusal(generate(*ours, "--adapter-path", adapter), f"--adapter-path is {adapter}")
    written(file, "--model", folder)
    said = generate(*ours, "--adapter-path", adapter)
    check_refusal(said, file, "with no adapter", f"--adapter-path is {adapter}")


@pytest.mark.parametrize(
    ("made", "asked"),
    [(KV, []), ([], KV), (KV, ["--kv-bits", "4", *KV[2:]]), (KV, [*KV[:4]])],
    ids=["unsaid", "only said", "other bits", "other start"],
)
def test_other_settings_of_keys_and_values_are_refused(folder, file, made, asked):
    written(file, "--model", folder, *made)
    said = generate("--prompt-cache-file", file, *asked)
    check_refusal(said, file, " ".join(made) or "no --kv-bits", "asked for is", "Give the same")


def rewrite(file, change_arrays=None, **metadata):
    """Write it again, with other arrays or metadata. None: without."""
    held, kept = mx.load(str(file), return_metadata=True)
    mx.eval(held)
    file.unlink()
    kept = {name: value for name, value in (kept | metadata).items() if value is not None}
    mx.save_safetensors(str(file), (change_arrays or dict)(held), kept)


def lying(name, value):
    return lambda held: held | {name: value(held[name])}


LIES = {
    "offset": lying("3.2", lambda a: a + 1),
    "far offset": lying("3.2", lambda a: a + 100_000),
    "negative offset": lying("3.2", lambda a: -a),
    "offset of a float": lying("3.2", lambda a: a.astype(mx.float32)),
    "fewer rows": lying("3.0", lambda a: a[:, :, :3]),
    "more heads": lying("3.1", lambda a: mx.concatenate([a, a], axis=1)),
    "narrow keys": lying("3.0", lambda a: a[..., :8]),
    "integers": lying("3.0", lambda a: a.astype(mx.int32)),
    "a small state": lying("0.0.1", lambda a: a[:, :1]),
    "two sequences": lying("0.0.1", lambda a: mx.concatenate([a, a])),
    "a state without axes": lying("1.0.0", lambda a: a.flatten()),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_state_of_other_shapes_is_refused(sound, lie):
    rewrite(sound)
    assert generate("--prompt-cache-file", sound).code == 0, "rewriting alone does no harm"
    rewrite(sound, LIES[lie])
    check_refusal(generate("--prompt-cache-file", sound), sound, "does not fit the model")


@pytest.mark.parametrize("lie", ["far offset", "negative offset"])
def test_a_file_of_mlx_lms_that_has_not_so_many_tokens_is_refused(sound, lie):
    rewrite(sound, **{"0.mlx_flash": None})
    assert generate("--prompt-cache-file", sound).code == 0, "a file without our part is one"
    rewrite(sound, LIES[lie])
    check_refusal(generate("--prompt-cache-file", sound), sound, "does not fit the model")


@pytest.mark.parametrize(
    "metadata",
    [
        {"0.mlx_flash": "{"}, {"0.mlx_flash": "[]"}, {"0.mlx_flash": "{}"},
        {"0.mlx_flash": '{"tokens": 3}'}, {"0.mlx_flash.deep": "x"}, {"0.tokenizer_config": "{"},
        {"1.0": "KVCache"}, {"1.0": "NoCache"}, {"1.3": "tree_map"}, {"1.3": "ArraysCache"},
    ],
    ids=str,
)  # fmt: skip
def test_metadata_that_lies_is_refused(sound, metadata):
    rewrite(sound, **metadata)
    check_refusal(generate("--prompt-cache-file", sound), sound, "cache")


def test_other_tokens_than_the_state_has_seen_are_refused(sound):
    _, metadata = load_prompt_cache(str(sound), return_metadata=True)
    held = json.loads(metadata["mlx_flash"])
    held["tokens"].append(5)
    rewrite(sound, **{"0.mlx_flash": json.dumps(held)})
    check_refusal(generate("--prompt-cache-file", sound), sound, "does not fit")


@pytest.mark.parametrize("left", [0, 7, 8, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(sound, left):
    size = sound.stat().st_size
    os.truncate(sound, left if isinstance(left, int) else int(size * left))
    check_refusal(generate("--prompt-cache-file", sound), sound, "not a prompt cache", "Make one")


@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_leaves_what_was_there(folder, file, before):
    # A limit on the size of files fails as a full disk does: in the middle of a write.
    if before:
        file.write_text("what was there")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    process = door.start(
        "cache-prompt", "--model", folder, *STREAMED, "--prompt", PREFIX,
        "--prompt-cache-file", file, preexec_fn=limit,
    )  # fmt: skip
    said = door.finish(process)
    check_refusal(said, file, "cannot be written", "Free some space")
    assert list(file.parent.iterdir()) == ([file] if before else [])
    if before:
        assert file.read_text() == "what was there"


def test_a_place_that_cannot_be_is_said_before_anything_is_computed(folder, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    for place in (tmp_path / "no" / "x.safetensors", tmp_path / "folder.safetensors"):
        said = cache_prompt("--model", "no-such-model", "--prompt-cache-file", place)
        check_refusal(said, place, "cannot be written")


OPTIONS = {
    ("--context", "5"): ["--context 5", "tokens of the prompt"],
    ("--kv-bits", "7", "--quantized-kv-start", "0"): ["mlx-lm", "7"],
    ("--model", "missing"): ["missing"],
    ("--ram", "1MB"): ["short of the floor"],
    ("--adapter-path", "missing"): ["--adapter-path missing"],
    ("--eos-token",): ["--eos-token", "--help"],
    ("--prompt", ""): ["empty"],
}


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_bad_option(folder, file, options):
    said = cache_prompt("--model", folder, "--prompt-cache-file", file, *options)
    check_refusal(said, *OPTIONS[options])
    assert not list(file.parent.iterdir())


def test_what_is_required():
    check_refusal(door.run("cache-prompt", "--prompt", "x"), "--prompt-cache-file")
    check_refusal(door.run("cache-prompt", "--prompt-cache-file", "x"), "--prompt")


def test_the_prompt_from_standard_input(folder, file):
    said = door.run(
        "cache-prompt", *STREAMED, "--model", folder, "--prompt-cache-file", file,
        "--prompt", "-", stdin=PREFIX,
    )  # fmt: skip
    assert said.code == 0, said.err
    one = prompt_file.read(str(file)).origin.tokens
    written(file, "--model", folder)
    assert one == prompt_file.read(str(file)).origin.tokens


def test_every_option_of_mlx_lm_is_here():
    theirs = mlx_lm.cache_prompt.setup_arg_parser()._actions
    command = typer.main.get_command(cli.app).commands["cache-prompt"]
    ours = {name: p for p in command.params for name in p.opts}
    for action in theirs[1:]:
        (name,) = action.option_strings
        assert ours[name].required == action.required, name
        if name != "--model" and not action.required:  # ours is the demo
            assert ours[name].default == action.default, name
    added = {"--ram", "--slots", "--context", "--policy", "--reader", "--kernels", "--threads"}
    added |= {"--prefill-step-size", "--revision", "--debug", "-v"}
    assert ours.keys() - {a.option_strings[0] for a in theirs} == added


def test_help():
    said = door.run("cache-prompt", "--help")
    assert (said.code, said.err) == (0, "")
    assert "mlx_lm.cache_prompt" in said.out
    assert sys.modules["mlx_flash.cli.cache_prompt"].__doc__
