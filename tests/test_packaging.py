"""The wheel that `pip install .` builds: small, whole, and bringing the right MLX."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
MAX_WHEEL_BYTES = 20e6
GPUS = ("metal", "cuda")


def built(out, **environment):
    """The wheel that pip makes of this folder."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out]
    env = {**os.environ, **environment}
    subprocess.run([*command, ROOT], check=True, capture_output=True, env=env)
    (path,) = out.glob("mlx_flash-*.whl")
    return path


# Compiling takes minutes; without a compiler the wheel is the same but for the kernels.
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["pure", "compiled"]
)
def test_wheel_is_small_and_carries_the_demo_model(tmp_path, compiled):
    nothing = {} if compiled else {"CXX": "/bin/false", "CC": "/bin/false"}
    wheel = built(tmp_path, **nothing)
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES
    names = zipfile.ZipFile(wheel).namelist()
    tracked = {p.relative_to(ROOT) for p in (ROOT / "mlx_flash").rglob("*") if p.is_file()}
    expected = {str(p) for p in tracked if "__pycache__" not in p.parts}
    kernels = {name for name in expected if name.startswith("mlx_flash/_native.c")}
    assert expected - kernels <= set(names)
    assert any(n.startswith("mlx_flash/_native.c") for n in names) == compiled
    assert "mlx_flash/demo/model.safetensors" in names
    bodies = {
        p.relative_to(ROOT) for gpu in GPUS for p in (ROOT / "custom_kernels" / gpu).rglob("*.*")
    }
    assert any(path.suffix == ".metal" for path in bodies)
    assert {f"mlx_flash/{path}" for path in bodies} <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "examples/", "benchmarks/"))]
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    found = subprocess.run(
        [sys.executable, "-c", "from mlx_flash.kernels.metal import sources; print(sources())"],
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()) == tmp_path / "installed/mlx_flash/custom_kernels/metal"


def brought(system, extra=""):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    if extra:
        requirements += project["optional-dependencies"][extra]
    parsed = [Requirement(text) for text in requirements]
    environment = {"platform_system": system, "extra": extra}
    return {
        (r.name, *sorted(r.extras))
        for r in parsed
        if not r.marker or r.marker.evaluate(environment)
    }


def test_each_platform_brings_its_own_mlx():
    assert ("mlx", "cpu") in brought("Linux")
    assert ("mlx", "cuda13") in brought("Linux", "cuda")
    assert ("mlx",) in brought("Darwin")
    assert ("mlx", "cpu") not in brought("Darwin", "cuda")
