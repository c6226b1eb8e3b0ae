"""Bad input at the public door: one line that names it and the way out, exit code 2, no trace."""

import json
import os
import shutil
import struct
import time
from pathlib import Path

import door
import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step

import mlx_flash
from mlx_flash import errors, loader, opening

FORM = "qwen3_5_moe-4bit"
SWITCH = "language_model.model.layers.0.mlp.switch_mlp"
EXPERTS = f"{SWITCH}.up_proj.weight"
NORM = "language_model.model.layers.0.input_layernorm.weight"
BRIEFLY = ("--slots", 5, "--ram", "4GB", "--max-tokens", 3)


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A sound model folder to damage."""
    return Path(shutil.copytree(checkpoints(FORM), tmp_path / "model"))


def check_refusal(said, *named):
    assert said.code == 2, said
    assert said.out == ""
    assert said.err.startswith("mlx-flash: error: ")
    assert said.err.count("\n") == 1, said.err
    assert said.err.rstrip().endswith((".", "`")), "a sentence, with the way out"
    assert "Traceback" not in said.err
    assert len(said.err) < 500
    for word in named:
        assert str(word) in said.err


def generate(*args, **options):
    return door.run("generate", *args, **options)


def config(**changes):
    """Set values of config.json, or of its text_config where it has them. None takes away."""

    def damage(folder):
        path = folder / "config.json"
        values = json.loads(path.read_text())
        for name, value in changes.items():
            part = values["text_config"] if name in values["text_config"] else values
            if name == "model_type":
                part = values
            if value is None:
                del part[name]
            else:
                part[name] = value
        path.write_text(json.dumps(values))

    return damage


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def gone(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def shard(change):
    """Rewrite the bytes of the weights."""

    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def header(change):
    """Change the safetensors header and, where ``change`` returns them, the data."""

    def rewrite(raw):
        (length,) = struct.unpack("<Q", raw[:8])
        entries, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        data = change(entries, data) or data
        new = json.dumps(entries).encode()
        return struct.pack("<Q", len(new)) + new + data

    return shard(rewrite)


def entry(name, **changes):
    """Change one header entry: values, or functions of what was there."""

    def change(entries, data):
        for key, value in changes.items():
            old = entries[name][key]
            entries[name][key] = value(old) if callable(value) else value

    return header(change)


def resize(name, size, **changes):
    """Give one tensor ``size(old)`` bytes of data, and let all offsets be right."""

    def change(entries, data):
        first, last = entries[name]["data_offsets"]
        new = size(last - first)
        grown = data[first:last][:new] + bytes(max(0, new - (last - first)))
        for other in entries.values():
            if other.get("data_offsets", [0])[0] >= last:
                other["data_offsets"] = [n + new - (last - first) for n in other["data_offsets"]]
        entries[name] |= {"data_offsets": [first, first + new], **changes}
        if not new:
            del entries[name]
        return data[:first] + grown + data[last:]

    return header(change)


def added(entries, data):
    entries["extra"] = {"dtype": "F32", "shape": [4], "data_offsets": [len(data), len(data) + 16]}
    return data + bytes(16)


def index(file):
    """Let the index place a tensor in another file."""

    def damage(folder):
        path = folder / "model.safetensors.index.json"
        values = json.loads(path.read_text())
        values["weight_map"][EXPERTS] = file
        path.write_text(json.dumps(values))

    return damage


def both(*damages):
    def damage(folder):
        for one in damages:
            one(folder)

    return damage


INDEX = "model.safetensors.index.json"
CHECKPOINT, MODEL = errors.CheckpointError, errors.UnsupportedModelError
DAMAGES = {
    # config.json
    "no config.json": (gone("config.json"), CHECKPOINT, ["config.json", "Finish"]),
    "config.json is cut": (text("config.json", "{"), CHECKPOINT, ["not JSON", "again"]),
    "config.json is a list": (text("config.json", "[]"), CHECKPOINT, ["object", "again"]),
    "config.json has no model_type": (text("config.json", "{}"), CHECKPOINT, ["model_type"]),
    "model_type is a number": (config(model_type=7), CHECKPOINT, ["model_type"]),
    "model_type is not known": (
        config(model_type="lamma"), MODEL, ["'lamma'", "mlx-lm", "mlx_flash.architectures"],
    ),
    **{
        f"config.json with {changes}": (config(**changes), CHECKPOINT, ["config.json", "again"])
        for changes in (
            {"hidden_size": "64"},
            {"hidden_size": 10**12},
            {"num_experts": None},
            {"num_experts": "16"},
            {"num_experts_per_tok": 64},
            {"num_attention_heads": 0},
            {"full_attention_interval": 0},
            {"num_hidden_layers": "4"},
            {"head_dim": 3.5},
            {"rms_norm_eps": "x"},
            {"moe_intermediate_size": -1},
            {"rope_parameters": {"rope_theta": "x", "type": "default"}},
            {"quantization": "4bit"},
            {"quantization": {"bits": 4}},
            {"text_config": None},
            {"text_config": 3},
        )
    },
    "generation_config.json is cut": (text("generation_config.json", "{"), CHECKPOINT, ["again"]),
    # which files there are
    "missing shard": (index("model-00002.safetensors"), CHECKPOINT, ["model-00002", "Finish"]),
    "shard outside the folder": (index("../model.safetensors"), CHECKPOINT, ["outside", "again"]),
    "shard at the root": (index("/etc/model.safetensors"), CHECKPOINT, ["outside"]),
    "index of another version": (
        both(text("model-2.safetensors", ""), index("model-2.safetensors")),
        CHECKPOINT, ["model-2"],
    ),
    "no weights": (gone("model.safetensors", INDEX), CHECKPOINT, ["safetensors"]),
    "weights are not there": (gone("model.safetensors"), CHECKPOINT, ["Finish"]),
    # what a shard says of itself
    "empty shard": (shard(lambda raw: b""), CHECKPOINT, ["0 bytes", "again"]),
    "not safetensors": (shard(lambda raw: b"PK\3\4" * 99), CHECKPOINT, ["not a safetensors"]),
    "truncated shard": (shard(lambda raw: raw[:-1000]), CHECKPOINT, ["1000 missing", "again"]),
    "shard cut in its header": (shard(lambda raw: raw[:900]), CHECKPOINT, ["again"]),
    "shard too long": (shard(lambda raw: raw + b"x"), CHECKPOINT, ["1 bytes follow"]),
    "offsets leave a gap": (
        entry(EXPERTS, data_offsets=lambda old: [n + 64 for n in old]), CHECKPOINT, ["a gap"],
    ),
    "offsets overlap": (
        entry(EXPERTS, data_offsets=lambda old: [n - 64 for n in old]), CHECKPOINT, ["overlaps"],
    ),
    "offsets backwards": (
        entry(EXPERTS, data_offsets=lambda old: old[::-1]), CHECKPOINT, [EXPERTS],
    ),
    "offsets beyond the file": (
        entry(EXPERTS, data_offsets=lambda old: [old[0], old[1] + 10**15]), CHECKPOINT, [EXPERTS],
    ),
    "shape of other size": (
        entry(EXPERTS, shape=lambda old: [*old[:2], old[2] + 1]), CHECKPOINT, [EXPERTS],
    ),
    "unknown dtype": (entry(EXPERTS, dtype="Q4"), CHECKPOINT, ["'Q4'"]),
    # sound files that are not this model
    "experts transposed": (
        entry(EXPERTS, shape=lambda old: [old[0], old[2], old[1]]), CHECKPOINT, ["fit together"],
    ),
    "half the experts": (
        entry(EXPERTS, shape=lambda old: [old[0] // 2, old[1] * 2, old[2]]), CHECKPOINT, [EXPERTS],
    ),
    "experts missing": (
        both(resize(EXPERTS, lambda size: 0), gone(INDEX)), CHECKPOINT, [EXPERTS],
    ),
    "experts missing, yet indexed": (resize(EXPERTS, lambda size: 0), CHECKPOINT, [EXPERTS]),
    "a tensor too many": (header(added), CHECKPOINT, ["extra"]),
    "words as floats": (entry(EXPERTS, dtype="F32"), CHECKPOINT, [EXPERTS, "float32"]),
    "scales as integers": (
        entry(f"{SWITCH}.up_proj.scales", dtype="I32"), CHECKPOINT, [SWITCH, "int32"],
    ),
    "norm as integers": (entry(NORM, dtype="I32"), CHECKPOINT, [NORM, "int32"]),
    "norm in float64": (resize(NORM, lambda size: 2 * size, dtype="F64"), CHECKPOINT, ["F64"]),
    # the tokenizer
    "no tokenizer.json": (gone("tokenizer.json"), CHECKPOINT, ["tokenizer.json", "Finish"]),
    "tokenizer.json is cut": (text("tokenizer.json", '{"a'), CHECKPOINT, ["tokenizer", "again"]),
    "tokenizer.json is empty": (text("tokenizer.json", ""), CHECKPOINT, ["tokenizer", "again"]),
    "tokenizer.json is a list": (text("tokenizer.json", "[]"), CHECKPOINT, ["tokenizer", "again"]),
    "tokenizer.json of no kind": (
        text("tokenizer.json", '{"added_tokens": [], "model": {"type": "Other"}}'), CHECKPOINT,
        ["tokenizer", "again"],
    ),
    "tokenizer_config.json is a list": (
        text("tokenizer_config.json", "[]"), CHECKPOINT, ["tokenizer", "again"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folder(folder, name):
    damage, error, named = DAMAGES[name]
    damage(folder)
    if error is CHECKPOINT:
        named = [folder, *named]
    check_refusal(generate("--model", folder, *BRIEFLY, "hi"), *named)
    with pytest.raises(error):
        mlx_flash.load(folder, ram="4GB", slots=5, context=64)


def test_the_folder_was_sound_before_it_was_damaged(folder):
    for change in (resize(NORM, lambda size: size), header(lambda entries, data: None)):
        change(folder)
        said = generate("--model", folder, *BRIEFLY, "hi")
        assert (said.code, said.out == "") == (0, False), said.err


@pytest.mark.parametrize("template", ["{% for", "{{ raise_exception('no system turns') }}"])
def test_chat_template_that_refuses(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    said = generate("--model", folder, *BRIEFLY, "--system-prompt", "Be brief.", "hi")
    check_refusal(said, "chat template", "--ignore-chat-template")


def test_no_folder(tmp_path):
    missing = tmp_path / "missing"
    check_refusal(generate("--model", missing, "hi"), missing, "no such folder", "owner/name")
    with pytest.raises(errors.ModelNotFoundError):
        mlx_flash.load(missing)
    with pytest.raises(FileNotFoundError):
        mlx_flash.load(missing)


def test_a_file_where_a_folder_should_be(checkpoints):
    file = checkpoints(FORM) / "model.safetensors"
    check_refusal(generate("--model", file, "hi"), file, "is a file", "folder")
    with pytest.raises(errors.ModelNotFoundError):
        mlx_flash.load(file)


OPTIONS = {
    ("--ram", "0"): ["--ram 0", "8GB"],
    ("--ram", "-5GB"): ["--ram -5GB", "8GB"],
    ("--ram", "900TB"): ["--ram 900TB", "GB this process may use", "auto"],
    ("--ram", "lots"): ["'lots'", "8GB"],
    ("--ram", ""): ["''", "8GB"],
    ("--ram", "1MB"): ["1.00 MB", "short of the floor", "process", "experts", "--ram", "--context"],
    ("--ram", "200%"): ["200%"],
    ("--slots", "3"): ["--slots 3", "4 or more"],
    ("--slots", "0"): ["--slots 0", "4 or more"],
    ("--slots", "-1"): ["--slots", "0", "--help"],
    ("--slots", "many"): ["--slots", "integer"],
    ("--policy", "nope"): ["'nope'", "lru", "lfu"],
    ("--reader", "nope"): ["'nope'", "pread"],
    ("--context", "10"): ["--context 10", "Ask for"],
    ("--context", "0"): ["--context", "--help"],
    ("--context", "1000000000"): ["short of the floor", "lower --context"],
    ("--max-tokens", "0"): ["--max-tokens 0", "-1"],
    ("--max-tokens", "-2"): ["--max-tokens -2", "-1"],
    ("--chat-template-config", "{"): ["--chat-template-config", "not JSON"],
    ("--chat-template-config", "[1]"): ["--chat-template-config", "object"],
    ("--chat-template-config", '{"tokenize": true}'): ["--chat-template-config", "tokenize"],
    ("--prompt-cache-file", "missing"): ["missing", "cache_prompt"],
    ("--adapter-path", "missing"): ["--adapter-path missing", "Check the path"],
    ("--extra-eos-token", "nope"): ["'nope'", "no token"],
    ("--revision", "main"): ["--revision main", "Hub", "Leave it out"],
    ("--quantize-activations",): ["--quantize-activations", "nvfp4", "affine"],
    ("--draft-model", "missing"): ["--draft-model missing", "recurrent state", "Leave it out"],
    ("--temp", "-1"): ["--temp", "--help"],
    ("--temp", "hot"): ["--temp", "number"],
    ("--temp", "inf"): ["--temp inf"],
    ("--top-p", "nan", "--temp", "1"): ["--top-p"],
    ("--min-p", "7"): ["--min-p"],
    ("--top-k", "100000"): ["--top-k 100000"],
    ("--xtc-threshold", "0.9"): ["--xtc-threshold"],
    ("--seed", "-1"): ["--seed -1"],
    ("--seed", "18446744073709551616"): ["--seed 18446744073709551616"],
    ("--num-draft-tokens", "0"): ["--num-draft-tokens"],
    ("--prefill-step-size", "0"): ["--prefill-step-size"],
    ("--kv-bits", "7", "--quantized-kv-start", "0"): ["mlx-lm", "7"],
    ("--mode", "x"): ["--mode", "--model"],
    ("--ram",): ["--ram", "--help"],
    ("another prompt",): ["another prompt", "--help"],
    ("--prompt", "another"): ["two prompts"],
}


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_bad_option(checkpoints, options):
    said = generate("--model", checkpoints(FORM), "hi", *options)
    check_refusal(said, *OPTIONS[options])


def test_unknown_command():
    check_refusal(door.run("generat"), "generat", "--help")


@pytest.mark.parametrize("with_template", [True, False])
@pytest.mark.parametrize(
    ("args", "stdin", "named"),
    [
        ([""], "", "empty"),
        (["--prompt", ""], "", "empty"),
        (["-"], "", "empty"),
        (["-"], None, "closed"),
        (["-"], b"\xff\xfe", "UTF-8"),
        ([], b"caf\xe9", "UTF-8"),
        (["caf\udce9"], "", "UTF-8"),  # what Python makes of an argument that is not UTF-8
    ],
)
def test_bad_prompt(checkpoints, args, stdin, named, with_template):
    template = [] if with_template else ["--ignore-chat-template"]
    said = generate("--model", checkpoints(FORM), *template, *args, stdin=stdin)
    check_refusal(said, named)


@pytest.mark.parametrize("wrong", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_prompt_cache_that_is_none(checkpoints, wrong):
    file = checkpoints(FORM) / wrong
    said = generate("--model", checkpoints(FORM), "--prompt-cache-file", file, "hi")
    check_refusal(said, file, "not a prompt cache", "cache_prompt")


def save_cache(path, model, folder):
    from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache

    cache = make_prompt_cache(model)
    list(generate_step(mx.array([40, 41, 42]), model, max_tokens=0, prompt_cache=cache))
    save_prompt_cache(str(path), cache, {"model": str(folder), "tokenizer_config": "{}"})
    return path


def test_a_prompt_cache_of_another_model(checkpoints, tmp_path):
    other = checkpoints("nemotron_h-8bit")
    cache = save_cache(tmp_path / "cache.safetensors", mlx_lm.load(str(other))[0], other)
    said = generate("--model", checkpoints(FORM), "--prompt-cache-file", cache, "hi")
    check_refusal(said, cache, other, "Leave --model out")


def test_a_prompt_cache_that_lies_about_its_model(checkpoints, tmp_path):
    other = mlx_lm.load(str(checkpoints("nemotron_h-8bit")))[0]
    cache = save_cache(tmp_path / "cache.safetensors", other, checkpoints(FORM))
    check_refusal(generate("--prompt-cache-file", cache, "hi"), cache, "does not fit")


@pytest.fixture
def trimmable(monkeypatch):
    """No family here has a cache that speculative decoding could trim. Pretend."""
    monkeypatch.setattr("mlx_flash.cli.inputs.can_trim_prompt_cache", lambda cache: True)


def test_a_draft_model_that_is_not_there(checkpoints, tmp_path, trimmable):
    missing = tmp_path / "missing"
    said = generate("--model", checkpoints(FORM), "--draft-model", missing, "hi")
    check_refusal(said, missing, "no such folder")


def test_a_draft_model_that_is_damaged(checkpoints, folder, trimmable):
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").write_bytes(b"")
    said = generate("--model", checkpoints(FORM), "--draft-model", folder, "hi")
    check_refusal(said, "--draft-model", folder)


def test_an_adapter_of_another_model(checkpoints, tmp_path):
    settings = {"num_layers": 4, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"nope.lora_a": mx.zeros((2, 2))})
    said = generate("--model", checkpoints(FORM), "--adapter-path", tmp_path, "hi")
    check_refusal(said, "--adapter-path", tmp_path, "nope.lora_a")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_adapter_that_changes_routed_experts(checkpoints, tmp_path, kind):
    # Streamed from the checkpoint, they would come without it: other tokens, no error.
    lora = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.switch_mlp.up_proj"]}
    settings = {"num_layers": 4, "lora_parameters": lora, "fine_tune_type": kind}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    weights = {f"{SWITCH}.up_proj.lora_a": mx.zeros((16, 2, 64))}
    if kind == "full":
        stock, _ = mlx_lm.load(str(checkpoints(FORM)))
        layer = stock.layers[0].mlp.switch_mlp.up_proj
        weights = {f"{SWITCH}.up_proj.biases": layer.biases + 1}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    said = generate("--model", checkpoints(FORM), "--adapter-path", tmp_path, "hi")
    check_refusal(said, "--adapter-path", "routed experts", "mlx_lm.fuse")
    with pytest.raises(errors.UnsupportedModelError):
        mlx_flash.load(checkpoints(FORM), adapter_path=str(tmp_path))


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"ram": "lots"}, errors.BudgetError),
        ({"ram": 0}, errors.BudgetError),
        ({"ram": "900TB"}, errors.BudgetError),
        ({"ram": "1MB"}, errors.BudgetError),
        ({"slots": 3}, errors.BudgetError),
        ({"policy": "nope"}, errors.FlashError),
        ({"reader": "nope"}, errors.FlashError),
        ({"adapter_path": "missing"}, errors.UsageError),
    ],
)
def test_bad_knobs_of_load(checkpoints, knobs, error):
    with pytest.raises(error) as caught:
        mlx_flash.load(checkpoints(FORM), **knobs)
    assert isinstance(caught.value, errors.FlashError)
    assert isinstance(caught.value, ValueError), "what Python itself would raise"


def test_the_installed_command_says_one_line(tmp_path):
    missing = tmp_path / "missing"
    check_refusal(door.finish(door.start("generate", "--model", missing, "hi")), missing)


def test_the_installed_command_reads_no_text_from_bytes(checkpoints):
    # In the C locale Python would let them through as surrogates.
    process = door.start("generate", "--model", checkpoints(FORM), env={"LC_ALL": "C"})
    process.stdin.buffer.write(b"caf\xe9")
    check_refusal(door.finish(process), "UTF-8")


def test_debug_shows_the_traceback_too(tmp_path):
    said = generate("-v", "--model", tmp_path / "missing", "hi")
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("Traceback")
    assert said.err.splitlines()[-1].startswith("mlx-flash: error: ")


def answer(model, tokens=24):
    return [token for token, _ in generate_step(mx.array([40, 41, 42]), model, max_tokens=tokens)]


def test_a_deleted_file_goes_on_being_read(folder):
    expected = answer(mlx_lm.load(str(folder))[0])
    model, _ = mlx_flash.load(folder, ram="4GB", slots=4, context=64)
    (folder / "model.safetensors").unlink()
    assert answer(model) == expected
    assert model.stats().misses > 0


def test_a_truncated_file_is_an_error_and_not_other_tokens(folder):
    model, _ = mlx_flash.load(folder, ram="4GB", slots=4, context=64)
    os.truncate(folder / "model.safetensors", 100_000)
    with pytest.raises(errors.ReadError) as caught:
        answer(model)
    assert "model.safetensors" in str(caught.value)
    assert caught.value.errno


def test_a_file_truncated_before_its_resident_weights_are_read(folder):
    lazy = opening.open_lazily(folder)
    os.truncate(folder / "model.safetensors", 20_000)
    with pytest.raises(errors.CheckpointError, match="resident weights cannot be read"):
        loader.stream(lazy, mlx_flash.StreamConfig(ram="4GB", slots=4, context=64))


def test_a_file_truncated_under_the_command(folder):
    args = ("--model", folder, "--slots", 4, "--ram", "4GB", "--max-tokens", 50_000)
    process = door.start("generate", *args, "hi")
    begun = process.stdout.read(5)
    os.truncate(folder / "model.safetensors", 100_000)
    said = door.finish(process)
    assert said.code == 2
    assert begun
    assert said.out.endswith("\n"), "the error is not glued to the text on a terminal"
    assert said.err.startswith("mlx-flash: error: ")
    assert said.err.count("\n") == 1
    assert "model.safetensors" in said.err


def test_json_keeps_the_text_that_came_before_an_error(folder):
    args = ("--model", folder, "--slots", 4, "--ram", "4GB", "--max-tokens", 50_000, "-v")
    process = door.start("generate", *args, "--json", "hi")
    for line in process.stderr:
        if line.startswith("experts"):
            break  # the last line of the plan: what follows is generation
    time.sleep(0.5)
    os.truncate(folder / "model.safetensors", 100_000)
    said = door.finish(process)
    assert said.code == 2
    assert json.loads(said.out)["finish_reason"] == "error"
    assert said.err.splitlines()[-1].startswith("mlx-flash: error: ")


@pytest.mark.parametrize("knob", ["context", "prefill_step_size", "read_threads"])
def test_a_knob_of_nothing_is_refused(knob):
    with pytest.raises(errors.UsageError, match=f"{knob} 0 leaves nothing"):
        mlx_flash.StreamConfig(**{knob: 0})
