"""What `mlx-flash bench` says of its runs: rows, ceilings reached, table, CSV, JSON, plot."""

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..streaming.plan import size
from .ceilings import Ceilings

OK, REFUSED, FAILED = "ok", "refused", "failed"
RESIDENT_RUN = "the fastest run with all {} in RAM"
MEMORY_READS = "the weights that a token needs / memory reads"
MOST_COLUMNS = 200


@dataclass
class Row:
    """A budget in one state of the page cache: medians over its runs. Seconds, bytes, tokens."""

    budget: str
    cache: str = "-"
    status: str = OK
    note: str = ""
    ram_bytes: int | None = None
    residency: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    decode_tokens_per_s_min: float | None = None
    decode_tokens_per_s_max: float | None = None
    hit_rate: float | None = None
    missed_bytes_per_token: float | None = None
    read_bytes_per_s: float | None = None
    share_from_disk: float | None = None
    peak_rss_bytes: int | None = None
    within_budget: bool | None = None
    memory_read_bytes_per_s: float | None = None
    memory_read_how: str | None = None
    disk_read_bytes_per_s: float | None = None
    disk_read_how: str | None = None
    page_cache_read_bytes_per_s: float | None = None
    mean_read_bytes: float | None = None
    active_bytes: int | None = None
    compute_s_per_token: float | None = None
    compute_how: str | None = None
    ceiling_tokens_per_s: float | None = None
    ceiling_reached: float | None = None
    prefill_read_bytes: float | None = None
    load_s: float | None = None
    prefill_step: int | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None
    runs: int | None = None
    model: str = ""
    streams: str = "experts"  # or "layers", of a model that has none
    slots: int | None = None
    policy: str = ""
    reader: str = ""
    read_threads: int | None = None
    context: int | None = None
    kernels: str = ""
    mlx_flash: str = ""
    mlx: str = ""
    commit: str = ""
    cpu: str = ""
    cores: int | None = None
    machine_ram_bytes: int | None = None


def rows_of(result: dict[str, Any], facts: dict[str, Any]) -> list[Row]:
    """A row per state of the page cache.

    Args:
        result: The ``Result`` of a ``bench_run`` process.
        facts: The fields of ``Row`` that do not come from its runs.
    """
    caches = dict.fromkeys(run["cache"] for run in result["runs"])
    return [
        _row([run for run in result["runs"] if run["cache"] == cache], result, facts)
        for cache in caches
    ]


def _row(runs: list[dict[str, Any]], result: dict[str, Any], facts: dict[str, Any]) -> Row:
    def median(name: str) -> float:
        return float(statistics.median(run[name] for run in runs))

    row = Row(**facts, cache=runs[0]["cache"], runs=len(runs))
    tokens = facts["tokens"]
    for name in ("ram_bytes", "residency", "peak_rss_bytes", "load_s", "prefill_step", "kernels"):
        setattr(row, name, result[name])
    row.within_budget = result["peak_rss_bytes"] <= result["ram_bytes"]
    row.prefill_tokens_per_s = facts["prompt_tokens"] / median("prefill_s")
    speeds = [tokens / run["decode_s"] for run in runs]
    row.decode_tokens_per_s = tokens / median("decode_s")
    row.decode_tokens_per_s_min, row.decode_tokens_per_s_max = min(speeds), max(speeds)
    row.missed_bytes_per_token = median("bytes_read") / tokens
    row.prefill_read_bytes = median("prefill_bytes_read")
    routed = sum(run["hits"] + run["misses"] for run in runs)
    row.hit_rate = sum(run["hits"] for run in runs) / routed if routed else None
    read_s = sum(run["read_s"] for run in runs)
    read = sum(run["bytes_read"] for run in runs)
    row.read_bytes_per_s = read / read_s if read_s else None
    if read and runs[0]["device_bytes"] is not None:
        # The kernel reads ahead: what the disk delivers may be more than was asked for.
        row.share_from_disk = min(1.0, sum(run["device_bytes"] for run in runs) / read)
    return row


def ceiling_fields(ceilings: Ceilings) -> dict[str, Any]:
    """The measured ceilings as fields of a row."""
    return {
        "memory_read_bytes_per_s": ceilings.memory_bytes_per_s,
        "memory_read_how": ceilings.memory_how,
        "disk_read_bytes_per_s": ceilings.disk_bytes_per_s,
        "disk_read_how": ceilings.disk_how,
        "page_cache_read_bytes_per_s": ceilings.page_cache_bytes_per_s,
        "mean_read_bytes": ceilings.read_bytes,
    }


def set_ceilings(rows: Sequence[Row]) -> None:
    """Fill in what each row could reach at most: ``1 / max(compute, missed bytes / disk)``.

    Compute is that of the fastest resident run, in which nothing is read; a resident row
    itself is held to the memory, which must deliver a token's active weights.
    """
    done = [row for row in rows if row.decode_tokens_per_s]
    resident = [row.decode_tokens_per_s or 0.0 for row in done if row.residency == 1]
    for row in done:
        assert row.active_bytes and row.memory_read_bytes_per_s
        if resident and row.residency != 1:
            row.compute_s_per_token, row.compute_how = (
                1 / max(resident),
                RESIDENT_RUN.format(row.streams),
            )
        else:
            row.compute_s_per_token = row.active_bytes / row.memory_read_bytes_per_s
            row.compute_how = MEMORY_READS
        row.ceiling_tokens_per_s = 1 / max(row.compute_s_per_token, _read_s(row))
        row.ceiling_reached = (row.decode_tokens_per_s or 0.0) / row.ceiling_tokens_per_s


def _read_s(row: Row) -> float:
    """Seconds a token, at the measured ceilings, for its missed bytes."""
    assert row.disk_read_bytes_per_s and row.page_cache_read_bytes_per_s
    from_disk = float(row.cache == "cold") if row.share_from_disk is None else row.share_from_disk
    from_cache = (1 - from_disk) / row.page_cache_read_bytes_per_s
    missed = row.missed_bytes_per_token or 0.0
    return missed * (from_disk / row.disk_read_bytes_per_s + from_cache)


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows for people: what was measured, the table, how to read it."""
    first = next((row for row in rows if row.status == OK), rows[0])
    runs = f"{first.prompt_tokens} random tokens of prompt, {first.tokens} decoded"
    if first.runs:
        runs += f", median of {first.runs} after one that was dropped"
    return [about(first), f"{first.model}: {runs}", "", _table(rows), "", *_notes(rows)]


def _table(rows: Sequence[Row]) -> str:
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    headers = (
        "\n\nbudget", "\npage\ncache", f"{rows[0].streams}\nin\nRAM", "\nprefill\ntok/s",
        "\ndecode\ntok/s", "\nhit\nrate", "missed\nMB per\ntoken", "\nread\nMB/s",
        "from\nthe\ndisk", "\npeak\nGB", "\nof\nbudget", "\nmemory\nGB/s", "\ndisk\nMB/s",
        "\nceiling\ntok/s", "\n\nreached",
    )  # fmt: skip
    for i, header in enumerate(headers):
        grid.add_column(header, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*_cells(row))
    console = Console(width=MOST_COLUMNS)  # the terminal may wrap it, but no figure is cut
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def _cells(row: Row) -> list[str]:
    if row.status != OK:
        return [row.budget, row.status]
    assert row.peak_rss_bytes and row.ram_bytes
    return [
        row.budget,
        row.cache,
        _percent(row.residency),
        _number(row.prefill_tokens_per_s),
        _number(row.decode_tokens_per_s),
        _percent(row.hit_rate),
        _number(row.missed_bytes_per_token or None, 1e6),
        _number(row.read_bytes_per_s, 1e6),
        _percent(row.share_from_disk),
        _number(row.peak_rss_bytes, 1e9),
        _percent(row.peak_rss_bytes / row.ram_bytes),
        _number(row.memory_read_bytes_per_s, 1e9),
        _number(row.disk_read_bytes_per_s, 1e6),
        _number(row.ceiling_tokens_per_s),
        _percent(row.ceiling_reached),
    ]


def _number(value: float | None, unit: float = 1.0) -> str:
    """Three digits or more, none of them noise."""
    if value is None:
        return "-"
    value /= unit
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _notes(rows: Sequence[Row]) -> list[str]:
    said = [f"{row.budget}: {row.note}" for row in rows if row.note]
    over = dict.fromkeys(row.budget for row in rows if row.within_budget is False)
    said += [f"{budget}: OVER BUDGET, please report this" for budget in over]
    done = [row for row in rows if row.status == OK]
    if not done:
        return said
    row = done[0]
    said += [
        f"memory: reads by {row.memory_read_how}",
        f"disk: {row.disk_read_how}, random {row.streams}, {size(row.mean_read_bytes or 0)} a read",
    ]
    for row in {row.compute_how: row for row in done if row.residency != 1}.values():
        compute = f"{(row.compute_s_per_token or 0) * 1e3:.2f} ms a token, {row.compute_how}"
        said.append(f"ceiling: 1 / max(compute, missed bytes / disk); compute is {compute}")
    if any(row.residency == 1 for row in done):
        said.append(f"ceiling with all {row.streams} in RAM: {MEMORY_READS}")
    if any(row.cache == "warm" for row in done):
        cached = statistics.median(row.page_cache_read_bytes_per_s or 0.0 for row in done)
        said.append(f"what comes from the page cache is held to its {cached / 1e6:.0f} MB/s")
    return said


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line per row, one column per field of ``Row``."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def as_json(rows: Sequence[Row], identical: bool | None, interrupted: bool) -> str:
    """One object."""
    return json.dumps(
        {
            "rows": [asdict(row) for row in rows],
            "tokens_identical": identical,
            "interrupted": interrupted,
        },
        ensure_ascii=False,
    )


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Decode and prefill over the budgets, the ceiling dashed. Needs matplotlib."""
    from matplotlib.figure import Figure  # an extra, and slow to import

    budgets = list(dict.fromkeys(row.budget for row in rows))
    done = [row for row in rows if row.status == OK]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, title in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        for color, cache in enumerate(("cold", "warm")):
            streamed = [row for row in done if row.cache == cache]
            # A row with every expert in RAM ends both lines: it reads nothing.
            line = [row for row in done if row.cache == "-" or row in streamed]
            look: dict[str, Any] = {"color": f"C{color}", "label": cache}
            if streamed:
                _draw(axes, budgets, line, f"{title}_tokens_per_s", marker="o", **look)
            if streamed and title == "decode":
                look |= {"label": f"{cache}, ceiling", "linestyle": "--", "marker": "_"}
                _draw(axes, budgets, streamed, "ceiling_tokens_per_s", markersize=16, **look)
        resident = [row for row in done if row.cache == "-"]
        if resident:
            look = {"color": "black", "linestyle": "", "marker": "*", "markersize": 10}
            name = f"{title}_tokens_per_s"
            _draw(
                axes,
                budgets,
                resident,
                name,
                label=f"all {resident[0].streams} in RAM",
                zorder=3,
                **look,
            )
        axes.set_title(f"{title}, tokens per second")
        axes.set_xlabel("--ram")
        measured = {row.budget for row in done}
        labels = [b if b in measured else f"{b}\nnot measured" for b in budgets]
        axes.set_xticks(range(len(budgets)), labels)
        axes.set_xlim(-0.5, len(budgets) - 0.5)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if done:
            axes.legend()
    figure.suptitle(about(done[0] if done else rows[0]), fontsize="small")
    figure.savefig(path, dpi=150)


def _draw(axes: Any, budgets: list[str], rows: Sequence[Row], name: str, **look: Any) -> None:
    places = [budgets.index(row.budget) for row in rows]
    axes.plot(places, [getattr(row, name) for row in rows], **look)


def about(row: Row) -> str:
    """Machine and versions, in one line."""
    commit = f" ({row.commit})" if row.commit else ""
    kernels = f", kernels: {row.kernels}" if row.kernels else ""
    return (
        f"mlx-flash {row.mlx_flash}{commit}, MLX {row.mlx}{kernels}; {row.cpu}, {row.cores} cores, "
        f"{(row.machine_ram_bytes or 0) / 1e9:.1f} GB"
    )
