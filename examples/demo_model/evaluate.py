"""Measure a demo checkpoint on the held-out prompts, through plain mlx-lm.

`python evaluate.py` measures the embedded 4-bit model. With `--float RUN/hf` it quantizes the float
checkpoint instead: `--bits 4 3 2 --top-k 4 3 2 1` is the table of the README.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model, load_tokenizer, quantize_model

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "mlx_flash" / "demo"
HELD_OUT = ROOT / "tests" / "data" / "heldout.jsonl"
MAX_TOKENS = {"story": 300, "tool": 120, "question": 60, "sum": 60, "result": 60}
LOOP_GRAM, LOOP_REPEATS = 4, 3  # a loop: the same 4 words more than 3 times
COLUMNS = (
    "tool parses",
    "schema holds",
    "right call",
    "question",
    "sum",
    "result",
    "story ends",
    "story loops",
)
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool}


def load_rows(path: Path = HELD_OUT, limit: int | None = None) -> list[dict[str, Any]]:
    """The held-out prompts, at most `limit` of a kind."""
    rows, seen = [], Counter()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        seen[row["kind"]] += 1
        if limit is None or seen[row["kind"]] <= limit:
            rows.append(row)
    return rows


def load(bits: int = 4, float_folder: Path | None = None):
    """(model, tokenizer): the embedded model, or the float checkpoint quantized to `bits` the way
    mlx-lm converts."""
    if float_folder is None:
        if bits != 4:
            raise SystemExit("the embedded model has 4 bits; other widths need --float RUN/hf")
        return mlx_lm.load(str(DEMO))
    model, config = load_model(float_folder)
    model, _ = quantize_model(model, config, 64, bits)
    return model, load_tokenizer(float_folder)


def set_top_k(model, top_k: int) -> None:
    """Route every token to `top_k` experts instead of the model's own number."""
    for layer in model.layers:
        layer.mlp.top_k = top_k


def complete(
    model, tokenizer, row: dict[str, Any], temperature: float = 0.0, seed: int = 0
) -> tuple[str, bool]:
    """The answer to a held-out prompt and whether it ended by itself."""
    prompt = tokenizer.apply_chat_template(
        row["messages"],
        tools=row["tools"],
        add_generation_prompt=True,
        enable_thinking=row["thinking"],
    )
    mx.random.seed(seed)
    parts, reason = [], None
    sampler = make_sampler(temp=temperature)
    for piece in mlx_lm.stream_generate(
        model, tokenizer, prompt, max_tokens=MAX_TOKENS[row["kind"]], sampler=sampler
    ):
        parts.append(piece.text)
        reason = piece.finish_reason
    return "".join(parts), reason == "stop"


def spoken_part(text: str) -> str:
    """What follows the thought."""
    return text.split("</think>")[-1].strip()


def parse_call(tokenizer, text: str, offered: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The tool call as mlx-lm's own parser reads it, or None."""
    start, end = tokenizer.tool_call_start, tokenizer.tool_call_end
    if start not in text or end not in text:
        return None
    try:
        return tokenizer.tool_parser(text.split(start)[1].split(end)[0].strip(), offered)
    except (ValueError, KeyError):
        return None


def satisfies(call: dict[str, Any], offered: list[dict[str, Any]]) -> bool:
    """A function that was offered, every required argument, no unknown one, types and enums as the
    schema says."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in offered}
    if call["name"] not in schemas:
        return False
    schema, arguments = schemas[call["name"]], call["arguments"]
    if set(schema["required"]) - set(arguments) or set(arguments) - set(schema["properties"]):
        return False
    return all(_fits(value, schema["properties"][name]) for name, value in arguments.items())


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    is_number_as_bool = isinstance(value, bool) and schema["type"] != "boolean"
    known = "enum" not in schema or value in schema["enum"]
    return isinstance(value, TYPES[schema["type"]]) and not is_number_as_bool and known


def contains(text: str, words: Iterable[str]) -> bool:
    """Every expected word stands in the text as a whole word."""
    return all(re.search(rf"(?<![\w.]){re.escape(word)}(?!\w|\.\d)", text) for word in words)


def loops(text: str) -> bool:
    """True if some 4 words in a row come back more than 3 times."""
    words = re.findall(r"[\w']+", text.lower())
    grams = Counter(tuple(words[i : i + LOOP_GRAM]) for i in range(len(words) - LOOP_GRAM + 1))
    return max(grams.values(), default=0) > LOOP_REPEATS


def judge(tokenizer, row: dict[str, Any], text: str, ended: bool) -> dict[str, bool]:
    """Column name -> passed, for the columns this kind of prompt counts in."""
    answer = spoken_part(text)
    if row["kind"] == "tool":
        call = parse_call(tokenizer, answer, row["tools"])
        right = (
            call is not None
            and {key: call[key] for key in ("name", "arguments")} == row["expected"]
        )
        return {
            "tool parses": call is not None,
            "schema holds": call is not None and satisfies(call, row["tools"]),
            "right call": right,
        }
    if row["kind"] == "story":
        return {"story ends": ended, "story loops": loops(answer)}
    return {row["kind"]: ended and contains(answer, row["expected"])}


def measure(
    model, tokenizer, rows: list[dict[str, Any]], temperature: float = 0.0, show: bool = False
) -> dict[str, tuple[int, int]]:
    """Column -> (passed, asked)."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        text, ended = complete(model, tokenizer, row, temperature)
        verdict = judge(tokenizer, row, text, ended)
        for column, passed in verdict.items():
            totals[column][0] += passed
            totals[column][1] += 1
        if show and (row["kind"] == "story" or not all(verdict.values())):
            print(f"--- {row['kind']} {verdict}\n{row['messages'][0]['content']}")
            print(f"expected {row['expected']}\n{text}")
    return {column: (passed, asked) for column, (passed, asked) in totals.items()}


def line(label: str, result: dict[str, tuple[int, int]]) -> str:
    """One row of the table."""
    cells = [f"{100 * result[c][0] / result[c][1]:.0f} %" if c in result else "-" for c in COLUMNS]
    return f"| {label} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--bits", type=int, nargs="+", default=[4], help="other than 4: with --float"
    )
    parser.add_argument("--top-k", type=int, nargs="+", default=[4])
    parser.add_argument("--limit", type=int, help="at most this many prompts of a kind")
    parser.add_argument("--kind", help="only prompts of this kind")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--float", type=Path, dest="float_folder", help="the float checkpoint, RUN/hf"
    )
    parser.add_argument("--show", action="store_true", help="print stories and wrong answers")
    args = parser.parse_args()
    rows = [row for row in load_rows(limit=args.limit) if args.kind in (None, row["kind"])]
    header = "| model | " + " | ".join(COLUMNS) + " | prompts | seconds |"
    print(header + "\n" + "|---" * (len(COLUMNS) + 3) + "|", flush=True)
    for bits, top_k in itertools.product(args.bits, args.top_k):
        began = time.perf_counter()
        model, tokenizer = load(bits, args.float_folder)
        set_top_k(model, top_k)
        result = measure(model, tokenizer, rows, args.temperature, args.show)
        seconds = time.perf_counter() - began
        print(
            line(f"{bits}-bit, K={top_k}", result) + f" {len(rows)} | {seconds:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
