"""Tiny models without routed experts, one per kind of layer that mlx-lm has."""

from typing import Any

import tiny

_PLAIN: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_PLAIN},
    "mistral": {"model_type": "mistral", **_PLAIN},
    "qwen3": {"model_type": "qwen3", **_PLAIN},
    "qwen3_5_moe": {  # by name only: this one has no experts
        **tiny.QWEN3_5_MOE,
        "text_config": {
            **tiny.QWEN3_5_MOE["text_config"],
            "num_hidden_layers": 6,
            "num_experts": 0,
            "intermediate_size": 128,
        },
    },
    "nemotron": {
        "model_type": "nemotron",
        **_PLAIN,
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
    "mamba2": {
        "model_type": "mamba2",
        "vocab_size": tiny.VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_heads": 4,
        "head_dim": 32,
        "state_size": 32,
        "n_groups": 1,
        "conv_kernel": 4,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": 4,
        "tie_word_embeddings": False,
    },
    # Three shapes of layer.
    "nemotron_h": {
        **tiny.NEMOTRON_H,
        "num_hidden_layers": 8,
        "hybrid_override_pattern": "M-M-*-M-",
        "intermediate_size": 128,
    },
    # Its last layers attend to keys and values that earlier ones return.
    "gemma4_text": {
        "model_type": "gemma4_text",
        **_PLAIN,
        "num_hidden_layers": 6,
        "head_dim": 32,
        "global_head_dim": 32,
        "num_kv_shared_layers": 2,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": tiny.VOCAB,
        "use_double_wide_mlp": False,
        "tie_word_embeddings": True,
    },
}
