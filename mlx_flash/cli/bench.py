"""`mlx-flash bench`: how fast a model is within each RAM budget, and how fast it could be."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer

from .. import demo
from ..config import StreamConfig
from ..errors import UsageError
from ..hub import resolve
from ..machine import Machine, can_drop, cores, cpu_name
from ..opening import open_lazily
from ..streaming.checkpoint import Span
from . import bench_options as opt
from . import bench_report as report
from . import ceilings, progress
from .bench_report import Row
from .bench_run import MAX, Job
from .generate import one_line_errors, say_error, say_untested
from .interrupt import Interrupt

ANY_MACHINE = Machine(1 << 60, 1 << 60, None, None)
CHILD = [sys.executable, "-P", "-c", "from mlx_flash.cli.bench_run import main; main()"]


def bench(
    model: opt.Model = None,
    ram: opt.Ram = f"{StreamConfig.ram},{MAX}",
    slots: opt.Slots = None,
    context: opt.Context = None,
    prompt_tokens: opt.PromptTokens = 128,
    tokens: opt.Tokens = 200,
    repeats: opt.Repeats = 3,
    cold: opt.Cold = False,
    warm: opt.Warm = False,
    seed: opt.Seed = 0,
    policy: opt.Policy = StreamConfig.policy,
    reader: opt.Reader = StreamConfig.reader,
    read_threads: opt.ReadThreads = StreamConfig.read_threads,
    kernels: opt.Kernels = StreamConfig.kernels,
    threads: opt.Threads = StreamConfig.threads,
    prefill_step_size: opt.PrefillStepSize = StreamConfig.prefill_step_size,
    csv: opt.Csv = None,
    plot: opt.Plot = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Measure a model within several RAM budgets, against memory and disk.

    Each budget gets a process of its own, so that the peak is its own. It
    computes a prompt of random tokens and decodes greedily. The tokens must
    be the same for every budget.

    Two ceilings are measured beside: how fast memory is read, and how fast
    the disk gives experts. With the bytes that were missed they tell how
    fast decoding could be at most, 1 / max(compute, missed bytes / disk),
    and how much of that was reached. Compute is the time per token with
    every expert in RAM: let one budget be max.

    mlx-flash bench ./my-model --ram 4GB,8GB,max --csv bench.csv

    The demo model is too small for budgets to differ. There, say how many
    experts to keep:

    mlx-flash bench --slots 12 --ram 1GB,max

    Exit codes: 0 measured, 1 the tokens differ, 2 bad input or a failed run,
    130 interrupted.
    """
    given = SimpleNamespace(**locals())
    with one_line_errors(debug):
        raise typer.Exit(run(given))


def run(given: SimpleNamespace) -> int:
    """Check all input, measure budget by budget, say what was found: the exit code."""
    budgets = _budgets(given.ram)
    caches = _caches(given)
    _check_files(given)
    found, bars = _Found(given), ExitStack()
    with Interrupt(lambda: found.interrupted(bars)), bars:
        prepared = _prepare(given, caches)
        for budget in budgets:
            found.add(*_measure(prepared, budget, bars))
    return found.finish()


def _budgets(ram: str) -> list[str]:
    """Those of ``--ram``. One that the machine lacks is a row; one that is no size is refused."""
    budgets = [text.strip() for text in ram.split(",")]
    for text in budgets:
        if text != MAX:
            (Machine.probe() if "%" in text else ANY_MACHINE).budget(text)
    return budgets


def _caches(given: SimpleNamespace) -> tuple[str, ...]:
    if given.cold and not can_drop():
        raise UsageError("--cold: this system does not let go of cached files. Use --warm.")
    both = given.cold == given.warm
    wanted = {"warm": both or given.warm, "cold": given.cold or (both and can_drop())}
    return tuple(cache for cache, yes in wanted.items() if yes)


def _check_files(given: SimpleNamespace) -> None:
    if given.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--plot needs matplotlib. Install it: pip install matplotlib")
        if given.plot.suffix != ".png":
            raise UsageError(f"--plot {given.plot} is not named .png, and PNG is what it draws.")
    for option, path in (("--csv", given.csv), ("--plot", given.plot)):
        if path is None:
            continue
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"{option} {path} cannot be written. Name a file elsewhere.")


@dataclass(frozen=True)
class _Prepared:
    """What the budgets share: their job, facts for every row, experts to read."""

    job: Job
    facts: dict[str, Any]
    experts: Sequence[Sequence[Span]]


def _prepare(given: SimpleNamespace, caches: tuple[str, ...]) -> _Prepared:
    folder = resolve(given.model) if given.model else demo.FOLDER
    job = Job(str(folder), {}, given.prompt_tokens, given.tokens, given.repeats, caches, given.seed)
    if given.context is not None and given.context < job.context:
        raise UsageError(
            f"--context {given.context} has no room for {given.prompt_tokens} tokens of prompt and "
            f"{given.tokens} to decode. Ask for {job.context}, or lower --tokens."
        )
    knobs = StreamConfig(
        slots=given.slots,
        context=given.context or job.context,
        prefill_step_size=min(given.prefill_step_size, given.prompt_tokens),
        policy=given.policy,
        reader=given.reader,
        read_threads=given.read_threads,
        kernels=given.kernels,
        threads=given.threads,
    )
    lazy = open_lazily(folder)
    say_untested(lazy)
    facts = {
        "model": given.model or "demo",
        "streams": "experts" if lazy.switches else "layers",
        "prompt_tokens": given.prompt_tokens,
        "tokens": given.tokens,
        "active_bytes": ceilings.active_bytes(lazy),
        "mlx_flash": version("mlx-flash"),
        "mlx": version("mlx"),
        "commit": _commit(),
        "cpu": cpu_name(),
        "cores": cores(),
        "machine_ram_bytes": Machine.probe().limit_bytes,
        **{name: getattr(knobs, name) for name in ("policy", "reader", "read_threads", "context")},
    }
    return _Prepared(replace(job, knobs=asdict(knobs)), facts, ceilings.sample_experts(lazy))


def _commit() -> str:
    """Of the checkout that this package is in, if it is in one."""
    here = Path(__file__).parent
    try:
        for command in (
            ["ls-files", "--error-unmatch", "--", Path(demo.__file__)],  # not just around it
            ["describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
        ):
            said = subprocess.run(
                ["git", "-C", here, *command], capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.stdout.strip()


@dataclass(frozen=True)
class _Text:
    """What one run decoded, and in which steps its prompt was computed."""

    run: str
    ids: list[int]
    prefill_step: int


def _measure(prepared: _Prepared, budget: str, bars: ExitStack) -> tuple[list[Row], list[_Text]]:
    """The rows of a budget, and what each of its runs decoded."""
    job = replace(prepared.job, knobs=prepared.job.knobs | {"ram": budget})
    slots = None if budget == MAX else job.knobs["slots"]
    facts = {"budget": budget, "slots": slots, **prepared.facts}
    answer = _ask(job, budget, bars)
    if "result" not in answer:
        [(status, note)] = answer.items()
        return [Row(**facts, status=status, note=note)], []
    bars.enter_context(progress.bar("ceilings"))
    facts |= report.ceiling_fields(ceilings.measure(prepared.experts, job.knobs["read_threads"]))
    bars.close()
    result = answer["result"]
    runs = [result["dropped"], *result["runs"]]
    texts = [
        _Text(f"{budget}, run {i} ({run['cache']})", run["ids"], result["prefill_step"])
        for i, run in enumerate(runs, 1)
    ]
    return report.rows_of(result, facts), texts


def _ask(job: Job, budget: str, bars: ExitStack) -> dict[str, Any]:
    """Let a fresh process do the job: its ``result``, or why it ``refused`` or ``failed``."""
    titles = {"load": "load", "run": budget}
    phase = None
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdin and process.stdout
        with process:
            try:
                process.stdin.write(json.dumps(asdict(job)) + "\n")
                process.stdin.flush()
                for message in map(json.loads, process.stdout):
                    if "phase" not in message:
                        bars.close()
                        return dict(message)
                    if message["phase"] != phase:
                        phase = message["phase"]
                        bars.close()
                        update = bars.enter_context(progress.bar(titles[phase]))
                    update(message["done"], message["total"])
                process.wait()
            except BrokenPipeError:
                process.wait()  # it ended before it had heard what to do
            finally:
                process.kill()
        log.seek(0)
        return {"failed": _last_words(process.returncode, log.read())}


def _last_words(code: int, log: str) -> str:
    if code < 0:
        return f"the process was ended by signal {-code}; was it out of memory?"
    return f"exit code {code}: {(log.strip() or 'no word').splitlines()[-1]}"


@dataclass
class _Found:
    """Everything measured so far."""

    given: SimpleNamespace
    rows: list[Row] = field(default_factory=list)
    texts: list[_Text] = field(default_factory=list)

    def add(self, rows: list[Row], texts: list[_Text]) -> None:
        """Take in a budget, and keep it on disk if asked to."""
        self.rows += rows
        self.texts += texts
        report.set_ceilings(self.rows)
        if self.given.csv is not None:
            report.write_csv(self.given.csv, self.rows)

    def finish(self) -> int:
        """Say everything, and the exit code."""
        difference = self._difference()
        self._say(None if not self.texts else difference is None)
        if self.given.plot is not None:
            report.plot(self.given.plot, self.rows)
        if difference:
            say_error(difference)
            return 1
        if all(row.status != report.OK for row in self.rows):
            say_error("no budget could be measured. Ask for more with --ram.")
            return 2
        return 2 if any(row.status == report.FAILED for row in self.rows) else 0

    def interrupted(self, bars: ExitStack) -> None:
        """Say what there is. The running process ends when this one does."""
        bars.close()
        if self.rows or self.given.as_json:
            self._say(None, interrupted=True)
        typer.echo(f"mlx-flash: interrupted after {len(self.rows)} rows.", err=True)

    def _say(self, identical: bool | None, interrupted: bool = False) -> None:
        if self.given.as_json:
            typer.echo(report.as_json(self.rows, identical, interrupted))
            return
        typer.echo("\n".join(report.lines(self.rows)))
        if identical is not None:
            typer.echo(f"tokens identical: {'yes' if identical else 'no'}")

    def _difference(self) -> str | None:
        """Where a run's tokens first differ from those of the first run, if they do."""
        for text in self.texts:
            first = self.texts[0]
            for i, (token, expected) in enumerate(zip(text.ids, first.ids, strict=True), 1):
                if token != expected:
                    why = "."
                    if text.prefill_step != first.prefill_step:
                        steps = sorted((text.prefill_step, first.prefill_step))
                        why = (
                            f"; their prompts were computed {steps[0]} and {steps[1]} tokens at a "
                            f"time, so try --prefill-step-size {steps[0]}."
                        )
                    return (
                        f"the tokens differ: number {i} is {expected} in {first.run}, and {token} "
                        f"in {text.run}{why}"
                    )
        return None
