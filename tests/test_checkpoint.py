"""Headers in, spans out: what is read must be true, what is not true must be refused."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENT

from mlx_flash.errors import CheckpointError, ModelNotFoundError
from mlx_flash.streaming.checkpoint import INDEX_NAME, Checkpoint, Span, read_json

SHARD = "model.safetensors"
F32_4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def entry(first: int, last: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [last - first], "data_offsets": [first, last], **changes}


def raw(header: object, data_bytes: int = 16) -> bytes:
    """A safetensors file with a header of one's own, as an object or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def write(folder: Path, content: bytes, name: str = SHARD) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def write_index(folder: Path, weight_map: object) -> Path:
    return write(folder, json.dumps({"weight_map": weight_map}).encode(), INDEX_NAME)


def bytes_at(span: Span) -> bytes:
    with span.path.open("rb") as file:
        file.seek(span.offset)
        return file.read(span.nbytes)


def refusal(read: Callable[[], object]) -> str:
    """The message of the CheckpointError that ``read`` raises: one line, with a way out."""
    with pytest.raises(CheckpointError) as caught:
        read()
    assert type(caught.value) is CheckpointError
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    ways_out = ("ownload", "onvert", "Pass a folder", "Remove", "publisher", "Check")
    assert any(way in message for way in ways_out), message
    return message


# What is sound


def test_spans_hold_the_bytes_of_the_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "experts": rng.standard_normal((4, 3, 5)).astype(np.float32),
        "packed": rng.integers(0, 2**32, (2, 8), np.uint32),
        "half": rng.standard_normal((7,)).astype(np.float16),
        "flag": np.array([True, False]),
        "scalar": np.array(3.0, np.float64),
        "none": np.zeros((0, 4), np.float32),
    }
    safetensors.numpy.save_file(tensors, tmp_path / SHARD, {"format": "mlx"})
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint) == set(tensors) and len(checkpoint) == len(tensors)
    for name, array in tensors.items():
        assert checkpoint[name].shape == array.shape
        assert bytes_at(checkpoint[name].span) == array.tobytes()
    assert checkpoint["packed"].dtype == "U32"
    rows = checkpoint["experts"].rows()
    assert [bytes_at(row) for row in rows] == [row.tobytes() for row in tensors["experts"]]
    halves = rows[1].split(3)
    assert b"".join(map(bytes_at, halves)) == tensors["experts"][1].tobytes()


def test_spans_of_what_mlx_writes(tmp_path: Path) -> None:
    tensors = {
        "bf16": mx.random.normal((3, 4)).astype(mx.bfloat16),
        "u32": mx.random.randint(0, 1000, (2, 2)).astype(mx.uint32),
    }
    mx.save_safetensors(str(tmp_path / SHARD), tensors)
    checkpoint = Checkpoint(tmp_path)
    assert {name: info.dtype for name, info in checkpoint.items()} == {"bf16": "BF16", "u32": "U32"}
    for name, array in tensors.items():
        assert bytes_at(checkpoint[name].span) == bytes(np.frombuffer(array, np.uint8))


def test_shards_with_an_index(tmp_path: Path) -> None:
    first, second = {"a": np.arange(4)}, {"b": np.arange(6.0)}
    safetensors.numpy.save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    safetensors.numpy.save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    write_index(
        tmp_path,
        {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    )
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint["b"].span.path.name == "model-00002-of-00002.safetensors"
    assert bytes_at(checkpoint["b"].span) == second["b"].tobytes()
    headers = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) - 4 * 8 - 6 * 8
    assert checkpoint.header_bytes == headers


def test_padded_header_and_file_without_tensors_are_sound(tmp_path: Path) -> None:
    assert len(Checkpoint(write(tmp_path / "empty", raw({}, 0)))) == 0
    padded = json.dumps({"a": F32_4}).encode().ljust(256)
    assert Checkpoint(write(tmp_path / "padded", raw(padded)))["a"].span.offset == 264


# What is damaged, file by file

DAMAGED = {
    "zero bytes": (b"", "not a safetensors file (0 bytes)"),
    "shorter than its prefix": (b"\x10\0\0", "not a safetensors file"),
    "another format": (b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file"),
    "header longer than the file": (raw({"a": F32_4}, 0)[:-3], "not a safetensors file"),
    "header of 2**63 bytes": (struct.pack("<Q", 1 << 63) + bytes(64), "not a safetensors file"),
    "truncated": (raw({"a": F32_4}, 9), "truncated: 79 bytes of 86, 7 missing"),
    "trailing bytes": (raw({"a": F32_4}, 19), "3 bytes follow the last tensor"),
    "not JSON": (raw(b"{'a': 1}"), "header is not JSON"),
    "not text": (raw(b"{\xff\xfe\xfd}"), "header is not JSON"),
    "too deep": (raw(b"[" * 100_000), "header is not JSON"),
    "endless number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "header is not JSON"),
    "not an object": (raw(["a"]), "not a JSON object"),
    "name twice": (
        raw(b'{"a":%s,"a":%s}' % ((json.dumps(F32_4).encode(),) * 2)),
        "a name occurs twice",
    ),
    "key twice": (
        raw(b'{"a":{"dtype":"U8","shape":[16],"shape":[16],"data_offsets":[0,16]}}'),
        "a name occurs twice",
    ),
    "overlap": (raw({"a": entry(0, 10), "b": entry(8, 16)}), "'b' overlaps another tensor"),
    "same place": (raw({"a": entry(0, 16), "b": entry(0, 16)}), "overlaps another tensor"),
    "gap": (raw({"a": entry(0, 6), "b": entry(8, 16)}), "'b' leaves a gap"),
    "gap at the start": (raw({"a": entry(4, 16)}), "'a' leaves a gap"),
    "empty tensor out of the file": (
        raw({"a": entry(0, 16), "b": entry(10**9, 10**9)}),
        "'b' leaves a gap",
    ),
    "empty tensor inside another": (
        raw({"a": entry(0, 16), "b": entry(8, 8)}),
        "'b' overlaps another tensor",
    ),
    "negative offset": (raw({"a": entry(-16, 0)}), "impossible offsets"),
    "end before start": (raw({"a": entry(16, 0, shape=[16])}), "bytes 16..0"),
    "offsets that are floats": (raw({"a": entry(0, 16, data_offsets=[0, 16.0])}), "impossible"),
    "offsets that are booleans": (
        raw({"a": entry(0, 1, data_offsets=[False, True])}, 1),
        "impossible offsets",
    ),
    "three offsets": (raw({"a": entry(0, 16, data_offsets=[0, 8, 16])}), "malformed"),
    "no offsets": (raw({"a": {"dtype": "U8", "shape": [16]}}), "malformed"),
    "entry is no object": (raw({"a": 1}), "malformed"),
    "shape is a string": (raw({"a": entry(0, 16, shape="16")}), "malformed"),
    "dtype is a list": (raw({"a": entry(0, 16, dtype=["U8"])}), "malformed"),
    "too few bytes": (raw({"a": entry(0, 16, shape=[5], dtype="F32")}), "F32 [5]"),
    "too many bytes": (raw({"a": entry(0, 16, shape=[3], dtype="F32")}), "F32 [3]"),
    "negative shape": (raw({"a": entry(0, 16, shape=[-4, -4])}), "impossible shape"),
    "boolean shape": (raw({"a": entry(0, 16, shape=[16, True])}), "impossible shape"),
    "float shape": (raw({"a": entry(0, 16, shape=[16.0])}), "impossible shape"),
    "shape that wraps to 16 in 64 bits": (
        raw({"a": entry(0, 16, shape=[(1 << 60) + 1, 16])}),
        "not what U8",
    ),
    "shape past 64 bits": (raw({"a": entry(0, 16, shape=[10**30])}), "impossible shape"),
    "shape too large to print": (
        raw({"a": entry(0, 16, shape=[10**4000, 10**4000])}),
        "impossible shape",
    ),
    "shape of a thousand axes": (
        raw({"a": entry(0, 16, shape=[2**62] * 1000)}),
        "impossible shape",
    ),
    "unknown dtype": (raw({"a": entry(0, 16, dtype="F6_E3M2")}), "'F6_E3M2'; known are BOOL"),
    "dtype not ours alone": (raw({"a": entry(0, 16, dtype="u8\n")}), r"'u8\n'"),
    "name of two lines": (raw({"a\nb": entry(0, 16, shape=[3])}), r"'a\nb'"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file(tmp_path: Path, kind: str) -> None:
    content, expected = DAMAGED[kind]
    message = refusal(lambda: Checkpoint(write(tmp_path, content)))
    assert str(tmp_path / SHARD) in message
    assert expected in message


def test_a_header_over_the_format_s_limit(tmp_path: Path) -> None:
    with (tmp_path / SHARD).open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(200_000_000)  # sparse
    assert "not a safetensors file" in refusal(lambda: Checkpoint(tmp_path))


def test_a_folder_in_place_of_a_shard(tmp_path: Path) -> None:
    (tmp_path / SHARD).mkdir()
    assert "Is a directory" in refusal(lambda: Checkpoint(tmp_path))


def test_a_shard_whose_link_dangles(tmp_path: Path) -> None:
    (tmp_path / SHARD).symlink_to(tmp_path / "gone")
    assert "cannot be read: No such file" in refusal(lambda: Checkpoint(tmp_path))


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, raw({"a": F32_4})))
    assert "b" not in checkpoint
    message = refusal(lambda: checkpoint["b"])
    assert "no tensor 'b'" in message and str(tmp_path) in message


def test_spans_that_cannot_be_cut(tmp_path: Path) -> None:
    header = {"scalar": entry(0, 1, shape=[]), "none": entry(1, 1), "three": entry(1, 4)}
    checkpoint = Checkpoint(write(tmp_path, raw(header, 4)))
    for cut in (
        checkpoint["scalar"].rows,
        checkpoint["none"].rows,
        lambda: checkpoint["three"].span.split(2),
    ):
        message = refusal(cut)
        assert str(tmp_path / SHARD) in message and "do not divide" in message


# What is wrong with a folder


def test_missing_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", write(tmp_path, b"", "file") / "file"):
        with pytest.raises(ModelNotFoundError, match=r"no such model folder\. Check") as caught:
            Checkpoint(path)
        assert str(path) in str(caught.value)


def test_folder_without_safetensors(tmp_path: Path) -> None:
    write(tmp_path, b"GGUF", "model.gguf")
    message = refusal(lambda: Checkpoint(tmp_path))
    assert str(tmp_path) in message and "no model*.safetensors" in message and "GGUF" in message


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write(tmp_path, raw({"a": F32_4}), "model-1.safetensors")
    write(tmp_path, raw({"a": F32_4}), "model-2.safetensors")
    message = refusal(lambda: Checkpoint(tmp_path))
    assert "'a'" in message and "model-1.safetensors" in message and "model-2" in message


INDEXES = {
    "missing shard": ({"a": SHARD, "b": "model-2.safetensors"}, "lacks the shard 'model-2.saf"),
    "missing shards": (
        {"b": "model-2.safetensors", "c": "model-3.safetensors", "d": "model-4.safetensors"},
        "and 2 more",
    ),
    "parent folder": ({"a": "../model.safetensors"}, "outside the model folder"),
    "absolute path": ({"a": "/model.safetensors"}, "outside the model folder"),
    "subfolder": ({"a": "model/model.safetensors"}, "outside the model folder"),
    "backslash": ({"a": "..\\model.safetensors"}, "outside the model folder"),
    "dots": ({"a": ".."}, "mlx-lm reads model*.safetensors only"),
    "nothing": ({"a": ""}, "mlx-lm reads model*.safetensors only"),
    "shard that mlx-lm ignores": ({"a": "consolidated.safetensors"}, "mlx-lm reads"),
    "shard of another format": ({"a": "model.bin"}, "mlx-lm reads"),
    "number": ({"a": 1}, "outside the model folder"),
    "name of two lines": ({"a": "model\n.safetensors"}, r"'model\n.safetensors'"),
    "name with a zero byte": ({"a": "model\0.safetensors"}, "lacks the shard"),
    "name that is not Unicode": ({"a": "model\ud800.safetensors"}, "lacks the shard"),
    "tensor that is not in its shard": ({"a": SHARD, "b": SHARD}, "places 'b' in"),
    "tensor in another shard": ({"a": "model-other.safetensors"}, "places 'a' in"),
    "list": ([], "no weight_map"),
    "nothing at all": (None, "no weight_map"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_index_that_lies(tmp_path: Path, kind: str) -> None:
    weight_map, expected = INDEXES[kind]
    folder = write(tmp_path / "model", raw({"a": F32_4}))
    write(folder, raw({"other": F32_4}), "model-other.safetensors")
    write(tmp_path, raw({"a": F32_4}))  # what ../model.safetensors would name
    write_index(folder, weight_map)
    message = refusal(lambda: Checkpoint(folder))
    assert str(folder) in message and expected in message
    message.encode()  # can be printed


def test_index_of_shards_that_are_all_missing(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": SHARD})
    assert "lacks the shard" in refusal(lambda: Checkpoint(tmp_path))


JSONS = {
    "broken": (b'{"weight_map": {', "is not JSON"),
    "empty": (b"", "is not JSON"),
    "not text": (b'{"a": "\xff"}', "is not JSON"),
    "too deep": (b"[" * 100_000, "is not JSON"),
    "endless number": (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    "list": (b"[]", "holds no JSON object"),
    "null": (b"null", "holds no JSON object"),
}


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
@pytest.mark.parametrize("kind", JSONS)
def test_broken_json(tmp_path: Path, name: str, kind: str) -> None:
    content, expected = JSONS[kind]
    write(tmp_path, raw({"a": F32_4}))
    path = write(tmp_path, content, name) / name
    message = refusal(lambda: Checkpoint(tmp_path) if name == INDEX_NAME else read_json(path))
    assert str(path) in message and expected in message


def test_json_that_is_not_there(tmp_path: Path) -> None:
    message = refusal(lambda: read_json(tmp_path / "config.json"))
    assert str(tmp_path) in message and "has no config.json" in message
    (tmp_path / "config.json").mkdir()
    assert "Is a directory" in refusal(lambda: read_json(tmp_path / "config.json"))


# Anything at all


SOUND = raw({"a": entry(0, 16), "b": entry(16, 64, dtype="F32", shape=[3, 4])}, 64)
HEADER_BYTES = len(SOUND) - 64
SNIPPETS = [b"-", b"0", b"9", b"1e9", b'"', b"[", b"]", b"{", b"}", b",", b":", b"null", b"true"]
MUTATION = st.tuples(
    st.integers(0, HEADER_BYTES),
    st.integers(0, 4),
    st.sampled_from(SNIPPETS) | st.binary(max_size=4),
)


@settings(PATIENT, max_examples=300)
@given(mutations=st.lists(MUTATION, max_size=4), keep_length=st.booleans(), cut=st.integers(0, 8))
def test_mutated_headers_give_spans_in_the_file_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory,
    mutations: list[tuple[int, int, bytes]],
    keep_length: bool,
    cut: int,
) -> None:
    content = SOUND
    for at, width, new in mutations:
        content = content[:at] + new + content[at + width :]
    if not keep_length:  # a prefix that agrees lets more of them through to the parser
        content = struct.pack("<Q", max(0, len(content) - 72)) + content[8:]
    folder = tmp_path_factory.getbasetemp() / "mutated"
    write(folder, content[: len(content) - cut])
    try:
        checkpoint = Checkpoint(folder)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
        return
    for info in checkpoint.values():
        assert info.span.offset >= 8
        assert info.span.offset + info.span.nbytes <= len(content) - cut
    assert sum(info.span.nbytes for info in checkpoint.values()) <= len(content)


def test_strided_spans() -> None:
    path = Path("model.safetensors")
    span = Span(path, 10, 12, 3, 8)
    assert [*span.pieces()] == [Span(path, at, 3) for at in (10, 18, 26, 34)]
    assert span.extent == 27
    assert span.split(2) == [Span(path, 10, 6, 3, 8), Span(path, 26, 6, 3, 8)]
    for parts in (3, 12):  # which would cut a piece
        with pytest.raises(CheckpointError, match=f"do not divide into {parts} experts"):
            span.split(parts)
    for together in (Span(path, 10, 12), Span(path, 10, 12, 12, 99), Span(path, 10, 12, 3, 3)):
        assert [*together.pieces()] == [Span(path, 10, 12)]
        assert together.extent == 12 and not together.is_strided
        assert together.split(2) == [Span(path, 10, 6), Span(path, 16, 6)]
    assert Span(path, 10, 0, 3, 8).extent == 0 and not [*Span(path, 10, 0, 3, 8).pieces()]
