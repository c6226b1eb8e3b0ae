"""The compiled kernels of custom_kernels/cpu. Reached through ``mlx_flash.kernels.native``."""

from typing import Any

mlx_version: str

def __getattr__(name: str) -> Any: ...
