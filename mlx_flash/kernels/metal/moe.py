"""MoE blocks that decode in a few launches: router, experts, weighted sum.

The references are mlx-lm's blocks, which compute prompts themselves.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.nemotron_h import MoEGate, NemotronHMoE
from mlx_lm.models.qwen3_moe import Qwen3MoeSparseMoeBlock
from mlx_lm.models.qwen3_next import Qwen3NextSparseMoeBlock

from .experts import DECODE_TOKENS, MetalSwitch, supports
from .router import fits, route


class MetalSparseMoeBlock(Qwen3NextSparseMoeBlock):
    """``Qwen3NextSparseMoeBlock``, Qwen3.5's too. Same weights, same call."""

    def __call__(self, x: mx.array) -> mx.array:
        # x: [B, S, D] -> [B, S, D]
        y: mx.array
        if self.sharding_group is not None or not _decodes(x):
            y = super().__call__(x)
            return y
        ids, scores = _route(self.gate(x), self.top_k, normalize=self.norm_topk_prob)
        shared, shared_gate = self.shared_expert(x), self.shared_expert_gate(x)
        y = self.switch_mlp.weighted(x, ids, scores, shared, shared_gate)
        return y


class MetalQwen3MoeBlock(Qwen3MoeSparseMoeBlock):
    """``Qwen3MoeSparseMoeBlock``. Same weights, same call."""

    def __call__(self, x: mx.array) -> mx.array:
        # x: [B, S, D] -> [B, S, D]
        y: mx.array
        if self.sharding_group is not None or not _decodes(x):
            y = super().__call__(x)
            return y
        ids, scores = _route(self.gate(x), self.top_k, normalize=self.norm_topk_prob)
        y = self.switch_mlp.weighted(x, ids, scores)
        return y


class MetalNemotronHMoE(NemotronHMoE):
    """``NemotronHMoE``. Same weights, same call."""

    def __call__(self, x: mx.array) -> mx.array:
        # x: [B, S, D] -> [B, S, D]
        y: mx.array
        if not _decodes(x):
            y = super().__call__(x)
            return y
        gate = self.gate
        ids, scores = _route(
            x @ gate.weight.T,
            gate.top_k,
            score="sigmoid",
            correction=gate.e_score_correction_bias,
            groups=gate.n_group,
            top_groups=gate.topk_group,
            group_score="top2sum",
            normalize=gate.top_k > 1 and gate.norm_topk_prob,
            eps=1e-20,
            scale=gate.routed_scaling_factor,
        )
        shared = self.shared_experts(x) if self.config.n_shared_experts is not None else None
        if self.moe_latent_size is None:
            y = self.switch_mlp.weighted(x, ids, scores, shared)
            return y
        y = self.switch_mlp.weighted(self.fc1_latent_proj(x), ids, scores)
        y = self.fc2_latent_proj(y)
        return y if shared is None else y + shared


def use_metal(model: nn.Module) -> None:
    """Let the MoE blocks in a model whose experts and routers have kernels decode by them.

    Switch layers that hold all experts become ``MetalSwitch``. One that streams them has to hold
    one already, as its ``switch``. Subclasses, which may have a forward of their own, stay.
    """
    for _, block in model.named_modules():
        if type(block) not in BLOCKS or not _routed(block):
            continue
        if supports(block.switch_mlp):
            block.switch_mlp = MetalSwitch(block.switch_mlp)
        if _weighs(block.switch_mlp):
            block.__class__ = BLOCKS[type(block)]


def _weighs(switch: Any) -> bool:
    inside = switch if isinstance(switch, MetalSwitch) else getattr(switch, "switch", None)
    return isinstance(inside, MetalSwitch) and hasattr(switch, "weighted")


def _routed(block: Any) -> bool:
    """Whether the router's kernel takes this block's router."""
    if not isinstance(block, NemotronHMoE):
        return fits(block.num_experts, block.top_k)
    gate = block.gate
    if type(gate) is not MoEGate:
        return False
    experts, groups = gate.n_routed_experts, gate.n_group
    # A group's score is the sum of its two best.
    return fits(experts, gate.top_k, groups) and not 1 < groups == experts


def _decodes(x: mx.array) -> bool:
    return 0 < x.size <= DECODE_TOKENS * x.shape[-1]


def _route(logits: mx.array, top_k: int, **how: Any) -> tuple[mx.array, mx.array]:
    # logits: [..., E] -> [..., top_k]
    ids, scores = route(logits.reshape(-1, logits.shape[-1]), top_k, **how)
    shape = (*logits.shape[:-1], top_k)
    return ids.reshape(shape), scores.reshape(shape)


BLOCKS: dict[type, type] = {
    Qwen3NextSparseMoeBlock: MetalSparseMoeBlock,
    Qwen3MoeSparseMoeBlock: MetalQwen3MoeBlock,
    NemotronHMoE: MetalNemotronHMoE,
}
