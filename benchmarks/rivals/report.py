"""What the runs say together: medians, the ratios that matter, a table and a CSV."""

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mlx_flash.cli import bench_report

from .runs import FLASH, LLAMA, LLAMA_128, LLAMA_REPACKED, Measured, Phase

LLAMAS = (LLAMA_REPACKED, LLAMA_128, LLAMA)
# Decode of ik_llama.cpp over llama.cpp's best on one machine: this model at Q4_K, 2 cores with
# AVX-512. By share of the checkpoint that the memory cap is, None for no cap.
IK_OVER_LLAMA = {None: 23.2 / 17.4, 75: 4.07 / 3.55, 50: 2.25 / 1.85, 25: 1.28 / 1.17}
FLASH_FIELDS = (
    "residency", "hit_rate", "missed_bytes_per_token", "read_bytes_per_s",
    "memory_read_bytes_per_s", "disk_read_bytes_per_s", "disk_read_how", "compute_s_per_token",
    "ceiling_tokens_per_s", "ceiling_reached", "ram_bytes", "peak_rss_bytes", "within_budget",
    "kernels",
)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """One figure held to its target."""

    phase: str
    name: str
    value: float | None
    target: float

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.phase}: {self.name}: not measured"
        verdict = "reached" if self.value >= self.target else "MISSED"
        return f"{self.phase}: {self.name}: {self.value:.2f}, target {self.target:g}, {verdict}"


def set_ceilings(measured: Sequence[Measured]) -> None:
    """Fill in what mlx-flash could reach at most, as `mlx-flash bench` does."""
    bench_report.set_ceilings([m.flash for m in measured if m.flash is not None])


def median(
    measured: Sequence[Measured], name: str, phase: str, runtimes: Sequence[str]
) -> float | None:
    """Of a field over the repeats, of the best of these runtimes; None where there is none."""
    found = []
    for runtime in runtimes:
        of_it = [m for m in measured if (m.runtime, m.phase) == (runtime, phase)]
        values = [value for m in of_it if (value := getattr(m, name)) is not None]
        if values:
            found.append(statistics.median(values))
    return max(found, default=None)


def ratios(measured: Sequence[Measured], phases: Sequence[Phase]) -> list[Ratio]:
    """What must be shown, phase by phase."""
    said = []
    for phase in phases:
        share = phase.percent
        decode = _over(measured, "decode", phase.name)
        scaled = decode / IK_OVER_LLAMA[share] if decode and share in IK_OVER_LLAMA else None
        capped = share is not None
        said += [
            Ratio(phase.name, "decode over llama.cpp's best", decode, 2.0 if capped else 1.2),
            Ratio(
                phase.name,
                "decode over ik_llama.cpp's, scaled by llama.cpp's",
                scaled,
                2.0 if capped else 0.95,
            ),
        ]
        if capped:
            prefill = _over(measured, "prefill", phase.name)
            said.append(Ratio(phase.name, "prefill over llama.cpp's best", prefill, 4.0))
            said.append(Ratio(phase.name, "share of the ceiling", _reached(measured, phase), 0.75))
        else:
            prefill = _over(measured, "long_prefill", phase.name)
            said.append(Ratio(phase.name, "long prefill over llama.cpp's best", prefill, 1.0))
    return said


def _over(measured: Sequence[Measured], name: str, phase: str) -> float | None:
    ours = median(measured, name, phase, [FLASH])
    theirs = median(measured, name, phase, LLAMAS)
    return ours / theirs if ours and theirs else None


def _reached(measured: Sequence[Measured], phase: Phase) -> float | None:
    rows = [m.flash for m in measured if m.flash is not None and m.phase == phase.name]
    shares = [row.ceiling_reached for row in rows if row.ceiling_reached is not None]
    return statistics.median(shares) if shares else None


def table(measured: Sequence[Measured], phases: Sequence[Phase]) -> str:
    """A row per runtime and phase, medians over the repeats."""
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    headers = (
        "\nphase", "\nruntime", "decode\ntok/s", "\nleast", "\nmost", "\ntokens", "prefill\ntok/s",
        "long\nprefill", "in page\ncache", "hit\nrate", "missed\nMB/token", "ceiling\ntok/s",
        "\nreached", "\nnote",
    )  # fmt: skip
    for i, header in enumerate(headers):
        text = i < 2 or header == "\nnote"
        grid.add_column(header, justify="left" if text else "right", no_wrap=header != "\nnote")
    for phase in phases:
        for runtime in dict.fromkeys(m.runtime for m in measured if m.phase == phase.name):
            runs = [m for m in measured if (m.runtime, m.phase) == (runtime, phase.name)]
            grid.add_row(phase.name, runtime, *_cells(runs))
    console = Console(width=180)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def line(m: Measured) -> str:
    """One run, as soon as it has ended."""
    rates = {"decode": m.decode, "prefill": m.prefill, "long prefill": m.long_prefill}
    said = [f"{name} {_number(rate)} tok/s" for name, rate in rates.items() if rate]
    return "; ".join([*said, *([m.note] if m.note else [])])


def _cells(runs: Sequence[Measured]) -> list[str]:
    speeds = [m.decode for m in runs if m.decode is not None]
    rows = [m.flash for m in runs if m.flash is not None]

    def of_runs(name: str) -> float | None:
        return _median([getattr(m, name) for m in runs])

    def of_rows(name: str) -> float | None:
        return _median([getattr(row, name) for row in rows])

    missed = of_rows("missed_bytes_per_token")
    decoded = of_runs("decoded")
    return [
        _number(of_runs("decode")),
        _number(min(speeds, default=None)),
        _number(max(speeds, default=None)),
        "-" if decoded is None else f"{decoded:.0f}",
        _number(of_runs("prefill")),
        _number(of_runs("long_prefill")),
        _percent(of_runs("in_page_cache")),
        _percent(of_rows("hit_rate")),
        _number(missed / 1e6 if missed else None),
        _number(of_rows("ceiling_tokens_per_s")),
        _percent(of_rows("ceiling_reached")),
        "; ".join(dict.fromkeys(m.note for m in runs if m.note)),
    ]


def _median(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:#.3g}".rstrip(".")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def write_csv(path: Path, measured: Sequence[Measured], facts: dict[str, Any]) -> None:
    """A line per run; the machine and the versions in every one."""
    own = [f.name for f in fields(Measured) if f.name != "flash"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*own, *FLASH_FIELDS, *facts])
        writer.writeheader()
        for m in measured:
            row = asdict(m.flash) if m.flash else {}
            line = {name: getattr(m, name) for name in own}
            writer.writerow(line | {name: row.get(name) for name in FLASH_FIELDS} | facts)
