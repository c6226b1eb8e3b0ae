"""Writes a synthetic MoE checkpoint of a named shape, as a stream: any size in little RAM.

The files are what `mlx_lm.convert` would have written: names, shapes and dtypes are read from
mlx-lm's own model. The values are random, so it benchmarks like the real one and says nothing.
"""

import re
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from synthetic import shapes, values, writer
from synthetic.topics import Routing
from tqdm import tqdm

from mlx_flash.machine import peak_rss_bytes

Shape = StrEnum("Shape", list(shapes.SHAPES))
Mode = StrEnum("Mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
Dtype = StrEnum("Dtype", ["bfloat16", "float16", "float32"])


def parse_size(text: str) -> int:
    """Bytes of "2GB", "500MB", "1.5GiB" or a plain number.

    Raises:
        ValueError: If it reads as no positive size.
    """
    match = re.fullmatch(r"([\d.]+)\s*([kmgt]?)(i?)b?", text.strip().lower())
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** " kmgt".index(match[2] or " "))
    if size <= 0:
        raise ValueError(f"Not a size: {text!r}. Write it like 2GB or 500MB.")
    return size


def describe(
    shape: str, layers: int | None, dtype: str, bits: int | None, group_size: int | None, mode: str
) -> shapes.Skeleton:
    config = shapes.config_for(shape, layers, dtype)
    return shapes.skeleton(config, dtype, bits, group_size, mode)


def least_bytes(shape: str, layers: int, *form: object) -> int:
    """Less than ``layers`` layers take, without building more than twice the real depth."""
    published = shapes.published_layers(shape)
    twice, once = (describe(shape, n, *form).nbytes for n in (2 * published, published))
    return layers // published * (twice - once)


def make(
    out: Path,
    shape: str,
    *,
    layers: int | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    dtype: str = "float32",
    shard_size: str = "2GB",
    seed: int = 0,
    routing: Routing | None = None,
    force: bool = False,
) -> shapes.Skeleton:
    """Writes the checkpoint into ``out`` and returns what it consists of.

    Raises:
        FileExistsError: If ``out`` is not empty and ``force`` is not given.
        OSError: If the disk has no room for it; nothing is written then.
        ValueError: If the quantization, the shard size or the routing makes no sense.
    """
    shard_bytes = parse_size(shard_size)
    if not force:
        writer.require_empty(out)
    if layers and layers > 2 * shapes.published_layers(shape):
        writer.require_space(out, least_bytes(shape, layers, dtype, bits, group_size, mode))
    skeleton = describe(shape, layers, dtype, bits, group_size, mode)
    writer.require_space(out, skeleton.nbytes)
    routing = values.choose_routing(skeleton.tensors, routing)
    recipe = values.Recipe(seed, layers or shapes.published_layers(shape), routing)
    bar = tqdm(total=skeleton.nbytes, unit="B", unit_scale=True, desc=shape, disable=None)
    with bar:  # shown on a terminal's stderr only
        writer.write(out, skeleton, recipe, shard_bytes, bar.update)
    return skeleton


def main(
    out: Annotated[Path, typer.Option(help="Folder to write; must be empty, or --force.")],
    shape: Annotated[Shape, typer.Option(help="Whose geometry to copy.")] = Shape.tiny,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Cut or repeat the layer pattern to this many.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits per weight: 2, 3, 4, 5, 6 or 8. [default: 4]")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights per scale: 32, 64 or 128. [default: 64]")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Quantization, as MLX names it.")] = Mode.affine,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Of scales and norms. Published ones have bfloat16, slow on a CPU."),
    ] = Dtype.float32,
    shard_size: Annotated[str, typer.Option(help="Largest file, like 2GB or 500MB.")] = "2GB",
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    routing: Annotated[
        Routing | None,
        typer.Option(help="Experts repeat as in published models, or not. [default: real]"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the checkpoint in the folder.")
    ] = False,
) -> None:
    """Write a synthetic Mixture-of-Experts checkpoint that stock mlx-lm loads.

    Eight of the 40 layers of Qwen3.5-35B-A3B, 5 GB, to measure streaming on a CPU:

        python benchmarks/make_checkpoint.py --shape qwen3.5-35b-a3b --layers 8 --out qwen-8

    Then ask for text, which will be gibberish at the real model's speed:

        python -m mlx_lm generate --model qwen-8 --prompt hello

    Tokens have topics, so that experts repeat about as they do in published models.
    See for yourself before you trust a hit rate measured on such a model:

        python benchmarks/routing_statistics.py qwen-8
    """
    began = time.monotonic()
    form: dict[str, Any] = {"bits": bits, "group_size": group_size, "mode": mode, "dtype": dtype}
    chance: dict[str, Any] = {"seed": seed, "routing": routing}
    try:
        made = make(out, shape, layers=layers, shard_size=shard_size, force=force, **form, **chance)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{out}: {len(made.tensors)} tensors, {made.nbytes / 1e9:.2f} GB, "
        f"{made.parameters / 1e9:.2f} B parameters in {time.monotonic() - began:.1f} s, "
        f"peak RSS {peak_rss_bytes() / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    typer.run(main)
