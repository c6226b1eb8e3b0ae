"""The synthetic checkpoint writer: the files mlx-lm would have written, in little RAM."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load, stream_generate
from mlx_lm.models import qwen3_5_moe
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from safetensors import safe_open
from transformers import AutoTokenizer

import mlx_flash

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not an installed package

import make_checkpoint  # noqa: E402
import routing_statistics  # noqa: E402
from synthetic import shapes, topics  # noqa: E402
from synthetic import tokenizer as tokenizer_files  # noqa: E402
from synthetic.topics import Routing  # noqa: E402

SCRIPT = BENCHMARKS / "make_checkpoint.py"
TINY_NEMOTRON = {
    **shapes.SHAPES["nemotron-3-nano-30b-a3b"],
    **{"hidden_size": 128, "num_hidden_layers": 6, "hybrid_override_pattern": "MEM*ME"},
    **{"vocab_size": 512, "num_attention_heads": 4, "head_dim": 32, "mamba_num_heads": 4},
    **{"mamba_head_dim": 32, "ssm_state_size": 32, "n_groups": 2, "moe_intermediate_size": 64},
    **{"moe_shared_expert_intermediate_size": 128, "intermediate_size": 64},
    **{"n_routed_experts": 16, "num_experts_per_tok": 4},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    make_checkpoint.make(out, "tiny", dtype="float32", shard_size="3MB")
    return out


def entries(folder: Path) -> dict[str, tuple[list[int], str]]:
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "np") as file:  # validates the header
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    return found


def bytes_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.glob("*")):
        yield path.name, path.read_bytes()


def tensors_of(folder: Path) -> dict[str, mx.array]:
    return {
        k: v for path in folder.glob("model*.safetensors") for k, v in mx.load(str(path)).items()
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_same_files_as_mlx_lm(tmp_path: Path, dtype: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    make_checkpoint.make(ours, "tiny", dtype=dtype)
    config = shapes.config_for("tiny", None, dtype)
    model = qwen3_5_moe.Model(qwen3_5_moe.ModelArgs.from_dict(json.loads(json.dumps(config))))
    model.set_dtype(getattr(mx, dtype))
    for layer in model.layers:
        if layer.is_linear:  # what mlx_lm.convert leaves alone
            layer.linear_attn.A_log = layer.linear_attn.A_log.astype(mx.float32)
    model, config = quantize_model(model, config, 64, 4)
    save_model(theirs, model)
    save_config(config, theirs / "config.json")
    assert entries(ours) == entries(theirs)
    for name in ("config.json", "model.safetensors.index.json"):
        assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())


def test_shards_and_index(tiny: Path) -> None:
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tiny.glob("model*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert index["weight_map"].keys() == entries(tiny).keys()
    for name, file in index["weight_map"].items():
        assert name in mx.load(str(tiny / file))
    sizes = [(tiny / file).stat().st_size for file in files]
    assert all(size < 3e6 + 50_000 for size in sizes)
    assert index["metadata"]["total_size"] < sum(sizes) < index["metadata"]["total_size"] + 1e5


def test_loads_and_generates(tiny: Path) -> None:
    model, tokenizer = load(str(tiny))
    logits = model(mx.array([tokenizer.encode("Hello, world")]))
    assert mx.isfinite(logits).all()
    assert 0.5 < logits.std() < 2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True
    )
    answers = list(stream_generate(model, tokenizer, prompt, max_tokens=24))
    assert len({answer.token for answer in answers}) > 12
    assert "".join(answer.text for answer in answers).strip()


def test_nemotron_loads_and_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny-nemotron", TINY_NEMOTRON)
    make_checkpoint.make(tmp_path, "tiny-nemotron", dtype="float32", seed=1)
    model, tokenizer = load(str(tmp_path))
    answers = list(stream_generate(model, tokenizer, "Hello", max_tokens=12))
    assert mx.isfinite(answers[-1].logprobs).all()
    assert len({answer.token for answer in answers}) > 6


@pytest.mark.parametrize(
    ("mode", "bits"),
    [*(("affine", bits) for bits in (2, 3, 4, 5, 6, 8)), ("mxfp4", 4), ("nvfp4", 4), ("mxfp8", 8)],
)
def test_weights_are_centred_and_scaled(tmp_path: Path, mode: str, bits: int) -> None:
    make_checkpoint.make(tmp_path, "tiny", layers=1, mode=mode, bits=bits)
    model, _ = load_model(tmp_path)
    for layer in (model.layers[0].mlp.switch_mlp.up_proj, model.language_model.lm_head):
        parts = (layer.weight, layer.scales, layer.get("biases"))
        form = {"group_size": layer.group_size, "bits": bits, "mode": mode}
        weights = mx.dequantize(*parts, **form).astype(mx.float32)
        deviation = weights.shape[-1] ** -0.5
        assert abs(weights.mean().item()) < 0.02 * deviation
        assert weights.std().item() == pytest.approx(deviation, rel=0.1)


def test_router_rows_have_one_norm(tiny: Path) -> None:
    gate = load_model(tiny)[0].layers[0].mlp.gate
    rows = mx.dequantize(gate.weight, gate.scales, gate.biases, gate.group_size, gate.bits)
    norms = np.array(mx.linalg.norm(rows, axis=1))
    assert gate.bits == 8
    assert norms == pytest.approx(np.ones(32), rel=1e-3)


def routing_of(folder: Path, tokens: int = 96) -> list[routing_statistics.Routing]:
    return routing_statistics.measure(*mlx_flash.load(folder, slots=16), "Once upon a time", tokens)


def test_uniform_routing_uses_every_expert(tmp_path: Path) -> None:
    make_checkpoint.make(tmp_path, "tiny", routing=Routing.UNIFORM)
    layers = routing_of(tmp_path)
    assert len(layers) == 4
    assert all(layer.used > 0.9 and layer.entropy > 0.9 for layer in layers)
    assert all(layer.busiest < 0.4 for layer in layers)
    assert 0.05 < np.mean([layer.next_token for layer in layers]) < 0.2


def test_real_routing_repeats_experts(tiny: Path) -> None:
    layers = routing_of(tiny)
    assert all(layer.used > 0.5 and layer.entropy > 0.6 for layer in layers)
    assert 0.3 < np.mean([layer.next_token for layer in layers]) < 0.6
    curve = np.mean([layer.lru for layer in layers], axis=0)
    assert (np.diff(curve) > 0).all()
    assert curve[2] > 0.5  # a cache of a quarter hits twice as often as its size


def test_forty_layers_route_alike(tmp_path: Path) -> None:
    make_checkpoint.make(tmp_path, "tiny", layers=40)
    layers = routing_of(tmp_path)
    for name in ("used", "busiest", "entropy", "next_token", "eight_tokens"):
        first, last = (
            np.mean([getattr(layer, name) for layer in half]) for half in (layers[:20], layers[20:])
        )
        assert last == pytest.approx(first, rel=0.2), name


def test_topics_are_orthogonal_and_follow_one_another() -> None:
    rows = np.arange(5000)
    table = topics.of_output(rows, 32, 2048)
    seen = np.unique(table, axis=0)
    assert len(seen) == topics.TOPICS
    gram = seen @ seen.T
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-6 * gram.max()
    embedded = topics.of_embedding(rows, 32)
    embedded -= embedded.mean(axis=0)
    stays = np.argmax(embedded @ seen.T, axis=1) == np.argmax(table @ seen.T, axis=1)
    assert np.mean(stays) == pytest.approx(1 - 1 / topics.DWELL, abs=0.01)


def test_routing_statistics_of_a_known_text() -> None:
    chosen = np.array([[0, 1], [1, 2]] * 8)
    layer = routing_statistics.statistics(chosen, 16)
    assert (layer.used, layer.busiest) == (3 / 16, 1.0)
    assert (layer.next_token, layer.eight_tokens) == (0.5, 1.0)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (7, 7, 8), strict=True):
        make_checkpoint.make(folder, "tiny", layers=2, seed=seed)
    first, second, other = (dict(bytes_of(folder)) for folder in folders)
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]


def test_values_do_not_depend_on_shards(tiny: Path, tmp_path: Path) -> None:
    make_checkpoint.make(tmp_path, "tiny", dtype="float32")
    one, many = tensors_of(tmp_path), tensors_of(tiny)
    assert one.keys() == many.keys()
    assert all(mx.array_equal(one[name], many[name]) for name in one)


def test_tokenizer_shows_every_id_and_round_trips(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    shown = [tokenizer.decode([n]) for n in range(2048)]
    assert len(tokenizer) == 2048
    assert all(shown)
    assert sum(not text.strip().isprintable() for text in shown) < 34  # control bytes
    assert len(set(shown[256:])) == 2048 - 256
    for text in (
        "Hello, wörld!\n\n  日本語 🙂\tx",
        "<|im_start|>user\nhi<|im_end|>\n",
        "".join(shown[300:320]),
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_ids_to_tokens([2045, 2046, 2047]) == list(tokenizer_files.SPECIALS)
    assert tokenizer.eos_token_id == 2047


def test_writer_streams(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--shape", "nemotron-3-nano-30b-a3b"]
    command += ["--layers", "1", "--out", str(tmp_path)]
    # Its own account of it: a child's ru_maxrss begins with what its parent had at the fork.
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak = float(re.search(r"peak RSS (\d+) MB", said)[1]) * 1e6
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size > 300e6
    assert peak < 200e6


def test_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        make_checkpoint.make(tmp_path, "tiny")
    make_checkpoint.make(tmp_path, "tiny", shard_size="3MB", force=True)
    make_checkpoint.make(tmp_path, "tiny", layers=1, force=True)
    assert [path.name for path in tmp_path.glob("model*.safetensors")] == ["model.safetensors"]
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_refuses_a_full_disk_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=70_000_000))
    with pytest.raises(OSError, match=r"needs 0\.22 GB .* has 0\.07 GB free"):
        make_checkpoint.make(tmp_path / "new" / "deep", "tiny", layers=100)
    assert not list(tmp_path.iterdir())


def test_refuses_absurd_sizes_quickly(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--shape", "qwen3.5-397b-a17b", "--out", "new"]
    done = subprocess.run(
        [*command, "--layers", "100000"], cwd=tmp_path, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: This checkpoint needs 410,")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 7},
        {"group_size": 48},
        {"shard_size": "much"},
        {"mode": "mxfp4", "routing": Routing.REAL},
    ],
)
def test_names_what_it_cannot_do(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"bits|group|size|affine"):
        make_checkpoint.make(tmp_path / "new", "tiny", **wrong)
    assert not list(tmp_path.iterdir())


def test_help_teaches() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert "--shape qwen3.5-35b-a3b --layers 8" in done.stdout
