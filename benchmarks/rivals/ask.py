"""Lets a process of its own do a job, under a memory cap and a time limit."""

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .caps import memory_cap

BENCHMARKS = Path(__file__).parent.parent
LAST_WORDS = {"done", "result", "refused", "failed"}


def module(python: str, name: str) -> list[str]:
    """The command that runs a module of this package."""
    return [python, "-m", f"rivals.{name}"]


def ask(
    command: Sequence[str], job: dict[str, Any], limit_s: float, cap_bytes: int | None = None
) -> dict[str, Any]:
    """Everything the process said, later words over earlier; ``note`` says what went wrong.

    A process that is stopped has still said what it had measured until then.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as log, memory_cap(cap_bytes) as join:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
            preexec_fn=join,
        )
        stopped = threading.Event()
        clock = threading.Timer(limit_s, lambda: (stopped.set(), process.kill()))
        clock.start()
        with process:
            try:
                _converse(process, job, found)
                if not found.keys() & LAST_WORDS:
                    process.wait()  # standard output has ended, so it does too
                    log.seek(0)
                    found["note"] = _why(process, stopped.is_set(), limit_s, log.read())
            finally:
                clock.cancel()
                process.kill()
    return found


def _converse(process: subprocess.Popen, job: dict[str, Any], found: dict[str, Any]) -> None:
    assert process.stdin and process.stdout
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return  # it ended before it had heard what to do
    for message in map(json.loads, process.stdout):
        if "phase" not in message:  # bench_run's progress
            found |= message
        if found.keys() & LAST_WORDS:
            return


def _why(process: subprocess.Popen, stopped: bool, limit_s: float, log: str) -> str:
    if stopped:
        return f"stopped after {limit_s:.0f} s"
    if process.returncode < 0:
        likely = ", probably out of memory" if process.returncode == -signal.SIGKILL else ""
        return f"ended by signal {-process.returncode}{likely}"
    return f"exit code {process.returncode}: {(log.strip() or 'no word').splitlines()[-1]}"
