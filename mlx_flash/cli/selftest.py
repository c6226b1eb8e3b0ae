"""`mlx-flash selftest`: are the kernels right on this machine, and how fast are they?"""

import json
import math
import platform
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any

import mlx.core as mx
import typer

from ..kernels.trials import FULL, QUICK, TOLERANCES, Trial, Verdict, backends, computes, judge
from ..kernels.trials.backends import Backend
from ..machine import Machine, cores
from ..streaming.plan import size
from . import progress
from .interrupt import Interrupt

WIDTH = 100
INDENT = 5 * " "
DTYPES = {mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16"}


def selftest(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small arrays: seconds, and times that say little.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Try every kernel beside MLX's own operation: is it right here, and how fast?

    The first thing to run on a new machine, and the table to paste into a
    report. It needs no model. Exit code 0: all are right, 1: one is wrong.

    error   largest difference from MLX's operations in float32, as a share
            of the largest value
    ours    median time of one call, its graph already built; on a GPU, of
            calls that wait for each other, as those of a model do
    MLX     the same by MLX's own operations, or mlx-lm's
    GB/s    what a call has to move, by our time: compare it with the memory
    """
    sizes = QUICK if quick else FULL
    found = [Found(backend, backend.trials(sizes)) for backend in backends.present()]
    bars = ExitStack()

    def say() -> None:
        typer.echo(json.dumps(_facts(found, quick)) if as_json else "\n".join(_lines(found, quick)))

    def interrupted() -> None:
        bars.close()
        say()
        typer.echo("mlx-flash: interrupted, not every kernel was tried.", err=True)

    with Interrupt(interrupted), bars:
        _run(found, bars.enter_context(progress.bar("selftest")))
    say()
    if any(one.wrong for one in found):
        raise typer.Exit(1)


@dataclass
class Found:
    """What has been found of a backend so far."""

    backend: Backend
    planned: Sequence[Trial]
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def wrong(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if not verdict.right]

    @property
    def complete(self) -> bool:
        return len(self.verdicts) == len(self.planned)

    def advice(self, quick: bool) -> str:
        """Whether to use these kernels here, in a sentence or two."""
        name, tried = self.backend.name, len(self.verdicts)
        if self.wrong:
            kernels = ", ".join(dict.fromkeys(v.trial.kernel for v in self.wrong))
            left = len(self.planned) - tried
            untried = f" Not tried: {left}." if left else ""
            return (
                f"FAIL: {len(self.wrong)} of {tried} are wrong ({kernels}). Do not use "
                f"{self.backend.turned_on}; please report this with the table.{untried}"
            )
        ratios = [v.ratio for v in self.verdicts if v.ratio is not None]
        if not ratios or not self.complete:
            return f"{name}: {tried} of {len(self.planned)} tried, none of them wrong."
        faster, middle = sum(r > 1 for r in ratios), statistics.median(ratios)
        how_fast = f"{faster} of {tried} faster than MLX's own, {_times(middle)} in the middle"
        if quick:
            verdict = f"without --quick it is seen whether {self.backend.turned_on} pays"
        elif middle > 1:
            verdict = f"{self.backend.turned_on} should pay here"
        else:
            verdict = "MLX's own are better here"
        return f"{name}: all right, {how_fast}; {verdict}."


def _run(found: Sequence[Found], update: Callable[[int, int], None]) -> None:
    planned = [(one, trial) for one in found for trial in one.planned]
    for done, (one, trial) in enumerate(planned):
        update(done, len(planned))
        one.verdicts.append(judge(trial))
        if one.verdicts[-1].fault and not computes():
            break  # what follows would be blamed for it


def _machine() -> dict[str, str]:
    """What a report needs to know of where this ran."""
    info = mx.device_info()
    chip = f"{info.get('device_name', platform.machine())} ({info.get('architecture', '')})"
    memory = f"{cores()} cores, {size(Machine.probe().ram_bytes)}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("mlx-flash", "mlx", "mlx-lm"))
    return {
        "machine": f"{chip}, {memory}",
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "versions": packages,
        "device": mx.default_device().type.name,
    }


def _lines(found: Sequence[Found], quick: bool) -> list[str]:
    lines = [f"{title:9} {text}"[:WIDTH] for title, text in _machine().items()]
    bounds = ", ".join(f"{short} {TOLERANCES[dtype]:.2g}" for dtype, short in DTYPES.items())
    lines.append(f"{'right':9} if the error is at most, as a share of the largest value: {bounds}")
    if quick:
        lines.append(f"{'--quick':9} small arrays: the times say little of a model")
    if not found:
        lines += ["", f"No kernels but MLX's own here: {backends.why_none()}."]
    for one in found:
        lines += ["", f"{one.backend.name}, {one.backend.runs_on}", *_table(one.verdicts)]
    return [
        *lines,
        "",
        *(part for one in found for part in textwrap.wrap(one.advice(quick), WIDTH)),
    ]


def _table(verdicts: Sequence[Verdict]) -> Iterator[str]:
    trials = [v.trial for v in verdicts]
    kernel, shape = (
        max((len(t) for t in texts), default=0)
        for texts in ([t.kernel for t in trials], [t.shape for t in trials])
    )
    yield (
        f"     {'kernel':{kernel}} {'shape':{shape}} {'type':4} {'error':>7} {'ours':>8} "
        f"{'MLX':>8} {'ratio':>5} {'GB/s':>5}"
    )
    for v in verdicts:
        about = f"{v.trial.kernel:{kernel}} {v.trial.shape:{shape}} {DTYPES[v.trial.dtype]:4}"
        row = f"{'ok' if v.right else 'FAIL':4} {about} {v.error:7.1e}"
        if v.ratio is not None and v.bytes_per_s is not None:
            row += f" {_time(v.ours_s):>8} {_time(v.stock_s):>8} {_times(v.ratio):>5}"
            row += f" {v.bytes_per_s / 1e9:5.1f}"
        yield row
        if v.fault:
            yield from textwrap.wrap(
                v.fault, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT
            )


def _time(seconds: float) -> str:
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.95:
            return f"{seconds * scale:.1f} {unit}"
    return f"{seconds:.2f} s"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 99.95 else f"{ratio:.0f}x"


def _facts(found: Sequence[Found], quick: bool) -> dict[str, Any]:
    """Everything by name, for machines. Names stay; new ones may come."""
    return {
        **_machine(),
        "quick": quick,
        "complete": all(one.complete for one in found),
        "right": not any(one.wrong for one in found),
        "backends": [
            {
                "name": one.backend.name,
                "runs_on": one.backend.runs_on,
                "advice": one.advice(quick),
                "trials": [_as_json(v) for v in one.verdicts],
            }
            for one in found
        ],
        "none": None if found else backends.why_none(),
    }


def _as_json(verdict: Verdict) -> dict[str, Any]:
    trial = verdict.trial
    return {
        "kernel": trial.kernel,
        "shape": trial.shape,
        "dtype": DTYPES[trial.dtype],
        "right": verdict.right,
        "error": None if math.isnan(verdict.error) else verdict.error,
        "tolerance": trial.tolerance,
        "ours_s": verdict.ours_s or None,
        "mlx_s": verdict.stock_s or None,
        "ratio": verdict.ratio,
        "bytes": verdict.nbytes,
        "bytes_per_s": verdict.bytes_per_s,
        "fault": verdict.fault or None,
    }
