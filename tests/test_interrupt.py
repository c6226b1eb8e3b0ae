"""Ctrl-C ends the command within a second, with what there is, wherever it strikes."""

import json
import os
import select
import signal
import sys
import time

import door
import pytest
import tiny

# One second is the promise. The rest is for the machine to schedule the process in, more of
# it where others keep every core busy.
LIMIT_S = 1.5 if os.getloadavg()[0] < 2 * (os.cpu_count() or 1) else 4.0
FORM = "qwen3_5_moe-4bit"
STREAMED = ("--slots", 4, "--ram", "4GB")
ENDLESS = ("--max-tokens", 50_000)

WIDE = {
    **tiny.QWEN3_5_MOE,
    "text_config": {
        **tiny.QWEN3_5_MOE["text_config"],
        "hidden_size": 1024,
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "shared_expert_intermediate_size": 4096,
    },
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model small on disk whose every layer takes seconds for a long prompt on a CPU."""
    folder = tmp_path_factory.mktemp("wide")
    return tiny.write(folder, config=WIDE, quantization={"group_size": 64, "bits": 4})


def interrupt(process):
    """Send SIGINT, see it end in time, and return what it said from then on."""
    process.send_signal(signal.SIGINT)
    begun = time.perf_counter()
    said = door.finish(process)
    took = time.perf_counter() - begun
    assert took < LIMIT_S
    assert said.code == 130, said
    assert "Traceback" not in said.err
    return said


def wait_for(stream, word):
    """Read a pipe or terminal until a word comes by. Returns all that was read."""
    seen = b""
    deadline = time.monotonic() + door.PATIENCE_S
    while word not in seen:
        ready, _, _ = select.select([stream], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no {word!r} in {seen!r}"
        piece = os.read(stream, 1 << 12)
        assert piece, f"no {word!r} in {seen!r}"
        seen += piece
    return seen


def test_while_it_decodes(checkpoints):
    args = ("generate", "--model", checkpoints(FORM), *STREAMED, "hello")
    process = door.start(*args, *ENDLESS)
    begun = wait_for(process.stdout.fileno(), b"J").decode(errors="replace")
    said = interrupt(process)
    expected = door.run(*args, "--max-tokens", 24).out.strip("\n")
    text = begun + said.out
    assert text.endswith("\n")
    compared = min(len(text) - 1, len(expected))
    assert compared >= 3
    assert text[:compared] == expected[:compared]
    assert [row.split()[0] for row in said.err.strip().splitlines()] == [
        "prompt", "decode", "experts", "disk", "memory",
    ]  # fmt: skip


def test_in_the_middle_of_one_native_call_of_a_long_prompt(wide):
    # Python cannot raise KeyboardInterrupt before the call ends, seconds from now. The
    # terminal has a progress bar: it must go, its cursor come back, the JSON stay off it.
    ours, theirs = os.openpty()
    process = door.start(
        "generate", "--model", wide, *STREAMED, "--json", "word " * 8000,
        stderr=theirs, env={"TERM": "xterm", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(theirs)
    wait_for(ours, b"prompt")
    time.sleep(0.7)
    assert process.poll() is None
    said = interrupt_on_terminal(process)
    terminal = os.read(ours, 1 << 16)
    os.close(ours)
    figures = json.loads(said.out)
    assert figures["finish_reason"] == "interrupted"
    assert figures["text"] == ""
    assert figures["generated_tokens"] == 0
    assert figures["prompt_tokens"] > 2000
    assert figures["time_to_first_token_s"] is None
    assert b"\x1b[?25h" in terminal, "the cursor is hidden for good"
    assert b"interrupted" not in terminal


def interrupt_on_terminal(process):
    process.send_signal(signal.SIGINT)
    begun = time.perf_counter()
    out = process.stdout.read()
    code = process.wait(door.PATIENCE_S)
    assert time.perf_counter() - begun < LIMIT_S
    process.stdin.close()
    process.stdout.close()
    assert code == 130
    return door.Said(code, out, "")


@pytest.mark.parametrize("as_json", [False, True])
def test_while_it_opens_the_model(checkpoints, tmp_path, as_json):
    # A named pipe for a config.json: whoever opens it waits for the other end.
    (tmp_path / "model").mkdir()
    pipe = tmp_path / "model" / "config.json"
    os.mkfifo(pipe)
    process = door.start("generate", "--model", pipe.parent, *["--json"] * as_json, "hello")
    with pipe.open("w"):  # returns once the command is at it
        said = interrupt(process)
    check_interrupted_load(said, as_json)


SLOW_LOAD = """
import sys
import mlx.core as mx
from mlx_flash import cli

def stream(*args):
    print("loading", file=sys.stderr, flush=True)
    x = mx.random.normal((2000, 2000))
    for _ in range(2000):
        x = mx.tanh(x @ x)
    mx.eval(x)  # minutes
    raise AssertionError("it was meant to be interrupted")

sys.modules["mlx_flash.cli.generate"].stream = stream
cli.main()
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_in_the_middle_of_one_native_call_of_loading(checkpoints, monkeypatch, as_json):
    monkeypatch.setattr(door, "COMMAND", sys.executable)
    args = ("generate", "--model", checkpoints(FORM), *["--json"] * as_json, "hello")
    process = door.start("-c", SLOW_LOAD, *args)
    wait_for(process.stderr.fileno(), b"loading\n")
    time.sleep(0.3)
    check_interrupted_load(interrupt(process), as_json)


def check_interrupted_load(said, as_json):
    assert said.err == "mlx-flash: interrupted while loading.\n"
    if as_json:
        assert json.loads(said.out) == {
            "text": "", "generated_tokens": 0, "finish_reason": "interrupted",
        }  # fmt: skip
    else:
        assert said.out == ""


def test_while_nobody_reads_what_it_says(checkpoints):
    # A pager that hangs: the goodbye cannot be said, and the command ends all the same.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(1 << 12))
    except BlockingIOError:
        os.set_blocking(writing, True)
    process = door.start(
        "generate", "--model", checkpoints(FORM), *STREAMED, *ENDLESS, "-v", "hello",
        stdout=writing,
    )  # fmt: skip
    os.close(writing)
    wait_for(process.stderr.fileno(), b"experts ")
    time.sleep(1)
    interrupt(process)
    os.close(reading)


def test_a_run_that_ends_leaves_signals_as_they_were(checkpoints):
    handler, fd = signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    for tokens in (2, 0):  # done, and refused
        door.run("generate", "--model", checkpoints(FORM), "--max-tokens", tokens, "hello")
        assert signal.getsignal(signal.SIGINT) is handler
        assert signal.set_wakeup_fd(-1) == -1
    signal.set_wakeup_fd(fd)
