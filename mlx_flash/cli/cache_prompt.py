"""`mlx-flash cache-prompt`: the state after a prompt into a file, for `generate` to go on from."""

import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from mlx_lm.models.cache import make_prompt_cache

from .. import demo, prompt_file
from ..computing import slower_because
from ..config import StreamConfig
from ..errors import FlashError, UsageError
from ..loader import stream
from ..machine import peak_rss_bytes
from ..opening import LazyModel, open_lazily, open_tokenizer
from ..prompt_file import Origin
from ..states import arrays, prefill
from ..streaming.model import StreamedModel
from ..streaming.plan import size
from . import inputs, progress
from . import options as opt
from . import prompt as prompts
from .figures import plan_lines
from .generate import one_line_errors, say_untested
from .interrupt import Interrupt


def cache_prompt(
    prompt_cache_file: opt.NewPromptCacheFile,
    prompt: Annotated[
        str, typer.Option(help="What the user says; - reads it.", rich_help_panel=opt.PROMPT)
    ],
    model: opt.Model = None,
    revision: opt.Revision = None,
    adapter_path: opt.AdapterPath = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    eos_token: opt.EosToken = None,
    ram: opt.Ram = str(StreamConfig.ram),
    slots: opt.Slots = None,
    context: opt.Context = None,
    policy: opt.Policy = StreamConfig.policy,
    reader: opt.Reader = StreamConfig.reader,
    kernels: opt.Kernels = StreamConfig.kernels,
    threads: opt.Threads = StreamConfig.threads,
    max_kv_size: opt.MaxKvSize = None,
    prefill_step_size: opt.PrefillStepSize = StreamConfig.prefill_step_size,
    kv_bits: opt.KvBits = None,
    kv_group_size: opt.KvGroupSize = 64,
    quantized_kv_start: opt.QuantizedKvStart = 5000,
    debug: opt.Debug = False,
) -> None:
    """Compute a prompt once, and write the model's state after it to a file.

    `generate --prompt-cache-file` goes on from there, and so does mlx-lm's own. Options have
    the names and defaults of mlx_lm.cache_prompt. Those of the Streaming group,
    --prefill-step-size, --revision and -v are ours.
    """
    given = SimpleNamespace(**locals())
    with one_line_errors(debug):
        _run(given)


def _run(given: SimpleNamespace) -> None:
    """Load, compute, write, say what it cost."""
    path = prompt_file.place(given.prompt_cache_file)
    bars = ExitStack()

    def stop() -> None:
        bars.close()
        prompt_file.partial(path).unlink(missing_ok=True)
        _say("mlx-flash: interrupted, nothing written.")

    with Interrupt(stop), bars:
        text = prompts.read(None, given.prompt)
        folder = inputs.model_folder(given, None)
        as_generate = {"quantize_activations": False}  # unasked: the same fingerprint
        lazy = open_lazily(folder, as_generate, given.adapter_path, given.trust_remote_code)
        say_untested(lazy)
        config = {"trust_remote_code": given.trust_remote_code}
        if given.eos_token is not None:
            config["eos_token"] = given.eos_token
        tokenizer = open_tokenizer(folder, config, given.trust_remote_code)
        tokens = prompts.encode_begun(tokenizer, text)
        model = _stream(given, lazy, len(tokens), bars)
        begun = time.perf_counter()
        cache = _compute(given, model, tokens, bars)
        rate = len(tokens) / (time.perf_counter() - begun)
        origin = Origin(tokens, lazy.fingerprint, inputs.kv_settings(given))
        prompt_file.write(path, cache, given.model or str(demo.FOLDER), config, origin)
        model.close()
    _say(
        f"prompt   {len(tokens)} tokens, {rate:.1f} tok/s",
        f"state    {size(sum(a.nbytes for a in arrays(cache)))} in {path}",
        f"memory   peak {size(peak_rss_bytes())} of a {size(model.plan.ram_bytes)} budget",
    )


def _stream(given: SimpleNamespace, lazy: LazyModel, tokens: int, bars: ExitStack) -> StreamedModel:
    if given.context is not None and given.context < tokens:
        raise UsageError(
            f"--context {given.context} is less than the {tokens} tokens of the prompt. Ask for "
            "more, or leave it out."
        )
    knobs = inputs.stream_config(given, given.context or tokens)
    model = stream(lazy, knobs, bars.enter_context(progress.bar("load")))
    bars.close()
    if reason := slower_because(knobs):
        _say(f"mlx-flash: slower than it could be without its compiled kernels: {reason}.")
    if given.debug:
        _say(*plan_lines(model.plan))
    return model


def _compute(
    given: SimpleNamespace, model: StreamedModel, tokens: list[int], bars: ExitStack
) -> list[Any]:
    cache: list[Any] = make_prompt_cache(model, given.max_kv_size)
    step = min(given.prefill_step_size, model.plan.prefill_tokens)
    update = bars.enter_context(progress.bar("prompt"))
    try:
        prefill(model, cache, tokens, inputs.kv_settings(given), step, update)
    except (ValueError, NotImplementedError) as error:
        if isinstance(error, FlashError):
            raise
        raise UsageError(f"mlx-lm cannot do this: {error}") from error
    bars.close()
    return cache


def _say(*lines: str) -> None:
    for line in lines:
        typer.echo(line, err=True)
