"""`mlx-flash generate` says what `mlx_lm.generate` says to the same options, and what it cost."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import door
import mlx.core as mx
import mlx_lm
import mlx_lm.cache_prompt
import mlx_lm.generate
import pytest
import typer
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_flash import cli
from mlx_flash.cli import options
from mlx_flash.kernels import native

FORM = "qwen3_5_moe-4bit"
STREAMED = ("--slots", 6, "--ram", "4GB")
PROMPT = "Where is it?"
STOCK = sys.modules["mlx_lm.generate"]  # the package has a function of that name

LEFT_OUT = {
    "--image": "no family that streams takes images",
    "--use-default-chat-template": "mlx-lm parses it and nothing reads it",
}
OTHER_DEFAULTS = {
    "--model": "the embedded demo, which needs no download",  # both say None
    "--prompt": "None, so that a pipe can be told from an option; then mlx-lm's",
}
OURS = {
    "--ram", "--slots", "--context", "--policy", "--reader", "--kernels", "--threads",
    "--revision", "--json", "--debug", "-v",
}  # fmt: skip


def stock(command, *args):
    """What one of mlx-lm's own commands prints."""
    out, argv = io.StringIO(), sys.argv
    sys.argv = ["mlx_lm", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out):
            command.main()
    finally:
        sys.argv = argv
    return out.getvalue()


def generate(*args, **said):
    said = door.run("generate", *STREAMED, *args, **said)
    assert said.code == 0, said.err
    return said


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    """A model whose chat template takes a variable."""
    path = tmp_path_factory.mktemp("generate") / "model"
    shutil.copytree(checkpoints(FORM), path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ mood }}" + config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """LoRA weights for projections beside the experts."""
    path = tmp_path_factory.mktemp("adapter")
    keys = ["linear_attn.out_proj", "self_attn.o_proj"]
    lora = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": keys}
    (path / "adapter_config.json").write_text(
        json.dumps({"num_layers": 4, "lora_parameters": lora})
    )
    model, _ = mlx_lm.load(str(folder))
    linear_to_lora_layers(model, 4, lora)
    mx.random.seed(3)
    weights = {
        name: mx.random.normal(array.shape) * 0.2
        for name, array in tree_flatten(model.parameters())
        if "lora_" in name
    }
    assert weights
    mx.save_safetensors(str(path / "adapters.safetensors"), weights)
    return path


@pytest.fixture(scope="module")
def plain(folder):
    """The greedy answer to the prompt, without any option."""
    return generate("--model", folder, PROMPT).out


def letters(text):
    """Tokens of one character that occur in an answer, after the first ones."""
    text = re.sub(r"<filler\d+>", "", text)
    return [c for c in dict.fromkeys(text[4:]) if c.isascii() and c.isprintable() and c != " "]


SAME = [
    [],
    ["--max-tokens", "7"],
    ["--temp", "0.8", "--top-p", "0.9", "--seed", "7"],
    ["--temp", "1", "--top-k", "20", "--min-p", "0.02", "--min-tokens-to-keep", "3", "--seed", "1"],
    ["--temp", "1.5", "--xtc-probability", "0.5", "--xtc-threshold", "0.05", "--seed", "2"],
    ["--system-prompt", "Be brief."],
    ["--prefill-response", "It is"],
    ["--ignore-chat-template"],
    ["--chat-template-config", '{"mood": "Merrily: "}'],
    ["--kv-bits", "8", "--quantized-kv-start", "0", "--kv-group-size", "32"],
    ["--kv-bits", "4", "--quantized-kv-start", "30"],
    ["--max-kv-size", "24"],
    ["--prefill-step-size", "5"],
]
CHANGES_NOTHING = ("--prefill-step-size", "--max-kv-size")  # here; other models differ


@pytest.mark.parametrize("same", SAME, ids=" ".join)
def test_text_is_that_of_mlx_lm(folder, plain, same):
    args = ["--model", folder, "--prompt", PROMPT, "--max-tokens", 24, *same]
    expected = stock(STOCK, *args, "--verbose", "F")
    assert generate(*args).out == expected
    assert len(set(expected)) > 3, "a model that says one thing would hide an option unheard"
    if same and same[0] not in CHANGES_NOTHING:
        assert expected.strip() != plain[: len(expected)].strip() or same[0] == "--max-tokens"


def test_an_extra_eos_token_ends_the_text(folder, plain):
    token = letters(plain)[0]
    args = ["--model", folder, "--prompt", PROMPT, "--extra-eos-token", token]
    said = generate(*args, "--json")
    assert said.out != plain
    assert json.loads(said.out)["finish_reason"] == "stop"
    assert json.loads(said.out)["text"] + "\n" == stock(STOCK, *args, "--verbose", "F")


def test_extra_eos_tokens_add_up(folder, plain):
    tokens = letters(plain)[:2]
    ours = [word for token in tokens for word in ("--extra-eos-token", token)]
    args = ["--model", folder, "--prompt", PROMPT]
    expected = stock(STOCK, *args, "--extra-eos-token", *tokens, "--verbose", "F")
    assert generate(*args, *ours).out == expected


def test_an_adapter_changes_the_text_as_in_mlx_lm(folder, adapter, plain):
    args = ["--model", folder, "--prompt", PROMPT, "--adapter-path", adapter, "--seed", "5"]
    expected = stock(STOCK, *args, "--verbose", "F")
    assert expected != plain
    assert generate(*args).out == expected


@pytest.mark.parametrize("kv", [[], ["--kv-bits", "8", "--quantized-kv-start", "0"]], ids=str)
def test_a_prompt_cache_goes_on_where_it_ends(folder, plain, tmp_path, kv):
    cache = tmp_path / "cache.safetensors"
    prefix = ["--model", folder, "--prompt-cache-file", cache, "--prompt", "Once there was a fox."]
    stock(mlx_lm.cache_prompt, *prefix, *kv)
    args = ["--prompt-cache-file", cache, "--prompt", PROMPT, "--max-tokens", 24]
    expected = stock(STOCK, *args, "--verbose", "F")
    assert not plain.startswith(expected.strip())
    said = generate(*args, "--json")
    figures = json.loads(said.out)
    assert figures["text"] + "\n" == expected
    assert figures["prompt_tokens"] < 40, "the prefix is not computed again"
    assert generate("--model", folder, *args).out == expected


def test_until_the_context_is_full(folder):
    args = ["--model", folder, "--max-tokens", -1, "--context", 60, "--json", PROMPT]
    figures = json.loads(generate(*args).out)
    assert figures["finish_reason"] in ("length", "stop")
    assert figures["prompt_tokens"] + figures["generated_tokens"] == 60


@pytest.mark.parametrize(
    ("args", "stdin"),
    [
        ([PROMPT], ""),
        (["--prompt", PROMPT], ""),
        (["-p", PROMPT], "not read"),
        (["-"], PROMPT),
        (["--prompt", "-"], PROMPT),
        ([], PROMPT),
    ],
)
def test_prompt_from_anywhere(folder, plain, args, stdin):
    assert generate("--model", folder, *args, stdin=stdin).out == plain


def test_no_prompt_is_that_of_mlx_lm(folder):
    expected = stock(STOCK, "--model", folder, "--verbose", "F")
    assert generate("--model", folder).out == expected
    assert generate("--model", folder, stdin=None).out == expected


def test_written_newlines_are_newlines(folder):
    expected = stock(STOCK, "--model", folder, "--prompt", "a\\n\\tb", "--verbose", "F")
    assert generate("--model", folder, "a\\n\\tb").out == expected
    assert generate("--model", folder, stdin="a\n\tb").out == expected


def our_options():
    command = typer.main.get_command(cli.app).commands["generate"]
    return [p for p in command.params if p.opts[0].startswith("-")]


def test_every_option_of_mlx_lm_is_here():
    theirs = {o: a for a in STOCK.setup_arg_parser()._actions for o in a.option_strings}
    ours = {o: p for p in our_options() for o in p.opts}
    assert theirs.keys() - ours.keys() - {"-h", "--help"} == LEFT_OUT.keys(), (
        "mlx-lm has an option that we do not know, or no longer has one we leave out"
    )
    assert ours.keys() - theirs.keys() == OURS
    for name, param in ours.items():
        if name in theirs and name.startswith("--") and name not in OTHER_DEFAULTS:
            action = theirs[name]
            default = "True" if name == "--verbose" else action.default
            assert param.default == (default if default != () else None), name
            flag = action.nargs == 0
            assert bool(getattr(param, "is_flag", False)) == flag, name
            assert set(action.option_strings) == set(param.opts), name


def test_what_is_left_out_does_nothing_in_mlx_lm():
    source = Path(STOCK.__file__).read_text()
    assert "use_default_chat_template" not in source, LEFT_OUT["--use-default-chat-template"]


def test_json_is_one_object_with_text_and_figures(folder, plain):
    said = generate("--model", folder, "--json", PROMPT)
    assert said.err == ""
    assert said.out.count("\n") == 1
    figures = json.loads(said.out)
    assert figures.pop("text") + "\n" == plain
    assert None not in figures.values()
    assert figures["generated_tokens"] == 100
    assert figures["prompt_tokens"] == len(f"<user\n{PROMPT}>\n<assistant\n")
    assert figures["finish_reason"] == "length"
    for rate in ("expert_hit_rate", "prefill_expert_hit_rate", "residency"):
        assert 0 < figures[rate] < 1, rate
    for positive in ("load_s", "time_to_first_token_s", "decode_tokens_per_s", "read_bytes_per_s"):
        assert figures[positive] > 0, positive
    layers, slots = 4, 6
    each, rest = divmod(figures["slot_bytes"], layers * slots)
    assert rest == 0
    assert figures["expert_bytes"] == layers * 16 * each
    decoded = figures["bytes_read_per_token"] * 99
    assert 0 < decoded < figures["bytes_read"]
    missed = (1 - figures["expert_hit_rate"]) * 4 * layers * each  # per token, at top_k 4
    if native() is None:
        misses, rest = divmod(figures["bytes_read"], each)
        assert rest == 0
        assert figures["evictions"] == misses - layers * slots
        assert figures["bytes_read_per_token"] == pytest.approx(missed, rel=0.02)
    else:  # guesses are read too, and not all of them come true
        assert 0 < figures["evictions"] < figures["bytes_read"] / each
        assert 0.98 < figures["bytes_read_per_token"] / missed < 1.6
    assert figures["peak_rss_bytes"] <= figures["ram_bytes"] == 4_000_000_000
    assert figures["within_budget"] is True


def test_json_keeps_every_character(folder):
    said = generate("--model", folder, "--json", "--prefill-response", "Füchse 🦊", PROMPT)
    assert json.loads(said.out)["text"]
    assert "\\u" not in said.out.replace("\\u00", ""), "control characters alone are escaped"


def test_json_of_a_model_that_fits(folder):
    said = door.run("generate", "--model", folder, "--json", "--max-tokens", 3, PROMPT)
    figures = json.loads(said.out)
    assert figures["residency"] == 1
    assert figures["bytes_read"] == figures["evictions"] == 0
    assert figures["expert_hit_rate"] is None


def test_figures_on_standard_error(folder, plain):
    said = generate("--model", folder, PROMPT)
    assert said.out == plain
    rows = said.err.strip().splitlines()
    assert [row.split()[0] for row in rows] == ["prompt", "decode", "experts", "disk", "memory"]
    assert "100 tokens" in rows[1]
    assert re.search(r"hit rate \d+\.\d%", rows[2])
    assert re.search(r"[KM]B read, .*[KM]B per token", rows[3])
    assert "4.00 GB budget" in rows[4]
    assert "OVER" not in said.err


@pytest.mark.parametrize("no", ["F", "False", "f"])
def test_the_text_alone(folder, plain, no):
    said = generate("--model", folder, "--verbose", no, PROMPT)
    assert (said.out, said.err) == (plain, "")


def test_debug_shows_the_plan(folder, plain):
    said = generate("--model", folder, "-v", PROMPT)
    assert said.out == plain
    for part in ("budget", "process", "resident", "state", "scratch", "6 in each of 4 layers"):
        assert part in said.err


def test_help_has_an_example_for_every_group(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = door.run("generate", "--help")
    assert (said.code, said.err) == (0, "")
    panels = [text for name, text in vars(options).items() if name.isupper()]
    assert len(panels) == 6
    for panel in panels:
        assert "e.g. " in panel
        assert panel in said.out, "it does not fit a terminal of 80 columns"
    assert {p.rich_help_panel for p in our_options()} >= set(panels)


@pytest.mark.parametrize("panel", [v for k, v in vars(options).items() if k.isupper()])
def test_examples_are_options_that_exist(panel):
    known = {o for p in our_options() for o in p.opts}
    assert set(re.findall(r"--[a-z-]+", panel)) <= known


def test_without_a_command_comes_the_help():
    said = door.run()
    assert said.code == 2
    assert "Usage: mlx-flash" in said.out
    assert "needs no download" in " ".join(said.out.split())
    assert said.err == ""


def test_version():
    from importlib.metadata import version

    said = door.run("--version")
    assert said.code == 0
    for package in ("mlx-flash", "mlx", "mlx-lm"):
        assert f"{package} {version(package)}" in said.out


def test_the_installed_command(folder, plain):
    said = door.finish(door.start("generate", "--model", folder, *STREAMED), PROMPT)
    assert said.code == 0
    assert said.out == plain
    assert "\x1b" not in said.err, "no progress bar in a pipe"
    assert said.err.startswith("\nprompt")


def test_a_terminal_that_knows_ascii_only(folder, plain):
    process = door.start(
        "generate", "--model", folder, *STREAMED, PROMPT, env={"PYTHONIOENCODING": "ascii"}
    )
    said = door.finish(process)
    assert said.code == 0, said.err
    assert said.out == plain.encode("ascii", "replace").decode()
    assert said.out != plain


def test_a_reader_that_goes_away(folder):
    process = door.start("generate", "--model", folder, *STREAMED, "-m", 400, PROMPT)
    process.stdin.close()
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(door.PATIENCE_S) == 1
    process.stderr.close()
    assert door.heard(err) == ""


def test_progress_on_a_terminal(folder):
    ours, theirs = os.openpty()
    args = ("generate", "--model", folder, *STREAMED, "--verbose", "F", "-m", 3, PROMPT * 60)
    process = door.start(
        *args, stderr=theirs, stdin=subprocess.DEVNULL, env={"TERM": "xterm", "COLUMNS": "80"}
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # Linux says EIO where a terminal has no other end
        while piece := os.read(ours, 1 << 16):
            seen += piece
    os.close(ours)
    with process:
        out = process.stdout.read()
    assert process.returncode == 0
    assert "load" not in out, "bars go to standard error alone"
    assert "\x1b[2K" not in out
    for title in (b"load", b"prompt", b"%"):
        assert title in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l"), "the cursor is back"


def test_no_model_is_the_embedded_demo():
    said = door.run("generate", "--max-tokens", 12)
    assert said.code == 0, said.err
    assert said.out.strip()
    streamed = door.run("generate", "--max-tokens", 12, "--slots", 12, "--json")
    assert json.loads(streamed.out)["text"] + "\n" == said.out
    assert json.loads(streamed.out)["bytes_read"] > 0
