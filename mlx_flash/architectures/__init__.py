"""What streaming must know about a model family. One file per ``model_type``.

Has never heard of slots, policies or readers. How a checkpoint's tensors become a model's weights
is read off mlx-lm (``layout.py``), and what a token asks of a model off its graph (``step.py``):
what is left for a family is which of its modules hold routed experts, and its fused kernels.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)
from mlx_lm.utils import MODEL_REMAPPING, _get_classes

from .. import plugins
from ..errors import PluginError, UnsupportedModelError
from ..kernels import attention, gated_delta, linear, mlp, norm, ssm
from ..kernels.metal import delta as metal_delta
from ..kernels.metal import moe as metal_moe
from ..kernels.metal import norm as metal_norm
from ..kernels.metal import ssm as metal_ssm
from ..step import Step
from ..streaming.plan import LayerExperts

FLOAT_BYTES = 4  # temporaries may be float32 whatever the weights are
GRAPH_BYTES = 16 << 10  # nodes of the lazy graph, per token of a recurrent layer's loop
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")


class Architecture:
    """Defaults that hold for every mlx-lm MoE model."""

    tested = True
    """Whether a parity test holds it to an oracle. False: it runs, and says so."""

    def classes(self, config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        """The model's class and that of its arguments. Overridden by who brings a model."""
        found: tuple[type[nn.Module], type] = _get_classes(config)
        return found

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

    def experts(self, switch: nn.Module, top_k: int) -> LayerExperts:
        """How many experts a layer has, how many a token takes, and the bytes of one."""
        arrays = list(self.parameters(switch).values())
        count = arrays[0].shape[0]
        return LayerExperts(count, top_k, sum(a.nbytes for a in arrays) // count)

    def scratch_bytes(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        step: Step,
        tokens: int,
        context: int,
        fused: bool = False,
    ) -> int:
        """Temporaries of one step over ``tokens`` tokens with ``context`` behind them.

        An upper estimate of one layer, since each streamed layer is a barrier: the widest
        projections and their copies, the routed rows of a MoE layer, one cache growing by
        a copy, keys and values that latent attention expands for a prompt, and without
        ``fused`` kernels (Metal's or our own) attention scores, and a recurrent state for
        every token, which the op-by-op fallback keeps all at once.
        """
        modules = dict(model.named_modules())
        routed = [
            call.experts * (5 * call.width + 3 * _middle(modules[path]))
            for path, call in step.calls.items()
        ]
        floats = max(routed, default=0) + 8 * _widest_linear(model, step.vocab)
        state = 0
        if not (fused or mx.metal.is_available()):
            floats += 3 * _heads(config) * context
            state = max((c.fixed_bytes for c in step.caches), default=0)
        per_token = FLOAT_BYTES * floats + state + GRAPH_BYTES
        growth = 2 * max((c.nbytes(context) for c in step.caches), default=0)
        expanded = FLOAT_BYTES * context * max(map(_expanded, modules.values()))
        return int(tokens * per_token + FLOAT_BYTES * 4 * step.vocab + growth + expanded)

    def use_kernels(self, model: nn.Module, native: ModuleType) -> None:
        """Swap what the extension computes faster than MLX's CPU backend, in place.

        The weights are in memory, and the switch layers are ``NativeSwitch``.
        """
        for door in (linear, norm, mlp, gated_delta, ssm, attention):
            door.use_native(model)

    def use_metal(self, model: nn.Module) -> None:
        """Swap what the Metal kernels decode faster than MLX's own operations, in place.

        The switch layers that they support hold a ``MetalSwitch``.
        """
        for door in (metal_moe, metal_delta, metal_ssm, metal_norm):
            door.use_metal(model)


class Untested(Architecture):
    """A family that mlx-lm has and no test of ours does."""

    tested = False


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: multimodal ones nest it."""
    nested: Mapping[str, Any] = config.get("text_config") or config
    return nested


def known() -> list[str]:
    """The model types of the registry: the file names of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def lookup(model_type: str) -> Architecture:
    """The architecture for a config's ``model_type``.

    First what is installed under the entry point group ``mlx_flash.architectures``, then the
    files of this package, then the defaults for whatever mlx-lm has a model for.

    Raises:
        UnsupportedModelError: If nobody has a model of that type.
        PluginError: If an installed package offers it and does not load.
    """
    outside = plugins.load(plugins.ARCHITECTURES, model_type)
    if outside is not None:
        return _checked(model_type, outside)
    name = MODEL_REMAPPING.get(model_type, model_type)
    for candidate in (model_type, name):
        if candidate in known():
            module = importlib.import_module(f"{__name__}.{candidate}")
            architecture: Architecture = module.architecture
            return architecture
    if not name.isidentifier() or importlib.util.find_spec(f"mlx_lm.models.{name}") is None:
        raise UnsupportedModelError(
            f"model type {model_type!r}: mlx-lm {version('mlx-lm')} has no model of it, and no "
            f"installed package offers one as {plugins.ARCHITECTURES}. Update mlx-lm, or check "
            "the config.json."
        )
    return Untested()


def _checked(model_type: str, outside: Any) -> Architecture:
    if not isinstance(outside, Architecture):
        raise PluginError(
            f"{plugins.ARCHITECTURES}: {model_type!r} is a {type(outside).__name__}, and not an "
            "instance of mlx_flash.architectures.Architecture. Mend the package that offers it."
        )
    return outside


def _middle(switch: nn.Module) -> int:
    widths = [
        module.weight.shape[1]
        for _, module in switch.named_modules()
        if isinstance(module, (SwitchLinear, QuantizedSwitchLinear))
    ]
    return max(widths, default=0)


def _heads(config: Mapping[str, Any]) -> int:
    dims = text_config(config)
    return next((int(dims[name]) for name in HEADS if isinstance(dims.get(name), int)), 0)


def _expanded(module: nn.Module) -> int:
    """Elements that one position of a latent cache grows to in a prompt's attention."""
    heads = [getattr(module, name, None) for name in ("embed_q", "unembed_out")]
    return sum(
        h.weight.shape[0] * max(h.weight.shape[1], h.weight.shape[2])
        for h in heads
        if isinstance(h, (MultiLinear, QuantizedMultiLinear))
    )


def _widest_linear(model: nn.Module, vocab: int) -> int:
    widths = [
        module.weight.shape[0]
        for _, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and module.weight.shape[0] < vocab
    ]
    return max(widths, default=0)
