"""Models without experts stream layer by layer, and say what the resident model says."""

import errno
import json
import subprocess
import sys
import textwrap
import threading

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny
from dense_configs import CONFIGS
from fakes import FakeReader
from mlx.utils import tree_flatten
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import ArraysCache

import mlx_flash
from mlx_flash import dense, weights
from mlx_flash.errors import BudgetError, ReadError, UnsupportedModelError
from mlx_flash.kernels import native
from mlx_flash.streaming.checkpoint import Span
from mlx_flash.streaming.layers import LayerRing, LayerTensor, StreamedLayer, as_streamed_layer
from mlx_flash.streaming.reader import PreadReader

# Gemma 4's text model is in the parity tests by another name.
pytestmark = pytest.mark.filterwarnings("ignore::mlx_flash.errors.UntestedModelWarning")

QUANTIZATIONS = {"f32": None, "4bit": {"group_size": 32, "bits": 4}}
PROMPT = range(40, 100)


@pytest.fixture(autouse=True)
def _small_weights_stream(monkeypatch):
    monkeypatch.setattr(dense, "LEAST_BYTES", 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a tiny dense checkpoint. Do not write to it."""
    root = tmp_path_factory.mktemp("dense")

    def folder(family, form="4bit"):
        path = root / f"{family}-{form}"
        if not path.exists():
            tiny.write(path, config=CONFIGS[family], quantization=QUANTIZATIONS[form])
        return path

    return folder


@pytest.fixture(scope="module")
def resident(folders):
    """The resident model's answer, computed once: mlx-lm's where the kernels are its own."""
    answers = {}

    def answer(family, form="4bit"):
        if (family, form) not in answers:
            if native() is None:
                model, _ = mlx_lm.load(str(folders(family, form)))
            else:
                model = load(folders(family, form), slots=1000)
                assert model.ring is None
            answers[family, form] = decode(model)
        return answers[family, form]

    return answer


def load(folder, **knobs):
    model, _ = mlx_flash.load(folder, **({"ram": "4GB", "context": 256} | knobs))
    return model


def decode(model, tokens=24, prompt=PROMPT):
    """Greedy tokens, and the log-probabilities each was chosen from. Three chunks of prompt."""
    steps = generate_step(mx.array(list(prompt)), model, max_tokens=tokens, prefill_step_size=24)
    said = list(steps)
    return [token for token, _ in said], mx.stack([logprobs for _, logprobs in said])


def same(ours, theirs):
    return ours[0] == theirs[0] and mx.array_equal(ours[1], theirs[1])


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("form", QUANTIZATIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_streamed_says_what_resident_says(folders, resident, family, form, slots):
    model = load(folders(family, form), slots=slots)
    layers = len(model.layers)
    assert sum(isinstance(layer, StreamedLayer) for layer in model.layers) == layers - slots
    assert same(decode(model), resident(family, form))
    streamed = model.plan.streamed_bytes
    assert streamed == model.plan.expert_bytes - model.plan.slot_bytes > 0
    # Three chunks, the last prompt token, 23 more and mlx-lm's one too many; the rest is ahead.
    passes = 3 + 24 + 1
    assert passes * streamed - model.plan.ring_bytes <= model.reader.bytes_read
    assert model.reader.bytes_read <= passes * streamed + model.plan.ring_bytes


@pytest.mark.skipif(native() is None, reason="SKIPPED LOUDLY: the native kernels are not built")
@pytest.mark.parametrize("family", CONFIGS)
def test_the_reference_says_what_mlx_lm_says(folders, family):
    stock, _ = mlx_lm.load(str(folders(family)))
    expected = decode(stock)
    assert same(decode(load(folders(family), slots=1, kernels="reference")), expected)
    tokens, logprobs = decode(load(folders(family), slots=1))
    assert tokens == expected[0]
    assert mx.max(mx.abs(logprobs - expected[1])).item() < 1e-3


@pytest.mark.skipif(native() is None, reason="SKIPPED LOUDLY: the native kernels are not built")
@pytest.mark.parametrize("reader", ["pread", "direct"])
def test_every_reader_brings_the_same(folders, resident, reader):
    assert same(decode(load(folders("llama"), slots=2, reader=reader)), resident("llama"))


def test_the_raw_layout_of_hugging_face_streams(tmp_path):
    """Llama's names are the same in both layouts; an axis of one moves in Mamba2's convolution."""
    for family in ("llama", "mamba2"):
        model = tiny.build(CONFIGS[family], dtype=mx.bfloat16)
        weights = dict(tree_flatten(model.parameters()))
        for name in [n for n in weights if "conv1d.weight" in n]:
            weights[name] = mx.contiguous(weights[name].moveaxis(2, 1))
        folder = tmp_path / family
        folder.mkdir()
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
        tiny.write_tokenizer(folder)
        whole, streamed = load(folder, slots=100), load(folder, slots=0)
        assert streamed.ring is not None
        assert same(decode(streamed), decode(whole))


def test_a_layer_larger_than_a_buffer_is_refused(folders, monkeypatch):
    monkeypatch.setattr(weights, "MOST_LAYER_BYTES", 1000)
    with pytest.raises(UnsupportedModelError, match=r"a layer of .* KB is more than the 1.00 KB"):
        load(folders("llama"), slots=2)
    assert load(folders("llama"), slots=1000).ring is None


def test_batches(folders):
    prompts = [list(range(40, 60)), list(range(90, 130)), [7, 8, 9]]
    said = []
    for slots in (1000, 2):
        model, tokenizer = mlx_flash.load(folders("qwen3"), ram="4GB", slots=slots, context=256)
        answer = batch_generate(model, tokenizer, prompts, max_tokens=16, return_token_ids=True)
        said.append(answer.token_ids)
    assert said[0] == said[1]


def test_two_models_alive(folders, resident):
    first, second = load(folders("llama"), slots=0), load(folders("nemotron_h"), slots=2)
    prompt = mx.array(list(PROMPT))
    steps = [
        generate_step(prompt, model, max_tokens=24, prefill_step_size=24)
        for model in (first, second)
    ]
    pairs = list(zip(*steps, strict=True))
    for i, family in enumerate(("llama", "nemotron_h")):
        tokens, logprobs = resident(family)
        assert [pair[i][0] for pair in pairs] == tokens
        assert mx.array_equal(mx.stack([pair[i][1] for pair in pairs]), logprobs)


def test_every_read_begins_before_its_layer_is_called(folders):
    model = load(folders("llama"), slots=2)
    decode(model)
    stats = model.ring.stats
    assert stats.calls == 5 * 28
    assert stats.begun_ahead == stats.calls


def test_the_next_token_is_read_while_the_last_layer_computes(folders):
    """The read of the next layer ends while its predecessor still holds its own buffer."""
    model = load(folders("llama"), slots=0)
    decode(model, 2)
    ring = model.ring
    with ring.holding(6):
        ahead = next(b for b in ring._buffers if b.layer == 0)
        ahead.read.result(timeout=10)  # would wait for ever if it waited for the block to end
    assert {b.layer for b in ring._buffers} == {0, 1}, "a buffer given back stays idle"


def test_a_forward_abandoned_half_way(folders, resident):
    model = load(folders("llama"), slots=1)
    block, forward = model.layers[3], type(model.layers[3].mlp).__call__

    class Interrupt(KeyboardInterrupt):
        pass

    def fail(self, x):
        if self is block.mlp and failing:
            forward(self, x)
            raise Interrupt
        return forward(self, x)

    block.mlp.__class__ = type("MLP", (type(block.mlp),), {"__call__": fail})
    for failing in (True, True, False, True, False):
        if failing:
            with pytest.raises(Interrupt):
                decode(model)
        else:
            assert same(decode(model), resident("llama"))


def test_layers_called_out_of_order(folders):
    whole, model = load(folders("llama"), slots=1000), load(folders("llama"), slots=0)
    x = mx.random.normal((1, 5, 64))
    for i in (3, 3, 6, 0, 5, 4, 1, 0, 6):
        assert mx.array_equal(model.layers[i](x), whole.layers[i](x))


def test_a_layer_that_has_no_bytes_cannot_compute(folders):
    model = load(folders("llama"), slots=0)
    decode(model, 2)
    with pytest.raises((ValueError, RuntimeError)):  # of MLX, of the kernel
        mx.eval(model.layers[0].self_attn(mx.ones((1, 1, 64))))


def test_nothing_keeps_bytes_of_the_ring(folders):
    """What a call returns, and what it leaves in the cache, outlives the layer's bytes."""
    model, whole = load(folders("gemma4_text"), slots=0), load(folders("gemma4_text"), slots=1000)
    tokens = mx.array([list(PROMPT)])
    caches = [mlx_lm.models.cache.make_prompt_cache(m) for m in (model, whole)]
    logits = [m(tokens, cache=c) for m, c in zip((model, whole), caches, strict=True)]
    for buffer in model.ring._buffers:
        buffer.read.result()
        memoryview(buffer.memory)[:] = bytes([255]) * buffer.memory.nbytes
    assert mx.array_equal(*logits)
    for ours, theirs in zip(*caches, strict=True):
        assert all(mx.array_equal(a, b) for a, b in zip(ours.state, theirs.state, strict=True))


class Side(nn.Module):
    """A layer whose result does not depend on what it leaves in its cache."""

    def __init__(self):
        super().__init__()
        self.weight = mx.zeros((8, 8))

    def __call__(self, x, cache):
        cache[0] = x @ self.weight
        return x + 1


def test_what_a_layer_leaves_in_its_cache_outlives_its_bytes(tmp_path):
    weights = np.random.default_rng(0).random((3, 8, 8), np.float32)
    (tmp_path / "weights").write_bytes(weights.tobytes())
    layers = [Side() for _ in weights]
    spans = [Span(tmp_path / "weights", 256 * i, 256) for i in range(3)]
    tensors = [
        [LayerTensor(layer, "weight", span, (8, 8), mx.float32)]
        for layer, span in zip(layers, spans, strict=True)
    ]
    ring = LayerRing(tensors, FakeReader(), lambda nbytes: mx.zeros((nbytes,), mx.uint8))
    caches = [ArraysCache(1) for _ in layers]
    x = mx.random.normal((1, 8))
    for turn, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        as_streamed_layer(layer, ring, turn)
        x = layer(x, cache=cache)
    for layer in layers:
        layer(x, cache=ArraysCache(1))
    x = x - 3
    for cache, weight in zip(caches, weights, strict=True):
        assert mx.allclose(cache[0], x @ mx.array(weight), atol=1e-5)
        x = x + 1
    ring.close()


def test_a_file_cut_short_is_noticed_at_the_call(folders, tmp_path):
    for knobs in ({}, {"reader": "pread", "kernels": "reference"}):
        folder = tiny.write(tmp_path / str(len(knobs)), config=CONFIGS["llama"])
        model = load(folder, slots=0, **knobs)
        decode(model, 2)
        weights = folder / "model.safetensors"
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size // 2)
        for _ in range(3):
            with pytest.raises(ReadError, match=r"bytes short|changed on disk"):
                decode(model)


@pytest.mark.parametrize("at", [1, 4, 11])
def test_a_failed_read_is_raised_and_tried_again(folders, resident, monkeypatch, at):
    count, lock = 0, threading.Lock()
    read = PreadReader.read_into

    def fail_once(self, jobs):
        nonlocal count
        with lock:
            count += 1
        if count == at:
            jobs[0][1][: len(jobs[0][1]) // 2] = bytes(len(jobs[0][1]) // 2)
            raise ReadError(errno.EIO, "fake fault", "fake")
        read(self, jobs)

    monkeypatch.setattr(PreadReader, "read_into", fail_once)
    model = load(folders("llama"), slots=0, reader="pread", kernels="reference")
    with pytest.raises(ReadError, match="fake fault"):
        decode(model)
    reference = decode(load(folders("llama"), slots=1000, reader="pread", kernels="reference"))
    assert same(decode(model), reference)


def test_a_closed_model_says_so(folders):
    model = load(folders("llama"), slots=0)
    decode(model, 2)
    model.close()
    with pytest.raises(ReadError, match="closed with its model"):
        decode(model)


def test_what_fits_is_stock(folders):
    model = load(folders("llama"))
    assert model.plan.residency == 1 and model.plan.ring_bytes == 0
    assert model.ring is None
    assert not any(isinstance(m, StreamedLayer) for m in model.modules())


def test_slots_are_whole_layers(folders):
    assert mlx_flash.plan(folders("llama"), ram="4GB", slots=5).residency == 1  # 2 buffers do
    with pytest.raises(BudgetError, match=r"--slots -1: this model has no experts.*0 or more"):
        mlx_flash.plan(folders("llama"), ram="4GB", slots=-1)


def test_an_adapter_stays_and_what_it_adapts_streams(folders, tmp_path):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    stock, _ = mlx_lm.load(str(folders("llama")))
    stock.freeze()
    config = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    linear_to_lora_layers(stock, 7, config)
    weights = {
        name: mx.random.normal(a.shape) * 0.1
        for name, a in tree_flatten(stock.trainable_parameters())
    }
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 7, "lora_parameters": config})
    )
    said = [
        decode(load(folders("llama"), slots=slots, adapter_path=str(tmp_path)))
        for slots in (1000, 0)
    ]
    assert same(*said)
    assert said[0][0] != decode(load(folders("llama"), slots=0))[0]


def test_it_ends_well(folders):
    script = """
        import sys
        import mlx.core as mx
        import mlx_flash
        from mlx_lm.generate import generate_step
        from mlx_flash import dense

        def begin():
            model, _ = mlx_flash.load(sys.argv[1], ram="4GB", slots=0, context=256)
            steps = generate_step(mx.array([40, 41, 42]), model, max_tokens=50)
            for _ in range(5):
                next(steps)
            return model, steps

        dense.LEAST_BYTES = 1
        model, steps = begin()
        del model, steps  # dropped while it reads
        model, steps = begin()
        model.close()  # under a generator
        model, steps = begin()
        mx.async_eval(model(mx.array([[40, 41, 42]])))
        """  # and the process ends while it computes and reads
    command = [sys.executable, "-c", textwrap.dedent(script), str(folders("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
