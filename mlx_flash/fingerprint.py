"""What a model is made of, in three hashes: a state of another model is told apart by them.

Reads headers and the file system's records, never weights.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError
from .streaming.checkpoint import Checkpoint


@dataclass(frozen=True)
class Fingerprint:
    """Hashes that agree where a prompt's state may be used again.

    Folders may be moved, not copied: a copy has other times of modification, which alone
    tell weights of the same shapes apart without reading them.

    Attributes:
        config: Of the model's config, quantization included.
        weights: Of the name, dtype, shape and place of every tensor, and of the size and
            time of modification of every shard.
        adapter: The same of LoRA weights; empty without.
    """

    config: str
    weights: str
    adapter: str = ""

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, config: Mapping[str, Any], adapter_path: str | None = None
    ) -> "Fingerprint":
        """The fingerprint of a model as it was opened.

        Raises:
            UsageError: If a file has gone since.
        """
        tensors = [
            (name, info.dtype, info.shape, info.span.path.name, info.span.offset)
            for name, info in sorted(checkpoint.items())
        ]
        shards = sorted({info.span.path for info in checkpoint.values()})
        adapter = sorted(Path(adapter_path).expanduser().iterdir()) if adapter_path else []
        return cls(
            config=_hash(config),
            weights=_hash([tensors, _records(shards)]),
            adapter=_hash(_records(adapter)) if adapter else "",
        )

    def differences(self, other: "Fingerprint") -> list[str]:
        """The names of the attributes that are not the same."""
        return [name for name, value in vars(self).items() if getattr(other, name) != value]


def _records(paths: list[Path]) -> list[tuple[str, int, int]]:
    try:
        found = [(path.name, path.stat()) for path in paths]
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}. Has the model moved?") from error
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
