"""The kernels for ARM, on machines that only emulate one."""

import shutil
import subprocess
from pathlib import Path

import pytest

CPU = Path(__file__).parents[1] / "custom_kernels" / "cpu"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")
AS_BUILT = ["-std=c++20", "-O3", "-fno-math-errno", "-ffp-contract=off"]
FLAGS = [*AS_BUILT, "-Wall", "-Wextra", "-Werror", "-static"]


@pytest.mark.skipif(
    not (COMPILER and EMULATOR), reason="SKIPPED LOUDLY: no aarch64 compiler or qemu-user"
)
def test_products_of_every_format_are_right_on_neon(tmp_path):
    program = tmp_path / "products"
    sources = [CPU / "isa_neon.cpp", CPU / "tests" / "products.cpp"]
    subprocess.run([COMPILER, *FLAGS, "-DTABLE=kNeon", *sources, "-o", program], check=True)
    run = subprocess.run([EMULATOR, program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("neon: ")
