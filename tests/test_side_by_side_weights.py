"""The GGUF of the side-by-side benchmark has the checkpoint's weights. Needs no llama.cpp."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not an installed package

import make_checkpoint  # noqa: E402
from rivals import blocks, gguf_writer, layout  # noqa: E402

gguf = pytest.importorskip("gguf", reason="SKIPPED LOUDLY: gguf is not installed: pip install gguf")


def decoded(packed, type_name):
    """What llama.cpp reads: by the gguf package's own dequantization. -> [n, 64]"""
    kind = gguf.GGMLQuantizationType[type_name]
    return gguf.dequantize(packed.reshape(-1), kind).reshape(-1, blocks.GROUP)


def random_groups(n, seed=0):
    draw = np.random.default_rng(seed)
    nibbles = draw.integers(0, 256, (n, 32), dtype=np.uint8)
    scales = draw.uniform(0.001, 0.009, n).astype(np.float32)
    biases = -scales * draw.uniform(0, 12, n).astype(np.float32)
    return nibbles, scales, biases


@pytest.mark.parametrize("seed", range(5))
def test_q4_k_differs_by_no_more_than_its_own_resolution(seed):
    nibbles, scales, biases = random_groups(64, seed)
    wanted = blocks.dequantize(nibbles, scales, biases)
    found = decoded(blocks.q4_k(nibbles, scales, biases), "Q4_K")
    step = scales.reshape(-1, 4).max(axis=1) / 63
    offset = (-biases + blocks.MIDDLE * np.repeat(step, 4)).reshape(-1, 4).max(axis=1) / 63
    # Half a step of the scale, times the distance of q from its middle, and half of the offset's.
    allowed = np.repeat(step / 2 * blocks.MIDDLE + offset / 2, 4)[:, None] * 1.01
    assert (np.abs(found - wanted) <= allowed).all()
    middle = np.abs((found - wanted).mean(axis=1)) / scales
    assert middle.mean() < 0.06  # a group is not shifted by the rounding of its scale


def test_q4_k_is_exact_for_what_it_can_say():
    nibbles, _, _ = random_groups(32)
    draw = np.random.default_rng(1)
    sc, m = draw.integers(1, 64, (2, 8, 4)).astype(np.float32)
    sc[:, 0] = m[:, 3] = 63  # the largest of a block sets its unit
    scales, biases = (sc * 2**-10).reshape(-1), (m * -(2**-8)).reshape(-1)
    found = decoded(blocks.q4_k(nibbles, scales, biases), "Q4_K")
    np.testing.assert_array_equal(found, blocks.dequantize(nibbles, scales, biases))


def test_q4_1_is_exact_for_halves():
    nibbles, scales, biases = random_groups(32)
    scales, biases = (x.astype(np.float16).astype(np.float32) for x in (scales, biases))
    found = decoded(blocks.q4_1(nibbles, scales, biases), "Q4_1")
    np.testing.assert_array_equal(found, blocks.dequantize(nibbles, scales, biases))


def test_groups_of_zeros_stay_zeros():
    nibbles, zeros = np.zeros((4, 32), np.uint8), np.zeros(4, np.float32)
    assert not decoded(blocks.q4_k(nibbles, zeros, zeros), "Q4_K").any()


def test_what_q4_k_cannot_hold():
    _, scales, biases = random_groups(8)
    assert blocks.fits_q4_k(256, scales, biases)
    assert not blocks.fits_q4_k(128, scales, biases)
    assert not blocks.fits_q4_k(256, scales, np.append(biases[1:], np.float32(0.1)))
    assert not blocks.fits_q4_k(256, -scales, biases)


def test_dequantize_is_mlx_s():
    nibbles, scales, biases = random_groups(8)
    words = mx.array(nibbles.view(np.uint32))
    theirs = mx.dequantize(words, mx.array(scales)[:, None], mx.array(biases)[:, None], 64, 4)
    np.testing.assert_allclose(blocks.dequantize(nibbles, scales, biases), theirs, rtol=1e-6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint, the plain weights that MLX sees in it, and its GGUF as read back."""
    folder = tmp_path_factory.mktemp("side-by-side")
    make_checkpoint.make(folder / "tiny", "tiny")
    wrote = []
    tensors = gguf_writer.prepare(folder / "tiny")
    gguf_writer.write(folder / "tiny", folder / "tiny.gguf", tensors, wrote.append)
    assert sum(wrote) == sum(tensor.nbytes for tensor in tensors)
    reader = gguf.GGUFReader(folder / "tiny.gguf")
    found = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    model, config = load_model(folder / "tiny")
    return model.language_model, config["text_config"], found, reader


def weight(module):
    """What a module multiplies by, in float32."""
    if "scales" not in module:
        return np.array(module.weight)
    arrays = module.weight, module.scales, module.biases
    return np.array(mx.dequantize(*arrays, module.group_size, module.bits, mode=module.mode))


def close(found, wanted):
    """Within what Q4_K may lose, which is far from any other weight."""
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


def test_the_file_has_every_tensor_of_the_architecture(tiny):
    _, text, found, _ = tiny
    names = gguf.TENSOR_NAMES
    known = {names[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN35MOE]}
    stems = {name.removesuffix(".weight").removesuffix(".bias") for name in found}
    for layer in range(text["num_hidden_layers"]):
        stems = {stem.replace(f"blk.{layer}.", "blk.{bid}.") for stem in stems}
    assert stems <= known
    fused_or_of_other_layouts = {"blk.{bid}.ffn_gate_up_exps"}
    assert known - stems - fused_or_of_other_layouts == {name for name in known if "nextn" in name}
    skeleton = make_checkpoint.describe("tiny", None, "float32", None, None, "affine")
    weights = [t for t in skeleton.tensors if t.kind not in ("scales", "biases")]
    a_word = [32 // t.quantized.bits if t.quantized else 1 for t in weights]
    wanted = sum(t.count * n for t, n in zip(weights, a_word, strict=True))
    assert sum(x.size for x in found.values()) == wanted


def test_metadata_is_the_config_s(tiny):
    _, text, _, reader = tiny
    wanted = {
        "block_count": text["num_hidden_layers"],
        "attention.head_count_kv": text["num_key_value_heads"],
        "rope.dimension_count": text["head_dim"] // 4,
        "expert_used_count": text["num_experts_per_tok"],
        "ssm.time_step_rank": text["linear_num_value_heads"],
        "ssm.group_count": text["linear_num_key_heads"],
    }
    for name, value in wanted.items():
        assert reader.get_field(f"{layout.ARCHITECTURE}.{name}").contents() == value
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == text["vocab_size"]


def test_experts_attention_and_tables_are_copied(tiny):
    model, _, found, _ = tiny
    layer = model.model.layers[3]
    close(found["token_embd.weight"], weight(model.model.embed_tokens))
    close(found["output.weight"], weight(model.lm_head))
    for name, module in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
        close(found[f"blk.3.attn_{name}.weight"], weight(layer.self_attn[module]))
    for name in ("gate", "up", "down"):
        close(found[f"blk.3.ffn_{name}_exps.weight"], weight(layer.mlp.switch_mlp[f"{name}_proj"]))
        shared = weight(layer.mlp.shared_expert[f"{name}_proj"])
        close(found[f"blk.3.ffn_{name}_shexp.weight"], shared)
    router = weight(layer.mlp.gate)
    np.testing.assert_allclose(found["blk.3.ffn_gate_inp.weight"], router, rtol=1e-5, atol=1e-7)


def test_value_heads_are_tiled_over_key_heads(tiny):
    model, text, found, _ = tiny
    delta, width = model.model.layers[0].linear_attn, text["linear_value_head_dim"]
    assert (delta.num_k_heads, delta.num_v_heads) == (2, 4)
    order = [0, 2, 1, 3]  # the first value head of each key head, then the second
    rows = np.concatenate([np.arange(h * width, (h + 1) * width) for h in order])
    keys = 2 * delta.key_dim
    qkv = weight(delta.in_proj_qkv)
    close(found["blk.0.attn_qkv.weight"], np.concatenate([qkv[:keys], qkv[keys:][rows]]))
    close(found["blk.0.attn_gate.weight"], weight(delta.in_proj_z)[rows])
    close(found["blk.0.ssm_beta.weight"], weight(delta.in_proj_b)[order])
    close(found["blk.0.ssm_alpha.weight"], weight(delta.in_proj_a)[order])
    close(found["blk.0.ssm_out.weight"], weight(delta.out_proj)[:, rows])
    np.testing.assert_allclose(found["blk.0.ssm_a"], -np.exp(np.array(delta.A_log))[order], 1e-6)
    np.testing.assert_array_equal(found["blk.0.ssm_dt.bias"], np.array(delta.dt_bias)[order])
    kernel = np.array(delta.conv1d.weight)[..., 0]
    wanted = np.concatenate([kernel[:keys], kernel[keys:][rows]])
    np.testing.assert_array_equal(found["blk.0.ssm_conv1d.weight"], wanted)


def test_heads_of_three_to_a_key():
    np.testing.assert_array_equal(layout.tiled_heads(2, 6), [0, 3, 1, 4, 2, 5])


@pytest.mark.parametrize(
    "config, why",
    [
        ({"model_type": "nemotron_h"}, "Only Qwen3.5-MoE"),
        ({"model_type": "qwen3_5_moe_text", "quantization": {"mode": "mxfp4"}}, "affine 4 bit"),
    ],
)
def test_other_checkpoints_are_refused(config, why):
    with pytest.raises(ValueError, match=why):
        layout.text_of(config)
