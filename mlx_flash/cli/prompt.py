"""From what the user typed to the tokens that the model sees, as `mlx_lm generate` does it."""

import json
import sys
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UsageError

DEFAULT = "hello"  # mlx-lm's
QUERY = "<query>"
MISFITS = (TemplateError, TypeError, ValueError)  # what chat templates raise


def read(argument: str | None, option: str | None) -> str:
    """The prompt: the argument or ``--prompt``; ``-`` or a pipe means standard input."""
    if argument is not None and option is not None:
        raise UsageError("two prompts: give one, as an argument or as --prompt.")
    prompt = argument if argument is not None else option
    if prompt is None:
        prompt = DEFAULT if sys.stdin is None or sys.stdin.isatty() else (read_stdin() or DEFAULT)
    elif prompt == "-":
        prompt = read_stdin()
    else:
        prompt = prompt.replace("\\n", "\n").replace("\\t", "\t")
    if not prompt:
        raise UsageError("the prompt is empty. Give one as an argument, or pipe it in.")
    return prompt


def read_stdin() -> str:
    """All of standard input, as text."""
    if sys.stdin is None:
        raise UsageError("standard input is closed. Give the prompt as an argument.")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 text ({error.reason}). Convert it."
        ) from error


def encode(
    tokenizer: TokenizerWrapper, given: SimpleNamespace, prompt: str, suffix: bool
) -> list[int]:
    """The tokens of the prompt, in the model's chat template where it has one.

    Args:
        tokenizer: The model's.
        given: The options of the command.
        prompt: What the user says.
        suffix: Only what follows the system turn: a prompt cache holds what is before.
    """
    templated = not given.ignore_chat_template and tokenizer.has_chat_template
    text = _templated(tokenizer, given, prompt, suffix) if templated else prompt
    return _tokens(tokenizer, text, templated)


def encode_begun(tokenizer: TokenizerWrapper, prompt: str) -> list[int]:
    """The tokens of a user's turn that has not ended, as ``mlx_lm.cache_prompt`` takes them."""
    if not tokenizer.has_chat_template:
        return _tokens(tokenizer, prompt, templated=False)
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            continue_final_message=True,
            add_generation_prompt=False,
        )
    except MISFITS as error:
        raise UsageError(f"the model's chat template takes no such prompt ({error}).") from error
    return _tokens(tokenizer, text, templated=True)


def _tokens(tokenizer: TokenizerWrapper, text: str, templated: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes that Python could not read as text
        raise UsageError("the prompt is not UTF-8 text. Convert it.") from error
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=not templated)
    if not tokens:
        raise UsageError("the prompt has no tokens. Say something.")
    return tokens


def _templated(
    tokenizer: TokenizerWrapper, given: SimpleNamespace, prompt: str, suffix: bool
) -> str:
    variables = _variables(given.chat_template_config)
    messages = [{"role": "user", "content": prompt}]
    if given.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": given.system_prompt})
    begun = given.prefill_response is not None
    if begun:
        messages.append({"role": "assistant", "content": given.prefill_response})

    def apply() -> str:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=begun,
            add_generation_prompt=not begun,
            **variables,
        )
        return text

    try:
        text = apply()
        if suffix:
            messages[-1]["content"] = QUERY
            text = text[apply().index(QUERY) :]
    except MISFITS as error:
        raise UsageError(
            f"the model's chat template does not take this ({error}). Change --system-prompt or "
            "--chat-template-config, or use --ignore-chat-template."
        ) from error
    return text


def _variables(chat_template_config: str | None) -> dict[str, Any]:
    if chat_template_config is None:
        return {}
    try:
        variables = json.loads(chat_template_config)
    except json.JSONDecodeError as error:
        raise UsageError(f"--chat-template-config is not JSON ({error}).") from error
    if not isinstance(variables, dict):
        raise UsageError("--chat-template-config is not a JSON object, such as '{\"a\": true}'.")
    return variables
