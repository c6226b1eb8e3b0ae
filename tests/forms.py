"""The tiny checkpoints that tests share, by family and quantization."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import tiny

FORMS: dict[str, Callable[[Path], Path]] = {
    "qwen3_5_moe-4bit": lambda p: tiny.write(p, quantization={"group_size": 64, "bits": 4}),
    "qwen3_5_moe-3bit-g32": lambda p: tiny.write(p, quantization={"group_size": 32, "bits": 3}),
    "qwen3_5_moe-2bit": lambda p: tiny.write(p, quantization={"group_size": 64, "bits": 2}),
    "qwen3_5_moe-mxfp8": lambda p: tiny.write(
        p, quantization={"group_size": 32, "bits": 8, "mode": "mxfp8"}
    ),
    "qwen3_5_moe-nvfp4": lambda p: tiny.write(
        p, quantization={"group_size": 16, "bits": 4, "mode": "nvfp4"}
    ),
    "qwen3_5_moe-mixed": lambda p: tiny.write(p, quantization=MIXED),
    "qwen3_5_moe-f32": lambda p: tiny.write(p),
    "qwen3_5_moe-4bit-bf16": lambda p: tiny.write(
        p, quantization={"group_size": 64, "bits": 4}, dtype=mx.bfloat16
    ),
    "qwen3_5_moe-hf-f32": lambda p: tiny.write_hf_qwen(p, dtype=mx.float32),
    "nemotron_h-mxfp4": lambda p: tiny.write(
        p, "nemotron_h", quantization={"group_size": 32, "bits": 4, "mode": "mxfp4"}
    ),
    "nemotron_h-8bit": lambda p: tiny.write(
        p, "nemotron_h", quantization={"group_size": 32, "bits": 8}
    ),
}


def _mixed(path: str, module: Any) -> bool | dict[str, int]:
    if not hasattr(module, "to_quantized"):
        return False
    if "layers.1." in path and "switch_mlp" in path:
        return {"group_size": 32, "bits": 8}
    if path.endswith("switch_mlp.down_proj"):
        return {"group_size": 32, "bits": 6}
    return not path.endswith("gate")


MIXED = {"group_size": 64, "bits": 4, "predicate": _mixed}
