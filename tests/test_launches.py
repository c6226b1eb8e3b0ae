"""What one token launches and moves, as the benchmark counts it, against counts by hand."""

import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import activations

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import launches
import on_a_mac

from mlx_flash.kernels.metal.delta import delta_step_bytes
from mlx_flash.kernels.metal.ssm import mamba2_step_bytes

# Bytes of a weight: in groups of 64, each with a scale and a bias of 2 bytes.
FOUR_BITS, EIGHT_BITS = 4 / 8 + 4 / 64, 8 / 8 + 4 / 64
CONTEXT = 1024


@pytest.fixture(scope="module")
def qwen():
    rows = launches.compare("qwen3.5-35b-a3b", CONTEXT, layers=4)
    return {row.kind: row for row in rows}


@pytest.fixture(scope="module")
def nemotron():
    rows = launches.compare("nemotron-3-nano-30b-a3b", CONTEXT, layers=6)
    return {row.kind: row for row in rows}


def moe_weights():
    """Of Qwen3.5-35B-A3B: eight experts and the shared one, router, the shared one's gate."""
    experts = 9 * 3 * 512 * 2048 * FOUR_BITS
    return experts + (256 + 1) * 2048 * EIGHT_BITS


def test_the_bytes_of_weights_are_those_by_hand(qwen, nemotron):
    norms = 2 * 2048 * 2
    channels = 2 * 16 * 128 + 32 * 128
    delta = (channels + 4096 + 2 * 32 + 4096) * 2048 * FOUR_BITS
    delta += 4 * channels * 2 + 32 * (4 + 2) + 128 * 2  # convolution, A_log and dt_bias, norm
    attention = (2 * 16 + 2 * 2 + 16) * 256 * 2048 * FOUR_BITS + 2 * 256 * 2
    ends = 248320 * 2048 * FOUR_BITS + 2048 * FOUR_BITS + 2048 * 2  # lm_head, one row, norm
    mamba2 = (4096 + 6144 + 64 + 4096) * 2688 * FOUR_BITS + 2688 * 2
    mamba2 += (4 + 1) * 6144 * 2 + 64 * (4 + 2 + 2) + 4096 * 2
    for row, weights in (
        (qwen["delta net, MoE"], delta + moe_weights() + norms),
        (qwen["attention, MoE"], attention + moe_weights() + norms),
        (qwen["embedding, lm_head"], ends),
        (nemotron["Mamba2"], mamba2),
    ):
        assert row.before["weights"] == row.after["weights"] == weights


def test_the_bytes_of_state_are_those_by_hand(qwen, nemotron):
    recurrent, history = 32 * 128 * 128 * 4, 3 * 8192 * 2
    of_kv = (CONTEXT + 1) * 2 * 2 * 256 * 2  # all positions read, one written, of keys and values
    for row, state in (
        (qwen["delta net, MoE"], 2 * (recurrent + history)),
        (qwen["attention, MoE"], of_kv),
        (qwen["embedding, lm_head"], 0),
        (nemotron["MoE"], 0),
    ):
        assert row.before["state"] == row.after["state"] == state


def test_the_launches_are_those_by_hand(qwen, nemotron):
    # Norm, router, choice, gate and up of the experts, shared expert, its gate, sum; residual.
    moe = 1 + 1 + 1 + 1 + 2 + 1 + 1 + 1
    assert qwen["delta net, MoE"].after["launches"] == 1 + 4 + 1 + 1 + 1 + moe
    # Norm, q k v, two norms, two ropes, two into the cache, attention, gate, projection, residual.
    assert qwen["attention, MoE"].after["launches"] == 1 + 3 + 2 + 2 + 2 + 1 + 2 + 1 + 1 + moe
    assert nemotron["Mamba2"].after["launches"] == 6
    assert nemotron["attention"].after == nemotron["attention"].before
    for row in (qwen["delta net, MoE"], nemotron["Mamba2"], nemotron["MoE"]):
        assert row.after["launches"] < row.before["launches"] / 2
        assert row.after["passed"] < row.before["passed"] / 2


@pytest.mark.parametrize(
    ("shape", "layers", "kernel", "nbytes"),
    [
        ("qwen3.5-35b-a3b", 4, "delta_step", delta_step_bytes(1, 16, 32, 128, 128, 4, 2) + 32 * 2),
        (
            *("nemotron-3-nano-30b-a3b", 6, "mamba2_step"),
            mamba2_step_bytes(1, 64, 8, 64, 128, 4, 2) + 64 * 2,
        ),
    ],
)
def test_a_kernel_moves_what_its_door_says(monkeypatch, shape, layers, kernel, nbytes):
    # Their A_log is float32, two bytes a head more than an activation.
    found, charged = [], launches.charged

    def seen(*given):
        for node, cost in charged(*given):
            if node.name.startswith(kernel):
                found.append(sum(cost.values()) - cost["launches"])
            yield node, cost

    monkeypatch.setattr(launches, "charged", seen)
    launches.compare(shape, CONTEXT, layers)
    assert set(found) == {nbytes}


def cost(function, *inputs):
    """Of a function whose first input is a weight."""
    mac = on_a_mac.Mac()
    with mac.stands_in():
        graph = on_a_mac.traced(function, inputs)
    kinds = ["weights", *["passed"] * (len(inputs) - 1)]
    held = {
        name: launches.Held(kind, array.nbytes)
        for name, kind, array in zip(graph.inputs, kinds, inputs, strict=True)
    }
    held |= dict.fromkeys(graph.constants, launches.Held("constant", 0))
    total = Counter()
    for _, part in launches.charged(graph.nodes, graph.nbytes, held, {}, mac.compiled):
        total += part
    return dict(total)


def test_what_an_operation_reads_and_writes_counts_once():
    w, x = mx.zeros((64, 100)), mx.zeros((1, 100))
    ids = mx.zeros((2,), mx.uint32)
    assert cost(lambda w, x: [x @ w.T], w, x) == {
        **{"launches": 1, "weights": 64 * 400, "passed": 400 + 64 * 4}
    }
    assert cost(lambda w, i: [w[i]], w, ids) == {
        **{"launches": 1, "weights": 2 * 400, "passed": 8 + 2 * 400}
    }
    assert cost(lambda w, x: [x * x], w, x)["passed"] == 2 * 400
    assert cost(lambda w, x: [mx.exp(mx.broadcast_to(x, (7, 100)))], w, x)["passed"] == 8 * 400
    assert cost(lambda w, x: [(x[:, :10] + 1.0).reshape(5, 2)], w, x) == {
        **{"launches": 1, "passed": 2 * 40}
    }


def test_what_mlx_compiles_is_fused_as_mlx_does():
    w, x = mx.zeros((100,)), mx.zeros((1, 100), mx.bfloat16)
    assert cost(lambda w, x: [activations.precise_swiglu(x, x, w)], w, x) == {
        **{"launches": 1, "weights": 400, "passed": 200 + 200}
    }
    assert cost(lambda w, x: [nn.ReLU2()(x)], w, x) == {"launches": 1, "passed": 400}
    assert cost(lambda w, x: [nn.silu(x) @ x.T], w, x) == {
        **{"launches": 2, "passed": 400 + (400 + 2)}
    }


def _diamond(x):
    y = mx.exp(x)
    return [mx.sigmoid(y) * y + 1.0]


def _sum_between(x):
    y = mx.exp(x)
    return [y / (mx.sum(y) + 1.0)]


def _two(x):
    y = mx.exp(x)
    return [y, y + 1.0]


def _launched(names):
    return sum(name not in on_a_mac.VIEWS for name in names)


@pytest.mark.parametrize("function", [_diamond, _sum_between, _two])
def test_a_compiled_function_takes_as_many_launches_as_in_mlx(tmp_path, function):
    x = mx.ones((3, 5))
    mx.eval(x)
    mx.export_to_dot(str(tmp_path / "graph"), *mx.compile(function)(x))
    lines = (tmp_path / "graph").read_text().splitlines()
    theirs = [line.split('"')[1] for line in lines if "rect" in line]
    ours = on_a_mac.fused(on_a_mac.traced(function, [x]))
    assert _launched(node.name for node in ours) == _launched(theirs)
    made = {name for node in ours for name in node.outputs}
    assert made >= set(on_a_mac.traced(function, [x]).outputs)


def test_a_cache_of_another_kind_is_refused(monkeypatch):
    monkeypatch.setattr(launches, "one_token_caches", lambda _: [object()])
    with pytest.raises(TypeError, match="no count of what a object moves"):
        launches.states_of(nn.Module(), CONTEXT)


def test_layers_of_a_kind_that_differ_are_not_one_row(monkeypatch):
    rows = [Counter(launches=n) for n in range(5)]
    monkeypatch.setattr(launches, "of_token", lambda *_: rows)
    with pytest.raises(RuntimeError, match="layers of the kind 'delta net, MoE' differ"):
        launches.compare("tiny")


def test_the_table_has_a_line_for_each_kind_of_layer(capsys):
    launches.main(shape=[launches.Shape.tiny], context=64)
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert max(map(len, out.splitlines())) <= 80
    for begin in ("3 x delta net, MoE 44 > 17 -61%", "attention, MoE 40 > 24 -40%"):
        assert any(line.startswith(begin) for line in lines)
    assert any(line.startswith(f"a token {3 * 44 + 40 + 6} > {3 * 17 + 24 + 6} ") for line in lines)
