"""MoE blocks that decode in a few launches: router, experts, weighted sum.

The references are mlx-lm's blocks, which compute prompts themselves.
"""

import functools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.nemotron_h import NemotronHMoE
from mlx_lm.models.qwen3_moe import Qwen3MoeSparseMoeBlock
from mlx_lm.models.qwen3_next import Qwen3NextSparseMoeBlock

from .experts import DECODE_TOKENS, MetalMLP, MetalSwitch, supports, supports_mlp
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
        ids, scores = _route_by_groups(self.gate, x)
        shared = self.shared_experts(x) if self.config.n_shared_experts is not None else None
        if self.moe_latent_size is None:
            y = self.switch_mlp.weighted(x, ids, scores, shared)
            return y
        y = self.switch_mlp.weighted(self.fc1_latent_proj(x), ids, scores)
        y = self.fc2_latent_proj(y)
        return y if shared is None else y + shared


class GroupRouted(nn.Module):
    """In front of a block that chooses as DeepSeek-V3 does, such as GLM-4's. Same weights."""

    def __call__(self, x: mx.array) -> mx.array:
        # x: [B, S, D] -> [B, S, D]
        y: mx.array
        if self.sharding_group is not None or not _decodes(x):
            y = super().__call__(x)
            return y
        ids, scores = _route_by_groups(self.gate, x)
        shared = self.shared_experts(x) if self.config.n_shared_experts is not None else None
        y = self.switch_mlp.weighted(x, ids, scores, shared)
        return y


class GptOss(nn.Module):
    """In front of gpt-oss's block. Same weights."""

    def __call__(self, x: mx.array) -> mx.array:
        # x: [B, S, D] -> [B, S, D]
        y: mx.array
        if self.sharding_group is not None or not _decodes(x):
            y = super().__call__(x)
            return y
        ids, scores = _route(self.router(x), self.num_experts_per_tok, score="softmax_topk")
        y = self.experts.weighted(x, ids, scores)
        return y


def use_metal(model: nn.Module) -> None:
    """Let the MoE blocks in a model whose experts and routers have kernels decode by them.

    The shared experts of such a block too. Switch layers that hold all experts become
    ``MetalSwitch``. One that streams them has to hold one already, as its ``switch``. Subclasses,
    which may have a forward of their own, stay.
    """
    for _, block in model.named_modules():
        metal = metal_class(block.__class__)
        if metal is None or not _routed(block):
            continue
        name = "experts" if "experts" in block else "switch_mlp"
        switch = getattr(block, name)
        if supports(switch):
            switch = block[name] = MetalSwitch(switch)
        if _weighs(switch):
            block.__class__ = metal
            shared = block.get("shared_expert")
            if shared is not None and supports_mlp(shared):
                shared.__class__ = MetalMLP


@functools.cache
def metal_class(block: type) -> type | None:
    """The class that decodes for blocks of exactly this one, or None."""
    if block in BLOCKS:
        return BLOCKS[block]
    front = FRONTS.get(f"{block.__module__}.{block.__qualname__}")
    return None if front is None else type(f"Metal{block.__name__}", (front, block), {})


def _weighs(switch: Any) -> bool:
    inside = switch if isinstance(switch, MetalSwitch) else getattr(switch, "switch", None)
    return isinstance(inside, MetalSwitch) and hasattr(switch, "weighted")


def _routed(block: Any) -> bool:
    """Whether the router's kernel takes this block's router."""
    gate = block.get("gate")
    if gate is None:
        return fits(block.num_local_experts, block.num_experts_per_tok)
    if isinstance(block, (Qwen3NextSparseMoeBlock, Qwen3MoeSparseMoeBlock)):
        return fits(block.num_experts, block.top_k)
    if (type(gate).__module__, type(gate).__name__) != (type(block).__module__, "MoEGate"):
        return False
    experts, groups = gate.n_routed_experts, gate.n_group
    # A group's score is the sum of its two best.
    return fits(experts, gate.top_k, groups) and not 1 < groups == experts


def _route_by_groups(gate: Any, x: mx.array) -> tuple[mx.array, mx.array]:
    """A ``MoEGate`` of DeepSeek-V3, GLM-4 or Nemotron-H; not all add an eps that none notices."""
    return _route(
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
# By name: no model's module is imported for it.
FRONTS: dict[str, type] = {
    "mlx_lm.models.deepseek_v3.DeepseekV3MoE": GroupRouted,
    "mlx_lm.models.glm4_moe.MoE": GroupRouted,
    "mlx_lm.models.glm4_moe_lite.Glm4MoeLiteMoE": GroupRouted,
    "mlx_lm.models.gpt_oss.MLPBlock": GptOss,
}
"""What goes in front of a class, both bases of one that stands for it."""
