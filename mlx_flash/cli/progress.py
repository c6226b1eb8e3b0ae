"""Progress on standard error, where a person is watching."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..weights import Progress as Callback


@contextmanager
def bar(title: str) -> Iterator[Callback]:
    """A bar that is gone when it is done, and nothing at all in a pipe or a log."""
    console = Console(stderr=True)
    columns = (
        TextColumn(f"{title:8}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,  # the text is for standard output, bar or no bar
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(title, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update
