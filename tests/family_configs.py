"""The config.json of every family's tiny checkpoint, spelled as published ones are."""

from typing import Any

from tiny import VOCAB

Config = dict[str, Any]

# What most families say. Every projection reads a multiple of 64, the group of a quantization.
BASE: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    # <|endoftext|> and <|im_end|> of the tiny tokenizer.
    "pad_token_id": 256,
    "bos_token_id": 256,
    "eos_token_id": 258,
}


def config(model_type: str, architecture: str, **rest: Any) -> Config:
    return {"model_type": model_type, "architectures": [architecture], **BASE, **rest}


def without(given: Config, *names: str) -> Config:
    return {name: value for name, value in given.items() if name not in names}


LLAMA = config(
    "llama",
    "LlamaForCausalLM",
    mlp_bias=False,
    rope_scaling={
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_type": "llama3",
    },
)

QWEN3 = config("qwen3", "Qwen3ForCausalLM", tie_word_embeddings=True)

QWEN3_MOE = config(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[1],
)

VISION_QWEN: Config = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}

QWEN3_VL_MOE: Config = {
    "model_type": "qwen3_vl_moe",
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "tie_word_embeddings": False,
    "text_config": {
        **without(QWEN3_MOE, "architectures", "rope_scaling"),
        "model_type": "qwen3_vl_moe_text",
        "mlp_only_layers": [],
        # Not 64: transformers tells a published, transposed tensor by its shape.
        "moe_intermediate_size": 128,
        "num_experts": 12,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": [8, 4, 4],
        },
    },
    "vision_config": {"model_type": "qwen3_vl_moe", **VISION_QWEN},
}

LINEAR_QWEN: Config = {
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
}

QWEN3_NEXT = config(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    **LINEAR_QWEN,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
    partial_rotary_factor=0.25,
)

QWEN3_5_MOE: Config = {
    "model_type": "qwen3_5_moe",
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "tie_word_embeddings": False,
    "text_config": {
        **without(BASE, "rope_theta", "rope_scaling"),
        **LINEAR_QWEN,
        "model_type": "qwen3_5_moe_text",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
        },
    },
    "vision_config": {
        "model_type": "qwen3_5_moe",
        **without(VISION_QWEN, "deepstack_visual_indexes"),
    },
}

NEMOTRON = config(
    "nemotron",
    "NemotronForCausalLM",
    hidden_act="relu2",
    norm_eps=1e-5,
    partial_rotary_factor=0.5,
    mlp_bias=False,
)

NEMOTRON_H: Config = {
    **without(BASE, "rms_norm_eps", "rope_theta", "rope_scaling", "hidden_act"),
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "num_hidden_layers": 7,
    "hybrid_override_pattern": "ME*-EME",
    "layer_norm_epsilon": 1e-5,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_proj_bias": False,
    "mamba_hidden_act": "silu",
    "ssm_state_size": 32,
    "conv_kernel": 4,
    "n_groups": 2,
    "chunk_size": 32,
    # transformers clamps dt to (time_step_min, inf), mlx-lm to time_step_limit: the same here.
    "time_step_min": 0.02,
    "time_step_limit": [0.02, float("inf")],
    "use_bias": False,
    "use_conv_bias": True,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}

NEMOTRON_H_LATENT: Config = {
    **NEMOTRON_H,
    "hidden_size": 128,
    "moe_latent_size": 64,
    "n_group": 4,
    "topk_group": 2,
}

NEMOTRON_H_DENSE: Config = {
    **NEMOTRON_H,
    "num_hidden_layers": 5,
    "hybrid_override_pattern": "M-*M-",
}

MAMBA2: Config = {
    "model_type": "mamba2",
    "architectures": ["Mamba2ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_heads": 4,
    "head_dim": 32,
    "state_size": 32,
    # One group, as published: mlx-lm's gated norm knows no groups, transformers' does.
    "n_groups": 1,
    "expand": 2,
    "conv_kernel": 4,
    "chunk_size": 32,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "rms_norm": True,
    "norm_before_gate": False,
    "residual_in_fp32": True,
    "time_step_limit": [0.0, 100.0],
    "time_step_rank": 4,
    "tie_word_embeddings": False,
}

LATENT_ATTENTION: Config = {
    "num_key_value_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}

GROUPED_EXPERTS: Config = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}

YARN: Config = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}

DEEPSEEK_V3 = without(
    config(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        **{**LATENT_ATTENTION, **GROUPED_EXPERTS},
        num_nextn_predict_layers=1,
    ),
    "head_dim",
)
DEEPSEEK_V3["rope_scaling"] = YARN

KIMI_K2: Config = {
    **DEEPSEEK_V3,
    "model_type": "kimi_k2",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "num_nextn_predict_layers": 0,
}

DEEPSEEK_V32: Config = {
    **DEEPSEEK_V3,
    "model_type": "deepseek_v32",
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_head_dim": 64,
    # A score is a sum of ReLUs over heads: with few heads several keys score zero, a tie.
    "index_n_heads": 16,
    "index_topk": 32,
}

GLM4_MOE = config(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    **without(GROUPED_EXPERTS, "scoring_func", "topk_method", "moe_layer_freq"),
    partial_rotary_factor=0.5,
    use_qk_norm=True,
    num_nextn_predict_layers=1,
) | {"attention_bias": True}

GPT_OSS = config(
    "gpt_oss",
    "GptOssForCausalLM",
    num_local_experts=16,
    num_experts_per_tok=4,
    sliding_window=20,
    layer_types=["sliding_attention", "full_attention"] * 2,
    swiglu_limit=7.0,
) | {
    "intermediate_size": 64,
    "attention_bias": True,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        # False as published, which mlx-lm's YaRN does not know: it rounds the range outwards.
        "truncate": True,
        "original_max_position_embeddings": 64,
    },
}

MIXTRAL = config(
    "mixtral",
    "MixtralForCausalLM",
    num_local_experts=12,
    num_experts_per_tok=3,
    sliding_window=None,
) | {"intermediate_size": 64}

MINIMAX_M2 = config(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    num_local_experts=16,
    num_experts_per_tok=4,
    shared_intermediate_size=0,
    rotary_dim=16,
    scoring_func="sigmoid",
    use_qk_norm=True,
    qk_norm_type="per_layer",
    use_routing_bias=True,
) | {"intermediate_size": 64}

GRANITE: Config = config(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    layer_types=["mamba", "mamba", "attention", "mamba"],
    num_local_experts=16,
    num_experts_per_tok=4,
    shared_intermediate_size=64,
    embedding_multiplier=3.0,
    attention_multiplier=0.25,
    logits_scaling=4.0,
    residual_multiplier=0.5,
    position_embedding_type="nope",
    mamba_n_heads=4,
    mamba_d_head=32,
    mamba_d_state=32,
    mamba_d_conv=4,
    mamba_n_groups=1,
    mamba_expand=2,
    mamba_chunk_size=32,
    mamba_conv_bias=True,
    mamba_proj_bias=False,
) | {"intermediate_size": 64, "tie_word_embeddings": True}

JAMBA = without(
    config(
        "jamba",
        "JambaForCausalLM",
        attn_layer_offset=1,
        attn_layer_period=3,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_d_conv=4,
        mamba_d_state=16,
        mamba_expand=2,
        mamba_dt_rank=16,
        mamba_conv_bias=True,
        mamba_proj_bias=False,
        use_mamba_kernels=False,
        num_experts=16,
        num_experts_per_tok=3,
    ),
    "head_dim",
    "rope_theta",
    "rope_scaling",
) | {"num_hidden_layers": 6, "intermediate_size": 64}

LFM2_MOE = config(
    "lfm2_moe",
    "Lfm2MoeForCausalLM",
    layer_types=["conv", "conv", "full_attention", "conv"],
    num_dense_layers=1,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    norm_topk_prob=True,
    use_expert_bias=True,
    routed_scaling_factor=1.5,
    norm_eps=1e-5,
    conv_bias=False,
    conv_L_cache=3,
) | {"tie_word_embeddings": True}

OLMOE = config(
    "olmoe",
    "OlmoeForCausalLM",
    num_experts=16,
    num_experts_per_tok=4,
    norm_topk_prob=False,
    clip_qkv=None,
) | {"intermediate_size": 64}

LLAMA4: Config = {
    "model_type": "llama4",
    "architectures": ["Llama4ForConditionalGeneration"],
    "tie_word_embeddings": False,
    "text_config": {
        **BASE,
        "model_type": "llama4_text",
        "intermediate_size": 64,
        "intermediate_size_mlp": 128,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 16,
        "attn_scale": 0.1,
    },
    "vision_config": {
        "model_type": "llama4_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
}

ERNIE = config(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    moe_num_experts=16,
    moe_k=4,
    moe_intermediate_size=64,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
    moe_layer_end_index=3,
    moe_layer_interval=1,
    moe_capacity=[64, 64, 64],
    use_bias=False,
) | {"tie_word_embeddings": True}

KIMI_LINEAR = without(
    config(
        "kimi_linear",
        "KimiLinearForCausalLM",
        **without(LATENT_ATTENTION, "q_lora_rank"),
        q_lora_rank=None,
        mla_use_nope=True,
        linear_attn_config={
            "full_attn_layers": [3],
            "kda_layers": [1, 2, 4],
            "head_dim": 32,
            "num_heads": 2,
            "short_conv_kernel_size": 4,
        },
        model_max_length=4096,
        num_experts=16,
        num_experts_per_token=4,
        num_shared_experts=1,
        moe_intermediate_size=64,
        moe_router_activation_func="sigmoid",
        moe_renormalize=True,
        moe_layer_freq=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.446,
        use_grouped_topk=True,
        num_expert_group=1,
        topk_group=1,
    ),
    "rope_scaling",
)

GEMMA4: Config = {
    "model_type": "gemma4",
    "architectures": ["Gemma4ForConditionalGeneration"],
    "tie_word_embeddings": True,
    "vocab_size": VOCAB,
    "text_config": {
        **without(BASE, "rope_theta", "rope_scaling", "hidden_act"),
        "model_type": "gemma4_text",
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 6,
        "sliding_window": 20,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "final_logit_softcapping": 30.0,
        "enable_moe_block": True,
        "num_experts": 16,
        "top_k_experts": 4,
        "moe_intermediate_size": 64,
    },
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "position_embedding_size": 64,
    },
}

LING_EXPERTS: Config = {
    "moe_intermediate_size": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}

# Ling 3
BAILING_V3 = config(
    "bailing_hybrid",
    "BailingMoeV3ForCausalLM",
    **LATENT_ATTENTION | {"q_lora_rank": None},
    **LING_EXPERTS,
    moe_shared_expert_intermediate_size=64,
    layer_group_size=4,
    short_conv_kernel_size=4,
    kda_safe_gate=True,
    kda_lower_bound=-5.0,
    no_kda_lora=True,
    rope_interleave=True,
    num_nextn_predict_layers=1,
)

# Ling 2.5
BAILING_HYBRID = config(
    "bailing_hybrid",
    "BailingMoeV2_5ForCausalLM",
    **LATENT_ATTENTION,
    **LING_EXPERTS,
    moe_shared_expert_intermediate_size=64,
    layer_group_size=4,
    group_norm_size=2,
    rope_interleave=True,
    partial_rotary_factor=0.5,
    use_qk_norm=True,
    score_function="sigmoid",
    moe_router_enable_expert_bias=True,
)

# Ling 2
BAILING_MOE = config(
    "bailing_moe",
    "BailingMoeV2ForCausalLM",
    **LING_EXPERTS,
    partial_rotary_factor=0.5,
    use_qk_norm=True,
    score_function="sigmoid",
    moe_router_enable_expert_bias=True,
)
