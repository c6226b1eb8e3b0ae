"""Writes a checkpoint in mlx-lm's form: safetensors shards, an index, a config last.

Holds one piece of one tensor at a time. The config is written last, so a folder whose writing
was interrupted does not load.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_lm.utils import save_config

from . import tokenizer, values
from .shapes import Skeleton, Tensor

Wrote = Callable[[int], Any]

SPARE_BYTES = 64_000_000  # tokenizer, index and headers
OWN_FILES = ("model*.safetensors", "model.safetensors.index.json", "config.json")


def require_empty(out: Path) -> None:
    """Raises FileExistsError when there is anything in the folder."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(
            f"{out} is not empty. Choose another folder, or pass --force to replace "
            "the checkpoint in it."
        )


def require_space(out: Path, nbytes: int) -> None:
    """Raises OSError when the disk of ``out`` has no room for ``nbytes`` of weights."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    own = sum(path.stat().st_size for path in out.glob("model*.safetensors"))  # to be replaced
    free = shutil.disk_usage(existing).free + own
    if nbytes + SPARE_BYTES > free:
        raise OSError(
            f"This checkpoint needs {nbytes / 1e9:,.2f} GB and the disk of {out} has "
            f"{free / 1e9:,.2f} GB free. Pass fewer --layers or --bits, or another --out."
        )


def write(
    out: Path,
    skeleton: Skeleton,
    recipe: values.Recipe,
    shard_bytes: int,
    wrote: Wrote,
) -> None:
    """Writes every file of the checkpoint, in place of one that may be there.

    Args:
        wrote: Called with the number of bytes of each piece once it is in the file.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in (path for pattern in OWN_FILES for path in out.glob(pattern)):
        old.unlink()
    shards = _shards(skeleton.tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        _write_shard(out / name, shard, recipe, wrote)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    sizes = {"total_size": skeleton.nbytes, "total_parameters": skeleton.parameters}
    index = {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))
    text = skeleton.config.get("text_config", skeleton.config)
    tokenizer.write(out, text["vocab_size"])
    ends = {"eos_token_id": [text["eos_token_id"], text["pad_token_id"]]}
    (out / "generation_config.json").write_text(json.dumps(ends, indent=4))
    save_config(skeleton.config, out / "config.json")


def _shards(tensors: list[Tensor], limit: int) -> list[list[Tensor]]:
    """Cuts where mlx-lm cuts: before the tensor that would not fit."""
    shards: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_shard(path: Path, shard: list[Tensor], recipe: values.Recipe, wrote: Wrote) -> None:
    with path.open("wb") as file:
        file.write(_header(shard))
        for piece in _pieces(shard, recipe):
            file.write(piece)
            wrote(piece.nbytes)


def _pieces(shard: list[Tensor], recipe: values.Recipe) -> Iterator[values.Bytes]:
    for tensor in shard:
        size = 0
        for piece in values.stream(tensor, recipe):
            size += piece.nbytes
            yield piece
        if size != tensor.nbytes:
            raise AssertionError(f"{tensor.name}: {size} bytes made, {tensor.nbytes} promised")


def _header(shard: list[Tensor]) -> bytes:
    """The length, then JSON: https://huggingface.co/docs/safetensors. Unpadded, as MLX's."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
        header[tensor.name] = entry | {"data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text
