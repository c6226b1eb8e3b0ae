"""MLX in a process of its own: stock mlx-lm timed, or the logits of mlx-flash for the check.

mlx-flash itself is timed by `mlx_flash.cli.bench_run`.
"""

import time
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

import mlx_flash

from .talk import Say, listen, steps_timed


def stock(job: dict[str, Any], say: Say) -> None:
    """Prefill and a few tokens of mlx-lm, everything resident."""
    begun = time.perf_counter()
    model, _ = mlx_lm.load(job["model"])
    say(load_s=time.perf_counter() - begun)
    prompt = mx.array(job["prompts"][0])
    _prefill(model, prompt[:2], make_prompt_cache(model))  # warm-up
    state = make_prompt_cache(model)
    begun = time.perf_counter()
    first = _prefill(model, prompt, state)
    say(prefill_s=[time.perf_counter() - begun])
    # One token ahead, so from yield to yield there is one token's work.
    steps = generate_step(first, model, max_tokens=job["tokens"] + 2, prompt_cache=state)
    next(steps)
    say(decode=steps_timed(lambda: next(steps), job["tokens"], job["seconds"]), done=True)


def _prefill(model: Any, prompt: mx.array, state: list[Any]) -> mx.array:
    """The token after the prompt."""
    chosen: list[mx.array] = []

    def greedy(logprobs: mx.array) -> mx.array:
        chosen.append(mx.argmax(logprobs, axis=-1))
        return chosen[-1]

    list(generate_step(prompt, model, max_tokens=0, sampler=greedy, prompt_cache=state))
    mx.eval(chosen[0])
    return chosen[0]


def logits(job: dict[str, Any], say: Say) -> None:
    """Saves the logits after every token of the prompt."""
    prompt = job["prompts"][0]
    model, _ = mlx_flash.load(job["model"], ram=job["ram"], context=len(prompt) + 2)
    found = model(mx.array(prompt)[None])[0].astype(mx.float32)
    np.save(job["logits"], np.array(found))
    say(done=True)


if __name__ == "__main__":
    job, say = listen()
    (logits if job.get("logits") else stock)(job, say)
