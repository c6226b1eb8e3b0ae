"""One run of one runtime within one memory cap: what to start, and what it measured."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_flash.cli import bench_report, ceilings
from mlx_flash.cli.bench import CHILD
from mlx_flash.cli.bench_run import MAX, Job
from mlx_flash.config import StreamConfig
from mlx_flash.machine import drop_from_page_cache
from mlx_flash.streaming.checkpoint import Span

from .ask import ask, module
from .caps import Image

FLASH = "mlx-flash"
STOCK = "mlx-lm"
LLAMA = "llama.cpp mmap"
LLAMA_128 = "llama.cpp mmap, read-ahead 128 KiB"
LLAMA_REPACKED = "llama.cpp repacked"
RIVAL_READ_AHEAD_KIB = 128


@dataclass(frozen=True)
class Phase:
    """A memory cap, also in percent of the checkpoint; None where everything may be in RAM."""

    name: str
    cap_bytes: int | None
    percent: int | None


@dataclass(frozen=True)
class Setup:
    """What all runs share."""

    model: Path
    shards: list[Path]
    gguf: Path
    image: Image | None
    llama_python: str
    prompts: list[list[int]]  # the short one, the long one
    seed: int
    tokens: int
    seconds: float
    limit_s: float
    threads: int
    stock_prompt_tokens: int
    stock_tokens: int
    experts: Sequence[Sequence[Span]]
    facts: dict[str, Any]  # for mlx-flash's rows


@dataclass
class Measured:
    """A run. Rates are tokens per second; None where nothing was measured."""

    runtime: str
    phase: str
    repeat: int
    cap_bytes: int | None
    note: str = ""
    decode: float | None = None
    decoded: int | None = None
    prefill: float | None = None
    long_prefill: float | None = None
    load_s: float | None = None
    in_page_cache: float | None = None  # share of the file, the least seen
    read_ahead_kib: int | None = None
    flash: bench_report.Row | None = field(default=None, repr=False)


def runtimes(phase: Phase, setup: Setup) -> list[str]:
    """Who can take part: what only runs resident runs in RAM only."""
    if phase.cap_bytes is None:
        return [FLASH, LLAMA_REPACKED, LLAMA, *([STOCK] if setup.stock_tokens else [])]
    return [FLASH, LLAMA_128, LLAMA] if setup.image else [FLASH, LLAMA]


def measure(runtime: str, phase: Phase, repeat: int, setup: Setup) -> Measured:
    """Starts with an empty page cache; every run warms up by itself."""
    drop_from_page_cache([*setup.shards, setup.gguf])
    found = Measured(runtime, phase.name, repeat, phase.cap_bytes)
    run: dict[str, Callable[[Measured, Setup], None]] = {FLASH: _flash, STOCK: _stock}
    run.get(runtime, _llama)(found, setup)
    return found


def _llama(found: Measured, setup: Setup) -> None:
    if setup.image:
        default = setup.image.default_read_ahead_kib()
        found.read_ahead_kib = RIVAL_READ_AHEAD_KIB if found.runtime == LLAMA_128 else default
        setup.image.set_read_ahead(found.read_ahead_kib)
    repacked = found.runtime == LLAMA_REPACKED
    job = {
        "model": str(setup.gguf),
        "mapped": not repacked,
        "repack": repacked,
        "threads": setup.threads,
        "prompts": setup.prompts if found.cap_bytes is None else setup.prompts[:1],
        "tokens": setup.tokens,
        "seconds": setup.seconds,
    }
    command = module(setup.llama_python, "llama_run")
    _take(found, ask(command, job, setup.limit_s, found.cap_bytes), setup.prompts)


def _stock(found: Measured, setup: Setup) -> None:
    prompt = setup.prompts[0][: setup.stock_prompt_tokens]
    job = {
        "model": str(setup.model),
        "prompts": [prompt],
        "tokens": setup.stock_tokens,
        "seconds": setup.seconds,
    }
    _take(found, ask(module(sys.executable, "mlx_run"), job, setup.limit_s), [prompt])


def _take(found: Measured, answer: dict[str, Any], prompts: list[list[int]]) -> None:
    rates = [
        len(prompt) / seconds
        for prompt, seconds in zip(prompts, answer.get("prefill_s", []), strict=False)
    ]
    found.prefill, found.long_prefill = [*rates, None, None][:2]
    if decode := answer.get("decode"):
        found.decode, found.decoded = decode["tokens"] / decode["seconds"], decode["tokens"]
    shares = [answer.get("in_page_cache"), answer.get("in_page_cache_after")]
    found.in_page_cache = min((share for share in shares if share is not None), default=None)
    found.load_s = answer.get("load_s")
    found.note = answer.get("note", "")


def _flash(found: Measured, setup: Setup) -> None:
    row = _flash_row(found, setup, len(setup.prompts[0]), setup.tokens)
    if row is None:
        return
    found.flash = row
    found.decode, found.decoded = row.decode_tokens_per_s, setup.tokens
    found.prefill, found.load_s = row.prefill_tokens_per_s, row.load_s
    if row.within_budget is False and found.cap_bytes is not None:
        found.note = "OVER BUDGET"
    if found.cap_bytes is None:
        if row.residency != 1:
            found.note = f"only {row.residency:.0%} of the experts fit in RAM"
        long = _flash_row(found, setup, len(setup.prompts[1]), 1)
        found.long_prefill = long.prefill_tokens_per_s if long else None


def _flash_row(
    found: Measured, setup: Setup, prompt_tokens: int, tokens: int
) -> bench_report.Row | None:
    """What `mlx-flash bench` makes of such a run, the ceilings of this moment in it."""
    job = Job(str(setup.model), {}, prompt_tokens, tokens, 1, ("warm",), setup.seed)
    knobs = StreamConfig(
        context=job.context,
        prefill_step_size=min(StreamConfig.prefill_step_size, prompt_tokens),
        threads=setup.threads,
    )
    job.knobs.update(asdict(knobs) | {"ram": found.cap_bytes or MAX})
    answer = ask(CHILD, asdict(job), setup.limit_s, found.cap_bytes)
    if "result" not in answer:
        found.note = next(answer[key] for key in ("refused", "failed", "note") if key in answer)
        return None
    facts = {"budget": found.phase, "prompt_tokens": prompt_tokens, "tokens": tokens}
    measured = ceilings.measure(setup.experts, knobs.read_threads)
    facts |= setup.facts | bench_report.ceiling_fields(measured)
    [row] = bench_report.rows_of(answer["result"], facts)
    return row
