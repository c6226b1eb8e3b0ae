"""`mlx-flash bench`: every figure from a real run, and held against the others."""

import contextlib
import copy
import csv
import ctypes
import importlib.util
import json
import mmap
import os
import re
import signal
import sys
import time
from dataclasses import fields
from functools import partial

import door
import mlx.core as mx
import mlx_lm
import psutil
import pytest
import typer
from mlx_lm.generate import generate_step

from mlx_flash import cli, demo
from mlx_flash.cli import bench_options, bench_run, ceilings
from mlx_flash.cli.bench_report import MEMORY_READS, RESIDENT_RUN, Row, set_ceilings
from mlx_flash.machine import drop_from_page_cache
from mlx_flash.opening import open_lazily

BENCH = sys.modules["mlx_flash.cli.bench"]  # the package has a function of that name
LAYERS, EXPERTS, TOP_K, EACH = 8, 32, 4, 30_720  # of the demo model
TOKENS, PROMPT = 8, 12
SHORT = ("--slots", 12, "--tokens", TOKENS, "--prompt-tokens", PROMPT, "--repeats", 2)
SHARDS = sorted(demo.FOLDER.glob("*.safetensors"))
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="SKIPPED LOUDLY: Linux's own")


@pytest.fixture(scope="module", autouse=True)
def quick_ceilings():
    """Real ones, of a moment instead of seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "measure", partial(ceilings.measure, seconds=0.02))
        patch.setattr(ceilings, "MEMORY_BYTES", 64 << 20)
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory, quick_ceilings):
    """Three budgets, one of them too small: the JSON, and the folder of CSV and PNG."""
    folder = tmp_path_factory.mktemp("bench")
    files = ("--csv", folder / "rows.csv", "--plot", folder / "rows.png", "--json")
    said = door.run(
        "bench", "--ram", "60MB, 1GB,max", "--kernels", "reference", "--reader", "pread", *SHORT,
        *files,
    )  # fmt: skip
    assert said.code == 0, said.err
    assert said.err == ""
    return json.loads(said.out), folder


def rows(measured, budget, cache=None):
    return [
        row
        for row in measured[0]["rows"]
        if row["budget"] == budget and cache in (None, row["cache"])
    ]


def test_a_row_per_budget_and_page_cache(measured):
    found = [(row["budget"], row["cache"], row["status"]) for row in measured[0]["rows"]]
    assert found == [
        ("60MB", "-", "refused"),
        ("1GB", "warm", "ok"),
        ("1GB", "cold", "ok"),
        ("max", "-", "ok"),
    ]
    assert measured[0]["tokens_identical"] is True
    assert measured[0]["interrupted"] is False


def test_a_budget_below_the_floor_is_a_row_that_says_so(measured):
    (row,) = rows(measured, "60MB")
    assert re.search(r"budget of 60\.00 MB is .* short of the floor", row["note"])
    assert row["decode_tokens_per_s"] is None


def test_figures_of_a_streamed_budget_agree_with_one_another(measured):
    for row in rows(measured, "1GB"):
        assert row["residency"] == 12 / EXPERTS
        assert row["ram_bytes"] == 1_000_000_000
        assert 40e6 < row["peak_rss_bytes"] < 1e9
        assert row["within_budget"] is True
        assert 0 < row["hit_rate"] < 1
        missed = (1 - row["hit_rate"]) * TOP_K * LAYERS * EACH
        assert row["missed_bytes_per_token"] == pytest.approx(missed)
        assert row["decode_tokens_per_s_min"] <= row["decode_tokens_per_s"]
        assert row["decode_tokens_per_s"] <= row["decode_tokens_per_s_max"]
        assert row["prefill_tokens_per_s"] > 0
        assert row["read_bytes_per_s"] > 1e6
        experts_read, rest = divmod(row["prefill_read_bytes"], EACH / 2)  # of two runs' median
        assert rest == 0 and experts_read > 0
        assert row["runs"] == 2


def test_figures_of_a_resident_budget(measured):
    (row,) = rows(measured, "max")
    assert row["residency"] == 1
    assert row["missed_bytes_per_token"] == row["prefill_read_bytes"] == 0
    assert row["hit_rate"] is row["read_bytes_per_s"] is row["share_from_disk"] is None
    assert row["slots"] is None
    assert row["within_budget"] is True


@ON_LINUX
def test_cold_misses_come_from_the_disk_and_warm_ones_do_not(measured):
    before = psutil.Process().io_counters().read_bytes
    drop_from_page_cache(SHARDS)
    nbytes = sum(len(path.read_bytes()) for path in SHARDS)
    if psutil.Process().io_counters().read_bytes - before < nbytes:
        pytest.skip("SKIPPED LOUDLY: reads of this file system are not counted as disk reads")
    (cold,), (warm,) = rows(measured, "1GB", "cold"), rows(measured, "1GB", "warm")
    assert cold["share_from_disk"] > 0.9
    assert warm["share_from_disk"] < 0.5


def test_ceilings_follow_from_what_was_measured(measured):
    (resident,) = rows(measured, "max")
    compute = 1 / resident["decode_tokens_per_s"]
    for row in rows(measured, "1GB"):
        assert row["compute_how"] == RESIDENT_RUN.format("experts")
        assert row["compute_s_per_token"] == pytest.approx(compute)
        disk_s = row["share_from_disk"] / row["disk_read_bytes_per_s"]
        cache_s = (1 - row["share_from_disk"]) / row["page_cache_read_bytes_per_s"]
        read_s = row["missed_bytes_per_token"] * (disk_s + cache_s)
        ceiling = 1 / max(compute, read_s)
        assert row["ceiling_tokens_per_s"] == pytest.approx(ceiling)
        assert row["ceiling_reached"] == pytest.approx(row["decode_tokens_per_s"] / ceiling)
    assert resident["compute_how"] == MEMORY_READS
    at_most = resident["memory_read_bytes_per_s"] / resident["active_bytes"]
    assert resident["ceiling_tokens_per_s"] == pytest.approx(at_most)


def test_a_slow_disk_and_uncounted_reads_lower_the_ceiling():
    def row(**more):
        facts = {"budget": "x", "active_bytes": 10, "memory_read_bytes_per_s": 100.0}
        disk = {"disk_read_bytes_per_s": 50.0, "page_cache_read_bytes_per_s": 500.0}
        return Row(**facts | disk | {"residency": 0.5, "decode_tokens_per_s": 1.0} | more)

    cold = row(cache="cold", missed_bytes_per_token=25.0)
    warm = row(cache="warm", missed_bytes_per_token=25.0)
    part = row(cache="warm", missed_bytes_per_token=25.0, share_from_disk=0.5)
    set_ceilings(found := [cold, warm, part])
    assert [r.compute_how for r in found] == [MEMORY_READS] * 3
    assert cold.ceiling_tokens_per_s == pytest.approx(2)  # 25 / 50 is more than 10 / 100
    assert warm.ceiling_tokens_per_s == pytest.approx(10)  # 25 / 500 is less
    assert part.ceiling_tokens_per_s == pytest.approx(1 / (12.5 / 50 + 12.5 / 500))
    set_ceilings([*found, row(cache="-", residency=1, decode_tokens_per_s=4.0)])
    assert cold.ceiling_tokens_per_s == pytest.approx(2)
    assert warm.ceiling_tokens_per_s == pytest.approx(4)
    assert warm.ceiling_reached == pytest.approx(1 / 4)


def test_csv_and_plot_hold_the_rows(measured):
    found, folder = measured
    with (folder / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [field.name for field in fields(Row)]
    assert len(lines) == len(found["rows"])
    for line, row in zip(lines, found["rows"], strict=True):
        assert line == {k: "" if v is None else str(v) for k, v in row.items()}
    png = (folder / "rows.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_every_row_says_what_it_was_measured_on(measured):
    for row in measured[0]["rows"]:
        for name in ("cpu", "mlx", "mlx_flash", "policy", "model"):
            assert row[name], name
        for name in ("cores", "machine_ram_bytes", "active_bytes", "read_threads"):
            assert row[name] > 0, name
        assert row["reader"] == "pread"
        assert row["context"] == PROMPT + TOKENS + 2
        assert re.fullmatch(r"([0-9a-f]{10,}(-dirty)?)?", row["commit"])
    for row in rows(measured, "1GB") + rows(measured, "max"):
        assert row["kernels"] == "mlx"
        assert row["memory_read_how"] and row["disk_read_how"]
        assert row["memory_read_bytes_per_s"] > 1e8 and row["disk_read_bytes_per_s"] > 1e5


def test_table_of_a_budget_where_nothing_was_resident():
    said = door.run("bench", "--ram", "1GB", *SHORT, "--warm", "--repeats", 1)
    assert said.code == 0, said.err
    table = said.out.splitlines()
    row = next(line for line in table if line.startswith("1GB"))
    assert row.split()[1:3] == ["warm", "38%"]
    assert not any(line.startswith("1GB") and "cold" in line for line in table)
    assert MEMORY_READS in said.out
    assert table[-1] == "tokens identical: yes"
    assert "…" not in said.out, "no figure is cut off"


@pytest.mark.parametrize("slots", [12, None])
def test_tokens_are_those_of_mlx_lm(slots):
    knobs = {"ram": "4GB", "slots": slots, "context": 64, "kernels": "reference"}
    job = bench_run.Job(str(demo.FOLDER), knobs, PROMPT, TOKENS, 1, ("warm", "cold"), seed=7)
    result = bench_run.measure(job, lambda **message: None)
    stock, _ = mlx_lm.load(str(demo.FOLDER))
    prompt = bench_run._prompt(job, stock.args.text_config["vocab_size"])
    assert len(set(prompt.tolist())) > PROMPT / 2, "a prompt must not repeat itself"
    expected = [token for token, _ in generate_step(prompt, stock, max_tokens=TOKENS + 2)]
    runs = [result.dropped, *result.runs]
    assert [run.ids for run in runs] == [expected] * len(runs)
    assert len(set(expected)) > 2
    assert [run.cache for run in result.runs] == (["warm", "cold"] if slots else ["-"])
    for run in runs:
        assert run.hits + run.misses == (TOKENS * TOP_K * LAYERS if slots else 0)
        assert run.bytes_read == run.misses * EACH
    mx.clear_cache()


def test_different_tokens_are_exit_code_1(monkeypatch):
    answers = []

    def lying(job, budget, bars):
        answers.append(copy.deepcopy(answers[0]) if answers else ask(job, budget, bars))
        if budget == "max":
            answers[-1]["result"]["runs"][-1]["ids"][5] += 1
        return answers[-1]

    ask = BENCH._ask
    monkeypatch.setattr(BENCH, "_ask", lying)
    said = door.run("bench", "--ram", "1GB,max", *SHORT, "--warm", "--repeats", 1)
    assert said.code == 1
    assert said.out.endswith("tokens identical: no\n")
    assert re.fullmatch(
        r"mlx-flash: error: the tokens differ: number 6 is \d+ in 1GB, run 1 \(warm\), and \d+ in "
        r"max, run 2 \(warm\)\.\n",
        said.err,
    )


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9; was it out of memory"),
        ("input(); raise SystemExit('no such luck')", "exit code 1: no such luck"),
    ],
)
def test_a_process_that_dies_is_a_row(monkeypatch, tmp_path, code, expected):
    monkeypatch.setattr(BENCH, "CHILD", [sys.executable, "-c", code])
    said = door.run("bench", "--ram", "1GB", *SHORT, "--csv", tmp_path / "rows.csv")
    assert said.code == 2
    assert expected in said.out
    assert "no budget could be measured" in said.err
    with (tmp_path / "rows.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["status"] == "failed"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--ram", "4GB,lots"], "'lots' is not a size"),
        (["--ram", ""], "is not a size"),
        (["--ram", "4GB,,max"], "is not a size"),
        (["--ram", "150%"], "more than the"),
        (["--context", 100], "has no room for 128 tokens of prompt and 200 to decode"),
        (["--plot", "x.jpg"], "not named .png"),
        (["--csv", "/no/such/folder/x.csv"], "cannot be written"),
        (["--csv", "."], "cannot be written"),
        (["--policy", "best"], "no policy 'best'"),
        (["--kernels", "fast"], "no kernels 'fast'"),
        (["/no/such/model"], "/no/such/model"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(monkeypatch, args, expected):
    monkeypatch.setattr(BENCH, "_measure", None)
    said = door.run("bench", *args)
    assert said.code == 2
    assert said.out == ""
    assert expected in said.err
    assert said.err.count("\n") == 1


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    monkeypatch.setattr(BENCH, "_measure", None)
    said = door.run("bench", "--plot", "x.png")
    assert said.code == 2
    assert said.err == (
        "mlx-flash: error: --plot needs matplotlib. Install it: pip install matplotlib\n"
    )


def wait_for(condition, seconds=door.PATIENCE_S):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def busy_child(process):
    """The process that measures, once it does."""
    children = psutil.Process(process.pid).children()
    return [child for child in children if child.cpu_times().user > 2]


def ended(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


ENDLESS = ("--slots", 12, "--warm", "--tokens", 100_000, "--prompt-tokens", 4, "--ram")


def test_interrupt_keeps_the_rows_and_ends_the_measuring_process(tmp_path):
    path = tmp_path / "rows.csv"
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    seen = []

    def bars():  # a terminal that nobody reads would hold the command up
        with contextlib.suppress(OSError):
            seen.append(os.read(ours, 1 << 16))
        return b"".join(seen)

    process = door.start(
        "bench", *ENDLESS, "10MB,1GB", "--csv", path,
        stderr=theirs, start_new_session=True, env={"TERM": "xterm", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(theirs)
    wait_for(lambda: bars() and path.exists() and "short of the floor" in path.read_text())
    (child,) = wait_for(lambda: busy_child(process))
    wait_for(lambda: b"1GB" in bars())
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
    begun = time.perf_counter()
    wait_for(lambda: bars() and process.poll() is not None)
    assert time.perf_counter() - begun < 4
    assert process.returncode == 130
    with process:
        out = process.stdout.read()
    assert re.search(r"^10MB +refused$", out, re.MULTILINE)
    assert "\x1b" not in out, "bars are for standard error"
    terminal = bars()
    os.close(ours)
    assert terminal.endswith(b"mlx-flash: interrupted after 1 rows.\r\n")
    assert terminal.rindex(b"\x1b[?25h") > terminal.rindex(b"\x1b[?25l"), "the cursor is back"
    assert b"Traceback" not in terminal
    assert wait_for(lambda: ended(child))
    assert path.read_text().count("\n") == 2


@ON_LINUX
def test_the_measuring_process_does_not_outlive_a_killed_command():
    # In the middle of a long prompt, when it has nothing to say that could go unheard.
    long = ("--slots", 12, "--prompt-tokens", 200_000, "--tokens", 1, "--ram", "4GB")
    process = door.start("bench", *long)
    (child,) = wait_for(lambda: busy_child(process))
    process.kill()
    door.finish(process)
    assert wait_for(lambda: ended(child), seconds=10)


@ON_LINUX
def test_dropped_files_are_out_of_the_page_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))  # not on disk yet
    assert resident_pages(path) > 0
    drop_from_page_cache([path])
    left = resident_pages(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    drop_from_page_cache([path])
    if resident_pages(path):
        pytest.skip("SKIPPED LOUDLY: this file system has no disk behind its page cache")
    assert left == 0


def resident_pages(path):
    """Pages of a file in the page cache, of mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        length = ctypes.c_size_t(len(mapped))
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), length, pages) == 0
        del start
        return sum(page & 1 for page in pages)


def test_active_bytes_are_what_a_token_reads():
    lazy = open_lazily(demo.FOLDER)
    every = sum(info.span.nbytes for info in lazy.checkpoint.values())
    table = sum(
        info.span.nbytes for name, info in lazy.checkpoint.items() if "embed_tokens" in name
    )
    tied = lazy.config["text_config"]["tie_word_embeddings"]
    asleep = LAYERS * (EXPERTS - TOP_K) * EACH
    assert ceilings.active_bytes(lazy) == every - asleep - (0 if tied else table)


def test_sampled_experts_are_whole_ones(monkeypatch):
    lazy = open_lazily(demo.FOLDER)
    monkeypatch.setattr(ceilings, "SAMPLE_BYTES", 10 * EACH)
    sample = ceilings.sample_experts(lazy)
    assert len(sample) == 10
    assert {sum(span.nbytes for span in expert) for expert in sample} == {EACH}
    assert len({expert[0].offset for expert in sample}) == 10


def test_help_teaches(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = door.run("bench", "--help")
    assert (said.code, said.err) == (0, "")
    panels = [text for text in vars(bench_options).values() if "   e.g. " in str(text)]
    assert len(panels) == 4
    params = typer.main.get_command(cli.app).commands["bench"].params
    known = {option for param in params for option in param.opts}
    for panel in panels:
        assert panel in said.out, "it does not fit a terminal of 80 columns"
        assert set(re.findall(r"--[a-z-]+", panel)) <= known
    text = " ".join(said.out.split())
    assert "1 / max(compute, missed bytes / disk)" in text
    assert "mlx-flash bench --slots 12 --ram 1GB,max" in text
    for param in params:
        assert param.help or param.name == "help"
