"""What streaming must know about a model family. One file per ``model_type``.

Has never heard of slots, policies or readers.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import cache as kv
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)
from mlx_lm.utils import MODEL_REMAPPING

from ..errors import UnsupportedModelError
from ..kernels import attention, gated_delta, linear, mlp, norm, ssm
from ..streaming.checkpoint import Checkpoint, Span
from ..streaming.plan import LayerExperts

FLOAT_BYTES = 4  # temporaries may be float32 whatever the weights are
GRAPH_BYTES = 16 << 10  # nodes of the lazy graph, per token of a recurrent layer's loop


class Architecture:
    """Defaults that hold for every mlx-lm MoE model in MLX layout."""

    def switches(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The routed-expert layers and their paths in the model."""
        for path, module in model.named_modules():
            if isinstance(module, (SwitchGLU, SwitchMLP)):
                yield path, module

    def parameters(self, switch: nn.Module) -> dict[str, mx.array]:
        """The expert weights of a switch layer, by path in it: [experts, ...] each."""
        return {
            f"{path}.{name}": array
            for path, module in switch.named_modules()
            if isinstance(module, (SwitchLinear, QuantizedSwitchLinear))
            for name, array in tree_flatten(module.parameters())
        }

    def experts(self, config: Mapping[str, Any], switch: nn.Module) -> LayerExperts:
        """How many experts a layer has, how many a token takes, and the bytes of one."""
        arrays = list(self.parameters(switch).values())
        count = arrays[0].shape[0]
        return LayerExperts(count, self.top_k(config), sum(a.nbytes for a in arrays) // count)

    def top_k(self, config: Mapping[str, Any]) -> int:
        """Experts that one token is routed to."""
        return int(text_config(config)["num_experts_per_tok"])

    def spans(self, checkpoint: Checkpoint, name: str, experts: int) -> list[Span]:
        """The bytes of one switch parameter on disk, expert by expert."""
        return checkpoint[name].rows()

    def state_bytes(self, model: nn.Module, context: int) -> int:
        """KV cache and recurrent state of one sequence of ``context`` tokens.

        Read off the caches of a one-token graph that is built and never evaluated.
        """
        return sum(_cache_bytes(c, context) for c in _one_token_caches(model))

    def scratch_bytes(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        tokens: int,
        context: int,
        fused: bool = False,
    ) -> int:
        """Temporaries of one step over ``tokens`` tokens with ``context`` behind them.

        An upper estimate of one layer, since each streamed layer is a barrier: the widest
        projections and their copies, the routed rows of a MoE layer, one cache growing by
        a copy, and without ``fused`` kernels (Metal's or our own) attention scores, and a
        recurrent state for every token, which the op-by-op fallback keeps all at once.
        """
        dims = text_config(config)
        hidden, vocab = dims.get("hidden_size", 0), dims["vocab_size"]
        middle = dims.get("moe_intermediate_size") or dims.get("intermediate_size", hidden)
        routed = self.top_k(config) if any(True for _ in self.switches(model)) else 0
        floats = routed * (5 * hidden + 3 * middle) + 8 * _widest_linear(model, vocab)
        caches = _one_token_caches(model)
        state = 0
        if not (fused or mx.metal.is_available()):
            floats += 3 * dims.get("num_attention_heads", 0) * context
            state = max(_recurrent_bytes(c) for c in caches)
        per_token = FLOAT_BYTES * floats + state + GRAPH_BYTES
        growth = 2 * max(_cache_bytes(c, context) for c in caches)
        return int(tokens * per_token + FLOAT_BYTES * 4 * vocab + growth)

    def use_kernels(self, model: nn.Module, native: ModuleType) -> None:
        """Swap what the extension computes faster than MLX's CPU backend, in place.

        The weights are in memory, and the switch layers are ``NativeSwitch``.
        """
        for door in (linear, norm, mlp, gated_delta, ssm, attention):
            door.use_native(model)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: multimodal ones nest it."""
    nested: Mapping[str, Any] = config.get("text_config", config)
    return nested


def known() -> list[str]:
    """The model types of the registry: the file names of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def lookup(model_type: object) -> Architecture:
    """The architecture for a config's ``model_type``.

    Raises:
        UnsupportedModelError: If the registry has none.
    """
    if model_type not in known():
        name = MODEL_REMAPPING.get(model_type, model_type)
        if not isinstance(name, str) or find_spec(f"mlx_lm.models.{name}") is None:
            raise _unsupported(model_type)
        return Architecture()
    module = importlib.import_module(f"{__name__}.{model_type}")
    architecture: Architecture = module.architecture
    return architecture


def check_tested(model_type: str) -> None:
    """Refuse the experts of a family that has no file here.

    Raises:
        UnsupportedModelError: If it has none.
    """
    if model_type not in known():
        raise _unsupported(model_type)


def _unsupported(model_type: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model type {model_type!r} is not one that mlx-flash streams: "
        f"{', '.join(known())}, and what mlx-lm has without experts. Use mlx_lm for it, if it "
        "fits in RAM."
    )


def _one_token_caches(model: nn.Module) -> list[Any]:
    caches: list[Any] = kv.make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    return caches


def _cache_bytes(cache: Any, context: int) -> int:
    if isinstance(cache, kv.CacheList):
        return sum(_cache_bytes(c, context) for c in cache.caches)
    if isinstance(cache, (kv.KVCache, kv.RotatingKVCache, kv.ChunkedKVCache)):
        if cache.keys is None:
            return 0
        most = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None) or context
        steps = -(-min(most, context) // cache.step)
        per_position = (cache.keys.nbytes + cache.values.nbytes) // cache.keys.shape[2]
        return int(steps * cache.step * per_position)
    return int(cache.nbytes)


def _recurrent_bytes(cache: Any) -> int:
    if isinstance(cache, kv.CacheList):
        return max(_recurrent_bytes(c) for c in cache.caches)
    return int(cache.nbytes) if isinstance(cache, kv.ArraysCache) else 0


def _widest_linear(model: nn.Module, vocab: int) -> int:
    widths = [
        module.weight.shape[0]
        for _, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and module.weight.shape[0] < vocab
    ]
    return max(widths, default=0)
