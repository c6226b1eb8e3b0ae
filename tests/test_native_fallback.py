"""Where the native kernels cannot run: the reference does, and one line says why."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import door
import mlx.core as mx
import pytest

import mlx_flash
from mlx_flash import kernels
from mlx_flash.errors import UsageError

FORM = "qwen3_5_moe-4bit"
HIDDEN = {"PYTHONPATH": str(Path(__file__).parent / "without_native")}


@pytest.fixture
def pretend(monkeypatch):
    """Let another module, or none, stand for the extension."""

    def stand_in(module):
        monkeypatch.setitem(sys.modules, "mlx_flash._native", module)
        kernels._load.cache_clear()

    yield stand_in
    monkeypatch.undo()
    kernels._load.cache_clear()


def test_an_extension_for_another_mlx_is_not_used(pretend):
    pretend(SimpleNamespace(mlx_version="0.0.1"))
    assert kernels.native() is None
    assert "built for MLX 0.0.1" in kernels.why_not()
    assert kernels.REBUILD in kernels.why_not()


def test_a_missing_extension_is_said_with_the_way_to_build_it(pretend, checkpoints):
    pretend(None)
    assert "not built" in kernels.why_not()
    with pytest.raises(UsageError, match="not built"):
        mlx_flash.load(checkpoints(FORM), ram="4GB", context=64, kernels="native")
    with pytest.raises(UsageError, match="direct"):
        mlx_flash.load(checkpoints(FORM), ram="4GB", context=64, reader="direct")


@pytest.mark.skipif(kernels.native() is None, reason="SKIPPED LOUDLY: no native kernels here")
def test_generate_says_why_it_is_slower_and_says_the_same(checkpoints):
    command = ("generate", "--model", checkpoints(FORM), "--slots", 5, "-m", 24, "--json", "hello")
    slow = door.finish(door.start(*command, env=HIDDEN))
    assert slow.code == 0, slow.err
    lines = [line for line in slow.err.splitlines() if "slower" in line]
    assert len(lines) == 1
    assert "not built" in lines[0]
    plain = door.finish(door.start(*command, "--kernels", "reference"))
    assert "slower" not in plain.err, "who asks for the reference needs no explanation"
    usual = door.finish(door.start(*command))
    said = [json.loads(one.out)["text"] for one in (slow, plain, usual)]
    assert said[0] == said[1] == said[2]


def test_the_package_installs_where_there_is_no_compiler(tmp_path):
    # CMake is there, a compiler is not.
    wheel = tmp_path / "wheel"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(wheel)]
    env = os.environ | {"CXX": "/nowhere/c++", "CC": "/nowhere/cc"}
    root = tmp_path / "source"
    here = Path(__file__).parents[1]
    subprocess.run(["git", "clone", "--quiet", here, root], check=True)
    for name in ("hatch_build.py", "pyproject.toml"):
        (root / name).write_bytes((here / name).read_bytes())
    done = subprocess.run(
        [*command, "-v", str(root)], env=env, capture_output=True, text=True, check=True
    )
    assert "native kernels were not built" in done.stdout + done.stderr
    (path,) = wheel.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")


@pytest.mark.skipif(kernels.native() is None, reason="SKIPPED LOUDLY: no native kernels here")
def test_kernels_and_threads_are_knobs(checkpoints):
    model, _ = mlx_flash.load(checkpoints(FORM), ram="4GB", slots=5, context=64, threads=1)
    assert kernels.native().threads() == 1
    reference, _ = mlx_flash.load(
        checkpoints(FORM), ram="4GB", slots=5, context=64, kernels="reference"
    )
    prompt = mx.array([list(range(40, 60))])
    assert type(model.reader) is not type(reference.reader)
    assert mx.max(mx.abs(model(prompt) - reference(prompt))).item() < 1e-3
