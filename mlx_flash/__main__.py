"""`mlx-flash`, and `python -m mlx_flash`."""

import sys


def main() -> None:
    """Hand over to the command, or stop quietly if interrupted while it is imported."""
    try:
        from .cli import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
