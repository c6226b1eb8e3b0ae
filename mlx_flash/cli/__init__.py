"""The `mlx-flash` command: one file per subcommand. The only room that prints."""

import io
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from .bench import bench
from .cache_prompt import cache_prompt
from .generate import generate, say_error
from .inspect import inspect
from .selftest import selftest

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run Mixture-of-Experts models that are larger than the RAM you give them, "
    "token for token what mlx-lm would say.",
    epilog="Start with [bold]mlx-flash generate --slots 12 'Tell me a story.'[/bold] "
    "It needs no download.",
)
app.command("generate")(generate)
app.command("cache-prompt")(cache_prompt)
app.command("bench")(bench)
app.command("inspect")(inspect)
app.command("selftest")(selftest)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(
            f"mlx-flash {version('mlx-flash')}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"
        )
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say and stop."),
    ] = False,
) -> None:
    """Options that come before a subcommand."""


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 nobody reads, 2 bad input, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # models say what not every terminal can
    try:
        sys.exit(app(prog_name="mlx-flash", standalone_mode=False))
    except typer.TyperException as error:
        if message := error.format_message():  # empty where the help has been shown
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "mlx-flash"
            say_error(f"{message.rstrip('.')}. See `{command} --help`.")
        sys.exit(error.exit_code)
