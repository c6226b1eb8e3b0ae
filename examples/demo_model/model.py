"""The demo's architecture: transformers' Qwen3.5-MoE classes at toy size, with a faster expert
layer for CPU training.

Knows nothing about data or optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from delta_net import TrainingDeltaNet
from torch import nn
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS_IMPLEMENTATION = "sorted_loop"
ROW_BLOCK = 64


def text_config(vocab_size: int, eos_token_id: int, pad_token_id: int) -> Qwen3_5MoeTextConfig:
    """Qwen3.5-MoE's shape in small: 3 gated delta nets per full attention, 32 experts top-4, one
    shared expert."""
    return Qwen3_5MoeTextConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        full_attention_interval=4,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 100000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    )


class _SortedExperts(torch.autograd.Function):
    """Experts over rows sorted by expert: two dense products per expert, forward and backward
    written out.

    rows: [N, D] sorted by expert, gate_up: [E, 2F, D], down: [E, D, F], ends: E row offsets -> [N,
    D]
    """

    @staticmethod
    def forward(ctx, rows, gate_up, down, ends):
        hidden = rows.new_empty(rows.shape[0], gate_up.shape[1])
        for expert, start, end in _segments(ends):
            torch.mm(rows[start:end], gate_up[expert].T, out=hidden[start:end])
        gate, up = hidden.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        active = gate * sigmoid * up
        out = torch.empty_like(rows)
        for expert, start, end in _segments(ends):
            torch.mm(active[start:end], down[expert].T, out=out[start:end])
        ctx.save_for_backward(rows, gate_up, down, hidden, sigmoid, active)
        ctx.ends = ends
        return out

    @staticmethod
    def backward(ctx, grad):
        rows, gate_up, down, hidden, sigmoid, active = ctx.saved_tensors
        d_active, d_rows = torch.empty_like(active), torch.empty_like(rows)
        d_down, d_gate_up = torch.zeros_like(down), torch.zeros_like(gate_up)
        for expert, start, end in _segments(ctx.ends):
            torch.mm(grad[start:end], down[expert], out=d_active[start:end])
            torch.mm(grad[start:end].T, active[start:end], out=d_down[expert])
        gate, up = hidden.chunk(2, dim=-1)
        silu = gate * sigmoid
        d_gate = d_active * up * (sigmoid + silu * (1 - sigmoid))
        d_hidden = torch.cat([d_gate, d_active * silu], dim=-1)
        for expert, start, end in _segments(ctx.ends):
            torch.mm(d_hidden[start:end], gate_up[expert], out=d_rows[start:end])
            torch.mm(d_hidden[start:end].T, rows[start:end], out=d_gate_up[expert])
        return d_rows, d_gate_up, d_down, None


def _segments(ends: list[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, start, end) of every expert that has rows."""
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            yield expert, start, end
        start = end


def sorted_experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """hidden_states: [N, D], top_k_index and top_k_weights: [N, K] -> [N, D].

    Every expert's rows are padded to a multiple of ROW_BLOCK: the matrix library compiles a kernel
    per shape.
    """
    count, top_k = top_k_index.shape
    flat = top_k_index.reshape(-1)
    rows_of = flat.bincount(minlength=self.num_experts)
    padded = (rows_of + ROW_BLOCK - 1) // ROW_BLOCK * ROW_BLOCK
    ends = padded.cumsum(0)
    order = flat.argsort(stable=True)
    shift = (ends - padded) - (
        rows_of.cumsum(0) - rows_of
    )  # padded start minus packed start, by expert
    place = torch.arange(count * top_k) + shift[flat[order]]
    source = torch.full((int(ends[-1]),), count)
    source[place] = order // top_k
    slot = torch.empty_like(order)
    slot[order] = place

    dtype = (
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    )
    rows = torch.cat(
        [hidden_states.to(dtype), hidden_states.new_zeros(1, hidden_states.shape[1], dtype=dtype)]
    )
    out = _SortedExperts.apply(
        rows.index_select(0, source),
        self.gate_up_proj.to(dtype),
        self.down_proj.to(dtype),
        ends.tolist(),
    )
    out = out.index_select(0, slot).view(count, top_k, -1)
    return torch.bmm(top_k_weights.to(dtype)[:, None], out).squeeze(1)


def build(config: Qwen3_5MoeTextConfig, seed: int = 0) -> Qwen3_5MoeForCausalLM:
    """A freshly initialised model whose gated delta nets start with memories of 10 to 1,000
    tokens."""
    torch.manual_seed(seed)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, sorted_experts_forward)
    config._experts_implementation = EXPERTS_IMPLEMENTATION
    config._attn_implementation = "sdpa"
    model = Qwen3_5MoeForCausalLM(config)
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.linear_attn = TrainingDeltaNet(config, layer.linear_attn.layer_idx)
    for name, module in model.named_modules():
        if hasattr(module, "dt_bias"):
            _init_decay(module)
        elif name.endswith(("experts", "gate")):
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    return model


def _init_decay(delta_net: nn.Module) -> None:
    """A in [1, 16], step in [0.001, 0.1], as Mamba and gated delta nets are trained."""
    heads = delta_net.num_v_heads
    with torch.no_grad():
        delta_net.A_log.copy_(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        delta_net.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
