"""Budgets that people write, limits that machines have."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mlx_flash import machine
from mlx_flash.errors import BudgetError
from mlx_flash.machine import Machine, cgroup_limit_bytes

GB, GIB = 10**9, 2**30
HERE = Machine(ram_bytes=16 * GB, available_bytes=10 * GB, cgroup_bytes=None, metal_bytes=None)
CAGED = Machine(ram_bytes=16 * GB, available_bytes=10 * GB, cgroup_bytes=2 * GB, metal_bytes=None)


def refusal(ram: object) -> str:
    with pytest.raises(BudgetError) as caught:
        HERE.budget(ram)  # type: ignore[arg-type]
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.startswith("--ram ") and "auto" in message
    return message


@pytest.mark.parametrize(
    ("ram", "expected"),
    [
        ("8GB", 8 * GB),
        ("8gb", 8 * GB),
        (" 8 GB\n", 8 * GB),
        ("8g", 8 * GB),
        ("+8G", 8 * GB),
        ("1.5GiB", 3 * GIB // 2),
        ("512MB", 512_000_000),
        ("512mib", 512 << 20),
        ("0.001TB", GB),
        ("100KiB", 102_400),
        ("100K", 100_000),
        ("4096", 4096),
        ("4096B", 4096),
        (4096, 4096),
        (8e9, 8 * GB),
        ("60%", 9_600_000_000),
        ("12.5 %", 2 * GB),
        ("100%", 16 * GB),
        (16 * GB, 16 * GB),
        (16 * GB + 4096, 16 * GB),  # control groups round a limit down to a page
        ("auto", 7 * GB),
    ],
)
def test_budget(ram: str | int, expected: int) -> None:
    assert HERE.budget(ram) == expected


RUBBISH = ["", " ", "lots", "GB", "%", "8XB", "8 GB 9", "8G\nB", "nan", "inf", "1e3GB", "0x10"]
RUBBISH += ["8,5GB", "1.GB", "--8GB", "60 percent", "8GB%", "9" * 400 + "GB", "auto1", "٨" * 19]


@pytest.mark.parametrize("ram", [*RUBBISH, None, 1e30])
def test_rubbish(ram: object) -> None:
    said = ram.strip() if isinstance(ram, str) else ram
    assert f"{said!r} is not a size. Use 8GB" in refusal(ram)


@pytest.mark.parametrize("ram", ["0", 0, "-1GB", -1, "0%", "-5%", "0.0GB", "0.5B", " 0\n"])
def test_nothing(ram: str | int) -> None:
    assert "leaves nothing to run in. Ask for a size such as 8GB" in refusal(ram)


@pytest.mark.parametrize("ram", ["900TB", "120%", "16.001GB", 16 * GB + 65_537, "9" * 18 + "TIB"])
def test_more_than_there_is(ram: str | int) -> None:
    assert "more than the 16.00 GB this process may use here. Ask for less" in refusal(ram)


def test_budget_in_a_control_group() -> None:
    assert CAGED.budget("50%") == GB
    assert CAGED.budget("auto") == 1_400_000_000
    with pytest.raises(BudgetError, match=r"more than the 2\.00 GB"):
        CAGED.budget("3GB")


def test_auto_leaves_a_share_of_what_is_free_and_fits_metal() -> None:
    assert Machine(16 * GB, GB, 2 * GB, None).budget("auto") == 700_000_000
    assert Machine(16 * GB, 16 * GB, None, 5 * GB).budget("auto") == 5 * GB


def test_what_this_process_holds_counts_as_available(monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(total=16 * GB, available=0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: full)
    assert 10_000_000 < Machine.probe().available_bytes <= machine.peak_rss_bytes() + (4 << 20)


def test_probe_this_machine() -> None:
    probed = Machine.probe()
    assert probed.ram_bytes == psutil.virtual_memory().total
    assert 0 < probed.budget("auto") < probed.limit_bytes <= probed.ram_bytes
    assert probed.available_bytes <= probed.ram_bytes + machine.rss_bytes()


# Control groups


LAYOUTS = {
    "v2": ("0::/a/b", {"a/b/memory.max": GIB}, GIB),
    "v2, a tighter parent": ("0::/a/b", {"a/b/memory.max": GIB, "a/memory.max": 9999}, 9999),
    "v2, only the parent": ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": GIB}, GIB),
    "v2, unlimited": ("0::/a", {"a/memory.max": "max"}, None),
    "v2, more than there is": ("0::/a", {"a/memory.max": 1 << 62}, None),
    "v2, container": ("0::/", {"memory.max": GIB}, GIB),
    "v2, container with its host's path": ("0::/host/c1", {"memory.max": GIB}, GIB),
    "v1": ("4:memory:/a", {"memory/a/memory.limit_in_bytes": GIB}, GIB),
    "v1, with another controller": (
        "9:name=systemd:/\n4:cpu,memory:/a:b",
        {"memory/a:b/memory.limit_in_bytes": GIB},
        GIB,
    ),
    "v1, unlimited": (
        "4:memory:/a",
        {"memory/a/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000},
        None,
    ),
    "v1 beside an empty v2": (
        "4:memory:/a\n0::/",
        {"memory/memory.limit_in_bytes": 2 * GIB, "memory/a/memory.limit_in_bytes": GIB},
        GIB,
    ),
    "none": ("", {}, None),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_cgroup_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    groups, limits, expected = LAYOUTS[kind]
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.lstrip("/"))
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, limit in limits.items():
        file = tmp_path / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    assert cgroup_limit_bytes() == expected


def test_no_control_groups_on_this_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert cgroup_limit_bytes() is None


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A group within a group limited to 1 GiB. Its processes must have ended at the end."""
    root, own, limit = Path("/sys/fs/cgroup"), "", "memory.max"
    if (root / "memory").is_dir():
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(path for _, kind, path in (x.split(":", 2) for x in lines) if kind == "memory")
        root, limit = root / "memory", "memory.limit_in_bytes"
    outer = root / own.lstrip("/") / f"mlx-flash-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        outer.mkdir()
        (outer / limit).write_text(str(GIB))
        inner.mkdir()
    except OSError as error:
        if outer.is_dir():
            outer.rmdir()
        pytest.skip(f"NOT TESTED: no memory control group can be made here ({error})")
    yield inner
    inner.rmdir()
    outer.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_auto_honours_a_real_control_group(memory_group: Path) -> None:
    code = f"""
import os
from pathlib import Path
Path({str(memory_group / "cgroup.procs")!r}).write_text(str(os.getpid()))
from mlx_flash.machine import Machine
here = Machine.probe()
print(here.cgroup_bytes, here.limit_bytes, here.budget("auto"), here.budget("50%"))
"""
    available = psutil.virtual_memory().available
    cgroup, limit, auto, half = map(int, run(code).split())
    assert cgroup == limit == GIB
    assert half == GIB // 2
    assert auto <= int(GIB * machine.AUTO_SHARE)
    if available > 2 * GIB:
        assert auto == int(GIB * machine.AUTO_SHARE)


# Resident sets


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_resident_set_and_its_peak_follow_the_memory_touched() -> None:
    code = """
from mlx_flash.machine import peak_rss_bytes, rss_bytes
def show():
    print(rss_bytes(), peak_rss_bytes())
show()
ballast = bytearray(b"x") * (200 << 20)
show()
del ballast
show()
"""
    before, during, after = (tuple(map(int, line.split())) for line in run(code).splitlines())
    assert during[0] - before[0] > 190 << 20
    assert during[1] - before[1] > 150 << 20  # the imports may have peaked above ``before``
    assert during[0] - after[0] > 190 << 20
    assert min(during[1], after[1]) > during[0] - (4 << 20)  # Linux counts in batches of pages


def test_the_peak_is_not_the_parent_s() -> None:
    ballast = bytearray(b"x") * (500 << 20)
    peak = int(run("from mlx_flash.machine import peak_rss_bytes; print(peak_rss_bytes())"))
    assert peak < len(ballast)


@pytest.mark.skipif(sys.platform != "linux", reason="SKIPPED LOUDLY: glibc only")
def test_freed_memory_goes_back_to_the_system():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(1000) for _ in range(64_000)]
    for address in blocks:
        ctypes.memset(address, 1, 1000)
    for address in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        libc.free(address)
    before = machine.rss_bytes()
    machine.give_back_free_memory()
    assert before - machine.rss_bytes() > 48e6
    libc.free(blocks[-1])
