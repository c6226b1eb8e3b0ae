"""Layouts are read off `sanitize`: whatever it does, the bytes found are those of its result."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.errors import CheckpointError
from mlx_flash.layout import Layout
from mlx_flash.streaming.checkpoint import Checkpoint

EXPERTS, OUT, IN = 4, 6, 8


class Model(nn.Module):
    """A model of which nothing matters but how it rearranges a checkpoint."""

    def __init__(self, rearrange):
        super().__init__()
        self.head = nn.Linear(2, 2)
        self._rearrange = rearrange

    def sanitize(self, weights):
        return self._rearrange(weights)


def write(folder, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return Checkpoint(folder)


def stacked(rng):
    return {
        f"experts.{e}.{part}": mx.array(rng.integers(0, 2**32, (OUT, IN), dtype=np.uint32))
        for e in range(EXPERTS)
        for part in ("gate", "up")
    }


def fused(rng):
    words = rng.integers(0, 2**32, (EXPERTS, 2 * OUT, IN), dtype=np.uint32)
    return {"gate_up": mx.array(words), "blocks": mx.array(words).view(mx.uint8)}


def read(span):
    """The bytes of a span, piece by piece."""
    piece, stride = span.piece or span.nbytes, span.stride or span.nbytes
    data = span.path.read_bytes()
    starts = range(span.offset, span.offset + stride * (span.nbytes // piece), stride)
    return b"".join(data[start : start + piece] for start in starts)


def check(layout, name, array):
    """The layout's bytes of every row are those of the array."""
    rows = array.shape[0]
    spans = layout.rows(name, rows, array.nbytes // rows)
    got = b"".join(map(read, spans))
    assert got == np.array(mx.contiguous(array).view(mx.uint8)).tobytes()
    return spans


def stack_all(weights):
    return {
        part: mx.stack([weights.pop(f"experts.{e}.{part}") for e in range(EXPERTS)])
        for part in ("gate", "up")
    }


FORMS = {
    "stacked": (stacked, stack_all),
    "stacked backwards": (
        stacked,
        lambda w: {"x": mx.stack([w[f"experts.{e}.up"] for e in reversed(range(EXPERTS))])},
    ),
    "concatenated and unflattened": (
        stacked,
        lambda w: {
            "x": mx.concatenate([w[f"experts.{e}.up"][None] for e in range(EXPERTS)], axis=0)
        },
    ),
    "halves": (fused, lambda w: dict(zip("gu", mx.split(w["gate_up"], 2, axis=1), strict=True))),
    "halves by slices": (
        fused,
        lambda w: {"g": w["gate_up"][:, :OUT], "u": w["gate_up"][:, OUT:]},
    ),
    "interleaved": (fused, lambda w: {"g": w["gate_up"][:, ::2], "u": w["gate_up"][:, 1::2]}),
    "interleaved blocks of bytes": (
        fused,
        lambda w: {"g": w["blocks"].view(mx.uint32)[:, ::2]},
    ),
    "blocks flattened": (
        fused,
        lambda w: {"x": w["blocks"].reshape(EXPERTS, 2 * OUT, 2, -1).view(mx.uint32).flatten(-2)},
    ),
    "some experts": (fused, lambda w: {"x": w["gate_up"][1:3]}),
    "one expert as a layer": (fused, lambda w: {"x": w["gate_up"][2]}),
    "an axis of one moved": (
        fused,
        lambda w: {"x": w["gate_up"][:, :, None].moveaxis(2, 1).squeeze(1)},
    ),
    "stacked, then halved": (
        stacked,
        lambda w: {"x": mx.stack([w[f"experts.{e}.up"] for e in range(EXPERTS)])[:, : OUT // 2]},
    ),
    "stacked, then every second": (
        stacked,
        lambda w: {"x": mx.stack([w[f"experts.{e}.up"] for e in range(EXPERTS)])[1::2]},
    ),
    "untouched": (fused, lambda w: w),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_in_rows_is_found(tmp_path, form):
    tensors, rearrange = FORMS[form]
    made = tensors(np.random.default_rng(1))
    layout = Layout(write(tmp_path, made), Model(rearrange))
    for name, array in rearrange(dict(made)).items():
        spans = check(layout, name, array)
        assert any(span.piece for span in spans) == form.startswith("interleaved")


COMPUTED = {
    "transposed": lambda w: {"x": w["gate_up"].swapaxes(1, 2)},
    "scaled": lambda w: {"x": w["gate_up"] * 2},
    "another dtype": lambda w: {"x": w["gate_up"].astype(mx.float32)},
    "padded": lambda w: {"x": mx.pad(w["gate_up"], ((0, 0), (0, 1), (0, 0)))},
    "joined along the rows, then cut": lambda w: {
        "x": mx.concatenate([w["gate_up"][:, :OUT], w["gate_up"][:, OUT:]], axis=1).reshape(
            2 * EXPERTS, OUT, IN
        )
    },
    "picked by an array": lambda w: {"x": w["gate_up"][mx.array([1, 0, 3, 2])]},
    "experts along another axis": lambda w: {"x": w["gate_up"].swapaxes(0, 1)},
    "joined along the rows": lambda w: {
        "x": mx.concatenate([w["gate_up"][:, ::2], w["gate_up"][:, 1::2]], axis=1)
    },
}


@pytest.mark.parametrize("form", COMPUTED)
def test_what_must_be_computed_names_the_conversion(tmp_path, form):
    rearrange = COMPUTED[form]
    made = fused(np.random.default_rng(1))
    layout = Layout(write(tmp_path, made), Model(rearrange))
    x = rearrange(dict(made))["x"]
    if form == "experts along another axis":  # strided rows, each of them readable
        check(layout, "x", x)
        return
    with pytest.raises(CheckpointError, match=r"`mlx_lm\.convert --hf-path .*`$"):
        layout.rows("x", x.shape[0], x.nbytes // x.shape[0])
    assert layout.span("x", x.nbytes) is None


def test_a_name_that_is_not_there(tmp_path):
    layout = Layout(write(tmp_path, fused(np.random.default_rng(1))), Model(dict))
    with pytest.raises(CheckpointError, match="nowhere"):
        layout.rows("nowhere", EXPERTS, 8)
    with pytest.raises(CheckpointError, match="gate_up"):
        layout.rows("gate_up", EXPERTS + 1, 2 * OUT * IN * 4)
    with pytest.raises(CheckpointError, match="gate_up"):
        layout.rows("gate_up", EXPERTS, 8)


class Copying(Model):
    """What MLX cannot export, in a part of the model, where mlx-lm's classes have it too."""

    def sanitize(self, weights):
        mx.eval(weights)
        return {"x": mx.contiguous(weights["blocks"].view(mx.uint32)[:, ::2])}


def test_copies_into_contiguous_memory_are_followed(tmp_path):
    made = fused(np.random.default_rng(1))
    model = Model(lambda weights: model.part.sanitize(weights))
    model.part = Copying(None)
    layout = Layout(write(tmp_path, made), model)
    check(layout, "x", made["gate_up"][:, ::2])
    assert "sanitize" not in vars(model.part)
    assert mx.contiguous is Copying.sanitize.__globals__["mx"].contiguous


def test_a_whole_weight(tmp_path):
    made = fused(np.random.default_rng(1))
    layout = Layout(
        write(tmp_path, made), Model(lambda w: {"a": w["gate_up"][1], "b": w["gate_up"][:, 1]})
    )
    assert read(layout.span("a", made["gate_up"][1].nbytes)) == bytes(made["gate_up"][1])
    assert read(layout.span("b", made["gate_up"][:, 1].nbytes)) == bytes(
        mx.contiguous(made["gate_up"][:, 1])
    )
    assert layout.span("a", 4) is None


def test_what_tracing_takes_out_of_the_model_is_put_back(tmp_path):
    model = Model(lambda w: w)

    def ties_the_head(weights):
        del model["head"]  # raises the second time
        model.tied = True
        return weights

    model._rearrange = ties_the_head
    Layout(write(tmp_path, fused(np.random.default_rng(1))), model)
    assert "head" in model
    assert not hasattr(model, "tied")


def test_a_sanitize_that_looks_at_values_leaves_what_mlx_lm_saved(tmp_path):
    made = fused(np.random.default_rng(1))
    saved = {"x": made["gate_up"]}

    def curious(weights):
        return {n: w * 2 if w[0, 0, 0].item() == 0 else w for n, w in weights.items()}

    layout = Layout(write(tmp_path, made), Model(curious))
    with pytest.raises(CheckpointError, match="cannot be followed"):
        layout.rows("gate_up", EXPERTS, 2 * OUT * IN * 4)
    (tmp_path / "mlx").mkdir()
    mx.save_safetensors(str(tmp_path / "mlx" / "model.safetensors"), saved, {"format": "mlx"})
    layout = Layout(Checkpoint(tmp_path / "mlx"), Model(curious))
    check(layout, "x", saved["x"])
    assert layout.span("x", saved["x"].nbytes) is None


axes = st.permutations([0, 1, 2])
STEPS = st.one_of(
    st.tuples(st.just("slice"), st.integers(0, 2), st.integers(0, 3), st.integers(1, 3)),
    st.tuples(st.just("transpose"), axes),
    st.tuples(st.just("reshape"), st.integers(0, 5)),
    st.tuples(st.just("index"), st.integers(0, 1)),
    st.tuples(st.just("take"), st.integers(0, 1)),
    st.tuples(st.just("split"), st.integers(0, 2)),
)


def apply(array, step):
    kind, *how = step
    if kind == "slice" and how[0] < array.ndim and how[1] < array.shape[how[0]]:
        cut = [slice(None)] * array.ndim
        cut[how[0]] = slice(how[1], None, how[2])
        return array[tuple(cut)]
    if kind == "transpose" and array.ndim == 3:
        return array.transpose(*how[0])
    if kind == "reshape":
        shapes = [(-1, 4), (4, -1), (2, -1, 4), (8, -1), (3, -1), (1, *array.shape)]
        shape = shapes[how[0]]
        size = int(np.prod([n for n in shape if n > 0]))
        if array.size % size == 0 and array.ndim < 4:
            return array.reshape(shape)
    if kind == "index" and array.ndim > 1 and how[0] < array.shape[0]:
        return array[how[0]]
    if kind == "take" and array.ndim > 1 and how[0] < array.shape[1]:
        return mx.take(array, mx.array([how[0]]), axis=1)
    if kind == "split" and how[0] < array.ndim and array.shape[how[0]] % 2 == 0:
        return mx.split(array, 2, axis=how[0])[1]
    return array


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=5), st.booleans())
def test_any_rearrangement_is_found_or_refused(tmp_path_factory, steps, of_parts):
    made = (stacked if of_parts else fused)(np.random.default_rng(2))

    def rearrange(weights):
        x = stack_all(dict(weights))["up"] if of_parts else weights["gate_up"]
        for step in steps:
            x = apply(x, step)
        return {"x": x}

    layout = Layout(write(tmp_path_factory.mktemp("any"), made), Model(rearrange))
    x = rearrange(dict(made))["x"]
    if x.ndim == 0 or x.size == 0:
        return
    try:
        check(layout, "x", x)
    except CheckpointError:
        assert any(kind in ("transpose", "reshape", "slice", "take") for kind, *_ in steps)
