"""mlx-flash: Mixture-of-Experts models larger than RAM, token for token as mlx-lm.

model, tokenizer = mlx_flash.load("path/or/repo", ram="8GB")
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .config import StreamConfig
from .errors import UntestedModelWarning

if TYPE_CHECKING:
    from .loader import load, plan
    from .prefix import PrefixCache
    from .states import KVSettings

__all__ = [
    "KVSettings",
    "PrefixCache",
    "StreamConfig",
    "UntestedModelWarning",
    "__version__",
    "load",
    "plan",
]

ROOMS = {"load": "loader", "plan": "loader", "PrefixCache": "prefix", "KVSettings": "states"}

__version__ = version("mlx-flash")


def __getattr__(name: str) -> Any:
    # mlx-lm takes over a second to import. What does not need it should not wait.
    if name in ROOMS:
        return getattr(import_module(f".{ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
