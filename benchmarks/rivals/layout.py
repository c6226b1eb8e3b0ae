"""Which tensor of an MLX checkpoint of Qwen3.5-MoE is which of llama.cpp's `qwen35moe`.

Follows llama.cpp's own converter: value heads of the linear attention are tiled over the key
heads instead of grouped by them, A is stored as -exp(A_log), the convolution loses its unit
axis. MLX has added the 1 to the norms' weights already. Knows names and order, not bits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARCHITECTURE = "qwen35moe"
Order = NDArray[np.int64]
Plain = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Entry:
    """A tensor to write: packed in blocks, or in float32 when ``plain`` is given.

    Args:
        source: A tensor of the checkpoint; its ``.scales`` and ``.biases`` lie beside it.
        order: Which of the source's pieces come first to last: rows, or ``columns`` of each.
        plain: From the source's values, dequantized, to the stored ones.
    """

    name: str
    source: str
    order: Order | None = None
    columns: bool = False
    plain: Plain | None = None


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a ``config.json``, if it is one that is known here.

    Raises:
        ValueError: If it is another architecture, or not quantized to affine 4 bit, group 64.
    """
    text = dict(config.get("text_config", config))
    if not str(text.get("model_type", "")).startswith("qwen3_5_moe"):
        raise ValueError(
            f"Only Qwen3.5-MoE has a counterpart in llama.cpp here, not {text.get('model_type')}. "
            "Make one: make_checkpoint.py --shape qwen3.5-35b-a3b"
        )
    q = config.get("quantization") or {}
    if (q.get("mode", "affine"), q.get("bits"), q.get("group_size")) != ("affine", 4, 64):
        raise ValueError("Only affine 4 bit with groups of 64 becomes Q4_K with the same bits.")
    if text["linear_key_head_dim"] != text["linear_value_head_dim"]:
        raise ValueError("llama.cpp needs key and value heads of the same size.")
    return text


def entries(text: dict[str, Any]) -> Iterator[Entry]:
    """Every tensor of the file, in order: what a token reads of a layer lies together."""
    root = "language_model.model"
    yield Entry("token_embd.weight", f"{root}.embed_tokens.weight")
    for layer in range(text["num_hidden_layers"]):
        full = (layer + 1) % text["full_attention_interval"] == 0
        rows = [*NORMS, *(ATTENTION if full else _linear(text)), *MIXTURE]
        for name, source, *how in rows:
            yield Entry(f"blk.{layer}.{name}", f"{root}.layers.{layer}.{source}", *how)
    yield Entry("output_norm.weight", f"{root}.norm.weight", plain=_same)
    if not text.get("tie_word_embeddings"):
        yield Entry("output.weight", "language_model.lm_head.weight")


def _linear(text: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The gated delta net, whose value heads change places."""
    keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
    width = text["linear_value_head_dim"]
    heads = tiled_heads(keys, values)
    lanes = (heads[:, None] * width + np.arange(width)).reshape(-1)
    mixed = np.concatenate([np.arange(2 * keys * width), 2 * keys * width + lanes])
    return [
        ("attn_qkv.weight", "linear_attn.in_proj_qkv.weight", mixed),
        ("attn_gate.weight", "linear_attn.in_proj_z.weight", lanes),
        ("ssm_beta.weight", "linear_attn.in_proj_b.weight", heads),
        ("ssm_alpha.weight", "linear_attn.in_proj_a.weight", heads),
        ("ssm_conv1d.weight", "linear_attn.conv1d.weight", mixed, False, _two_axes),
        ("ssm_a", "linear_attn.A_log", heads, False, _decay),
        ("ssm_dt.bias", "linear_attn.dt_bias", heads, False, _same),
        ("ssm_norm.weight", "linear_attn.norm.weight", None, False, _same),
        ("ssm_out.weight", "linear_attn.out_proj.weight", lanes, True),
    ]


def tiled_heads(keys: int, values: int) -> Order:
    """From value heads grouped by key head, g0v0 g0v1 g1v0 ..., to g0v0 g1v0 ... g0v1 ..."""
    return np.arange(values).reshape(keys, values // keys).T.reshape(-1)


def _same(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x


def _decay(a_log: NDArray[np.float32]) -> NDArray[np.float32]:
    return -np.exp(a_log)


def _two_axes(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    return kernel.reshape(kernel.shape[0], -1)  # MLX: [channels, taps, 1]


def _one_axis(row: NDArray[np.float32]) -> NDArray[np.float32]:
    return row.reshape(-1)


NORMS: list[tuple[Any, ...]] = [
    ("attn_norm.weight", "input_layernorm.weight", None, False, _same),
    ("post_attention_norm.weight", "post_attention_layernorm.weight", None, False, _same),
]
ATTENTION: list[tuple[Any, ...]] = [
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("attn_q_norm.weight", "self_attn.q_norm.weight", None, False, _same),
    ("attn_k_norm.weight", "self_attn.k_norm.weight", None, False, _same),
]
MIXTURE: list[tuple[Any, ...]] = [
    ("ffn_gate_inp.weight", "mlp.gate.weight", None, False, _same),
    ("ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight", None, False, _one_axis),
    ("ffn_gate_shexp.weight", "mlp.shared_expert.gate_proj.weight"),
    ("ffn_up_shexp.weight", "mlp.shared_expert.up_proj.weight"),
    ("ffn_down_shexp.weight", "mlp.shared_expert.down_proj.weight"),
    ("ffn_gate_exps.weight", "mlp.switch_mlp.gate_proj.weight"),
    ("ffn_up_exps.weight", "mlp.switch_mlp.up_proj.weight"),
    ("ffn_down_exps.weight", "mlp.switch_mlp.down_proj.weight"),
]
