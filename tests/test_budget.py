"""The budget is a promise: peak RSS of the process under --ram, or a refusal that says why."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from dense_configs import CONFIGS

import mlx_flash
from mlx_flash.errors import BudgetError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COMMAND = Path(sys.executable).with_name("mlx-flash")
CGROUP_V1 = Path("/sys/fs/cgroup/memory")
CGROUP_V2 = Path("/sys/fs/cgroup")
PROMPT = "Once upon a time, a model larger than its memory began to speak, word by word."


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory):
    """Eight of the forty layers of Qwen3.5-35B-A3B: 4.8 GB on disk."""
    folder = tmp_path_factory.mktemp("qwen3.5-35b-a3b-8")
    if shutil.disk_usage(folder).free < 8e9:
        pytest.skip("SKIPPED LOUDLY: the budget tests need 8 GB of free disk")
    command = [sys.executable, BENCHMARKS / "make_checkpoint.py", "--out", folder]
    shape = ["--shape", "qwen3.5-35b-a3b", "--layers", "8"]
    subprocess.run([*command, *shape], check=True, capture_output=True)
    assert sum(p.stat().st_size for p in folder.iterdir()) > 3e9
    yield folder
    shutil.rmtree(folder)


def generate(folder, ram, prompt=PROMPT, max_tokens=6, cgroup=None):
    """The figures of a run of the command, in a control group if one is given."""
    options = ["--ignore-chat-template", "--json", "-m", str(max_tokens)]

    def join():
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.run(
        [COMMAND, "generate", "--model", folder, "--ram", ram, *options, prompt],
        capture_output=True,
        text=True,
        preexec_fn=join,
    )


def check_kept(result):
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["peak_rss_bytes"] <= figures["ram_bytes"]
    assert figures["generated_tokens"] == 6
    assert figures["evictions"] > 0
    return figures


@pytest.fixture(scope="module")
def dense_checkpoint(tmp_path_factory):
    """Thirteen layers without experts, 340 MB."""
    config = CONFIGS["llama"] | {
        "hidden_size": 768,
        "intermediate_size": 1920,
        "num_hidden_layers": 13,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 64,
    }
    return tiny.write(tmp_path_factory.mktemp("dense") / "llama", config=config)


@pytest.fixture
def memory_cgroup():
    """A maker of memory control groups, v1 or v2, where this machine lets us make one."""
    made = []

    def make(limit_bytes):
        v1 = (CGROUP_V1 / "memory.limit_in_bytes").exists()
        group = (CGROUP_V1 if v1 else CGROUP_V2) / f"mlx-flash-test-{os.getpid()}"
        try:
            group.mkdir()
            made.append(group)
            limit = "memory.limit_in_bytes" if v1 else "memory.max"
            (group / limit).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"SKIPPED LOUDLY: no memory cgroup can be made here ({error})")
        return group

    yield make
    for group in made:
        group.rmdir()


@pytest.mark.parametrize("ram", ["1.5GB", "2GB", "2.5GB"])
def test_peak_stays_under_the_budget(big_checkpoint, ram):
    figures = check_kept(generate(big_checkpoint, ram))
    assert figures["residency"] < 1


def test_peak_stays_under_a_memory_cgroup_of_the_same_size(big_checkpoint, memory_cgroup):
    group = memory_cgroup(1_500_000_000)
    check_kept(generate(big_checkpoint, "1.5GB", cgroup=group))


def test_auto_keeps_within_a_memory_cgroup(big_checkpoint, memory_cgroup):
    figures = check_kept(generate(big_checkpoint, "auto", cgroup=memory_cgroup(2_400_000_000)))
    assert figures["ram_bytes"] < 2_400_000_000


def test_below_the_floor_it_refuses_before_loading_and_the_floor_is_true(big_checkpoint):
    refusal = generate(big_checkpoint, "900MB")
    assert refusal.returncode == 2
    assert refusal.stdout == ""
    match = re.search(
        r"budget of 900\.00 MB is ([\d.]+) ([MG]B) short of the floor, ([\d.]+) GB: .* process, .*"
        r"resident weights, .* context state, .* scratch, .* experts\. Raise --ram or lower",
        refusal.stderr,
    )
    assert match, refusal.stderr
    assert refusal.stderr.count("\n") == 1
    floor = float(match[3])
    # The process itself varies by a MB or two from run to run.
    check_kept(generate(big_checkpoint, f"{floor + 0.02:.2f}GB", prompt=PROMPT[:32]))


def test_refusal_reads_no_weights(big_checkpoint):
    io = Path("/proc/self/io")
    if not io.exists():
        pytest.skip("SKIPPED LOUDLY: no /proc/self/io here, so bytes read cannot be counted")
    with pytest.raises(BudgetError, match="short of the floor"):
        mlx_flash.load(big_checkpoint, ram="300MB")
    before = int(io.read_text().split()[1])
    with pytest.raises(BudgetError, match="short of the floor"):
        mlx_flash.load(big_checkpoint, ram="300MB")
    assert int(io.read_text().split()[1]) - before < 20e6  # headers and the tokenizer


def test_slots_and_budget_contradict_each_other(big_checkpoint):
    with pytest.raises(BudgetError, match="lower --slots"):
        mlx_flash.load(big_checkpoint, ram="2GB", slots=200)


@pytest.mark.parametrize("more_mb", [5, 90])
def test_layers_that_stream_stay_under_the_budget(dense_checkpoint, more_mb):
    refusal = generate(dense_checkpoint, "100MB")
    assert refusal.returncode == 2
    match = re.search(r"short of the floor, ([\d.]+) MB: .* scratch, .* layers\.", refusal.stderr)
    assert match, refusal.stderr
    ram_mb = float(match[1]) + more_mb
    result = generate(dense_checkpoint, f"{ram_mb:.0f}MB")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["peak_rss_bytes"] <= figures["ram_bytes"]
    assert figures["layers_in_ram"] in ((0, 1) if more_mb == 5 else (2, 3, 4))
    streamed = figures["expert_bytes"] - figures["slot_bytes"]
    assert figures["bytes_read_per_token"] == pytest.approx(streamed, rel=0.35)  # and some ahead
    assert ram_mb * 1e6 < figures["expert_bytes"] + 260e6, "else it would fit"
