"""What other installed packages bring: architectures, policies and readers, by entry point."""

from importlib.metadata import entry_points
from typing import Any

from .errors import PluginError, brief

ARCHITECTURES = "mlx_flash.architectures"
POLICIES = "mlx_flash.policies"
READERS = "mlx_flash.readers"


def names(group: str) -> list[str]:
    """What installed packages offer in an entry point group."""
    return sorted({point.name for point in entry_points(group=group)})


def load(group: str, name: str) -> Any | None:
    """What an installed package offers by that name, or None if none does.

    Raises:
        PluginError: If two packages do, or what one offers cannot be imported.
    """
    points = tuple(entry_points(group=group, name=name))
    if not points:
        return None
    if len({point.value for point in points}) > 1:
        offered = " and ".join(point.value for point in points)
        raise PluginError(f"{group}: {name!r} is offered twice, by {offered}. Uninstall one.")
    try:
        return points[0].load()
    except Exception as error:  # it is somebody else's code
        raise PluginError(
            f"{group}: {name!r} is offered as {points[0].value}, which does not import "
            f"({brief(error)}). Mend that package, or uninstall it."
        ) from error
