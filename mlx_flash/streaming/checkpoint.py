"""Where the bytes of every tensor lie on disk. Reads headers, never tensor data.

Every header is checked against its file before anything is read through it, so that
a truncated or lying checkpoint is refused here and nowhere else. Format: safetensors,
https://github.com/huggingface/safetensors#format.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError, ModelNotFoundError

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_RANK = 64  # numpy's; a longer shape is no shape

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of one file: a range, or equal pieces at equal distances.

    Args:
        path: The file.
        offset: Where the first byte lies.
        nbytes: How many there are, gaps not counted.
        piece: Bytes that lie together. 0: all of them.
        stride: From the start of one piece to the start of the next.
    """

    path: Path
    offset: int
    nbytes: int
    piece: int = 0
    stride: int = 0

    @property
    def is_strided(self) -> bool:
        return self.piece not in (0, self.nbytes, self.stride)

    @property
    def extent(self) -> int:
        """Bytes on disk from the first to the last."""
        if not self.is_strided or not self.nbytes:
            return self.nbytes
        return (self.nbytes // self.piece - 1) * self.stride + self.piece

    def pieces(self) -> Iterator["Span"]:
        """The spans of bytes that lie together, in the order of memory."""
        if not self.is_strided:
            yield Span(self.path, self.offset, self.nbytes)
            return
        for i in range(self.nbytes // self.piece):
            yield Span(self.path, self.offset + i * self.stride, self.piece)

    def split(self, parts: int) -> list["Span"]:
        """Cut into ``parts`` equal spans of whole pieces, in order."""
        piece, stride = (self.piece, self.stride) if self.is_strided else (0, 0)
        if parts < 1 or self.nbytes % (parts * (piece or 1)):
            raise CheckpointError(
                f"{self.path}: {self.nbytes} bytes at {self.offset} do not divide into "
                f"{parts} experts. Download this file again."
            )
        n = self.nbytes // parts
        step = n // piece * stride if piece else n
        return [Span(self.path, self.offset + i * step, n, piece, stride) for i in range(parts)]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: its dtype in safetensors' spelling, shape and place."""

    span: Span
    dtype: str
    shape: tuple[int, ...]

    def rows(self) -> list[Span]:
        """One span per index of the first axis: per expert, when stacked."""
        return self.span.split(self.shape[0] if self.shape else 0)


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a folder of safetensors files, by name.

    Args:
        folder (Path): A model folder. Reads ``model*.safetensors``, the files that
            mlx-lm loads, and checks them against the index when there is one.

    Raises:
        ModelNotFoundError: If the folder does not exist.
        CheckpointError: If a file is missing, truncated, or is not what its header says.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ModelNotFoundError(f"{folder}: no such model folder. Check the path.")
        self.folder = folder
        self.header_bytes = 0
        self._tensors: dict[str, TensorInfo] = {}
        formats = set[object]()
        index = _read_index(folder)
        paths = sorted(folder.glob("model*.safetensors"))
        if not paths and not index:
            raise CheckpointError(
                f"{folder} has no model*.safetensors. Pass a folder in MLX or Hugging Face "
                "layout; GGUF, pickle and npz files are not read."
            )
        for path in paths:
            header_bytes, tensors, metadata = _read_header(path)
            self.header_bytes += header_bytes
            formats.add(metadata.get("format"))
            self._check_unique(path, tensors)
            self._tensors.update(tensors)
        self._check_index(index)
        self.is_saved_by_mlx = formats == {"mlx"}

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.folder} has no tensor {name!r}. The checkpoint is incomplete or in a "
                "layout this architecture does not know: convert it with `mlx_lm.convert`."
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _check_unique(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        # Which of the two mlx-lm would load depends on the order of the folder's files.
        for name in tensors.keys() & self._tensors.keys():
            raise CheckpointError(
                f"{path}: {name!r} is also in {self._tensors[name].span.path.name}. "
                "Remove the file that does not belong to this checkpoint."
            )

    def _check_index(self, index: Mapping[str, str]) -> None:
        for tensor, file in index.items():
            info = self._tensors.get(tensor)
            if info is None or info.span.path.name != file:
                raise CheckpointError(
                    f"{self.folder / INDEX_NAME} places {tensor!r} in {file!r}, which does not "
                    "hold it. Index and shards are of different versions: download both again."
                )


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name to shard name, or empty where there is no index."""
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} has no weight_map. Download this file again.")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or PurePosixPath(file).name != file or "\\" in file:
            raise CheckpointError(
                f"{path} places {tensor!r} in {file!r}, outside the model folder. "
                "Do not trust this checkpoint: get it from its publisher again."
            )
        if not (file.startswith("model") and file.endswith(".safetensors")):
            raise CheckpointError(
                f"{path} places {tensor!r} in {file!r}, but mlx-lm reads model*.safetensors "
                "only. Convert the checkpoint with `mlx_lm.convert`."
            )
    missing = sorted({f for f in weight_map.values() if not (folder / f).exists()})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder} lacks the shard {missing[0]!r}{more} that its index names. "
            "Finish the download."
        )
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the model folder."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}. Is it a model folder? Finish the download."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Download it again.") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object. Download it again.")
    return value


def _read_header(path: Path) -> tuple[int, dict[str, TensorInfo], dict[str, Any]]:
    """Size of the header in bytes, the checked tensors of one file, and its metadata."""
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise _damaged(path, f"not a safetensors file ({file_bytes} bytes)")
            raw = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _tensor(path, start, name, entry) for name, entry in header.items()}
    _check_layout(path, start, file_bytes, tensors)
    return start, tensors, metadata if isinstance(metadata, dict) else {}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _tensor(path: Path, start: int, name: str, entry: Any) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [first, last]}:
            pass
        case _:
            raise _damaged(path, f"the header entry of {name!r} is malformed")
    if dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{path}: {name!r} has dtype {dtype!r}; known are {', '.join(DTYPE_BITS)}. "
            "Convert the checkpoint with `mlx_lm.convert`."
        )
    if len(shape) > MAX_RANK or not all(_is_size(n) for n in shape):
        raise _damaged(path, f"{name!r} has an impossible shape")
    if not (_is_size(first) and _is_size(last)):
        raise _damaged(path, f"{name!r} has impossible offsets")
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if last - first != nbytes:
        raise _damaged(
            path, f"{name!r} has bytes {first}..{last}, which is not what {dtype} {shape} takes"
        )
    return TensorInfo(Span(path, start + first, nbytes), dtype, tuple(shape))


def _is_size(value: object) -> bool:
    # A JSON true is an int to Python, and no count of bytes needs more than 63 bits.
    return type(value) is int and 0 <= value < 1 << 63


def _check_layout(path: Path, start: int, file_bytes: int, tensors: dict[str, TensorInfo]) -> None:
    """The data section is covered once, without gap or overlap, to the end of the file."""
    expected = start
    in_order = sorted(tensors.items(), key=lambda item: (item[1].span.offset, item[1].span.nbytes))
    for name, info in in_order:
        if info.span.offset != expected:
            fault = "overlaps another tensor" if info.span.offset < expected else "leaves a gap"
            raise _damaged(path, f"{name!r} {fault} at byte {info.span.offset}")
        expected += info.span.nbytes
    if file_bytes < expected:
        raise _damaged(
            path, f"truncated: {file_bytes} bytes of {expected}, {expected - file_bytes} missing"
        )
    if file_bytes > expected:
        raise _damaged(path, f"{file_bytes - expected} bytes follow the last tensor")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read: {error.strerror}. Check its permissions and the disk."
    )


def _damaged(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{path}: {fault}. Download this file again.")
