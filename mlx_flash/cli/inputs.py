"""What the options name: model, tokenizer, prompt cache, draft model, sampler, room."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import QuantizedKVCache, can_trim_prompt_cache, make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load as load_resident

from .. import demo, prompt_file
from ..config import StreamConfig
from ..errors import UsageError
from ..hub import resolve
from ..opening import MISFITS, LazyModel, open_tokenizer
from ..prompt_file import Origin, PromptFile
from ..states import KVSettings
from ..step import one_token_caches


def prompt_cache(given: SimpleNamespace) -> PromptFile | None:
    """The file of ``--prompt-cache-file``, checked against the other options."""
    name = given.prompt_cache_file
    if name is None:
        return None
    found = prompt_file.read(name)
    if found.origin is not None:  # it says more than a name: see check_fit
        return found
    first = found.layers[0]
    if isinstance(first, QuantizedKVCache) and (
        given.kv_group_size != first.group_size or given.kv_bits not in (None, first.bits)
    ):
        raise UsageError(
            f"{name} holds {first.bits} bits in groups of {first.group_size}. "
            "Give --kv-bits and --kv-group-size to match."
        )
    if given.model is not None and given.model != (found.model or given.model):
        raise UsageError(
            f"{name} was made with {found.model}, not with {given.model}. "
            "Leave --model out, or make the cache again."
        )
    return found


def check_fit(given: SimpleNamespace, cache: PromptFile | None, lazy: LazyModel) -> None:
    """Refuse a prompt cache that is not of this model, or was computed otherwise."""
    if cache is None:
        return
    if cache.origin is not None:
        _check_origin(given, cache.origin, lazy)
    if not prompt_file.fits(cache, one_token_caches(lazy.model)):
        raise UsageError(
            f"{given.prompt_cache_file} does not fit the model it names. {prompt_file.REMEDY}"
        )


def _check_origin(given: SimpleNamespace, origin: Origin, lazy: LazyModel) -> None:
    name, folder = given.prompt_cache_file, lazy.checkpoint.folder
    other = origin.fingerprint.differences(lazy.fingerprint)
    if "config" in other or "weights" in other:
        raise UsageError(
            f"{name} was computed with another {' and '.join(other)} than {folder} has now. Give "
            "the model it was made with, or make it again with `mlx-flash cache-prompt`."
        )
    if other:
        was = "an adapter" if origin.fingerprint.adapter else "no adapter"
        raise UsageError(
            f"{name} was computed with {was}, and --adapter-path is {given.adapter_path or 'none'}"
            ", which is not the same. Give the same, or make it again with `mlx-flash "
            "cache-prompt`."
        )
    if str(asked := kv_settings(given)) != str(origin.settings):
        raise UsageError(
            f"{name} was computed with {origin.settings}, and asked for is {asked}. Give the "
            "same, or make it again with `mlx-flash cache-prompt`."
        )


def kv_settings(given: SimpleNamespace) -> KVSettings:
    """What the options say about keys and values."""
    return KVSettings(
        max_kv_size=given.max_kv_size,
        kv_bits=given.kv_bits,
        kv_group_size=given.kv_group_size,
        quantized_kv_start=given.quantized_kv_start,
    )


def model_folder(given: SimpleNamespace, cache: PromptFile | None) -> Path:
    """``--model``, else the model of the prompt cache, else the embedded demo."""
    name = given.model or (cache.model if cache else None)
    if given.revision is not None and (name is None or Path(name).expanduser().is_dir()):
        raise UsageError(
            f"--revision {given.revision} is of a Hub repository, and {name or 'the demo'} is a "
            "folder. Leave it out."
        )
    return resolve(name, given.revision) if name else demo.FOLDER


def tokenizer(given: SimpleNamespace, folder: Path, cache: PromptFile | None) -> TokenizerWrapper:
    """The model's tokenizer, with ``--extra-eos-token``."""
    extra = cache.tokenizer_config if cache else None
    loaded = open_tokenizer(folder, extra, given.trust_remote_code)
    for token in given.extra_eos_token or []:
        if not token.isdecimal() and token not in loaded.get_vocab():
            raise UsageError(
                f"--extra-eos-token {token!r} is no token of this model. Give one, or its number."
            )
        loaded.add_eos_token(token)
    return loaded


def draft_model(given: SimpleNamespace, model: nn.Module, main: TokenizerWrapper) -> Any:
    """The draft model, whole in RAM before the plan is made, so that the plan counts it."""
    if given.draft_model is None:
        return None
    if not can_trim_prompt_cache(make_prompt_cache(model)):
        raise UsageError(
            f"--draft-model {given.draft_model}: mlx-lm cannot take wrong guesses back out of "
            "this model's recurrent state. Leave it out."
        )
    folder = resolve(given.draft_model)
    try:
        draft, draft_tokenizer = load_resident(str(folder))
    except MISFITS as error:
        raise UsageError(
            f"--draft-model {given.draft_model} does not load ({error}). Download it again."
        ) from error
    if draft_tokenizer.vocab_size != main.vocab_size:
        raise UsageError(
            f"--draft-model has {draft_tokenizer.vocab_size} tokens, the model "
            f"{main.vocab_size}. They must share a tokenizer."
        )
    return draft


def sampler(given: SimpleNamespace, main: TokenizerWrapper) -> Any:
    """The sampler that mlx-lm makes of the same options."""
    if not math.isfinite(given.temp):
        raise UsageError(f"--temp {given.temp} is not a temperature. Ask for 0 to 2 or so.")
    if given.top_k >= main.vocab_size:
        raise UsageError(
            f"--top-k {given.top_k}: the model has {main.vocab_size} tokens. Ask for fewer, or "
            "for 0."
        )
    return make_sampler(
        given.temp,
        given.top_p,
        given.min_p,
        given.min_tokens_to_keep,
        top_k=given.top_k,
        xtc_probability=given.xtc_probability,
        xtc_threshold=given.xtc_threshold,
        xtc_special_tokens=main.encode("\n") + list(main.eos_token_ids),
    )


def knobs(given: SimpleNamespace, prompt_tokens: int) -> StreamConfig:
    """The streaming options, with room for the prompt and what may follow it."""
    if given.max_tokens == 0 or given.max_tokens < -1:
        raise UsageError(f"--max-tokens {given.max_tokens}: ask for one or more, or -1.")
    needed = prompt_tokens + max(given.max_tokens, 1)
    if given.context is not None and given.context < needed:
        raise UsageError(
            f"--context {given.context} is less than the {prompt_tokens} tokens of the prompt and "
            f"the {needed - prompt_tokens} to generate. Ask for {needed}, or lower --max-tokens."
        )
    endless = max(StreamConfig.context, 2 * prompt_tokens) if given.max_tokens < 0 else 0
    return stream_config(given, given.context or max(needed, endless))


def stream_config(given: SimpleNamespace, context: int) -> StreamConfig:
    """The streaming options, with room for so many tokens."""
    return StreamConfig(
        ram=given.ram,
        slots=given.slots,
        context=context,
        prefill_step_size=given.prefill_step_size,
        policy=given.policy,
        reader=given.reader,
        kernels=given.kernels,
        threads=given.threads,
    )


def seed(given: SimpleNamespace) -> None:
    """Seed MLX's random numbers, if asked to."""
    if given.seed is None:
        return
    if not 0 <= given.seed < 1 << 64:
        raise UsageError(f"--seed {given.seed} is not a number of 64 bits. Ask for 0 or more.")
    mx.random.seed(given.seed)
