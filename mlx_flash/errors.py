"""What can go wrong for a reason the user can mend. One line each, with the way out."""


class FlashError(Exception):
    """Base of every error that mlx-flash raises about its input or its budget."""


class ModelNotFoundError(FlashError, FileNotFoundError):
    """The model folder or Hub repository is not there or cannot be reached."""


class CheckpointError(FlashError, ValueError):
    """A model folder is incomplete, damaged or lies about its contents."""


class UnsupportedModelError(FlashError, ValueError):
    """The checkpoint is sound, but this model or this use of it cannot stream."""


class BudgetError(FlashError, ValueError):
    """The RAM budget is unreadable, impossible, or below the model's floor.

    Attributes:
        floor_bytes: That floor, where it is what the budget is below.
    """

    floor_bytes: int | None = None


class ReadError(FlashError, OSError):
    """Expert bytes could not be read. Carries ``errno``, ``strerror`` and ``filename``."""

    def __str__(self) -> str:
        place = f"{self.filename}: " if self.filename else ""
        return f"{place}{self.strerror}."


class UsageError(FlashError, ValueError):
    """Options that contradict each other, the model, or a file they name."""


class PluginError(FlashError, ImportError):
    """What another installed package brings does not load, or is not what it says."""


class UntestedModelWarning(UserWarning):
    """A model family that runs here, and that no test of ours compares with mlx-lm."""


def brief(error: BaseException, most_lines: int = 2) -> str:
    """The beginning of what a library says, in one line, to quote in what we say."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:most_lines])[:160].rstrip(".:, ")
