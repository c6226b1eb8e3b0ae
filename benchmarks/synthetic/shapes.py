"""Named model shapes, and the tensors mlx-lm stores for them.

Knows configs and module trees, not values: every array here stays lazy, so a 250 GB model
costs a few megabytes.
"""

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes, get_total_parameters, quantize_model

SAFETENSORS_DTYPES = {
    mx.uint8: "U8",
    mx.uint32: "U32",
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.float32: "F32",
}


@dataclass(frozen=True)
class Quantized:
    """How a module packs its weights: ``bits`` a weight, one scale for ``group_size``."""

    bits: int
    group_size: int
    mode: str


@dataclass(frozen=True)
class Tensor:
    """One entry of the checkpoint. ``quantized`` is None for plain weights."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it
    quantized: Quantized | None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * {"U8": 1, "BF16": 2, "F16": 2, "U32": 4, "F32": 4}[self.dtype]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Skeleton:
    """Everything about a checkpoint except its values."""

    config: dict[str, Any]
    tensors: list[Tensor]
    parameters: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def config_for(shape: str, layers: int | None, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a named shape, cut or stretched to ``layers`` layers."""
    config = copy.deepcopy(SHAPES[shape])
    text = config.get("text_config", config)
    layers = layers or text["num_hidden_layers"]
    text["num_hidden_layers"] = layers
    if pattern := text.get("hybrid_override_pattern"):
        text["hybrid_override_pattern"] = (pattern * math.ceil(layers / len(pattern)))[:layers]
    elif every := text.get("full_attention_interval"):
        kinds = ["linear_attention"] * (every - 1) + ["full_attention"]
        text["layer_types"] = (kinds * math.ceil(layers / every))[:layers]
    end, begin, eos = (text["vocab_size"] - n for n in (3, 2, 1))  # as synthetic.tokenizer
    config |= {"eos_token_id": eos, "bos_token_id": begin, "pad_token_id": end}
    text |= {"dtype": dtype, "eos_token_id": eos, "bos_token_id": begin, "pad_token_id": end}
    return config


def published_layers(shape: str) -> int:
    return int(SHAPES[shape].get("text_config", SHAPES[shape])["num_hidden_layers"])


def skeleton(
    config: dict[str, Any], dtype: str, bits: int | None, group_size: int | None, mode: str
) -> Skeleton:
    """What the checkpoint of ``lazy_model`` consists of. Arguments and errors are the same."""
    model, config = lazy_model(config, dtype, bits, group_size, mode)
    return Skeleton(config, list(_tensors(model)), get_total_parameters(model))


def lazy_model(
    config: dict[str, Any], dtype: str, bits: int | None, group_size: int | None, mode: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Builds mlx-lm's model lazily, casts and quantizes it as ``mlx_lm.convert`` does.

    Args:
        config: As in ``config.json``; it is not changed.
        dtype: Of scales, norms and plain weights. What mlx-lm keeps in float32 stays so.
        bits, group_size: None for the default of ``mode``.

    Returns:
        The model and its config.

    Raises:
        ValueError: If MLX has no such quantization, or no layer can take it.
    """
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    cast: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)

    def to_dtype(path: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(getattr(mx, dtype)) if floating and cast(path) else array

    model.update(tree_map_with_path(to_dtype, model.parameters()))
    with contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints its bits per weight
        model, config = quantize_model(model, config, group_size, bits, mode)
    if not any(tensor.quantized for tensor in _tensors(model)):
        raise ValueError(f"No layer can take group size {group_size}. Try 32, 64 or 128.")
    return model, config


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    modules = dict(model.named_modules())
    for name, array in tree_flatten(model.parameters()):
        owner = modules[name.rpartition(".")[0]]
        packed = hasattr(owner, "bits") and name.endswith((".weight", ".scales", ".biases"))
        quantized = Quantized(owner.bits, owner.group_size, owner.mode) if packed else None
        yield Tensor(name, array.shape, SAFETENSORS_DTYPES[array.dtype], quantized)


_QWEN35_ROPE = {
    "mrope_interleaved": True,
    "mrope_section": [11, 11, 10],
    "rope_type": "default",
    "rope_theta": 10000000,
    "partial_rotary_factor": 0.25,
}


def _qwen35(**geometry: int) -> dict[str, Any]:
    text = {
        "model_type": "qwen3_5_moe_text",
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "tie_word_embeddings": False,
        "rope_parameters": _QWEN35_ROPE,
        **geometry,
    }
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": text,
    }


# Geometry of the public configs; `tiny` has every part of its family and loads in a second.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3.5-35b-a3b": _qwen35(
        hidden_size=2048,
        num_hidden_layers=40,
        vocab_size=248320,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    ),
    "qwen3.5-397b-a17b": _qwen35(
        hidden_size=4096,
        num_hidden_layers=60,
        vocab_size=248320,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=64,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=1024,
        shared_expert_intermediate_size=1024,
    ),
    "nemotron-3-nano-30b-a3b": {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hidden_size": 2688,
        "num_hidden_layers": 52,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "vocab_size": 131072,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "attention_bias": False,
        "max_position_embeddings": 262144,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "mamba_proj_bias": False,
        "mamba_hidden_act": "silu",
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "n_groups": 8,
        "expand": 2,
        "use_bias": False,
        "use_conv_bias": True,
        "intermediate_size": 1856,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "layer_norm_epsilon": 1e-5,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {  # no experts: it streams layer by layer
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "tiny": _qwen35(
        hidden_size=256,
        num_hidden_layers=4,
        vocab_size=2048,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
    ),
}
