"""Documents to training batches: rows of whole documents, and which tokens are learned.

Batch `step` of a seed is always the same, so a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from corpus import Document, document
from tokenizer import render
from transformers import PreTrainedTokenizerFast

# Share of the other tokens that are learned too: they teach copying, leaving some out saves time.
CONTEXT_SHARE = 0.25
GAP = 3  # tokens between documents: as far as the convolution looks back
GIVE_UP = 8  # documents in a row that fit nowhere before a batch is called full


class Encoder:
    """Documents to token ids and a learned-or-not flag per token, true for the assistant's
    words."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        to_id = tokenizer.convert_tokens_to_ids
        self.pad = to_id("<|endoftext|>")
        self.start, self.end = to_id("<|im_start|>"), to_id("<|im_end|>")
        self.think, self.think_end = to_id("<think>"), to_id("</think>")
        self.assistant = tokenizer.encode("assistant\n", add_special_tokens=False)
        self.no_thought = tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False)

    def encode(self, doc: Document) -> tuple[list[int], list[bool]]:
        text = render(self.tokenizer, doc.messages, doc.tools)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        learned = [False] * len(ids)
        header = [self.start, *self.assistant]
        for at, token in enumerate(ids):
            if token == self.start and ids[at : at + len(header)] == header:
                first = self._first_learned(ids, at + len(header))
                last = ids.index(self.end, first)
                learned[first : last + 1] = [True] * (last + 1 - first)
        return ids, learned

    def _first_learned(self, ids: list[int], at: int) -> int:
        """Skip what the generation prompt already contains."""
        if ids[at : at + len(self.no_thought)] == self.no_thought:
            return at + len(self.no_thought)
        return at + 2 if ids[at] == self.think else at


@dataclass(frozen=True)
class Batch:
    """Token ids, learned flags, and each token's document (-1: none), all [rows, length]."""

    tokens: torch.Tensor
    learned: torch.Tensor
    documents: torch.Tensor

    def masks(self) -> dict[str, torch.Tensor]:
        """What keeps documents apart, per kind of layer: who may look at whom, whose token."""
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return {"full_attention": same.tril()[:, None], "linear_attention": self.documents}


def batch(encoder: Encoder, seed: int, step: int, rows: int, length: int) -> Batch:
    """Rows of whole documents, padded at the end."""
    rng = random.Random(f"{seed}:{step}")
    packed: list[list[tuple[list[int], list[bool]]]] = [[] for _ in range(rows)]
    used = [0] * rows
    misses = 0
    while misses < GIVE_UP:
        ids, learned = encoder.encode(document(rng))
        row = min(range(rows), key=lambda row: used[row])
        if used[row] + len(ids) > length:
            misses += 1
            continue
        packed[row].append((ids, [flag or rng.random() < CONTEXT_SHARE for flag in learned]))
        used[row] += len(ids) + GAP
    tokens = torch.full((rows, length), encoder.pad)
    flags = torch.zeros((rows, length), dtype=torch.bool)
    documents = torch.full((rows, length), -1)
    for row, docs in enumerate(packed):
        at = 0
        for index, (ids, learned) in enumerate(docs):
            span = slice(at, at + len(ids))
            tokens[row, span], flags[row, span] = torch.tensor(ids), torch.tensor(learned)
            documents[row, span] = index
            at += len(ids) + GAP
    return Batch(tokens, flags, documents)
