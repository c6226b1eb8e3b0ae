"""What `mlx-flash selftest` runs on a Mac, on the emulator: right, whole, and honest when broken.

Times mean nothing here and are not taken.
"""

import door
import mlx.core as mx
import pytest
from recurrences import mutated

from mlx_flash.kernels import metal as metal_door
from mlx_flash.kernels import trials
from mlx_flash.kernels.trials import backends, judge
from mlx_flash.kernels.trials.metal import trials as metal_trials


@pytest.fixture
def on_a_mac(quick_metal, monkeypatch):
    monkeypatch.setattr(metal_door, "available", lambda: True)
    return quick_metal


def test_every_metal_kernel_is_tried_and_right(on_a_mac):
    with on_a_mac.recording() as launches:
        verdicts = [judge(trial, timed=False) for trial in metal_trials(trials.QUICK)]
    wrong = [(v.trial, v.error, v.fault) for v in verdicts if not v.right]
    assert not wrong
    bodies = {path.stem for path in metal_door.sources().glob("*.metal")}
    assert {launch.name for launch in launches} == bodies, "a kernel without a trial: add one"


def test_every_trial_is_of_our_kernels(on_a_mac):
    for trial in metal_trials(trials.QUICK):
        case = trial.make()
        with on_a_mac.recording() as launches:
            mx.eval(case.ours(*case.variants[0]))
            assert launches, f"{trial.kernel} runs none"
        with on_a_mac.recording() as launches:
            mx.eval(case.stock(*case.variants[0]))
            assert not launches, f"{trial.kernel}: what it is compared with is ours"


BLOCKS = {"qwen3.5 moe block 4 bit", "qwen3 moe block 4 bit", "nemotron moe block 4 bit"}
EXPERTS = {"experts 4 bit", "experts mxfp4"}
BROKEN = {  # by a tenth of a percent, where that can be
    "route": ("= score * scale;", "= score * scale * 1.001f;", {"router"} | BLOCKS),
    "gate_up": ("T(activated", "T(1.001f * activated", {"shared expert 4 bit"} | EXPERTS | BLOCKS),
    "down": ("= T(v)", "= T(v * 1.001f)", EXPERTS | BLOCKS),
    "delta_step": (
        "T(shared_y[me]",
        "T(1.001f * shared_y[me]",
        {"gated delta step", "gated delta step, joined"},
    ),
    "mamba2_step": ("(sum + float(D[head])", "(sum - float(D[head])", {"mamba2 step"}),
    "gated_norm": ("/ SIZE + eps", "/ SIZE + eps + 0.01f", {"gated norm", "group norm"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_kernel_is_found(on_a_mac, monkeypatch, tmp_path, name):
    old, new, kernels = BROKEN[name]
    mutated(tmp_path, monkeypatch, name, old, new)
    exact = [trial for trial in metal_trials(trials.QUICK) if trial.dtype == mx.float32]
    wrong = {trial.kernel for trial in exact if not judge(trial, timed=False).right}
    assert wrong == kernels


def test_a_wrong_kernel_can_be_broken_here():
    assert set(BROKEN) == {path.stem for path in metal_door.sources().glob("*.metal")}


def test_the_command_takes_the_backends_that_are_present(on_a_mac, monkeypatch):
    few = [t for t in metal_trials(trials.QUICK) if t.kernel == "router"]
    monkeypatch.setattr("mlx_flash.kernels.trials.metal.trials", lambda sizes: few)
    monkeypatch.setattr("mlx_flash.kernels.trials.native.trials", lambda sizes: [])
    said = door.run("selftest", "--quick")
    assert said.code == 0
    assert "\nmetal, compiled by Metal at first use\n" in said.out
    assert "metal: all right" in said.out
    assert "metal" in {backend.name for backend in backends.present()}
