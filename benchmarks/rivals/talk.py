"""How a run in a process of its own hears what to do and says what it found.

One JSON object on standard input; objects come back on standard output, a line each. Standard
library only: a rival's interpreter may have nothing else of ours.
"""

import ctypes
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Say = Callable[..., None]


def listen() -> tuple[dict[str, Any], Say]:
    """The job, and the way to say something. What libraries print goes to standard error."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    return job, say


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def steps_timed(step: Callable[[], Any], tokens: int, seconds: float) -> dict[str, float]:
    """Calls ``step`` for so many tokens or seconds, whatever ends first."""
    done, begun = 0, time.perf_counter()
    while done < tokens:
        step()
        done += 1
        if time.perf_counter() - begun > seconds:
            break
    return {"tokens": done, "seconds": time.perf_counter() - begun}


def share_in_page_cache(path: Path) -> float:
    """How much of a file is in memory now. Linux's mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    present = (ctypes.c_ubyte * pages)()
    with path.open("rb") as file:
        where = libc.mmap(None, ctypes.c_size_t(size), 1, 1, file.fileno(), ctypes.c_long(0))
    address = ctypes.c_void_p(where)
    try:
        if libc.mincore(address, ctypes.c_size_t(size), present):
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
    finally:
        libc.munmap(address, ctypes.c_size_t(size))
    return sum(memoryview(present).cast("B").tobytes().translate(LOWEST_BIT)) / pages


LOWEST_BIT = bytes(value & 1 for value in range(256))
