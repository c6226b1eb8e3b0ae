"""One budget of `mlx-flash bench`, in a process of its own, so that its peak is its own.

The parent writes a ``Job`` to standard input and keeps it open; messages come back on standard
output, an object a line. When standard input ends, so does this process.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import psutil
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache

from ..architectures import text_config
from ..config import StreamConfig
from ..errors import BudgetError, FlashError
from ..kernels import linear, metal, native
from ..kernels.experts import NativeSwitch
from ..loader import stream
from ..machine import Machine, drop_from_page_cache, peak_rss_bytes
from ..opening import open_lazily
from ..streaming.model import StreamedModel

MAX = "max"
MAX_SHARE = 0.95  # of what is available; with less left over the system would reclaim code
MOST_TOKENS_PER_DROP = 8
SAY_EVERY_S = 0.25

Tick = Callable[[], None]


@dataclass(frozen=True)
class Job:
    """What to measure. ``knobs`` are those of ``StreamConfig``; its ram may be ``max``."""

    model: str
    knobs: dict[str, Any]
    prompt_tokens: int
    tokens: int
    repeats: int
    caches: tuple[str, ...]  # of "warm", "cold", in this order
    seed: int

    @property
    def context(self) -> int:
        """Tokens of a run: mlx-lm computes one more than it yields."""
        return self.prompt_tokens + self.tokens + 2


@dataclass(frozen=True)
class Run:
    """One prompt and the tokens after it. Counters are of the decode, but for prefill's."""

    cache: str  # of the operating system: "warm", "cold", or "-" where nothing is read
    ids: list[int]
    prefill_s: float
    prefill_bytes_read: int
    decode_s: float
    hits: int
    misses: int
    bytes_read: int
    read_s: float
    device_bytes: int | None  # that the disk delivered; None where the system does not count


@dataclass(frozen=True)
class Result:
    """All runs of a budget, the first one apart: it pays for what only happens once."""

    dropped: Run
    runs: list[Run]
    ram_bytes: int
    residency: float
    prefill_step: int
    peak_rss_bytes: int
    load_s: float
    kernels: str


def measure(job: Job, say: Callable[..., None]) -> Result:
    """Load the model within the budget and run the prompt, again and again.

    Raises:
        FlashError: As ``load`` would.
    """
    begun = time.perf_counter()
    lazy = open_lazily(Path(job.model))
    prompt = _prompt(job, text_config(lazy.config)["vocab_size"])
    files = sorted({info.span.path for info in lazy.checkpoint.values()})
    model = stream(lazy, _knobs(job), lambda done, total: say(phase="load", done=done, total=total))
    load_s = time.perf_counter() - begun
    caches = job.caches if model.plan.residency < 1 else ("-",)
    order = [
        cache for cache in ("-", "warm", "cold") if cache in caches for _ in range(job.repeats)
    ]
    total, done, said_at = (1 + len(order)) * job.tokens, 0, 0.0

    def tick() -> None:
        nonlocal done, said_at
        done += 1
        if time.perf_counter() - said_at > SAY_EVERY_S:
            said_at = time.perf_counter()
            say(phase="run", done=done, total=total)

    say(phase="run", done=0, total=total)
    with wired_limit(model, [generation_stream]):
        # The dropped run also leaves in the page cache what a warm run is going to read.
        dropped, *runs = [
            _run(model, prompt, job.tokens, cache, files, tick) for cache in (order[0], *order)
        ]
    return Result(
        dropped=dropped,
        runs=runs,
        ram_bytes=model.plan.ram_bytes,
        residency=model.plan.residency,
        prefill_step=model.plan.prefill_tokens,
        peak_rss_bytes=peak_rss_bytes(),
        load_s=load_s,
        kernels=_kernels(model),
    )


def _run(
    model: StreamedModel, prompt: mx.array, tokens: int, cache: str, files: list[Path], tick: Tick
) -> Run:
    drop = partial(drop_from_page_cache, files) if cache == "cold" else None
    state = make_prompt_cache(model)
    empty = _counters(model)
    first, prefill_s = _prefill(model, prompt, state, drop)
    filled = _counters(model)
    ids, decode_s, before, after = _decode(model, first, tokens, state, drop, tick)
    counts = {
        name: after[name] - before[name] for name in ("hits", "misses", "bytes_read", "read_s")
    }
    counted = after["device_bytes"] is not None
    return Run(
        cache=cache,
        ids=[cast(int, first.item()), *ids],
        prefill_s=prefill_s,
        prefill_bytes_read=filled["bytes_read"] - empty["bytes_read"],
        decode_s=decode_s,
        device_bytes=after["device_bytes"] - before["device_bytes"] if counted else None,
        **counts,
    )


def _prefill(
    model: StreamedModel, prompt: mx.array, state: list[Any], drop: Tick | None
) -> tuple[mx.array, float]:
    """The token after the prompt, and the seconds until it is known.

    A call of mlx-lm's ``generate_step`` that stops there: one that went on would have begun
    with the next token already.
    """
    chosen: list[mx.array] = []

    def greedy(logprobs: mx.array) -> mx.array:
        chosen.append(mx.argmax(logprobs, axis=-1))
        return chosen[-1]

    if drop:
        drop()
    clock = _Clock()
    for _ in generate_step(
        prompt,
        model,
        max_tokens=0,
        sampler=greedy,
        prompt_cache=state,
        prefill_step_size=model.plan.prefill_tokens,
        prompt_progress_callback=lambda *_: clock.without(drop),
    ):
        pass
    return chosen[0], clock.seconds()


def _decode(
    model: StreamedModel,
    first: mx.array,
    tokens: int,
    state: list[Any],
    drop: Tick | None,
    tick: Tick,
) -> tuple[list[int], float, dict[str, Any], dict[str, Any]]:
    """The tokens after ``first``, the seconds they took, and the counters before and after.

    Clock and counters go from yield to yield, the first one left out: mlx-lm is always one
    token ahead, so that between two yields there is one token's work.
    """
    every = _tokens_per_drop(model)
    steps = generate_step(first, model, max_tokens=tokens + 1, prompt_cache=state)
    ids = [cast(int, next(steps)[0])]
    before, clock = _counters(model), _Clock()
    for i, (token, _) in enumerate(steps, 1):
        ids.append(cast(int, token))
        tick()
        if i % every == 0:
            clock.without(drop)
    seconds = clock.seconds()
    return ids, seconds, before, _counters(model)


class _Clock:
    """Seconds since it was made, without those in which it did something else."""

    def __init__(self) -> None:
        self._aside_s = 0.0
        self._begun = time.perf_counter()

    def without(self, aside: Tick | None) -> None:
        if aside is None:
            return
        mx.synchronize(generation_stream)  # on the clock: no work must hide in what is aside
        start = time.perf_counter()
        aside()
        self._aside_s += time.perf_counter() - start

    def seconds(self) -> float:
        return time.perf_counter() - self._begun - self._aside_s


def _tokens_per_drop(model: StreamedModel) -> int:
    """How many tokens a cold run decodes before the page cache is dropped again.

    So few that an expert just read can hardly be evicted and read again before: with LRU,
    a token brings at most top_k experts into a layer's slots.
    """
    plan = model.plan
    least = [n // plan.layers[path].top_k for path, n in plan.slots.items() if plan.streams(path)]
    return max(1, min([MOST_TOKENS_PER_DROP, *least]))


def _counters(model: StreamedModel) -> dict[str, Any]:
    return {
        **asdict(model.stats()),
        "bytes_read": model.reader.bytes_read,
        "read_s": model.reader.read_s,
        "device_bytes": (
            psutil.Process().io_counters().read_bytes if sys.platform == "linux" else None
        ),
    }


def _prompt(job: Job, vocabulary: int) -> mx.array:
    """Tokens without meaning or repetition: a text that repeats itself repeats its experts."""
    return mx.array(np.random.default_rng(job.seed).integers(vocabulary, size=job.prompt_tokens))


def _knobs(job: Job) -> StreamConfig:
    knobs = StreamConfig(**{**job.knobs, "ram": "auto"})
    if job.knobs["ram"] != MAX:
        return replace(knobs, ram=job.knobs["ram"])
    here = Machine.probe()
    most = min(here.limit_bytes, int(here.available_bytes * MAX_SHARE))
    return replace(knobs, ram=most, slots=None)


def _kernels(model: StreamedModel) -> str:
    if any(type(m).__module__.startswith(metal.__name__) for m in model.modules()):
        return "metal"
    extension = native()
    ours = (NativeSwitch, *linear.CLASSES.values())
    if extension is None or not any(isinstance(m, ours) for m in model.modules()):
        return "mlx"
    return f"native {extension.isa()}"


def main() -> None:
    """The process: a job in, messages out."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no message
    job = Job(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        say(result=asdict(measure(job, say)))
    except BudgetError as error:
        say(refused=str(error))
    except FlashError as error:
        say(failed=str(error))


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)
