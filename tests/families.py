"""Tiny random checkpoints of every family, written by transformers, with its logits as the oracle.

torch and transformers are imported where they are used: the tests that need them skip without.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import family_configs as configs
import mlx.core as mx
import numpy as np
import tiny
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

PROMPT, DECODE = 64, 32

Weights = dict[str, mx.array]


@dataclass(frozen=True)
class Family:
    """One family: its published config.json, and how its published weights are no plain save.

    Attributes:
        mtp: Where published checkpoints keep the multi-token prediction layer ("mtp.layers.0.").
        mtp_extra: What that layer has besides a copy of the last decoder layer.
        original_format: Whether the Hub has what transformers unfuses its experts to.
        publish: What turns what transformers wrote into what the Hub has.
        zero: Parameters that stay at zero.
        as_mlx: What makes transformers' model agree where mlx-lm computes something else.
        differs: In what mlx-lm and transformers disagree, and what hides it here.
        hf: Whether transformers has the family; the oracle is mlx-lm where not.
        seed: Chosen for a varied continuation and no near-ties between its best two tokens.
    """

    name: str
    config: dict[str, Any]
    mtp: str = ""
    mtp_extra: tuple[str, ...] = ()
    original_format: bool = True
    publish: Callable[[Weights], Weights] | None = None
    zero: tuple[str, ...] = ()
    as_mlx: Callable[[Any], None] | None = None
    differs: str = ""
    hf: bool = True
    seed: int = 0


# Names, in transformers' modules, of what scores the experts.
ROUTERS = ("mlp.gate.weight", "router.weight", "router.proj.weight", "feed_forward.gate.weight")
ROUTERS += ("mixer.gate.weight", "moe.gate.weight", "block_sparse_moe.gate.weight")


def write_hf(family: Family, folder: Path) -> Path:
    """The family's checkpoint as transformers writes it, in the layout published on the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    if not family.hf:
        return tiny.write(folder, config=family.config, seed=family.seed)
    published = json.dumps(family.config, indent=2)
    (folder / "config.json").write_text(published)
    _random(family, folder).save_pretrained(
        folder, save_original_format=family.original_format, max_shard_size="1GB"
    )
    # transformers 5 respells config.json (rope_parameters); mlx-lm reads what the Hub has.
    (folder / "config.json").write_text(published)
    tiny.write_tokenizer(folder)
    path = str(folder / "model.safetensors")
    weights = {**mx.load(path), **_mtp(family, mx.load(path))}
    if family.publish:
        weights = family.publish(weights)
    mx.eval(weights)
    mx.save_safetensors(path, weights, {"format": "pt"})
    return folder


def write_mlx(hf: Path, folder: Path, quantization: dict[str, Any] | None = None) -> Path:
    """The same checkpoint as `mlx_lm.convert` writes it."""
    return tiny.save(folder, *load_model(hf, lazy=True), quantization)


def prompt(seed: int = 0, length: int = PROMPT) -> list[int]:
    """Random bytes."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, length)]


def oracle(
    family: Family, folder: Path, tokens: list[int], decode: int = DECODE
) -> tuple[list[int], np.ndarray]:
    """The prompt with its greedy continuation, and float32 logits [len(tokens) + decode, VOCAB].

    The logits are of one pass over everything: not even transformers' own cache is trusted.
    """
    if not family.hf:
        return _mlx_oracle(folder, tokens, decode)
    import torch

    model = _load(family, folder)
    model.generation_config.eos_token_id = None
    given = torch.tensor([tokens])
    with torch.inference_mode():
        mask = torch.ones_like(given)
        ids = model.generate(given, attention_mask=mask, do_sample=False, max_new_tokens=decode)
        # What follows the first wrong token is a guess: each pass mends one token at least.
        for _ in range(decode + 1):
            logits = model(ids, use_cache=False).logits[0]
            greedy = torch.cat([given[0], logits[len(tokens) - 1 : -1].argmax(-1)])[None]
            if torch.equal(greedy, ids):
                return ids[0].tolist(), logits.float().numpy()
            ids = greedy
    raise AssertionError(f"{family.name}: transformers does not agree with itself")


def logits(
    model: Any, tokens: list[int], prefill: int = PROMPT, chunk: int = 24, cache: Any = None
) -> np.ndarray:
    """What a model on MLX says of `tokens`: a prompt in chunks, then one at a time, with a cache.

    Float32, [len(tokens), VOCAB].
    """
    cache = cache or make_prompt_cache(model)
    rows, start = [], 0
    for end in [*range(chunk, prefill, chunk), *range(prefill, len(tokens) + 1)]:
        rows.append(model(mx.array([tokens[start:end]]), cache=cache)[0])
        mx.eval(rows[-1])
        start = end
    return np.array(mx.concatenate(rows).astype(mx.float32))


def _mlx_oracle(folder: Path, tokens: list[int], decode: int) -> tuple[list[int], np.ndarray]:
    model, _ = load_model(folder)
    cache = make_prompt_cache(model)
    last, tokens = mx.array([tokens]), list(tokens)
    for _ in range(decode):
        tokens.append(model(last, cache=cache)[0, -1].argmax().item())
        last = mx.array([tokens[-1:]])
    return tokens, np.array(model(mx.array([tokens]))[0])


def _model_class(config: dict[str, Any]) -> Any:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = config["architectures"][0]
    return getattr(transformers, RENAMED.get(name, name))


# Architectures whose published name is not that of transformers' class.
RENAMED = {"BailingMoeV3ForCausalLM": "BailingHybridForCausalLM"}


def _parsed(family: Family, model_class: Any) -> Any:
    """The configuration as transformers reads it, under its own name of the family."""
    config = json.loads(json.dumps(family.config))
    return model_class.config_class.from_dict(
        {**config, "model_type": model_class.config_class.model_type}
    )


def _load(family: Family, folder: Path) -> Any:
    """transformers' model of what is on disk, in float32."""
    import torch

    model_class = _model_class(family.config)
    given: dict[str, Any] = {}
    if "quantization_config" in family.config:
        from transformers import Mxfp4Config

        given["quantization_config"] = Mxfp4Config(dequantize=True)
    model = model_class.from_pretrained(
        folder,
        config=_parsed(family, model_class),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        **given,
    )
    if family.as_mlx:
        family.as_mlx(model)
    return model.float().eval()


def _random(family: Family, folder: Path) -> Any:
    """The family's model, with every parameter and every saved buffer at random."""
    import torch

    torch.manual_seed(family.seed)
    model_class = _model_class(family.config)
    config = _parsed(family, model_class)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = model_class._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(family.seed)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, tensor in dict(model.state_dict(keep_vars=True)).items():
            if name.endswith(family.zero) or (tied and "lm_head" in name):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim < 2 or name.endswith("A_log"):
                # Norms, biases, decays, sinks: around what they start from, which may be 0 or 1.
                tensor.copy_(tensor + 0.2 * noise)
            elif name.endswith(ROUTERS):
                tensor.copy_(2 * tensor.shape[-1] ** -0.5 * noise)
            elif "embed" in name:
                # Small where tied: a token would only ever predict itself.
                tensor.copy_((0.03 if tied else 0.5) * noise)
            else:
                tensor.copy_(tensor.shape[-1] ** -0.5 * noise)
    return model


def _mtp(family: Family, weights: Weights) -> Weights:
    """A multi-token prediction layer: a copy of the last decoder layer, and what joins it."""
    if not family.mtp:
        return {}
    text = family.config.get("text_config", family.config)
    layer = f"layers.{text['num_hidden_layers'] - 1}."
    hidden, copied, key = text["hidden_size"], {}, mx.random.key(family.seed)
    for name, array in weights.items():
        prefix, found, rest = name.partition(layer)
        if found and "visual" not in prefix:
            copied[family.mtp + rest] = array + 0
    for name in family.mtp_extra:
        if "norm" in name:
            copied[name] = mx.random.normal((hidden,), key=key)
        elif "embed" in name or "head" in name:
            copied[name] = mx.random.normal((tiny.VOCAB, hidden), key=key)
        else:
            copied[name] = mx.random.normal((hidden, 2 * hidden), key=key)
    return copied


def _transposed(weights: Weights) -> Weights:
    """Qwen3-VL's experts: [experts, in, out] on the Hub, [experts, out, in] in transformers 5."""
    return {
        name: mx.contiguous(array.swapaxes(1, 2)) if ".experts." in name else array
        for name, array in weights.items()
    }


def _mxfp4(weights: Weights) -> Weights:
    """gpt-oss's experts as published: 32 values in 16 bytes, [experts, out, in / 32, 16]."""
    packed = {}
    for name, array in weights.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = array
            continue
        # transformers: [experts, in, out].
        blocks, scales = mx.quantize(array.swapaxes(1, 2), group_size=32, bits=4, mode="mxfp4")
        packed[f"{name}_blocks"] = mx.unflatten(blocks.view(mx.uint8), -1, (-1, 16))
        packed[f"{name}_scales"] = scales
    return packed


def _kimi(weights: Weights) -> Weights:
    """Kimi Linear's dense layers, which transformers renames along with its sparse ones."""
    dense = ("block_sparse_moe.gate_proj", "block_sparse_moe.up_proj", "block_sparse_moe.down_proj")
    return {
        name.replace("block_sparse_moe", "mlp") if any(d in name for d in dense) else name: array
        for name, array in weights.items()
    }


def _ling(weights: Weights) -> Weights:
    """Ling 3's linear attention ends in o_proj, its latent one in dense: transformers forgets."""
    linear = {name.removesuffix(".A_log") for name in weights if name.endswith(".A_log")}
    return {
        name.replace(".dense.", ".o_proj.")
        if name.partition(".dense.")[0] in linear
        else name: array
        for name, array in weights.items()
    }


def _renormalize(model: Any) -> None:
    """Let Jamba's routers hand out weights that sum to one, as mlx-lm's do."""
    for module in model.modules():
        if type(module).__name__ == "JambaTopKRouter":
            module.register_forward_hook(
                lambda _module, _given, out: (out[0], out[1] / out[1].sum(-1, keepdim=True), out[2])
            )


def _appended(layer: int) -> dict[str, Any]:
    """DeepSeek's way: the prediction layer is one more decoder layer."""
    prefix = f"model.layers.{layer}."
    names = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight")
    names += ("shared_head.norm.weight", "shared_head.head.weight")
    return {"mtp": prefix, "mtp_extra": tuple(prefix + name for name in names)}


QWEN_MTP: dict[str, Any] = {
    "mtp": "mtp.layers.0.",
    "mtp_extra": (
        "mtp.fc.weight",
        "mtp.norm.weight",
        "mtp.pre_fc_norm_embedding.weight",
        "mtp.pre_fc_norm_hidden.weight",
    ),
}

DT = "mlx-lm clamps dt to time_step_limit, transformers to (time_step_min, inf): the same here"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", configs.LLAMA, seed=1),
        Family("qwen3", configs.QWEN3, seed=4),
        Family("nemotron", configs.NEMOTRON, seed=5),
        Family(
            "mamba2",
            configs.MAMBA2,
            seed=1,
            differs="mlx-lm's gated norm knows no groups; the tiny config has one, as published",
        ),
        Family("nemotron_h-dense", configs.NEMOTRON_H_DENSE, seed=2, differs=DT),
        Family("nemotron_h", configs.NEMOTRON_H, seed=5, differs=DT),
        Family(
            "nemotron_h-latent",
            configs.NEMOTRON_H_LATENT,
            seed=5,
            mtp="mtp.layers.0.",
            mtp_extra=(
                "mtp.layers.0.enorm.weight",
                "mtp.layers.0.hnorm.weight",
                "mtp.layers.0.eh_proj.weight",
            ),
            differs=DT,
        ),
        Family("qwen3_moe", configs.QWEN3_MOE, seed=5),
        Family("qwen3_vl_moe", configs.QWEN3_VL_MOE, seed=3, publish=_transposed),
        Family("qwen3_next", configs.QWEN3_NEXT, seed=1, **QWEN_MTP),
        # Fused experts on the Hub, [experts, 2 * intermediate, hidden], as transformers computes.
        Family("qwen3_5_moe", configs.QWEN3_5_MOE, seed=4, original_format=False, **QWEN_MTP),
        # mlx-lm and transformers know the prediction layer of DeepSeek's 61 layers by its number.
        Family("deepseek_v3", configs.DEEPSEEK_V3, seed=2, **_appended(61)),
        Family("kimi_k2", configs.KIMI_K2, seed=1),
        Family("deepseek_v32", configs.DEEPSEEK_V32, seed=5, **_appended(61)),
        Family("glm4_moe", configs.GLM4_MOE, seed=5, **_appended(4)),
        Family(
            "gpt_oss",
            configs.GPT_OSS,
            seed=3,
            publish=_mxfp4,
            differs="mlx-lm's YaRN ignores truncate=false; the tiny config says true",
        ),
        Family("mixtral", configs.MIXTRAL, seed=5),
        Family("minimax", configs.MINIMAX_M2, seed=1),
        Family("granitemoehybrid", configs.GRANITE, seed=2),
        Family(
            "jamba",
            configs.JAMBA,
            seed=1,
            as_mlx=_renormalize,
            differs="mlx-lm renormalizes the top-k router weights; transformers leaves them",
        ),
        Family("lfm2_moe", configs.LFM2_MOE, seed=2),
        Family("olmoe", configs.OLMOE, seed=5),
        Family("llama4", configs.LLAMA4),
        Family(
            "ernie4_5_moe",
            configs.ERNIE,
            seed=1,
            zero=("e_score_correction_bias",),
            mtp="mtp_block.0.",
            mtp_extra=(
                "mtp_emb_norm.0.weight",
                "mtp_hidden_norm.0.weight",
                "mtp_linear_proj.0.weight",
            ),
            differs="mlx-lm drops e_score_correction_bias; transformers selects experts with it",
        ),
        Family("kimi_linear", configs.KIMI_LINEAR, seed=1, publish=_kimi),
        Family("gemma4", configs.GEMMA4, seed=2),
        Family("bailing_moe_v3", configs.BAILING_V3, seed=4, publish=_ling, **_appended(4)),
        Family("bailing_hybrid", configs.BAILING_HYBRID, hf=False),
        Family("bailing_moe", configs.BAILING_MOE, hf=False),
    )
}
