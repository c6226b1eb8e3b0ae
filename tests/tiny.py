"""Tiny random checkpoints, written as mlx-lm writes them. Random routers: evictions happen."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes, quantize_model, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 320

QWEN3_5_MOE: dict[str, Any] = {
    "model_type": "qwen3_5_moe",
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "full_attention_interval": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [4, 2, 2],
        },
    },
}

NEMOTRON_H: dict[str, Any] = {
    "model_type": "nemotron_h",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "max_position_embeddings": 4096,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "attention_bias": False,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_proj_bias": False,
    "ssm_state_size": 32,
    "conv_kernel": 4,
    "n_groups": 2,
    "time_step_limit": [0.0, 100.0],
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "hybrid_override_pattern": "ME*EME",
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
}

CONFIGS = {"qwen3_5_moe": QWEN3_5_MOE, "nemotron_h": NEMOTRON_H}


def build(
    config: dict[str, Any], seed: int = 0, dtype: mx.Dtype = mx.float32, classes: Any = _get_classes
) -> nn.Module:
    """A random model. Routers get unit-variance logits, so tokens spread over experts."""
    mx.random.seed(seed)
    model_class, args_class = classes(config)
    model = model_class(args_class.from_dict(config))

    def randomize(path: str, array: mx.array) -> mx.array:
        if path.endswith(("gate.weight", "A_log", "dt_bias", "D")):
            scale = array.shape[-1] ** -0.5 * 4 if path.endswith("gate.weight") else 0.5
            return (mx.random.normal(array.shape) * scale).astype(mx.float32)
        if array.ndim >= 2:
            return (mx.random.normal(array.shape) * array.shape[-1] ** -0.5).astype(dtype)
        return (1 + 0.1 * mx.random.normal(array.shape)).astype(dtype)

    model.update(tree_map_with_path(randomize, model.parameters()))
    mx.eval(model.parameters())
    return model


def write(
    folder: Path,
    family: str = "qwen3_5_moe",
    *,
    quantization: dict[str, Any] | None = None,
    seed: int = 0,
    dtype: mx.Dtype = mx.float32,
    config: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint in MLX layout: config, weights, tokenizer, chat template."""
    config = json.loads(json.dumps(config or CONFIGS[family]))
    return save(folder, build(config, seed, dtype), config, quantization)


def save(
    folder: Path,
    model: nn.Module,
    config: dict[str, Any],
    quantization: dict[str, Any] | None = None,
) -> Path:
    """A model in MLX layout, as `mlx_lm.convert` writes it, with the tiny tokenizer."""
    if quantization is not None:
        model, config = quantize_model(
            model,
            config,
            quantization["group_size"],
            quantization["bits"],
            mode=quantization.get("mode", "affine"),
            quant_predicate=quantization.get("predicate"),
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder)
    return folder


def write_hf_qwen(folder: Path, seed: int = 0, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """The same family as Hugging Face lays it out: fused gate_up_proj, no quantization."""
    config = json.loads(json.dumps(QWEN3_5_MOE))
    model = build(config, seed, dtype)
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        hf = name.replace("language_model.model", "model.language_model")
        hf = hf.replace("language_model.lm_head", "lm_head")
        if "conv1d.weight" in hf:
            array = array.moveaxis(1, 2)
        norm = hf.endswith(("layernorm.weight", "q_norm.weight", "k_norm.weight"))
        if norm or hf == "model.language_model.norm.weight":
            array = array - 1.0
        weights[hf] = array
    for name in [n for n in weights if n.endswith("switch_mlp.gate_proj.weight")]:
        block = name.removesuffix("switch_mlp.gate_proj.weight")
        up = weights.pop(f"{block}switch_mlp.up_proj.weight")
        gate = weights.pop(name)
        weights[f"{block}experts.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
        down = weights.pop(f"{block}switch_mlp.down_proj.weight")
        weights[f"{block}experts.down_proj"] = down
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: mx.contiguous(array) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Byte-level: 256 bytes, then special tokens, then fillers up to VOCAB."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    fillers = [f"<filler{i}>" for i in range(VOCAB - len(alphabet) - len(special))]
    vocab = {token: i for i, token in enumerate([*alphabet, *special, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
