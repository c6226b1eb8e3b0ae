"""Whole models with ``--kernels metal``, on the emulator, against MLX's own operations.

In float32, where both are exact to rounding: the same greedy tokens, and log-probabilities that
differ by less than ``BOUND``. The router decides the same or what follows is another text.
"""

import sys
from collections import Counter
from pathlib import Path

import dense_configs
import door
import mlx.core as mx
import pytest
import tiny
from family_configs import GPT_OSS, OLMOE, QWEN3_NEXT
from forms import FORMS
from mlx_lm.generate import generate_step
from mlx_lm.models import gated_delta, ssm
from mlx_lm.models.cache import make_prompt_cache

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

import launches

import mlx_flash
from mlx_flash import demo, dense
from mlx_flash.cli import bench_run
from mlx_flash.computing import who_computes
from mlx_flash.config import StreamConfig
from mlx_flash.errors import UsageError
from mlx_flash.kernels import metal as metal_door
from mlx_flash.opening import open_lazily

BOUND = 2e-4
TOKENS = 24
FOUR = {"group_size": 32, "bits": 4}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
MODELS = {
    "demo": None,
    "qwen3_5_moe-4bit": lambda p: tiny.write(p, quantization=FOUR),
    "qwen3_next-4bit": lambda p: tiny.write(p, config=QWEN3_NEXT, quantization=FOUR),
    "qwen3_next-mxfp4": lambda p: tiny.write(p, config=QWEN3_NEXT, quantization=MXFP4),
    "nemotron_h-4bit": lambda p: tiny.write(p, "nemotron_h", quantization=FOUR),
    "nemotron_h-mxfp4": lambda p: tiny.write(p, "nemotron_h", quantization=MXFP4),
    "qwen3_5_moe-nvfp4": FORMS["qwen3_5_moe-nvfp4"],
    "qwen3_5_moe-4bit-bf16": FORMS["qwen3_5_moe-4bit-bf16"],
}
MOE, DELTA, MAMBA2 = {"route", "gate_up", "down"}, {"delta_step", "gated_norm"}, {"mamba2_step"}
RUNS = {  # the kernels that each has to launch
    "demo": MOE | DELTA,
    "qwen3_next-4bit": MOE | DELTA,
    "qwen3_next-mxfp4": MOE | DELTA,
    "nemotron_h-4bit": MOE | MAMBA2 | {"gated_norm"},
    "nemotron_h-mxfp4": MOE | MAMBA2 | {"gated_norm"},
    "qwen3_5_moe-nvfp4": DELTA,  # a format that MLX computes
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")

    def of(name):
        if name == "demo":
            return demo.FOLDER
        path = root / name
        return path if path.exists() else MODELS[name](path)

    return of


@pytest.fixture
def on_a_mac(quick_metal, monkeypatch):
    monkeypatch.setattr(metal_door, "available", lambda: True)
    return quick_metal


def loaded(path, kernels, slots):
    model, _ = mlx_flash.load(path, slots=slots, context=128, kernels=kernels)
    return model


def decode(model, tokens=TOKENS, prompt=range(40, 60)):
    steps = list(generate_step(mx.array(list(prompt)), model, max_tokens=tokens))
    return [token for token, _ in steps], mx.stack([logprobs for _, logprobs in steps])


def slots_of(name):
    return 12 if name == "demo" else 6


@pytest.mark.parametrize("name", RUNS)
def test_the_tokens_are_those_of_the_reference(on_a_mac, folder, name):
    tokens, logprobs = decode(loaded(folder(name), "reference", slots_of(name)))
    model = loaded(folder(name), "metal", slots_of(name))
    with on_a_mac.recording() as launches:
        ours, our_logprobs = decode(model)
    assert ours == tokens
    assert mx.abs(our_logprobs - logprobs).max().item() < BOUND
    assert logprobs.dtype == mx.float32
    assert len(set(tokens)) > 8, "a model that says one thing would hide a broken kernel"
    assert model.stats().evictions > 0
    assert {launch.name for launch in launches} == RUNS[name]


@pytest.mark.parametrize("slots", [6, 1000])
@pytest.mark.parametrize(
    ("config", "runs"), [(OLMOE, {"gate_up"}), (GPT_OSS, MOE)], ids=["olmoe", "gpt_oss"]
)
def test_other_families_take_what_there_is_for_them(on_a_mac, tmp_path, config, runs, slots):
    """Of a block that has no kernel of its own, the experts."""
    path = tiny.write(tmp_path / "model", config=config, quantization=FOUR)
    tokens, logprobs = decode(loaded(path, "reference", slots), 6)
    model = loaded(path, "metal", slots)
    with on_a_mac.recording() as launches:
        ours, our_logprobs = decode(model, 6)
    assert ours == tokens
    assert mx.abs(our_logprobs - logprobs).max().item() < BOUND
    assert {launch.name for launch in launches} == runs


@pytest.mark.parametrize("name", ["qwen3_5_moe-4bit", "nemotron_h-mxfp4"])
def test_every_access_of_a_few_tokens_is_sound(metal, monkeypatch, folder, name):
    monkeypatch.setattr(metal_door, "available", lambda: True)
    tokens, _ = decode(loaded(folder(name), "reference", 6), tokens=3)
    assert decode(loaded(folder(name), "metal", 6), tokens=3)[0] == tokens


@pytest.mark.parametrize("name", ["qwen3_5_moe-4bit", "nemotron_h-4bit"])
def test_more_experts_than_slots_go_in_waves_and_are_summed(on_a_mac, folder, name):
    # A few tokens at once are still decoded by the kernels, and route to more than four slots.
    reference, model = (loaded(folder(name), k, 4) for k in ("reference", "metal"))
    caches = [make_prompt_cache(m) for m in (reference, model)]
    for tokens in (8, 1, 3):
        x = mx.array([list(range(70, 70 + tokens))])
        with on_a_mac.recording() as launches:
            ours = model(x, cache=caches[1])
            mx.eval(ours)
        assert mx.abs(ours - reference(x, cache=caches[0])).max().item() < 1e-3
        in_waves = all(launch.name != "down" for launch in launches)
        assert in_waves == (tokens > 1)


@pytest.mark.parametrize(("family", "runs"), [("nemotron_h", MAMBA2), ("qwen3_5_moe", DELTA)])
def test_layers_that_stream_whole_decode_by_the_kernels(
    on_a_mac, monkeypatch, tmp_path, family, runs
):
    monkeypatch.setattr(dense, "LEAST_BYTES", 1)
    path = tiny.write(tmp_path / "dense", config=dense_configs.CONFIGS[family], quantization=FOUR)
    tokens, logprobs = decode(loaded(path, "reference", 1), 8)
    model = loaded(path, "metal", 1)
    with on_a_mac.recording() as launches:
        ours, our_logprobs = decode(model, 8)
    assert model.plan.whole_layers and model.plan.streamed_bytes
    assert {launch.name for launch in launches} == runs | {"gated_norm"}
    assert ours == tokens
    assert mx.abs(our_logprobs - logprobs).max().item() < BOUND


def test_all_experts_in_ram_take_the_same_kernels(on_a_mac, folder):
    path = folder("qwen3_5_moe-4bit")
    tokens, logprobs = decode(loaded(path, "metal", 6), 8)
    model = loaded(path, "metal", 1000)
    ours, our_logprobs = decode(model, 8)
    assert model.stats().misses == 0
    assert ours == tokens
    assert mx.abs(our_logprobs - logprobs).max().item() < BOUND  # the prompt in one wave or many


def test_bfloat16_stays_as_near_to_float32_as_the_reference(on_a_mac, folder):
    path = folder("qwen3_5_moe-4bit-bf16")
    exact = loaded(path, "reference", 1000)
    exact.set_dtype(mx.float32)
    off = {"reference": 0.0, "metal": 0.0}
    for kernels in off:
        model = loaded(path, kernels, 6)
        for token in range(40, 52):
            x = mx.array([[token]])
            off[kernels] += mx.abs(model(x) - exact(x)).mean().item()
    assert 0 < off["metal"] < 1.02 * off["reference"]


def test_who_computes_is_said(on_a_mac, folder, monkeypatch):
    def said(name):
        return who_computes(open_lazily(folder(name)), StreamConfig(kernels="metal"))

    assert said("demo") == ("metal", "--kernels metal")
    assert said("qwen3_5_moe-nvfp4") == (
        "metal",
        "--kernels metal; MLX computes 4 of 4 layers of experts",
    )
    lines = door.run("inspect", "--kernels", "metal").out.splitlines()
    assert "kernels     metal: --kernels metal" in lines
    assert bench_run._kernels(loaded(folder("demo"), "metal", 12)) == "metal"
    assert bench_run._kernels(loaded(folder("demo"), "reference", 12)) == "mlx"


def test_without_metal_it_is_refused_in_one_line():
    for command in (("generate", "hello"), ("inspect",)):
        said = door.run(*command, "--kernels", "metal")
        assert (said.code, said.out) == (2, "")
        assert said.err.count("\n") == 1
        assert "--kernels metal needs a Mac" in said.err


def test_the_direct_reader_is_not_for_it(on_a_mac):
    with pytest.raises(UsageError, match="--reader pread"):
        mlx_flash.load(demo.FOLDER, slots=12, kernels="metal", reader="direct")


# --- launches -------------------------------------------------------------------------------

VIEWS = {
    *("Reshape", "Broadcast", "BroadcastAxes", "Transpose", "ExpandDims", "Squeeze", "Flatten"),
    *("Unflatten", "Slice", "Split", "AsStrided", "View", "StopGradient", "Depends", "Copy"),
    "Contiguous",  # which copies, or does not
}


def launches_per_token(model, monkeypatch, tmp_path):
    """GPU operations of one decoded token: kernels launched, and nodes of MLX's graph by kind.

    As on a Mac: what is one kernel there, but many nodes on a CPU, counts once. Its inputs are
    kept, and its outputs are leaves of their own.
    """
    kept, kernels = [], Counter()

    def once(name, inputs, *outputs):
        kept.extend(x for x in inputs if isinstance(x, mx.array))
        kernels[name] += 1
        made = [mx.zeros(shape, dtype) for shape, dtype in outputs]
        mx.eval(made)
        return made

    def metal_kernel(name, **_):
        return lambda *, inputs, output_shapes, output_dtypes, **_: once(
            name, inputs, *zip(output_shapes, output_dtypes, strict=True)
        )

    def alike(name):
        return lambda x, *rest, **_: once(name, [x, *rest], (x.shape, x.dtype))[0]

    def attention(q, k, v, **_):
        return once("attention", [q, k, v], ((*q.shape[:-1], v.shape[-1]), q.dtype))[0]

    def dequantize(w, scales, biases=None, group_size=None, bits=None, mode="affine"):
        wide = (*w.shape[:-1], w.shape[-1] * 32 // bits)
        return once("dequantize", [w, scales, biases], (wide, mx.float32))[0]

    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([list(range(40, 60))]), cache=cache))
    mx.eval([c.state for c in cache])
    with monkeypatch.context() as mac:
        mac.setattr(mx.fast, "metal_kernel", metal_kernel)
        mac.setattr(mx.fast, "rms_norm", alike("rms_norm"))
        mac.setattr(mx.fast, "rope", alike("rope"))
        mac.setattr(mx.fast, "scaled_dot_product_attention", attention)
        mac.setattr(mx, "dequantize", dequantize)
        mac.setattr(mx, "default_device", lambda: mx.gpu)
        mac.setattr(mx.metal, "is_available", lambda: True)
        mac.setattr(gated_delta, "_gated_delta_kernel", metal_kernel("gated_delta"))
        mac.setattr(ssm, "_ssm_kernel", metal_kernel("ssm"))
        logits = model(mx.array([[7]]), cache=cache)
    path = tmp_path / "graph.dot"
    states = [x for c in cache for x in c.state if isinstance(x, mx.array)]
    mx.export_to_dot(str(path), logits, *kept, *states)
    labels = [line.split('"')[1] for line in path.read_text().splitlines() if "rect" in line]
    return kernels, Counter(label for label in labels if label not in VIEWS)


@pytest.mark.parametrize("name", ["qwen3_5_moe-4bit", "qwen3_next-4bit", "nemotron_h-4bit"])
def test_a_token_takes_fewer_launches(on_a_mac, monkeypatch, folder, tmp_path, name):
    counted = {}
    for kernels in ("reference", "metal"):
        model = loaded(folder(name), kernels, 1000)
        ran, nodes = launches_per_token(model, monkeypatch, tmp_path)
        counted[kernels] = sum(ran.values()) + sum(nodes.values())
        rows = launches.of_token(model, {}, launches.states_of(model, 20))
        assert sum(row["launches"] for row in rows) == counted[kernels], "as in a trace"
    assert counted["metal"] < 0.56 * counted["reference"]
