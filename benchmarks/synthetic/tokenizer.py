"""A tokenizer of any vocabulary size, written without building it in memory.

256 byte tokens round-trip every text; the rest are made-up words, so that whatever a random
model generates can be seen and reads back as the same ids.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the last three ids
SYLLABLES = [c + v for c in "bdfghjklmnprstvwyz" for v in ("a", "e", "i", "o", "u", "ai", "ou")]

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write(folder: Path, vocab_size: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Raises:
        ValueError: If ``vocab_size`` has no room for the bytes, or more than there are words.
    """
    head, tail = json.dumps(_tokenizer(vocab_size), indent=1).split('"VOCAB"')
    with (folder / "tokenizer.json").open("w", encoding="utf-8") as file:
        file.write(head + "{\n")
        for index, token in enumerate(_tokens(vocab_size - len(SPECIALS))):
            file.write(",\n" * (index > 0) + f"{json.dumps(token)}:{index}")
        file.write("}" + tail)
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 262144,
        "bos_token": None,
        "eos_token": SPECIALS[2],
        "pad_token": SPECIALS[0],
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=4))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _tokens(count: int) -> Iterator[str]:
    base = len(SYLLABLES)
    if not 256 <= count <= 256 + base**2 + base**3:
        raise ValueError(f"No vocabulary of {count} tokens: 256 bytes, then made-up words.")
    yield from _byte_letters()
    for index in range(count - 256):
        pair, rest = SYLLABLES[index % base] + SYLLABLES[index // base % base], index // base**2
        yield "Ġ" + pair + (SYLLABLES[rest - 1] if rest else "")


def _byte_letters() -> Iterator[str]:
    """GPT-2's alphabet: printable bytes stand for themselves, others for letters above 255."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    above = iter(range(256, 512))
    yield from (chr(byte) if byte in shown else chr(next(above)) for byte in range(256))


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    first = vocab_size - len(SPECIALS)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": first + n, "content": token, **flags, "special": True}
            for n, token in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a whole word is one token; other text falls to bytes
            "vocab": "VOCAB",
            "merges": [],
        },
    }
