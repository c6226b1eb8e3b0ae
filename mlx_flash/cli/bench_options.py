"""The options of `mlx-flash bench`. Those that `generate` has too mean the same."""

from pathlib import Path
from typing import Annotated

import typer

from ..config import policies, readers

BUDGETS = "Budgets   e.g. --ram 4GB,8GB,50%,max"
RUNS = "Runs   e.g. --tokens 200 --repeats 5 --cold"
STREAMING = "Streaming   e.g. --policy lfu --read-threads 16"
OUTPUT = "Output   e.g. --csv bench.csv --plot bench.png"

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A model folder or a Hub repository. Without it: the embedded demo model.",
        show_default=False,
    ),
]

Ram = Annotated[
    str,
    typer.Option(
        help="Ceilings on the whole process, one after another: 8GB, 1.5GiB, 60% of the machine, "
        "auto, or max: every expert in RAM, or as many as the machine has room for.",
        rich_help_panel=BUDGETS,
    ),
]
Slots = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Experts in RAM per layer, or whole layers of a model without experts, instead of "
        "what a budget gives; not for max.",
        rich_help_panel=BUDGETS,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of context to leave room for. Without it: the prompt and --tokens.",
        rich_help_panel=BUDGETS,
    ),
]

PromptTokens = Annotated[
    int,
    typer.Option(
        min=1,
        help="Length of the prompt: random tokens, the same for every budget.",
        rich_help_panel=RUNS,
    ),
]
Tokens = Annotated[
    int, typer.Option(min=1, help="Tokens to decode in a run, greedily.", rich_help_panel=RUNS)
]
Repeats = Annotated[
    int,
    typer.Option(
        min=1,
        help="Runs to take the median of, after a first one that is dropped.",
        rich_help_panel=RUNS,
    ),
]
Cold = Annotated[
    bool,
    typer.Option(
        "--cold",
        help="The model is dropped from the page cache before and during each run, so that "
        "misses come from the disk.",
        rich_help_panel=RUNS,
    ),
]
Warm = Annotated[
    bool,
    typer.Option(
        "--warm",
        help="The page cache is as the first run left it. Without --cold and --warm: both.",
        rich_help_panel=RUNS,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the prompt.", rich_help_panel=RUNS)]

Policy = Annotated[
    str,
    typer.Option(
        help=f"Which expert gives up its slot: {', '.join(policies())}.", rich_help_panel=STREAMING
    ),
]
Reader = Annotated[
    str,
    typer.Option(
        help=f"How bytes come from disk: {', '.join(readers())}.", rich_help_panel=STREAMING
    ),
]
ReadThreads = Annotated[
    int,
    typer.Option(
        min=1, help="Reads in flight, here and for the disk's ceiling.", rich_help_panel=STREAMING
    ),
]
Kernels = Annotated[
    str, typer.Option(help="Who computes: auto, native, reference.", rich_help_panel=STREAMING)
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Threads that compute, with native kernels. Without it: one per core.",
        rich_help_panel=STREAMING,
    ),
]
PrefillStepSize = Annotated[
    int,
    typer.Option(
        min=1,
        help="Most prompt tokens at a time. The plan takes fewer where scratch is short.",
        rich_help_panel=STREAMING,
    ),
]

Csv = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the rows here, each as soon as it is measured.",
        rich_help_panel=OUTPUT,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.png", help="Draw the rows. Needs matplotlib.", rich_help_panel=OUTPUT
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON object instead of the table.", rich_help_panel=OUTPUT),
]
Debug = Annotated[
    bool, typer.Option("-v", "--debug", help="Show tracebacks.", rich_help_panel=OUTPUT)
]
