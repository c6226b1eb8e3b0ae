"""The side-by-side benchmark: its sums, and the processes it starts. Needs no llama.cpp."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not an installed package

import side_by_side  # noqa: E402
from rivals import agreement, report, talk  # noqa: E402
from rivals.ask import ask  # noqa: E402
from rivals.caps import memory_cap  # noqa: E402
from rivals.runs import FLASH, LLAMA, LLAMA_128, LLAMA_REPACKED, Measured, Phase  # noqa: E402

from mlx_flash.cli.bench_report import Row  # noqa: E402
from mlx_flash.machine import drop_from_page_cache  # noqa: E402

CHILD = [sys.executable, "-c"]
HEAR = "import sys, time, json; job = json.loads(sys.stdin.readline()); "


def test_phases_are_shares_of_the_checkpoint():
    assert side_by_side.phases_of("ram, 75", 1000) == [
        Phase("in RAM", None, None),
        Phase("cap 75 %", 750, 75),
    ]
    with pytest.raises(typer.BadParameter, match="half"):
        side_by_side.phases_of("half", 1000)


PHASES = [Phase("in RAM", None, None), Phase("cap 50 %", 10**10, 50)]


def run(runtime, phase, decode, prefill=None, **more):
    return Measured(runtime, PHASES[phase].name, 0, PHASES[phase].cap_bytes, decode=decode,
                    prefill=prefill, **more)  # fmt: skip


def flash_row(decode, residency, missed, compute_s=0.1):
    """100 bytes a token at 1000 bytes/s of memory; the disk gives 50 bytes/s."""
    return Row("", decode_tokens_per_s=decode, residency=residency, missed_bytes_per_token=missed,
               active_bytes=int(1000 * compute_s), memory_read_bytes_per_s=1000.0,
               disk_read_bytes_per_s=50.0, page_cache_read_bytes_per_s=500.0,
               share_from_disk=1.0)  # fmt: skip


def test_ratios_are_to_the_best_of_the_medians():
    measured = [
        run(FLASH, 0, 8.0, long_prefill=90.0, flash=flash_row(8.0, 1, 0)),
        run(LLAMA, 0, 4.0, long_prefill=60.0),
        run(LLAMA_REPACKED, 0, 5.0, long_prefill=45.0),
        *(run(FLASH, 1, speed, 30.0, flash=flash_row(speed, 0.5, 10)) for speed in (4, 1, 3)),
        *(run(LLAMA_128, 1, speed, 5.0) for speed in (1.0, 9.0, 2.0)),  # one outlier
        run(LLAMA, 1, 0.5, 6.0),
    ]
    report.set_ceilings(measured)
    found = {(r.phase, r.name): r for r in report.ratios(measured, PHASES)}
    decode, scaled = "decode over llama.cpp's best", "decode over ik_llama.cpp's, scaled by"
    values = {key: ratio.value for key, ratio in found.items()}
    assert values["in RAM", decode] == pytest.approx(8 / 5)
    assert values["in RAM", f"{scaled} llama.cpp's"] == pytest.approx(8 / (5 * 23.2 / 17.4))
    assert values["in RAM", "long prefill over llama.cpp's best"] == pytest.approx(90 / 60)
    assert values["cap 50 %", decode] == pytest.approx(3 / 2)
    assert values["cap 50 %", f"{scaled} llama.cpp's"] == pytest.approx(3 / (2 * 2.25 / 1.85))
    assert values["cap 50 %", "prefill over llama.cpp's best"] == pytest.approx(30 / 6)
    # Ten missed bytes take a fifth of a second, more than the eighth that a resident run takes.
    assert values["cap 50 %", "share of the ceiling"] == pytest.approx(3 / 5)
    assert "1.60, target 1.2, reached" in str(found["in RAM", decode])
    assert "1.50, target 2, MISSED" in str(found["cap 50 %", decode])
    targets = {name: r.target for (phase, name), r in found.items() if phase == "cap 50 %"}
    assert list(targets.values()) == [2, 2, 4, 0.75]


def test_what_was_not_measured_is_no_ratio():
    measured = [run(FLASH, 1, 3.0), run(LLAMA, 1, None, note="stopped after 9 s")]
    assert all("not measured" in str(ratio) for ratio in report.ratios(measured, PHASES))
    assert "stopped after 9 s" in report.table(measured, PHASES)


def test_csv_has_a_line_per_run(tmp_path):
    measured = [run(FLASH, 1, 3.0, flash=flash_row(3.0, 0.5, 10)), run(LLAMA, 1, 2.0)]
    report.write_csv(tmp_path / "out.csv", measured, {"cpu": "a cpu"})
    with (tmp_path / "out.csv").open() as file:
        ours, theirs = csv.DictReader(file)
    assert (ours["runtime"], ours["decode"], ours["missed_bytes_per_token"]) == (FLASH, "3.0", "10")
    assert (theirs["runtime"], theirs["residency"], theirs["cpu"]) == (LLAMA, "", "a cpu")


def test_logits_agree_or_not():
    draw = np.random.default_rng(0)
    ours = draw.normal(size=(5, 200)).astype(np.float32)
    near = ours + 0.01 * draw.normal(size=ours.shape).astype(np.float32)
    agreed = agreement.compare(ours, near)
    assert agreed.same and agreed.top_1 == 1 and agreed.correlation < 1
    assert not agreement.compare(ours, ours[::-1]).same
    assert agreement.compare(ours, np.roll(ours, 1, axis=1)).top_1 == 0


def test_a_decode_ends_with_its_tokens_or_its_seconds():
    assert talk.steps_timed(lambda: None, 7, 100)["tokens"] == 7
    assert talk.steps_timed(lambda: None, 7, 0)["tokens"] == 1


def test_a_run_that_takes_too_long_is_ended_and_keeps_what_it_said():
    slow = HEAR + "print(json.dumps({'prefill_s': job}), flush=True); time.sleep(100)"
    found = ask([*CHILD, slow], [0.5], limit_s=1.5)
    assert found == {"prefill_s": [0.5], "note": "stopped after 2 s"}


@pytest.mark.parametrize(
    "ending, note",
    [
        ("sys.exit('no such model')", "exit code 1: no such model"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9, probably out of memory"),
        ("import os; os.kill(os.getpid(), 11)", "ended by signal 11"),
    ],
)
def test_why_a_run_failed_is_said(ending, note):
    assert ask([*CHILD, HEAR + ending], {}, limit_s=60)["note"] == note


def test_progress_is_no_result():
    talks = HEAR + 'print(\'{"phase": "load"}\'); print(\'{"result": 3}\', flush=True)'
    assert ask([*CHILD, talks], {}, limit_s=60) == {"result": 3}


def test_a_run_ends_with_the_one_who_asked():
    code = "import time; from rivals import talk; talk.listen(); time.sleep(100)"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    with subprocess.Popen([*CHILD, code], stdin=subprocess.PIPE, env=environment) as process:
        process.stdin.write(b"{}\n")
        process.stdin.close()
        try:
            assert process.wait(20) == 1
        finally:
            process.kill()


def test_share_in_page_cache(tmp_path):
    if sys.platform != "linux":
        pytest.skip("SKIPPED LOUDLY: no mincore as Linux has it")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 22))
    assert talk.share_in_page_cache(path) == 1
    kind = subprocess.check_output(["stat", "-f", "-c", "%T", path], text=True).strip()
    if kind == "tmpfs":
        pytest.skip("SKIPPED LOUDLY: this file system lives in memory")
    drop_from_page_cache([path])
    assert talk.share_in_page_cache(path) == 0


def test_a_cap_holds_for_the_child():
    try:
        with memory_cap(1 << 28):
            pass
    except OSError as error:
        pytest.skip(f"SKIPPED LOUDLY: no memory cgroup can be made here ({error})")
    take = HEAR + "x = bytearray(job); print('{\"done\": true}', flush=True)"
    assert ask([*CHILD, take], 1 << 26, 60, cap_bytes=1 << 28) == {"done": True}
    assert "signal 9" in ask([*CHILD, take], 1 << 29, 60, cap_bytes=1 << 28)["note"]
