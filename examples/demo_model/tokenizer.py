"""The demo's tokenizer: byte-level BPE with Qwen's split pattern and special tokens, trained on our
corpus.

`python tokenizer.py OUT` writes a transformers tokenizer folder with the chat template.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from corpus import document
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
TRAINING_DOCUMENTS = 12_000
# Qwen's pattern, and the one the merges are learned with: there no letter ever joins a space or a
# sign, so that a word is the same token in a question, in JSON and in a tool call, and a small
# model can copy it.
_BEFORE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_AFTER = r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_SPLIT = _BEFORE + r"[^\r\n\p{L}\p{N}]?" + _AFTER
LEARNING_SPLIT = _BEFORE + _AFTER
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
MARKERS = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def render(tokenizer: PreTrainedTokenizerFast, messages: list, tools: list | None, **kwargs) -> str:
    """A chat as text, through the one chat template that inference uses too."""
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizers object as transformers sees it, with template and end tokens."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=SPECIAL[3:],
    )
    wrapped.chat_template = TEMPLATE.read_text()
    return wrapped


def splitter(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Split by the pattern, then map bytes to printable characters."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def empty() -> Tokenizer:
    """Byte-level BPE without merges."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = splitter(LEARNING_SPLIT)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def train(vocab_size: int = VOCAB_SIZE, count: int = TRAINING_DOCUMENTS) -> PreTrainedTokenizerFast:
    """Learn the merges from the first documents of a corpus seed that training does not use."""
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    markers = [AddedToken(text, special=False, normalized=False) for text in MARKERS]
    renderer = wrap(empty())

    def texts() -> Iterator[str]:
        for index in range(count):
            doc = document(random.Random(f"tokenizer:{index}"))
            text = render(renderer, doc.messages, doc.tools)
            for marker in SPECIAL + MARKERS:
                text = text.replace(marker, "\n")
            yield text

    tokenizer = empty()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(MARKERS),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.pre_tokenizer = splitter(QWEN_SPLIT)
    tokenizer.add_tokens(special)
    tokenizer.add_tokens(markers)
    return wrap(tokenizer)


if __name__ == "__main__":
    train().save_pretrained(sys.argv[1])
