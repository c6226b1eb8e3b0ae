"""`mlx-flash selftest`: no kernel is left out, a wrong one is found, and the table can be read."""

import json
import os
import signal
import sys
import types

import door
import mlx.core as mx
import pytest
from test_interrupt import wait_for

from mlx_flash import kernels
from mlx_flash.cli.selftest import Found, _table
from mlx_flash.kernels import trials
from mlx_flash.kernels.trials import Case, Trial, Verdict, backends, judge, seconds
from mlx_flash.kernels.trials.metal import trials as metal_trials
from mlx_flash.kernels.trials.native import trials as native_trials

needs_native = pytest.mark.skipif(
    kernels.native() is None, reason="SKIPPED LOUDLY: the native kernels are not built"
)

# What the extension has besides kernels: readers, memory, settings.
NO_KERNELS = {
    "ExpertPool",
    "Fetch",
    "Files",
    "Weights",
    "empty_slots",
    "isa",
    "memory_read_bandwidth",
    "mlx_version",
    "set_isa",
    "set_threads",
    "threads",
}


@pytest.fixture
def extension(monkeypatch):
    """Let a copy of the extension stand for it, to look over its shoulder or to break it."""
    copied = types.ModuleType("mlx_flash._native")
    copied.__dict__.update(vars(kernels.native()))
    monkeypatch.setitem(sys.modules, "mlx_flash._native", copied)
    kernels._load.cache_clear()
    yield copied
    monkeypatch.undo()
    kernels._load.cache_clear()


def watch(extension, called):
    """Note every kernel of the extension that is called."""

    def watched(name, kernel):
        def call(*given, **named):
            called.add(name)
            return kernel(*given, **named)

        return call

    for name in {n for n in vars(extension) if not n.startswith("_")} - NO_KERNELS:
        setattr(extension, name, watched(name, getattr(extension, name)))


@needs_native
def test_every_native_kernel_is_tried_and_right(extension):
    called = set()
    wanted = {name for name in vars(extension) if not name.startswith("_")} - NO_KERNELS
    watch(extension, called)
    verdicts = [judge(trial, timed=False) for trial in native_trials(trials.QUICK)]
    wrong = [(v.trial.kernel, v.error, v.fault) for v in verdicts if not v.right]
    assert not wrong
    assert called == wanted, "a kernel of the extension without a trial: add one"


@needs_native
def test_every_trial_is_of_our_kernels(extension):
    for trial in native_trials(trials.QUICK):
        called = set()
        case = trial.make()
        watch(extension, called)
        fused = any(name in trial.kernel for name in ("experts", "block"))  # built beforehand
        mx.eval(case.ours(*case.variants[0]))
        assert called or fused, f"{trial.kernel} runs none"
        called.clear()
        mx.eval(case.stock(*case.variants[0]))
        assert not called, f"{trial.kernel}: what it is compared with runs {called}"


@needs_native
def test_the_command_prints_a_table_to_paste():
    said = door.run("selftest", "--quick")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert said.out.isascii(), "also where a terminal has no more"
    for title in ("machine", "system", "versions", "device", "right"):
        assert any(line.startswith(title) for line in lines)
    assert mx.__version__.split(".dev")[0] in said.out
    for trial in native_trials(trials.QUICK):
        rows = [line for line in lines if f"ok   {trial.kernel} " in line]
        assert any(trial.shape in row for row in rows), trial
    assert lines[-2].startswith("native: all right")
    assert lines[-1].endswith("whether --kernels native pays.")


@needs_native
def test_the_command_for_machines():
    said = door.run("selftest", "--quick", "--json")
    assert said.code == 0
    facts = json.loads(said.out)
    assert facts["right"] and facts["complete"] and facts["quick"] and facts["none"] is None
    (native,) = facts["backends"]
    assert native["name"] == "native"
    assert len(native["trials"]) == len(native_trials(trials.QUICK))
    for trial in native["trials"]:
        assert trial["right"] and trial["fault"] is None
        assert 0 <= trial["error"] <= trial["tolerance"]
        assert trial["ratio"] == pytest.approx(trial["mlx_s"] / trial["ours_s"])
        assert trial["bytes_per_s"] == pytest.approx(trial["bytes"] / trial["ours_s"])


@needs_native
@pytest.mark.parametrize("how", ["off by one", "raises", "nan", "another shape"])
def test_a_wrong_kernel_is_found(extension, monkeypatch, how):
    rule = extension.rms_norm

    def broken(x, weight, eps):
        if how == "raises":
            raise RuntimeError("no such function\nin this library")
        y = rule(x, weight, eps)
        return {"off by one": y + 1, "nan": y * float("nan"), "another shape": y[..., :-1]}[how]

    extension.rms_norm = broken
    few = [t for t in native_trials(trials.QUICK) if "norm" in t.kernel]
    monkeypatch.setattr("mlx_flash.kernels.trials.native.trials", lambda sizes: few)
    said = door.run("selftest", "--quick")
    assert said.code == 1
    assert said.out.count("\nFAIL ") == 1
    assert "\nFAIL rms norm " in said.out
    assert "\nok   gated rms norm " in said.out
    assert "FAIL: 1 of 3 are wrong (rms norm). Do not use --kernels native" in said.out
    fault = "ours: RuntimeError: no such function in this library"
    assert (fault in said.out) == (how == "raises")
    facts = json.loads(door.run("selftest", "--quick", "--json").out)
    assert not facts["right"]
    assert [t["kernel"] for t in facts["backends"][0]["trials"] if not t["right"]] == ["rms norm"]


def test_what_follows_a_fault_of_the_gpu_is_not_blamed_for_it(monkeypatch):
    def fault(_):
        raise RuntimeError("[METAL] Command buffer execution failed")

    good = Case(lambda x: x, lambda x: x, [(mx.ones(3),)], 4)
    bad = Case(fault, lambda x: x, [(mx.ones(3),)], 4)
    few = [Trial(name, "3", mx.float32, lambda c=c: c) for name, c in (("a", bad), ("b", good))]
    backend = backends.Backend("metal", "--kernels metal", "a GPU", lambda sizes: few)
    monkeypatch.setattr(backends, "present", lambda: [backend])
    said = door.run("selftest", "--quick")
    assert said.code == 1 and "FAIL: 1 of 2 are wrong (a)." in said.out and "\nok   b" in said.out
    monkeypatch.setattr(trials.mx, "eval", fault)
    assert not trials.computes()
    monkeypatch.undo()
    assert trials.computes()
    monkeypatch.setattr(backends, "present", lambda: [backend])
    command = sys.modules["mlx_flash.cli.selftest"]  # the package names its function so
    monkeypatch.setattr(command, "computes", lambda: False)
    said = door.run("selftest", "--quick")
    assert said.code == 1 and "FAIL: 1 of 1 are wrong (a)." in said.out
    assert "Not tried: 1." in " ".join(said.out.split()) and "ok   b" not in said.out


def test_no_answer_in_any_output_is_wrong():
    x = mx.ones(3)
    for last in (mx.array(float("nan")), mx.array(float("inf"))):
        case = Case(lambda x, last=last: (x, last), lambda x: (x, mx.array(1.0)), [(x,)], 4)
        assert not judge(Trial("two", "3", mx.float32, lambda c=case: c), timed=False).right


def test_whose_operation_raised_is_said():
    def stock(x):
        raise ValueError("not in MLX")

    case = Case(lambda x: x, stock, [(mx.ones(3),)], 4)
    verdict = judge(Trial("new", "3", mx.float32, lambda: case), timed=False)
    assert verdict.fault == "MLX's own: ValueError: not in MLX"


@pytest.mark.parametrize("error", [AttributeError, IndexError, FileNotFoundError, MemoryError])
def test_a_trial_that_cannot_run_is_a_row_of_the_table(error):
    def lacking(*_):
        raise error("mlx.core has no such thing")

    for make, whose in (
        (lambda: Case(lacking, lambda x: x, [(mx.ones(3),)], 4), "ours"),
        (lacking, "its arrays"),
    ):
        verdict = judge(Trial("new", "3", mx.float32, make))
        assert not verdict.right
        assert verdict.fault == f"{whose}: {error.__name__}: mlx.core has no such thing"


def test_the_answer_is_held_to_float32_of_the_same_arguments():
    x = mx.array([1 + 2**-7, 1e-3]).astype(mx.bfloat16)
    seen = []

    def stock(x):
        seen.append((x.dtype, mx.default_device().type))
        return 3 * x

    case = Case(lambda x: 3 * x, stock, [(x,)], 4)
    verdict = judge(Trial("thrice", "2", mx.bfloat16, lambda: case), timed=False)
    assert seen == [(mx.float32, mx.cpu)]
    assert verdict.right and 0 < verdict.error < 2**-7
    rounded = Case(lambda x: 3 * x.astype(mx.bfloat16), lambda x: 3 * x, [(mx.array([0.3]),)], 4)
    assert not judge(Trial("thrice", "1", mx.float32, lambda: rounded), timed=False).right


def test_on_a_gpu_each_call_waits_for_the_one_before():
    seen = []

    def call(x, one):
        seen.append(x)
        return x * one, one

    variants = [(mx.array([float("inf")]), mx.array(1)), (mx.ones((2, 3)), mx.array(1))]
    assert seconds(call, variants, linked=False) > 0
    assert all(not mx.isnan(x).any() for x in seen), "calls of their own"
    seen.clear()
    assert seconds(call, variants, linked=True) > 0
    after = [x for x in seen if x.size == 6]
    assert after and all(mx.isnan(x).all() for x in after), "0 * inf of the call before"


@needs_native
def test_every_trial_can_be_timed_in_a_chain():
    for trial in native_trials(trials.QUICK)[::3]:
        case = trial.make()
        for call in (case.ours, case.stock):
            assert seconds(call, case.variants[:1], linked=True) > 0


def test_every_table_is_100_columns_wide_at_most():
    for trials_of in (native_trials, metal_trials):
        for sizes in (trials.QUICK, trials.FULL):
            verdicts = [Verdict(t, 1e-5, 0.9999, 123.4, 10**9) for t in trials_of(sizes)]
            assert max(map(len, _table(verdicts))) <= 100


def test_advice_follows_the_figures():
    trial = Trial("kernel", "1", mx.float32, lambda: None)
    backend = backends.Backend("metal", "--kernels metal", "a GPU", lambda sizes: [])

    def advice(*times, error=0.0, planned=None, quick=False):
        verdicts = [Verdict(trial, error, ours, stock, 1) for ours, stock in times]
        return Found(backend, [trial] * (planned or len(times)), verdicts).advice(quick)

    assert advice((1, 3), (1, 2), (2, 1)) == (
        "metal: all right, 2 of 3 faster than MLX's own, 2.0x in the middle; "
        "--kernels metal should pay here."
    )
    assert advice((1, 3), quick=True).endswith(
        "without --quick it is seen whether --kernels metal pays."
    )
    assert advice((1, 9), planned=26) == "metal: 1 of 26 tried, none of them wrong."
    assert advice((1, 9), planned=26, error=1.0).startswith("FAIL: 1 of 1 are wrong (kernel).")
    assert "MLX's own are better here" in advice((2, 1), (3, 1), (1, 2))
    assert advice((1, 9), error=1.0).startswith("FAIL: 1 of 1 are wrong (kernel).")
    assert advice((1, 9), error=float("nan")).startswith("FAIL: 1 of 1 are wrong (kernel).")


def test_where_there_are_no_kernels_it_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_flash._native", None)
    kernels._load.cache_clear()
    try:
        said = door.run("selftest")
        facts = json.loads(door.run("selftest", "--json").out)
    finally:
        monkeypatch.undo()
        kernels._load.cache_clear()
    assert said.code == 0
    assert "No kernels but MLX's own here: they were not built" in said.out
    assert facts["backends"] == [] and "not built" in facts["none"]


@needs_native
def test_an_interrupt_leaves_the_table_so_far():
    ours, theirs = os.openpty()
    process = door.start("selftest", stderr=theirs, env={"TERM": "xterm", "COLUMNS": "80"})
    os.close(theirs)
    wait_for(ours, b"  2 %")
    process.send_signal(signal.SIGINT)
    out = process.stdout.read()
    code = process.wait(door.PATIENCE_S)
    terminal = os.read(ours, 1 << 16)
    os.close(ours)
    process.stdout.close()
    process.stdin.close()
    assert code == 130
    assert "\nok   experts 2 bit" in out
    assert out.rstrip().endswith("tried, none of them wrong."), "no advice from a few"
    assert b"not every kernel was tried" in terminal and b"Traceback" not in terminal
    assert b"\x1b[?25h" in terminal, "the cursor is hidden for good"
