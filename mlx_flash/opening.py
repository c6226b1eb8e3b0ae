"""A model folder, checked and built without reading a weight."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_adapters, load_model, load_tokenizer

from . import architectures
from .architectures import Architecture
from .dense import layer_tensors
from .errors import (
    CheckpointError,
    FlashError,
    ModelNotFoundError,
    UnsupportedModelError,
    UsageError,
    brief,
)
from .fingerprint import Fingerprint
from .layout import Layout
from .step import Step, one_token
from .streaming.checkpoint import Checkpoint, Span, read_json
from .streaming.layers import LayerTensor
from .streaming.plan import LayerExperts
from .streaming.spread import whole_layer

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
MISFITS = (
    ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class LazyModel:
    """A model that is built and not yet read, with what its experts look like.

    One without experts has no switches, and ``tensors``: by layer, what of it can stream.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    architecture: Architecture
    model: nn.Module
    layout: Layout
    step: Step
    switches: dict[str, nn.Module]
    layers: dict[str, LayerExperts]
    fingerprint: Fingerprint
    tensors: dict[str, list[LayerTensor]]

    def expert_spans(self, path: str) -> dict[str, list[Span]]:
        """Where the experts of a switch layer lie, by parameter: what fills a slot of each.

        Raises:
            CheckpointError: If an expert is not stored as the model computes with it.
        """
        parameters = self.architecture.parameters(self.switches[path])
        return {
            name: self.layout.rows(f"{path}.{name}", array.shape[0], array.nbytes // array.shape[0])
            for name, array in parameters.items()
        }

    @property
    def untested(self) -> str:
        """What to say of a family that no test of ours holds to an oracle; empty if one does."""
        if self.architecture.tested:
            return ""
        family = self.config["model_type"]
        return f"model type {family!r} is untested here: compare its answers with mlx-lm's."


def open_tokenizer(
    folder: Path, tokenizer_config: dict[str, Any] | None = None, trust_remote_code: bool = False
) -> TokenizerWrapper:
    """The tokenizer of a model folder, as ``mlx_lm.load`` makes it."""
    if not any(True for name in VOCABULARIES for _ in folder.glob(name)):
        raise CheckpointError(f"{folder} has no tokenizer.json. Finish the download.")
    extra = {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})}
    eos = _model_config(folder).get("eos_token_id")
    try:
        return load_tokenizer(folder, extra, eos_token_ids=eos)
    except Exception as error:  # the Rust of it raises no narrower one
        raise CheckpointError(
            f"{folder} has no tokenizer that loads ({brief(error)}). Download it again."
        ) from error


def open_lazily(
    folder: Path,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    trust_remote_code: bool = False,
) -> LazyModel:
    """Check every header, then build the model without reading a weight.

    Raises:
        FlashError: If anything about the folder is not as it should be.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder}: no such model folder. Check the path.")
    config = _model_config(folder)
    architecture = architectures.lookup(config["model_type"])
    checkpoint = Checkpoint(folder)
    try:
        _check_activations(config, model_config)
        classes = _Traced(checkpoint, architecture)
        model, config = load_model(folder, True, True, model_config, classes, trust_remote_code)
        layout = classes.layout_of(model)
        _check_dtypes(folder, model)
        switches = dict(architecture.switches(model))
        step = one_token(model, switches)
        switches = {path: switches[path] for path in step.calls}
        layers = {
            path: architecture.experts(switch, step.calls[path].experts)
            for path, switch in switches.items()
        }
        tensors = {} if switches else layer_tensors(model, layout)
        for path, found in tensors.items():
            layers[path] = whole_layer(sum(t.span.nbytes for t in found))
    except FlashError:
        raise
    except MISFITS as error:
        raise CheckpointError(
            f"{folder}: config.json and the weights do not fit together ({brief(error)}). "
            "Download the model again, or convert it with mlx_lm.convert."
        ) from error
    if adapter_path is not None:
        _adapt(model, switches, tensors, adapter_path)
    return LazyModel(
        checkpoint=checkpoint,
        config=config,
        architecture=architecture,
        model=model,
        layout=layout,
        step=step,
        switches=switches,
        layers=layers,
        tensors=tensors,
        fingerprint=Fingerprint.of(checkpoint, config, adapter_path),
    )


class _Traced:
    """The model's classes for ``load_model``, with an eye on how ``sanitize`` lays it out."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture):
        self._checkpoint = checkpoint
        self._architecture = architecture
        self._layout: Layout | None = None
        self._class: type[nn.Module] | None = None

    def __call__(self, config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        self._class, arguments = self._architecture.classes(config)
        if not hasattr(self._class, "sanitize"):
            return self._class, arguments
        own = self._class.sanitize

        def sanitize(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            self._layout = Layout(self._checkpoint, model, own)
            sanitized: dict[str, mx.array] = own(model, weights)
            return sanitized

        return type(self._class.__name__, (self._class,), {"sanitize": sanitize}), arguments

    def layout_of(self, model: nn.Module) -> Layout:
        """How the loaded model lies on disk. Gives the model its own class back."""
        if self._class is not None:
            model.__class__ = self._class
        return self._layout or Layout(self._checkpoint, model)


def _adapt(
    model: nn.Module,
    switches: dict[str, nn.Module],
    tensors: dict[str, list[LayerTensor]],
    adapter_path: str,
) -> None:
    before = _weights(switches, tensors)
    try:
        load_adapters(model, adapter_path).eval()
    except MISFITS as error:
        raise UsageError(
            f"--adapter-path {adapter_path}: no adapter of mlx-lm that fits this model "
            f"({brief(error)}). Check the path, or train it for this model."
        ) from error
    if _weights(switches, tensors) != before:
        what = "routed experts" if switches else "layers"
        raise UnsupportedModelError(
            f"--adapter-path {adapter_path} changes {what}, which stream as they are on disk. "
            "Fuse it into the model with mlx_lm.fuse first."
        )


def _weights(
    switches: dict[str, nn.Module], tensors: dict[str, list[LayerTensor]]
) -> dict[str, int]:
    """Which array is where: the same dict as long as none is another."""
    streamed = {path: [t.module[t.name] for t in found] for path, found in tensors.items()}
    return {name: id(array) for name, array in tree_flatten([switches, streamed])}


def _check_activations(config: dict[str, Any], extra: dict[str, Any] | None) -> None:
    mode = config.get("quantization", {}).get("mode", "affine")
    if (extra or {}).get("quantize_activations") and mode not in ("nvfp4", "mxfp8"):
        raise UnsupportedModelError(
            f"--quantize-activations needs weights in nvfp4 or mxfp8, not {mode}. Leave it out."
        )


def _model_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{folder / 'config.json'} names no model_type. Download it again.")
    generation = folder / "generation_config.json"
    if generation.exists() and "eos_token_id" in (extra := read_json(generation)):
        config["eos_token_id"] = extra["eos_token_id"]
    return config


def _check_dtypes(folder: Path, model: nn.Module) -> None:
    """Quantized words are uint32, everything that is computed with is a float."""
    for path, module in model.named_modules():
        packed = hasattr(module, "scales") and hasattr(module, "bits")
        for name, array in module.items():
            if not isinstance(array, mx.array):
                continue
            if packed and name == "weight":
                right = array.dtype == mx.uint32
            else:
                right = mx.issubdtype(array.dtype, mx.floating) or (
                    packed and name == "scales" and array.dtype == mx.uint8
                )
            if not right:
                raise CheckpointError(
                    f"{folder}: {path}.{name} has dtype {array.dtype}, which the model cannot "
                    "compute with. Download the model again, or convert it with mlx_lm.convert."
                )
