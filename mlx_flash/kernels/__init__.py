"""One door per operation that mlx-flash computes in another way than mlx-lm would.

Each stands beside its plain-MLX reference, and a test holds the two together. The compiled
extension is optional: where it is missing, or was built for another MLX, the reference runs.
"""

import functools
import importlib
from importlib.metadata import version
from types import ModuleType

from ..errors import brief

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def native() -> ModuleType | None:
    """The compiled kernels, or None where they cannot run. ``why_not`` says why."""
    return _load()[0]


def why_not() -> str:
    """One line on what stands in the way of the compiled kernels; empty if nothing does."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    importlib.import_module("mlx.core")  # brings the library that the extension links to
    try:
        module = importlib.import_module("mlx_flash._native")
    except ModuleNotFoundError:
        return None, f"they were not built (no C++ compiler at install time?); {REBUILD}"
    except ImportError as error:
        return None, f"they do not load ({brief(error)}); {REBUILD}"
    present = version("mlx").split(".dev")[0]
    if module.mlx_version != present:
        built = module.mlx_version
        return None, f"they were built for MLX {built} and this is {present}; {REBUILD}"
    return module, ""
