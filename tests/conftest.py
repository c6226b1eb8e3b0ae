"""What every test file shares: tiny checkpoints, written once a session."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

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
