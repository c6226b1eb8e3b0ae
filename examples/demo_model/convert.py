"""From a training checkpoint to the embedded model: Hugging Face float32 folder, parity check, mlx-
lm 4-bit folder.

`python convert.py RUN DEMO` reads RUN/final.pt (or RUN/checkpoint.pt), writes RUN/hf and replaces
the data files in DEMO.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import torch
import transformers
from model import text_config
from safetensors.torch import save_file
from tokenizer import TEMPLATE
from transformers import AutoTokenizer, Qwen3_5MoeConfig, Qwen3_5MoeForCausalLM

TOLERANCE = 1e-3  # largest logit difference over the largest logit, float32 against float32
TOP_KEYS = (
    "architectures",
    "image_token_id",
    "model_type",
    "text_config",
    "tie_word_embeddings",
    "transformers_version",
    "video_token_id",
    "vision_end_token_id",
    "vision_start_token_id",
)
TEXT_KEYS = (
    "attention_bias",
    "attention_dropout",
    "attn_output_gate",
    "dtype",
    "eos_token_id",
    "full_attention_interval",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "layer_types",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "mamba_ssm_dtype",
    "max_position_embeddings",
    "mlp_only_layers",
    "model_type",
    "moe_intermediate_size",
    "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "output_router_logits",
    "pad_token_id",
    "partial_rotary_factor",
    "rms_norm_eps",
    "rope_parameters",
    "router_aux_loss_coef",
    "shared_expert_intermediate_size",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)
PARITY_PROMPT = (
    "<|im_start|>user\nWhere does Mira live?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def full_config(tokenizer) -> dict:
    """config.json with the keys of the published Qwen3.5-MoE checkpoints."""
    to_id = tokenizer.convert_tokens_to_ids
    text = text_config(len(tokenizer), to_id("<|im_end|>"), to_id("<|endoftext|>"))
    config = Qwen3_5MoeConfig(
        text_config=text.to_dict(),
        image_token_id=to_id("<|image_pad|>"),
        video_token_id=to_id("<|video_pad|>"),
        vision_start_token_id=to_id("<|vision_start|>"),
        vision_end_token_id=to_id("<|vision_end|>"),
    ).to_dict()
    config["architectures"] = ["Qwen3_5MoeForConditionalGeneration"]
    config["eos_token_id"] = [to_id("<|im_end|>"), to_id("<|endoftext|>")]
    config["transformers_version"] = transformers.__version__
    config["text_config"] |= {
        "attn_output_gate": True,
        "dtype": "float32",
        "full_attention_interval": 4,
        "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 0,
        "mtp_use_dedicated_embeddings": False,
    }
    config["text_config"] = {
        key: config["text_config"][key] for key in TEXT_KEYS if key in config["text_config"]
    }
    return {key: config[key] for key in ("eos_token_id", *TOP_KEYS)}


def write_hf(run: Path) -> Path:
    """RUN/hf: the float32 checkpoint in the published layout, fused gate_up_proj and all."""
    checkpoint = run / "final.pt" if (run / "final.pt").exists() else run / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)["model"]
    folder = run / "hf"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    weights = {
        name.replace("model.", "model.language_model.", 1): w.float().contiguous()
        for name, w in state.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    tokenizer.chat_template = TEMPLATE.read_text()
    tokenizer.save_pretrained(folder)
    config = full_config(tokenizer)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["text_config"]["pad_token_id"],
    }
    generation |= {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return folder


def parity(run: Path, folder: Path) -> float:
    """Largest relative logit difference between transformers' own classes and mlx-lm, both in
    float32."""
    model, tokenizer = mlx_lm.load(str(folder))
    ids = tokenizer.encode(PARITY_PROMPT)
    ours = np.array(model(mx.array([ids]))[0].astype(mx.float32))
    checkpoint = run / "final.pt" if (run / "final.pt").exists() else run / "checkpoint.pt"
    reference = Qwen3_5MoeForCausalLM(text_config(len(tokenizer._tokenizer), 0, 0))
    reference.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    with torch.no_grad():
        theirs = reference.eval()(torch.tensor([ids])).logits[0].numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def quantized(folder: Path, out: Path, bits: int = 4) -> None:
    """mlx-lm's own conversion, float32 scales and activations."""
    shutil.rmtree(out, ignore_errors=True)
    mlx_lm.convert(
        str(folder), str(out), quantize=True, q_group_size=64, q_bits=bits, dtype="float32"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("demo", type=Path)
    args = parser.parse_args()
    folder = write_hf(args.run)
    error = parity(args.run, folder)
    print(f"transformers against mlx-lm, float32: {error:.2e} relative")
    if error > TOLERANCE:
        raise SystemExit(
            f"the two disagree by more than {TOLERANCE}: the conversion is wrong, "
            f"{args.demo} is untouched"
        )
    quantized(folder, args.run / "mlx4")
    args.demo.mkdir(parents=True, exist_ok=True)
    for path in sorted((args.run / "mlx4").iterdir()):
        if path.name != "README.md":
            shutil.copy(path, args.demo / path.name)
            print(f"{path.stat().st_size:>10,}  {args.demo / path.name}")


if __name__ == "__main__":
    main()
