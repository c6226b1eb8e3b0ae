"""Streams an MLX checkpoint into a GGUF that llama.cpp loads: the same nibbles, Q4_K blocks.

Holds a piece of one tensor at a time. Header and metadata are written by the `gguf` package,
which is imported when it is needed.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_flash.streaming.checkpoint import Checkpoint

from . import blocks
from .layout import ARCHITECTURE, Entry, entries, text_of

PIECE_GROUPS = 1 << 15  # 2 M weights
ALIGNMENT = 32  # of a tensor in the file, GGUF's default
Wrote = Callable[[int], Any]


@dataclass(frozen=True)
class Packed:
    """A tensor about to be written: its shape, its GGML type by name, its bytes in pieces."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int
    pieces: Callable[[], Iterator[NDArray]]


def prepare(folder: Path) -> list[Packed]:
    """What the file will hold. Reads scales and biases, to choose each tensor's type.

    Raises:
        ValueError: If the checkpoint has no such counterpart.
    """
    checkpoint = Checkpoint(folder)
    text = text_of(json.loads((folder / "config.json").read_text()))
    return [_packed(checkpoint, entry) for entry in entries(text)]


def write(folder: Path, out: Path, tensors: list[Packed], wrote: Wrote) -> None:
    """Writes the file, under another name until it is complete.

    Args:
        wrote: Called with the number of bytes of each piece once it is in the file.
    """
    unfinished = out.with_name(out.name + ".part")
    _write_header(folder, unfinished, tensors)
    with unfinished.open("ab") as file:
        file.write(bytes(-file.tell() % ALIGNMENT))
        for tensor in tensors:
            begun = file.tell()
            for piece in tensor.pieces():
                file.write(piece)
                wrote(piece.nbytes)
            if file.tell() - begun != tensor.nbytes:
                raise AssertionError(f"{tensor.name} came out with another size than promised")
            file.write(bytes(-tensor.nbytes % ALIGNMENT))
    unfinished.rename(out)


def _packed(checkpoint: Checkpoint, entry: Entry) -> Packed:
    if entry.plain is not None:
        values = _plain(checkpoint, entry)
        return Packed(entry.name, values.shape, "F32", values.nbytes, lambda: iter([values]))
    *rows, words = checkpoint[entry.source].shape
    columns = words * 8  # weights in a uint32
    groups = math.prod(rows) * columns // blocks.GROUP
    scales, biases = _scales(checkpoint, entry.source)
    fits = blocks.fits_q4_k(columns, scales, biases)
    nbytes = groups // 4 * blocks.Q4_K_BYTES if fits else groups * 2 * blocks.Q4_1_BYTES
    pieces = partial(_pieces, checkpoint, entry, blocks.q4_k if fits else blocks.q4_1)
    return Packed(entry.name, (*rows, columns), "Q4_K" if fits else "Q4_1", nbytes, pieces)


def _pieces(checkpoint: Checkpoint, entry: Entry, encode: Any) -> Iterator[NDArray]:
    nibbles = _mapped(checkpoint, entry.source).reshape(-1, blocks.GROUP // 2)
    scales, biases = _scales(checkpoint, entry.source)
    order = _group_order(entry, checkpoint[entry.source].shape)
    for start in range(0, len(nibbles), PIECE_GROUPS):
        piece: Any = slice(start, start + PIECE_GROUPS)
        piece = piece if order is None else order[piece]
        yield encode(nibbles[piece], scales[piece], biases[piece])


def _group_order(entry: Entry, shape: tuple[int, ...]) -> NDArray[np.int64] | None:
    """The entry's order of rows or columns, as one of groups. A head is whole groups."""
    if entry.order is None:
        return None
    rows, groups = shape[0], shape[1] * 8 // blocks.GROUP
    if entry.columns:
        columns = entry.order.reshape(groups, blocks.GROUP)
        if (np.diff(columns) != 1).any():
            raise ValueError(f"{entry.source}: heads of this size cut through groups of weights.")
        order, of_row = columns[:, 0] // blocks.GROUP, np.arange(rows)
    else:
        order, of_row = np.arange(groups), entry.order
    return (of_row[:, None] * groups + order).reshape(-1)


def _plain(checkpoint: Checkpoint, entry: Entry) -> NDArray[np.float32]:
    info = checkpoint[entry.source]
    raw = _mapped(checkpoint, entry.source)
    if info.dtype == "U32":  # the routers, at 8 bit
        scales, biases = _scales(checkpoint, entry.source)
        if raw.size != scales.size * blocks.GROUP:
            raise ValueError(f"{entry.source} is expected to have 8 bits a weight.")
        q = raw.reshape(-1, blocks.GROUP).astype(np.float32)
        values = (scales[:, None] * q + biases[:, None]).reshape(info.shape[0], -1)
    else:
        values = _floats(raw, info.dtype).reshape(info.shape)
    if entry.order is not None:
        values = values[entry.order]
    assert entry.plain is not None
    return np.ascontiguousarray(entry.plain(values), np.float32)


def _scales(checkpoint: Checkpoint, weight: str) -> tuple[blocks.Floats, blocks.Floats]:
    """Scales and biases of a packed tensor, one a group, in the order of its weights."""
    module = weight.removesuffix(".weight")
    names = (f"{module}.scales", f"{module}.biases")
    scales, biases = (_floats(_mapped(checkpoint, n), checkpoint[n].dtype) for n in names)
    return scales, biases


def _mapped(checkpoint: Checkpoint, name: str) -> blocks.Bytes:
    span = checkpoint[name].span
    return np.memmap(span.path, np.uint8, "r", span.offset, (span.nbytes,))


def _floats(raw: blocks.Bytes, dtype: str) -> blocks.Floats:
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32, copy=False)


def _write_header(folder: Path, out: Path, tensors: list[Packed]) -> None:
    import gguf

    text = text_of(json.loads((folder / "config.json").read_text()))
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    writer.add_name("synthetic")
    _add_geometry(writer, text)
    _add_tokenizer(writer, folder, text)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type_name]
        # Shapes count weights, so any dtype but bytes: those it would divide by the block.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("f4"), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add_geometry(writer: Any, text: dict[str, Any]) -> None:
    rope = text["rope_parameters"]
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(text["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_expert_count(text["num_experts"])
    writer.add_expert_used_count(text["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(text["shared_expert_intermediate_size"])
    writer.add_full_attention_interval(text["full_attention_interval"])
    writer.add_ssm_conv_kernel(text["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(text["linear_key_head_dim"])
    writer.add_ssm_group_count(text["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(text["linear_num_value_heads"])
    writer.add_ssm_inner_size(text["linear_value_head_dim"] * text["linear_num_value_heads"])


def _add_tokenizer(writer: Any, folder: Path, text: dict[str, Any]) -> None:
    """The checkpoint's words, without merges: prompts come as ids, so it has to load only."""
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = [f"<|{i}|>" for i in range(text["vocab_size"])]
    for word, i in written["model"]["vocab"].items():
        words[i] = word
    kinds = [1] * len(words)  # normal
    for added in written["added_tokens"]:
        words[added["id"]] = added["content"]
        kinds[added["id"]] = 3  # control
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{words[0]} {words[1]}"])  # llama.cpp insists on a list
    writer.add_eos_token_id(text["eos_token_id"])
    writer.add_pad_token_id(text["pad_token_id"])
    writer.add_add_bos_token(False)
