"""llama.cpp in a process of its own: prefill and greedy decode of given token ids, timed.

Runs under any interpreter that has llama-cpp-python and numpy; knows nothing of MLX.
"""

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from .talk import listen, share_in_page_cache, steps_timed

WARM_TOKENS = 8
ERROR = 4  # GGML_LOG_LEVEL_ERROR
WARM_SHARE = 1 / 4  # of the seconds for a decode


@llama_cpp.llama_log_callback
def log_errors(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


class Session:
    """A model and its context. Mapped from the file, or read into memory and repacked."""

    def __init__(self, path: str, mapped: bool, repack: bool, threads: int, context: int):
        llama_cpp.llama_log_set(log_errors, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        if hasattr(model, "load_mode"):
            names = ("LLAMA_LOAD_MODE_NONE", "LLAMA_LOAD_MODE_MMAP")
            model.load_mode = getattr(llama_cpp, names[mapped])
        else:  # before llama.cpp had modes
            model.use_mmap = mapped
        model.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = context  # flash attention stays at its default, auto
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.batch = llama_cpp.llama_batch_init(context, 0, 1)
        self.length = 0
        self.token = 0

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.length = 0

    def eval(self, tokens: list[int], every: bool = False) -> None:
        """Computes the tokens; logits of the last one, or of every one."""
        batch, last = self.batch, len(tokens) - 1
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self.length + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every or i == last
        if code := llama_cpp.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode gave {code}")
        self.length += len(tokens)
        self.token = int(self.logits(-1).argmax())

    def logits(self, i: int) -> Any:
        """Of the i-th token of the last batch, without a copy."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, i)
        return np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab_size,)
        )

    def step(self) -> None:
        self.eval([self.token])


def main() -> None:
    job, say = listen()
    prompts = job["prompts"]
    context = max(map(len, prompts)) + job["tokens"] + WARM_TOKENS
    begun = time.perf_counter()
    llama = Session(job["model"], job["mapped"], job["repack"], job["threads"], context)
    say(load_s=time.perf_counter() - begun, llama_cpp=llama_cpp.__version__)
    if out := job.get("logits"):
        llama.eval(prompts[0], every=True)
        np.save(out, np.stack([llama.logits(i) for i in range(len(prompts[0]))]))
        say(done=True)
        return
    llama.eval(prompts[0])
    steps_timed(llama.step, WARM_TOKENS, job["seconds"] * WARM_SHARE)
    path = Path(job["model"])
    say(in_page_cache=share_in_page_cache(path) if job["mapped"] else None)
    prefill_s = []
    for i, prompt in enumerate(prompts):
        llama.clear()
        begun = time.perf_counter()
        llama.eval(prompt)
        prefill_s.append(time.perf_counter() - begun)
        say(prefill_s=prefill_s)
        if i == 0:
            say(decode=steps_timed(llama.step, job["tokens"], job["seconds"]))
    if job["mapped"]:
        say(in_page_cache_after=share_in_page_cache(path))
    say(done=True)


if __name__ == "__main__":
    main()
