"""`mlx-flash generate`: a prompt in, the model's text out, figures beside it."""

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import typer
from mlx_lm.generate import stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..computing import slower_because
from ..config import StreamConfig
from ..errors import FlashError, UsageError
from ..loader import stream
from ..opening import LazyModel, open_lazily
from ..streaming.model import StreamedModel
from . import inputs, progress
from . import options as opt
from . import prompt as prompts
from .figures import Figures, lines, plan_lines
from .interrupt import Interrupt


def generate(
    prompt_argument: opt.PromptArgument = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    adapter_path: opt.AdapterPath = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    extra_eos_token: opt.ExtraEosToken = None,
    quantize_activations: opt.QuantizeActivations = False,
    draft_model: opt.DraftModel = None,
    num_draft_tokens: opt.NumDraftTokens = 3,
    ram: opt.Ram = str(StreamConfig.ram),
    slots: opt.Slots = None,
    context: opt.Context = None,
    policy: opt.Policy = StreamConfig.policy,
    reader: opt.Reader = StreamConfig.reader,
    kernels: opt.Kernels = StreamConfig.kernels,
    threads: opt.Threads = StreamConfig.threads,
    prompt: opt.Prompt = None,
    system_prompt: opt.SystemPrompt = None,
    prefill_response: opt.PrefillResponse = None,
    ignore_chat_template: opt.IgnoreChatTemplate = False,
    chat_template_config: opt.ChatTemplateConfig = None,
    max_tokens: opt.MaxTokens = 100,
    temp: opt.Temp = 0.0,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    top_k: opt.TopK = 0,
    xtc_probability: opt.XtcProbability = 0.0,
    xtc_threshold: opt.XtcThreshold = 0.1,
    min_tokens_to_keep: opt.MinTokensToKeep = 1,
    seed: opt.Seed = None,
    max_kv_size: opt.MaxKvSize = None,
    prefill_step_size: opt.PrefillStepSize = StreamConfig.prefill_step_size,
    prompt_cache_file: opt.PromptCacheFile = None,
    kv_bits: opt.KvBits = None,
    kv_group_size: opt.KvGroupSize = 64,
    quantized_kv_start: opt.QuantizedKvStart = 5000,
    as_json: opt.Json = False,
    verbose: opt.Verbose = "True",
    debug: opt.Debug = False,
) -> None:
    """Generate text, experts streaming from disk as the RAM budget needs.

    The text goes to standard output, progress and figures to standard error.
    Options have mlx-lm's names and defaults. Those of the Streaming group,
    --revision, --json and -v are ours.
    """
    given = SimpleNamespace(**locals())
    with one_line_errors(debug):
        run(given)


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn what the user can mend into one line and exit code 2."""
    try:
        yield
    except FlashError as error:
        if debug:
            traceback.print_exc()
        say_error(str(error))
        raise typer.Exit(2) from None


def say_error(text: str) -> None:
    """The one line."""
    typer.echo(f"mlx-flash: error: {' '.join(text.split())}", err=True)


def say_untested(lazy: LazyModel) -> None:
    """One line, where no test of ours compares the family with mlx-lm."""
    if lazy.untested:
        typer.echo(f"mlx-flash: {lazy.untested}", err=True)


def run(given: SimpleNamespace) -> None:
    """Load, generate, say what it cost."""
    bars = ExitStack()
    with Interrupt(lambda: _finish_unbegun(given, bars)) as interrupt, bars:
        loaded = _load(given, bars)
        figures = loaded.figures
        interrupt.goodbye = lambda: _finish(given, figures, "interrupted", bars)
        try:
            for piece in _generate(loaded, bars):
                if not given.as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except FlashError:
            if given.as_json:
                _finish(given, figures, "error", bars)
            elif figures.text:
                typer.echo()  # the error gets a line of its own
            raise
        loaded.model.close()  # mlx-lm leaves a step in flight: its reads end with the command
    _finish(given, figures, figures.finish_reason, bars)


@dataclass(frozen=True)
class _Loaded:
    """Everything that is loaded before the first token."""

    model: StreamedModel
    tokenizer: TokenizerWrapper
    tokens: list[int]
    options: dict[str, Any]
    figures: Figures


def _load(given: SimpleNamespace, bars: ExitStack) -> _Loaded:
    text = prompts.read(given.prompt_argument, given.prompt)
    begun = time.perf_counter()
    inputs.seed(given)  # here, as mlx-lm does: building a model draws random numbers
    cache = inputs.prompt_cache(given)
    folder = inputs.model_folder(given, cache)
    config = {"quantize_activations": given.quantize_activations}
    lazy = open_lazily(folder, config, given.adapter_path, given.trust_remote_code)
    say_untested(lazy)
    inputs.check_fit(given, cache, lazy)
    tokenizer = inputs.tokenizer(given, folder, cache)
    tokens = prompts.encode(tokenizer, given, text, suffix=cache is not None)
    prompt_tokens = len(tokens) + (cache.tokens if cache else 0)
    knobs = inputs.knobs(given, prompt_tokens)
    sampler = inputs.sampler(given, tokenizer)
    draft = inputs.draft_model(given, lazy.model, tokenizer)
    model = stream(lazy, knobs, bars.enter_context(progress.bar("load")))
    bars.close()
    if reason := slower_because(knobs):
        _say([f"mlx-flash: slower than it could be without its compiled kernels: {reason}."])
    if given.debug:
        _say(plan_lines(model.plan))
    options = _options(given, model, knobs.context - prompt_tokens)
    options |= {"sampler": sampler, "prompt_cache": cache.layers if cache else None}
    if draft is not None:
        options |= {"draft_model": draft, "num_draft_tokens": given.num_draft_tokens}
    figures = Figures(model, time.perf_counter() - begun, len(tokens))
    return _Loaded(model, tokenizer, tokens, options, figures)


def _options(given: SimpleNamespace, model: StreamedModel, room: int) -> dict[str, Any]:
    """The keywords of mlx-lm's ``stream_generate`` that are options of ours."""
    return {
        "max_tokens": given.max_tokens if given.max_tokens > 0 else room,
        "prefill_step_size": min(given.prefill_step_size, model.plan.prefill_tokens),
        "max_kv_size": given.max_kv_size,
        "kv_bits": given.kv_bits,
        "kv_group_size": given.kv_group_size,
        "quantized_kv_start": given.quantized_kv_start,
    }


def _generate(loaded: _Loaded, bars: ExitStack) -> Iterator[str]:
    """The text as it comes. Prefill has a progress bar until the first of it."""
    update = bars.enter_context(progress.bar("prompt"))
    loaded.figures.begin()
    try:
        for response in stream_generate(
            loaded.model,
            loaded.tokenizer,
            loaded.tokens,
            prompt_progress_callback=update,
            **loaded.options,
        ):
            bars.close()
            loaded.figures.token(response)
            yield response.text
    except (ValueError, NotImplementedError) as error:
        if isinstance(error, FlashError):
            raise
        raise UsageError(f"mlx-lm cannot do this: {error}") from error


def _finish(
    given: SimpleNamespace, figures: Figures, finish_reason: str | None, bars: ExitStack
) -> None:
    """The end of the output, whether the text has ended or was interrupted."""
    bars.close()
    figures.finish_reason = finish_reason
    summary = figures.summary()
    if given.as_json:
        typer.echo(json.dumps({"text": figures.text, **summary}, ensure_ascii=False))
        return
    typer.echo()
    if given.verbose.lower() not in ("false", "f"):
        _say(["", *lines(summary)])


def _finish_unbegun(given: SimpleNamespace, bars: ExitStack) -> None:
    bars.close()
    if given.as_json:
        typer.echo(json.dumps({"text": "", "generated_tokens": 0, "finish_reason": "interrupted"}))
    _say(["mlx-flash: interrupted while loading."])


def _say(text: list[str]) -> None:
    for line in text:
        typer.echo(line, err=True)
