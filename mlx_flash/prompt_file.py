"""A prompt's state in a file, of which mlx-lm reads its part: the format of ``save_prompt_cache``.

mlx-lm's own files say the model's name alone. Ours also say which tokens the state has seen,
and what it was computed with.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as kv

from .errors import UsageError, brief
from .fingerprint import Fingerprint
from .states import KVSettings, counts

SUFFIX = ".safetensors"
OURS = "mlx_flash"  # the name of our part of the metadata: one JSON object
REMEDY = "Make one with `mlx-flash cache-prompt` or `mlx_lm.cache_prompt`."


@dataclass(frozen=True)
class Origin:
    """What a state was computed from and with.

    Attributes:
        tokens: Ids of the tokens it has seen, in order.
        fingerprint: Of the model.
        settings: Of keys and values.
    """

    tokens: list[int]
    fingerprint: Fingerprint
    settings: KVSettings


@dataclass(frozen=True)
class PromptFile:
    """A state as it was read.

    Attributes:
        layers: mlx-lm's prompt cache.
        model: The name of the model, if the file has it.
        tokenizer_config: As ``mlx_lm.load`` takes it.
        origin: None in mlx-lm's own files.
    """

    layers: list[Any]
    model: str | None
    tokenizer_config: dict[str, Any]
    origin: Origin | None

    @property
    def tokens(self) -> int:
        """How many tokens the state has seen."""
        return max((int(getattr(c, "offset", 0)) for c in self.layers), default=0)


def place(name: str) -> Path:
    """Where a state of this name is going to be: MLX gives every file the same suffix.

    Raises:
        UsageError: If nothing can be written there.
    """
    path = Path(name if name.endswith(SUFFIX) else name + SUFFIX).expanduser()
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(
            f"{path} cannot be written: it is a folder, or {folder} is none that may be written "
            "to. Name a file in a folder of yours."
        )
    return path


def write(
    path: Path, layers: list[Any], model: str, tokenizer_config: dict[str, Any], origin: Origin
) -> None:
    """Write a state, all of it or nothing: what was there before stays until the end.

    Args:
        path: What ``place`` returned.
        layers: mlx-lm's prompt cache.
        model: The model's name, for mlx-lm.
        tokenizer_config: As ``mlx_lm.load`` takes it.
        origin: What the state was computed from and with.

    Raises:
        UsageError: If there is no room, or no permission.
    """
    if counts(layers) - {len(origin.tokens)}:
        raise AssertionError("a state has seen the tokens it is written with")
    metadata = {
        "model": model,
        "tokenizer_config": json.dumps(tokenizer_config),
        OURS: json.dumps(asdict(origin)),
    }
    begun = partial(path)
    try:
        kv.save_prompt_cache(str(begun), layers, metadata)
        with begun.open("rb") as file:
            os.fsync(file.fileno())
        begun.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: MLX's, of a full disk too
        raise UsageError(
            f"{path} cannot be written ({brief(error)}). Free some space, or name another place."
        ) from error
    finally:
        begun.unlink(missing_ok=True)


def partial(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")


def read(name: str) -> PromptFile:
    """Read a state of mlx-lm's or of ours. Nothing of it is computed with yet.

    Raises:
        UsageError: If it is not there, truncated, or no such file.
    """
    if not Path(name).is_file():
        raise UsageError(f"{name}: no such file. {REMEDY}")
    try:
        layers, metadata = kv.load_prompt_cache(name, return_metadata=True)
        config = json.loads(metadata["tokenizer_config"])
        origin = _origin(metadata[OURS]) if OURS in metadata else None
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{name} is not a prompt cache ({brief(error)}). {REMEDY}") from error
    return PromptFile(layers, metadata.get("model"), config, origin)


def _origin(text: str) -> Origin:
    held = json.loads(text)
    tokens = [int(token) for token in held["tokens"]]
    return Origin(tokens, Fingerprint(**held["fingerprint"]), KVSettings(**held["settings"]))


def fits(found: PromptFile, fresh: list[Any]) -> bool:
    """Whether a state can be one of a model, and has seen as many tokens as it says.

    Args:
        found: What ``read`` returned.
        fresh: Caches of the model after one token, as ``one_token_caches`` makes them.
    """
    layers = found.layers
    try:
        alike = len(layers) == len(fresh) and all(map(_layer_fits, layers, fresh))
        return alike and (found.origin is None or not counts(layers) - {len(found.origin.tokens)})
    except (AttributeError, TypeError, LookupError, ValueError, ArithmeticError):
        return False  # what is no array where one should be


def _layer_fits(layer: Any, fresh: Any) -> bool:
    if type(fresh) is kv.ArraysCache:
        whole = layer.left_padding is None and layer.lengths is None
        return whole and type(layer) is kv.ArraysCache and _alike(layer.cache, fresh.cache)
    if type(fresh) is not kv.KVCache:
        return type(layer) is type(fresh)
    if type(layer.offset) is not int:
        return False
    if type(layer) is kv.QuantizedKVCache:
        held = [*layer.keys, *layer.values]
        wanted = fresh.to_quantized(group_size=layer.group_size, bits=layer.bits)
        expected = [*wanted.keys, *wanted.values]
    else:
        held, expected = [layer.keys, layer.values], [fresh.keys, fresh.values]
    rows = held[0].shape[2]
    return (
        type(layer) in (kv.KVCache, kv.QuantizedKVCache)
        and 0 < layer.offset <= rows
        and all(a.shape[2] == rows for a in held)
        and _alike([a[:, :, :1] for a in held], [a[:, :, :1] for a in expected])
    )


def _alike(held: list[mx.array], expected: list[mx.array]) -> bool:
    """The same shapes and kinds of number; which float it is may differ between kernels."""
    pairs = zip(held, expected, strict=True)
    return all(a.shape == b.shape and _kind(a) == _kind(b) for a, b in pairs)


def _kind(array: mx.array) -> Any:
    return "floating" if mx.issubdtype(array.dtype, mx.floating) else array.dtype
