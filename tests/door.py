"""The public door: `mlx-flash` in this process, or started as a user starts it."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_flash import cli
from mlx_flash.kernels import native

COMMAND = Path(sys.executable).with_name("mlx-flash")
PATIENCE_S = 60  # for a process that should end long before


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str


def run(*args: object, stdin: str | bytes | None = "") -> Said:
    """Run ``mlx-flash`` in this process, which saves the two seconds of starting one."""
    out, err = io.StringIO(), io.StringIO()
    old = sys.argv, sys.stdin
    sys.argv = ["mlx-flash", *map(str, args)]
    sys.stdin = None
    if stdin is not None:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        sys.stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    code: Any = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv, sys.stdin = old
    return Said(code or 0, out.getvalue(), heard(err.getvalue()))


def start(*args: object, **options: Any) -> "subprocess.Popen[str]":
    """Start the installed command, its pipes open."""
    env = os.environ | options.pop("env", {})
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
    command = [str(COMMAND), *map(str, args)]
    return subprocess.Popen(command, text=True, env=env, errors="replace", **pipes)


def finish(process: "subprocess.Popen[str]", stdin: str | None = None) -> Said:
    """Wait for a started command, and end it if it does not."""
    with process:
        try:
            out, err = process.communicate(stdin, timeout=PATIENCE_S)
        finally:
            process.kill()
    return Said(process.returncode, out, heard(err))


def heard(err: str | None) -> str:
    """Without the line that says why it is slower, where all of the suite runs without kernels."""
    lines = (err or "").splitlines(keepends=True)
    return "".join(line for line in lines if native() or "slower than it could be" not in line)
