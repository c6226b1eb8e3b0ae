"""What one token's graph says of a model, and that nothing of it is computed or kept."""

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from mlx_lm.models.cache import KVCache
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_flash import loader
from mlx_flash.config import StreamConfig
from mlx_flash.opening import open_lazily
from mlx_flash.step import CacheSize, one_token


class Block(nn.Module):
    """Routes to three of eight experts, through a norm that hangs on the switch layer."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 8, bias=False)
        self.experts = SwitchGLU(16, 32, 8)
        self.experts.after = nn.RMSNorm(16)
        self.spare = SwitchGLU(16, 32, 8)

    def __call__(self, x):
        scores = mx.softmax(self.gate(x), axis=-1)
        chosen = mx.argpartition(-scores, kth=2, axis=-1)[..., :3]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        return self.experts.after((self.experts(x, chosen) * weights[..., None]).sum(axis=-2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = [Block()]

    def make_cache(self):
        return [KVCache()]

    def __call__(self, inputs, cache=None):
        x = self.embed(inputs)
        cache[0].update_and_fetch(x[:, None], x[:, None])
        return self.embed.as_linear(self.layers[0](x))


def switches(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, SwitchGLU)}


def test_a_step_says_who_was_called_and_how():
    model = Model()
    before = switches(model)
    step = one_token(model, before)
    assert {path: (c.experts, c.width) for path, c in step.calls.items()} == {
        "layers.0.experts": (3, 16)
    }
    assert step.vocab == 50
    assert {path: id(m) for path, m in switches(model).items()} == {
        path: id(m) for path, m in before.items()
    }
    (cache,) = step.caches
    assert cache == CacheSize(0, 2 * 16 * 4, KVCache.step, None)
    assert cache.nbytes(1) == cache.nbytes(KVCache.step) == KVCache.step * 128
    assert cache.nbytes(KVCache.step + 1) == 2 * KVCache.step * 128


def test_a_model_that_fails_gets_its_layers_back():
    model = Model()
    del model["embed"]
    before = switches(model)
    with pytest.raises(AttributeError):
        one_token(model, before)
    assert switches(model) == before


def test_a_window_and_a_recurrent_state_do_not_grow():
    assert CacheSize(100, 8, 4, most=16).nbytes(1000) == 100 + 16 * 8
    assert CacheSize(100).nbytes(10**6) == 100


def test_a_step_keeps_no_array_alive(checkpoints):
    lazy = open_lazily(checkpoints("qwen3_5_moe-f32"))
    gc.collect()
    held = gc.get_referents(lazy.step, *lazy.step.caches, *lazy.step.calls.values())
    assert not any(isinstance(x, mx.array) for x in held)
    assert lazy.step.state_bytes(512) > 0


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_what_hangs_on_a_switch_layer_stays_reachable(tmp_path, kernels):
    folder = tiny.write(tmp_path / "model")
    lazy = open_lazily(folder)
    path = next(iter(lazy.switches))
    lazy.switches[path].after = norm = nn.RMSNorm(64)
    model = loader.stream(lazy, StreamConfig(ram="4GB", slots=5, context=64, kernels=kernels))
    found = dict(model.named_modules())[path]
    assert found.after is norm
    assert not hasattr(found, "gate_proj"), "its slots are no experts"
