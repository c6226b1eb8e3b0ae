"""What every test file shares: tiny checkpoints, written once a session."""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from forms import FORMS

HIDING = Path(__file__).parent / "without_native"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reference",
        action="store_true",
        help="Run as if the native kernels had not been built, in started commands too.",
    )

    parser.addoption(
        "--write-tables",
        action="store_true",
        help="Write the tables of docs/ from what the tests found, instead of comparing.",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--reference"):
        sys.modules["mlx_flash._native"] = None  # type: ignore[assignment]
        path = [str(HIDING), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))


@pytest.fixture(autouse=True)
def tasks_are_counted_right() -> Iterator[None]:
    """Take back what MLX 0.32.4 counts too many when a read has failed.

    It counts a task, and then refuses to enqueue it on a stream that has failed. From two such
    tasks on a later evaluation may wait for them for ever, when it has ten others on their way.
    """
    yield
    if ACTIVE_TASKS is None:
        return
    deadline = time.monotonic() + 0.5
    while ACTIVE_TASKS.value > 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    ACTIVE_TASKS.value = 0


def _active_tasks() -> ctypes.c_int | None:
    """The first field of MLX's scheduler, where it is known to be that."""
    library = Path(mx.__file__).parent / "lib" / "libmlx.so"
    if mx.__version__ != "0.32.4" or not library.exists():
        return None
    scheduler = ctypes.CDLL(str(library))._ZN3mlx4core9scheduler9schedulerEv
    scheduler.restype = ctypes.c_void_p
    return ctypes.c_int.from_address(scheduler())


ACTIVE_TASKS = _active_tasks()


def pytest_report_header() -> str:
    from mlx_flash.kernels import native, why_not

    module = native()
    return f"kernels: {module.isa()}, {module.threads()} threads" if module else why_not()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, by the name of its form. Do not write to it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(form: str) -> Path:
        path = root / form
        return path if path.exists() else FORMS[form](path)

    return folder
