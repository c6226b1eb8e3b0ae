"""`mlx-flash inspect` says what is true of a checkpoint, and reads nothing but headers."""

import json
import math
from pathlib import Path

import door
import mlx.core as mx
import pytest
import tiny
from families import FAMILIES
from mlx.utils import tree_flatten

import mlx_flash
from mlx_flash import computing
from mlx_flash.anatomy import anatomy
from mlx_flash.kernels import native
from mlx_flash.opening import open_lazily
from mlx_flash.streaming.checkpoint import Checkpoint

FORMS = [
    "qwen3_5_moe-4bit",
    "qwen3_5_moe-mixed",
    "qwen3_5_moe-hf-f32",
    "qwen3_5_moe-nvfp4",
    "nemotron_h-mxfp4",
]


def facts(*args):
    said = door.run("inspect", *args, "--json")
    assert (said.code, said.err) == (0, ""), said.err
    assert said.out.count("\n") == 1
    return json.loads(said.out)


@pytest.mark.parametrize("form", FORMS)
def test_figures_add_up_to_the_model(checkpoints, form):
    folder = checkpoints(form)
    lazy, said = open_lazily(folder), facts(folder)
    everything = sum(a.nbytes for _, a in tree_flatten(lazy.model.parameters()))
    experts = sum(e.nbytes for e in lazy.layers.values())
    assert said["experts"]["bytes"] == experts
    assert sum(part["bytes"] for part in said["resident"].values()) == everything - experts
    assert said["plan"]["resident_bytes"] == everything - experts
    for part in [said["experts"], *said["resident"].values()]:
        assert sum(f["bytes"] for f in part["formats"]) == part["bytes"]
    layers = said["experts"]["layers"]
    assert sum(e["layers"] for e in layers) == len(lazy.layers)
    assert sum(e["layers"] * e["count"] * e["nbytes_each"] for e in layers) == experts
    token = sum(e["layers"] * e["top_k"] * e["nbytes_each"] for e in layers)
    assert said["experts"]["bytes_per_token"] == token
    disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert (said["checkpoint"]["files"], said["checkpoint"]["bytes"]) == (1, disk)
    assert said["checkpoint"]["ignored"] == {"tensors": 0, "bytes": 0, "names": {}}


def test_a_model_by_its_parts(checkpoints):
    said = facts(checkpoints("qwen3_5_moe-4bit"))
    assert said["model_type"] == "qwen3_5_moe"
    assert said["class"] == "mlx_lm.models.qwen3_5_moe.Model"
    assert said["tested"] is True
    assert said["layers"] == {"gated delta": 3, "attention": 1}
    (experts,) = said["experts"]["layers"]
    assert (experts["layers"], experts["count"], experts["top_k"]) == (4, 16, 4)
    bits = {"dtype": None, "bits": 4, "group_size": 64, "mode": "affine"}
    assert said["experts"]["formats"] == [bits | {"bytes": said["experts"]["bytes"]}]
    assert said["resident"].keys() == {
        "embeddings", "output layer", "gated delta", "attention", "shared experts", "routers",
        "norms",
    }  # fmt: skip
    table = tiny.VOCAB * (64 // 2 + 2 * 4)  # words, and a scale and a bias for each row
    assert said["resident"]["embeddings"]["bytes"] == table
    assert said["resident"]["output layer"]["bytes"] == table
    assert said["resident"]["norms"]["bytes"] == (2 * 4 + 1) * 64 * 4


def test_mamba_and_layers_of_experts_alone(checkpoints):
    said = facts(checkpoints("nemotron_h-mxfp4"))
    assert said["layers"] == {"mamba2": 2, "experts alone": 3, "attention": 1}
    assert said["experts"]["formats"][0]["mode"] == "mxfp4"
    assert {"mamba2", "attention", "routers", "shared experts"} <= said["resident"].keys()


KINDS = {
    "gpt_oss": {"sliding attention": 2, "attention": 2},
    "llama4": {"chunked attention": 3, "attention": 1},
    "deepseek_v3": {"latent attention": 4},
    "kimi_linear": {"gated delta": 3, "latent attention": 1},
    "lfm2_moe": {"short convolution": 3, "attention": 1},
    "jamba": {"mamba": 4, "attention": 2},
}


@pytest.mark.parametrize("family", KINDS)
def test_kinds_and_purposes_are_read_off_any_family(tmp_path, family):
    lazy = open_lazily(tiny.write(tmp_path / family, config=FAMILIES[family].config))
    found = anatomy(lazy)
    assert found.layers == KINDS[family]
    assert {*KINDS[family]} <= {
        f"{k}{p}" for k in ("", "sliding ", "chunked ") for p in found.parts
    }
    assert {"routers", "embeddings", "norms"} <= found.parts.keys()
    assert "other" not in found.parts
    shared = found.parts["shared experts"].nbytes if "shared experts" in found.parts else 0
    assert shared == 0 or shared > 10_000, "a bias of the router's scores is the router's"


def test_a_model_without_experts(tmp_path):
    wide = FAMILIES["llama"].config | {"intermediate_size": 512}  # worth streaming
    folder = tiny.write(tmp_path / "llama", config=wide)
    said = facts(folder)
    assert said["tested"] is True
    assert (said["experts"]["bytes"], said["experts"]["bytes_per_token"]) == (0, 0)
    assert said["experts"]["layers"] == []
    assert said["layers"] == {"attention": len(said["plan"]["slots"])}
    assert "experts     none: layers stream whole" in door.run("inspect", folder).out


def test_mixed_quantization_is_listed(checkpoints):
    said = facts(checkpoints("qwen3_5_moe-mixed"))
    formats = {(f["bits"], f["group_size"]) for f in said["experts"]["formats"]}
    assert formats == {(4, 64), (8, 32), (6, 32)}
    assert len(said["experts"]["layers"]) == 2, "experts of one layer are larger"
    lines = door.run("inspect", checkpoints("qwen3_5_moe-mixed")).out
    for words in ("4-bit g64", "8-bit g32", "6-bit g32", "3 x 16, 4 per token", "1 x 16"):
        assert words in lines
    assert said["resident"]["routers"]["formats"][0]["dtype"] == "float32"


def test_forms_of_a_checkpoint(checkpoints):
    ours, theirs = facts(checkpoints("qwen3_5_moe-f32")), facts(checkpoints("qwen3_5_moe-hf-f32"))
    assert ours["checkpoint"]["layout"] == "mlx"
    assert theirs["checkpoint"]["layout"] == "huggingface"
    for said in (ours, theirs):
        assert (said["checkpoint"]["streams"], said["checkpoint"]["reads"]) == (True, "whole")
    for name in ("layers", "experts", "resident"):
        assert ours[name] == theirs[name]
    lines = door.run("inspect", checkpoints("qwen3_5_moe-hf-f32")).out
    assert "Hugging Face layout, streamed as it is, 1 file" in lines


@pytest.mark.parametrize("axes", ["interleaved", "computed"])
def test_experts_that_are_not_as_the_model_computes_with_them(tmp_path, monkeypatch, axes):
    """gpt_oss: gate and up are every other row. And experts that are made by arithmetic."""
    from mlx_lm.models import qwen3_5_moe

    folder = tiny.write(tmp_path / "model")

    def sanitize(model, weights):
        for name in [n for n in weights if "switch_mlp.up_proj" in n]:
            gate = name.replace("up_proj", "gate_proj")
            both = weights.pop(name.replace("up_proj", "both"), None)
            if both is None:
                continue
            weights[name], weights[gate] = both[:, ::2], both[:, 1::2]
        for name in [n for n in weights if n.endswith("switch_mlp.both")]:
            both = weights.pop(name)
            if axes == "computed":
                both = both * 2
            weights[name.replace("both", "up_proj.weight")] = both[:, ::2]
            weights[name.replace("both", "gate_proj.weight")] = both[:, 1::2]
        return weights

    monkeypatch.setattr(qwen3_5_moe.Model, "sanitize", sanitize)
    weights = mx.load(str(folder / "model.safetensors"))
    for name in [n for n in weights if n.endswith("switch_mlp.up_proj.weight")]:
        up, gate = weights.pop(name), weights.pop(name.replace("up_proj", "gate_proj"))
        both = mx.stack([up, gate], axis=2).reshape(up.shape[0], -1, up.shape[2])
        weights[name.replace("up_proj.weight", "both")] = both
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "model.safetensors.index.json").unlink()
    said, lines = facts(folder)["checkpoint"], door.run("inspect", folder).out
    assert said["layout"] == "huggingface", "though most names are the model's"
    if axes == "interleaved":
        assert (said["streams"], said["reads"]) == (True, "strided")
        assert "streamed as it is in strided pieces" in lines
    else:
        command = f"mlx_lm.convert --hf-path {folder} --mlx-path CONVERTED"
        assert (said["streams"], said["reads"], said["conversion"]) == (False, None, command)
        assert f"needs a conversion: `{command}`" in lines


def test_tensors_that_the_model_does_not_use(tmp_path):
    folder = tiny.write_hf_qwen(tmp_path / "hf", dtype=mx.float32)
    weights = mx.load(str(folder / "model.safetensors"))
    weights |= {f"mtp.layers.0.{name}.weight": mx.zeros((4, 8)) for name in ("fc", "norm")}
    weights["model.visual.patch_embed.weight"] = mx.zeros((8,))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    said = facts(folder)["checkpoint"]["ignored"]
    names = {"mtp": 2 * 4 * 8 * 4, "model.visual": 8 * 4}
    assert said == {"tensors": 3, "bytes": sum(names.values()), "names": names}
    lines = door.run("inspect", folder).out
    assert "3 tensors, 288 B: model.visual.*, mtp.*" in lines


def test_names_of_the_json_stay(checkpoints):
    said = facts(checkpoints("qwen3_5_moe-4bit"), "--slots", 6, "--ram", "4GB")
    assert {name: sorted(v) if isinstance(v, dict) else type(v) for name, v in said.items()} == {
        "model": str,
        "model_type": str,
        "class": str,
        "tested": bool,
        "checkpoint": ["bytes", "conversion", "files", "ignored", "layout", "reads", "streams"],
        "layers": ["attention", "gated delta"],
        "experts": ["bytes", "bytes_per_token", "formats", "layers"],
        "resident": sorted(said["resident"]),
        "kernels": ["run", "why_not_native"],
        "floor_bytes": int,
        "plan": [
            "context", "planned_bytes", "prefill_tokens", "process_bytes", "ram_bytes",
            "residency", "resident_bytes", "scratch_bytes", "slot_bytes", "slots", "state_bytes",
        ],
        "refused": type(None),
    }  # fmt: skip
    assert set(said["experts"]["layers"][0]) == {"layers", "count", "top_k", "nbytes_each"}
    (form,) = said["experts"]["formats"]
    assert set(form) == {"dtype", "bits", "group_size", "mode", "bytes"}
    assert set(said["plan"]["slots"].values()) == {6}
    assert said["plan"]["ram_bytes"] == 4_000_000_000


def test_lines_are_few_and_aligned():
    said = door.run("inspect")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert len(lines) < 30
    titles = ["model", "checkpoint", "layers", "experts", "resident", "kernels", "floor", "plan"]
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == titles
    assert all(line[10:12] == "  " and line[12] != " " for line in lines)
    assert all(len(line) <= 100 for line in lines if not line.startswith("kernels"))
    assert "qwen3_5_moe, tested" in lines[0]
    assert "MLX layout, 1 file, 10.27 MB" in lines[1]
    assert "8: 6 gated delta, 2 attention" in lines[2]


def test_the_floor_is_the_smallest_budget(checkpoints):
    folder = checkpoints("nemotron_h-8bit")
    floor = facts(folder)["floor_bytes"]
    assert facts(folder, "--ram", floor + 2_000_000)["plan"] is not None
    said = facts(folder, "--ram", floor - 20_000_000)
    assert said["plan"] is None
    assert "short of the floor" in said["refused"]
    assert abs(said["floor_bytes"] - floor) < 10_000_000, "the process alone has grown"
    lines = door.run("inspect", folder, "--ram", floor - 20_000_000).out.splitlines()
    assert lines[-1].startswith("plan        a RAM budget of ")
    assert any(line == f"floor       --ram {math.ceil(n / 1e6)}MB" for line in lines
               for n in (floor, facts(folder)["floor_bytes"]))  # fmt: skip


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_who_computes_and_why(checkpoints, kernels):
    said = facts(checkpoints("qwen3_5_moe-4bit"), "--kernels", kernels)["kernels"]
    if kernels == "auto" and native() is not None:
        assert said == {"run": f"native {native().isa()}", "why_not_native": None}
    else:
        assert said["run"] == "reference"
        assert said["why_not_native"]


def test_without_the_compiled_kernels_it_says_why(checkpoints, monkeypatch):
    monkeypatch.setattr(computing, "native", lambda: None)
    monkeypatch.setattr(computing, "why_not", lambda: "they were not built")
    said = facts(checkpoints("qwen3_5_moe-4bit"))["kernels"]
    assert said == {"run": "reference", "why_not_native": "they were not built"}
    lines = door.run("inspect", checkpoints("qwen3_5_moe-4bit")).out
    assert "kernels     reference: they were not built\n" in lines


BAD = {
    ("--ram", "lots"): ["'lots'", "8GB"],
    ("--ram", "900TB"): ["--ram 900TB"],
    ("--slots", "3"): ["--slots 3", "4 or more"],
    ("--kernels", "nope"): ["'nope'", "reference"],
    ("--context", "0"): ["--context", "--help"],
    ("--revision", "main"): ["--revision main", "Leave it out"],
}


@pytest.mark.parametrize("options", BAD, ids=" ".join)
def test_bad_option_is_one_line(checkpoints, options):
    check_refusal(door.run("inspect", checkpoints("qwen3_5_moe-4bit"), *options), *BAD[options])


def check_refusal(said, *named):
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("mlx-flash: error: ")
    assert said.err.count("\n") == 1
    for word in named:
        assert word in said.err


def test_bad_model_is_one_line(tmp_path):
    check_refusal(door.run("inspect", tmp_path / "missing"), "no such folder")
    (tmp_path / "config.json").write_text('{"model_type": "lamma"}')
    check_refusal(door.run("inspect", tmp_path), "'lamma'")


def test_help_teaches(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = door.run("inspect", "--help")
    assert (said.code, said.err) == (0, "")
    for words in ("mlx-flash inspect ./my-model --ram 8GB", "ignored", "floor", "--json"):
        assert words in said.out


def test_nothing_is_read_but_headers(tmp_path):
    # rchar counts every byte this process asks the kernel for, from disk or page cache.
    io = Path("/proc/self/io")
    if not io.exists():
        pytest.skip("SKIPPED LOUDLY: no /proc/self/io here, so bytes read cannot be counted")

    def bytes_read():
        return int(io.read_text().split()[1])

    config = json.loads(json.dumps(tiny.QWEN3_5_MOE))
    config["text_config"] |= {"num_experts": 64, "vocab_size": 4096}
    folder = tiny.write(tmp_path / "model", config=config)
    door.run("inspect", folder)  # modules imported
    before = bytes_read()
    assert door.run("inspect", folder).code == 0
    read = bytes_read() - before
    small = sum(p.stat().st_size for p in folder.iterdir() if p.suffix != ".safetensors")
    headers = 2 * Checkpoint(folder).header_bytes
    table = 4096 * 64 * 4  # the smallest of the large tensors
    assert headers <= read <= headers + 4 * small + 200_000 < headers + table
    assert mlx_flash.plan(folder, ram="4GB", slots=4).expert_bytes > 10 * table
