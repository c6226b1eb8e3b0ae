"""A router's choice of experts in one launch: scores, groups, top_k, normalization.

The references are mlx-lm's: ``Qwen3NextSparseMoeBlock`` (softmax over all experts),
``group_expert_select`` of DeepSeek-V3, GLM-4 and Nemotron-H (sigmoid, correction, groups) and
``gpt_oss`` (softmax over the chosen).
"""

from typing import Literal

import mlx.core as mx

from . import SIMD, Kernel

MAX_EXPERTS = 512
"""That a simdgroup holds in its registers, 16 a lane."""
MAX_TOP_K = SIMD
MAX_GROUPS = SIMD
SCORES = {"softmax": 0, "sigmoid": 1, "softmax_topk": 2}
SIMDGROUPS = 8
"""Tokens of a threadgroup, where there are as many."""

Score = Literal["softmax", "sigmoid", "softmax_topk"]
GroupScore = Literal["max", "top2sum"]

ROUTE = Kernel(
    "route", ("logits", "correction", "eps", "scale"), ("ids", "scores"), headers=("ordered",)
)


def route(
    logits: mx.array,
    top_k: int,
    *,
    score: Score = "softmax",
    correction: mx.array | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_score: GroupScore = "max",
    normalize: bool = True,
    eps: float = 0.0,
    scale: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """Choose experts, the best first and of equals the smaller id.

    Experts are chosen by their score plus ``correction``; without one and without groups by
    their logits, of which two differ where their scores may have saturated. Those of groups that
    are not kept are chosen by 0, as mlx-lm has it. NaN is worse than any number.

    Args:
        logits: [T, E], E up to 512.
        top_k: How many to choose, up to 32.
        score: Of an expert, in float32: softmax over all experts, sigmoid, or softmax over the
            chosen.
        correction: [E], added for the choice, not to the scores that come out.
        groups: Into how many equal runs the experts fall, up to 32.
        top_groups: How many of them are kept.
        group_score: By what: their best expert, or the sum of their two best.
        normalize: Divide the scores by their sum + ``eps``. ``softmax_topk`` needs none.
        eps: See ``normalize``.
        scale: Multiplies the scores, after that.

    Returns:
        ids [T, top_k] uint32 and scores [T, top_k] float32.

    Raises:
        ValueError: If no kernel or no reference means this.
    """
    _check(logits, top_k, score, groups, top_groups, group_score)
    tokens, experts = logits.shape
    ids, scores = ROUTE(
        logits,
        logits if correction is None else correction,
        eps,
        scale,
        template=[
            ("HELD", -(-experts // SIMD)),
            ("TOP_K", top_k),
            ("SCORE", SCORES[score]),
            ("CORRECTED", correction is not None),
            ("GROUPS", groups),
            ("TOP_GROUPS", top_groups),
            ("TOP_TWO", group_score == "top2sum"),
            ("NORMALIZE", normalize),
        ],
        grid=(SIMD * tokens, 1, 1),
        threadgroup=(SIMD * min(tokens, SIMDGROUPS), 1, 1),
        outputs=[((tokens, top_k), mx.uint32), ((tokens, top_k), mx.float32)],
    )
    return ids, scores


def reference(
    logits: mx.array,
    top_k: int,
    *,
    score: Score = "softmax",
    correction: mx.array | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_score: GroupScore = "max",
    normalize: bool = True,
    eps: float = 0.0,
    scale: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """``route`` in MLX's operations."""
    _check(logits, top_k, score, groups, top_groups, group_score)
    tokens, experts = logits.shape
    own = logits = logits.astype(mx.float32)
    if score == "softmax":
        own = mx.softmax(logits, axis=-1)
    elif score == "sigmoid":
        own = mx.sigmoid(logits)
    choice = logits if correction is None and groups == 1 else own
    if correction is not None:
        choice = choice + correction.astype(mx.float32)
    choice = _without_nan(choice)
    if groups > 1:
        grouped = mx.sort(choice.reshape(tokens, groups, -1), axis=-1)
        ranks = grouped[..., -1]
        if group_score == "top2sum":
            ranks = ranks + grouped[..., -2]
        left = mx.argsort(-ranks, axis=-1)[:, top_groups:, None]
        grouped = mx.put_along_axis(choice.reshape(tokens, groups, -1), left, mx.array(0.0), axis=1)
        choice = grouped.reshape(tokens, experts)
    # argsort is stable: of equals the smaller id stays first.
    ids = mx.argsort(-choice, axis=-1)[:, :top_k]
    scores = mx.take_along_axis(own, ids, axis=-1)
    if score == "softmax_topk":
        scores = mx.softmax(scores, axis=-1)
    elif normalize:
        scores = scores / (scores.sum(axis=-1, keepdims=True) + eps)
    return ids.astype(mx.uint32), scores * scale


def route_bytes(logits: mx.array, top_k: int, correction: mx.array | None = None) -> int:
    """Bytes that one launch of ``route`` moves: logits [T, E] in, ids and scores [T, top_k] out."""
    written = logits.shape[0] * top_k * 8
    return logits.nbytes + written + (0 if correction is None else correction.nbytes)


def fits(experts: int, top_k: int, groups: int = 1) -> bool:
    """Whether ``route`` takes a router of this size."""
    return (
        0 < top_k <= min(experts, MAX_TOP_K)
        and experts <= MAX_EXPERTS
        and 0 < groups <= MAX_GROUPS
        and experts % groups == 0
    )


def _without_nan(x: mx.array) -> mx.array:
    return mx.where(mx.isnan(x), -mx.inf, x)


def _check(
    logits: mx.array, top_k: int, score: str, groups: int, top_groups: int, group_score: str
) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits are [tokens, experts], not {logits.shape}")
    experts = logits.shape[-1]
    if not fits(experts, top_k, groups) or not 0 < top_groups <= groups:
        raise ValueError(
            f"no router for top {top_k} of {experts} experts in {top_groups} of {groups} groups: "
            f"up to {MAX_EXPERTS} experts, top {MAX_TOP_K} and {MAX_GROUPS} equal groups"
        )
    if score not in SCORES:
        raise ValueError(f"no score {score!r}: {', '.join(SCORES)}")
    if group_score not in ("max", "top2sum"):
        raise ValueError(f"no group score {group_score!r}: max, top2sum")
    if group_score == "top2sum" and 1 < groups == experts:
        raise ValueError("top2sum needs groups of two experts or more")
