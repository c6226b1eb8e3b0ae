"""The source that MLX makes for a call, without running it."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import emulator


def generated(call: Callable[[], Any]) -> list[str]:
    """The sources of all launches in a call, whose results hold nothing."""
    found: list[str] = []
    with patch.object(emulator, "run_source", lambda source, *_: found.append(source)):
        call()
    return found
