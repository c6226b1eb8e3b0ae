"""What other installed packages bring: architectures, policies and readers, by entry point.

A policy or reader from outside is held to its protocol: what it is not, or raises, is one
``PluginError`` that names it, and never a wrong answer.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .errors import FlashError, PluginError, brief
from .streaming import eviction, reader
from .streaming.eviction import EvictionPolicy
from .streaming.reader import Job, Reader

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


def policy(name: str) -> Callable[[], EvictionPolicy]:
    """What makes a policy of that name, one per layer: ours, or an installed package's.

    Raises:
        PluginError: If an installed package offers it and does not load.
    """
    if name in eviction.POLICIES:
        return eviction.POLICIES[name]
    return partial(OutsidePolicy, name, _callable(POLICIES, name))


def open_reader(name: str, paths: Iterable[Path], threads: int) -> Reader:
    """A reader of that name: ours, or an installed package's.

    Raises:
        PluginError: If an installed package offers it and does not load, or has no reader.
        ReadError: If a file cannot be opened.
    """
    if name in reader.READERS:
        return reader.READERS[name](paths, threads)
    return OutsideReader(name, _callable(READERS, name), paths, threads)


class OutsidePolicy:
    """A policy of an installed package: what goes wrong in it is said to be its fault.

    Args:
        name: What it is offered as.
        make: Makes it.
    """

    def __init__(self, name: str, make: Callable[[], Any]):
        self._blame = partial(_blame, POLICIES, name)
        with self._blame():
            self._policy = make()
        _check(POLICIES, name, self._policy, ("touch", "insert", "evict"))

    def touch(self, expert: int) -> None:
        with self._blame():
            self._policy.touch(expert)

    def insert(self, expert: int) -> None:
        with self._blame():
            self._policy.insert(expert)

    def evict(self, pinned: Set[int]) -> int:
        with self._blame():
            return operator.index(self._policy.evict(frozenset(pinned)))


class OutsideReader:
    """A reader of an installed package: what goes wrong in it is said to be its fault.

    Args:
        name: What it is offered as.
        open_: Opens it, on files and with so many threads.
        paths: The files that spans may name.
        threads: Reads in flight.
    """

    def __init__(self, name: str, open_: Callable[..., Any], paths: Iterable[Path], threads: int):
        self._blame = partial(_blame, READERS, name)
        with self._blame():
            self._reader = open_(paths, threads)
        _check(READERS, name, self._reader, ("read_into", "close"), ("bytes_read", "read_s"))
        self._count()

    def _count(self) -> None:
        self.bytes_read, self.read_s = int(self._reader.bytes_read), float(self._reader.read_s)

    def read_into(self, jobs: Sequence[Job]) -> None:
        with self._blame():
            self._reader.read_into(jobs)
            self._count()

    def close(self) -> None:
        with self._blame():
            self._reader.close()


def _callable(group: str, name: str) -> Callable[..., Any]:
    made = load(group, name)
    if made is None:
        raise PluginError(f"{group}: no installed package offers {name!r} any more. Install it.")
    if not callable(made):
        raise PluginError(
            f"{group}: {name!r} is a {type(made).__name__}, which cannot be called to make one. "
            "Mend the package that offers it."
        )
    found: Callable[..., Any] = made
    return found


def _check(
    group: str, name: str, made: Any, methods: Iterable[str], counters: Iterable[str] = ()
) -> None:
    lacks = [f"{m}()" for m in methods if not callable(getattr(made, m, None))]
    lacks += [c for c in counters if not isinstance(getattr(made, c, None), (int, float))]
    if lacks:
        raise PluginError(
            f"{group}: {name!r} makes a {type(made).__name__} that lacks {' and '.join(lacks)}. "
            "Mend the package that offers it."
        )


@contextmanager
def _blame(group: str, name: str) -> Iterator[None]:
    try:
        yield
    except FlashError:
        raise
    except Exception as error:  # it is somebody else's code
        raise PluginError(
            f"{group}: {name!r} failed ({type(error).__name__}: {brief(error)}). Mend the package "
            "that offers it, or choose another."
        ) from error
