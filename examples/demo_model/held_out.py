"""The held-out prompts: drawn from the keys that the corpus never trains on, with what a right
answer needs.

One JSON line per prompt: kind, thinking, messages, tools, expected. `corpus.py --held-out FILE`
writes it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import stories
import tools
from corpus import FACTS, SPOKEN, SUMS
from world import QUESTIONS, articles, ask, held_out, question_key

SEED = "held-out"
COUNTS = {"tool": 80, "result": 16, "question": 120, "sum": 30, "story": 10}


def _row(
    kind: str, thinking: bool, messages: list, expected: Any, offered: list | None = None
) -> dict[str, Any]:
    return {
        "kind": kind,
        "thinking": thinking,
        "messages": messages,
        "tools": offered,
        "expected": expected,
    }


def _held_out_instance(rng: random.Random, key: str) -> tools.Instance:
    while True:
        item = tools.instance(rng, key)
        if held_out(*tools.call_key(item)) and len(set(item.words.values())) == len(item.words):
            return item


def tool_prompt(rng: random.Random, index: int) -> dict[str, Any]:
    """A request whose tool and values were never trained together, among one to three offered
    tools."""
    names = list(tools.TOOLS)
    item = _held_out_instance(rng, names[index % len(names)])
    others = rng.sample([name for name in names if name != item.key], index // len(names) % 3)
    offered = [item.schema] + [tools.schema(rng, name) for name in others]
    rng.shuffle(offered)
    expected = {"name": item.name, "arguments": item.arguments}
    return _row(
        "tool", index % 2 == 0, [{"role": "user", "content": item.request}], expected, offered
    )


def result_prompt(rng: random.Random, index: int) -> dict[str, Any]:
    """The same, one step on: the tool has answered; every number of its result belongs in the
    sentence."""
    keys = [
        key
        for key, tool in tools.TOOLS.items()
        if "status" not in tool.results and key not in ("heating", "books", "shopping")
    ]
    item = _held_out_instance(rng, keys[index % len(keys)])
    content, _ = tools.result(rng, item)
    call = {"type": "function", "function": {"name": item.name, "arguments": item.arguments}}
    messages = [
        {"role": "user", "content": item.request},
        {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": [call]},
        {"role": "tool", "content": content},
    ]
    expected = [tools.spoken(value) for value in json.loads(content).values()]
    return _row("result", False, messages, expected, [item.schema])


def question(rng: random.Random, index: int) -> dict[str, Any]:
    """A (subject, relation, phrasing) triple that was never trained; the fact was, in other
    words."""
    while True:
        fact = rng.choice(FACTS)
        template = rng.randrange(len(QUESTIONS[fact.relation]))
        if held_out(*question_key(fact, template)):
            return _row(
                "question",
                index % 2 == 0,
                [{"role": "user", "content": ask(fact, template)}],
                list(fact.answer),
            )


def arithmetic(rng: random.Random, index: int) -> dict[str, Any]:
    """A sum whose numbers were never trained together."""
    op = "+-*"[index % 3]
    while True:
        a, b = (
            (rng.randint(0, 12), rng.randint(0, 12))
            if op == "*"
            else (rng.randint(0, 99), rng.randint(0, 99))
        )
        if (op != "-" or a >= b) and held_out("sum", a, op, b):
            break
    text = rng.choice(SUMS).format(a=a, b=b, op=SPOKEN[op] if rng.random() < 0.3 else op)
    value = {"+": a + b, "-": a - b, "*": a * b}[op]
    return _row("sum", index % 2 == 0, [{"role": "user", "content": text}], [str(value)])


def story_prompt(rng: random.Random, index: int) -> dict[str, Any]:
    """A hero and a thing that never met in training."""
    while True:
        hero, thing = rng.choice(list(stories.NAMES)), rng.choice(list(stories.THINGS))
        if held_out(*stories.story_key(hero, thing)):
            break
    text = articles(stories.PROMPTS_BOTH[index % len(stories.PROMPTS_BOTH)].format(h=hero, t=thing))
    return _row("story", index % 2 == 0, [{"role": "user", "content": text}], [hero, thing])


MAKERS = {
    "tool": tool_prompt,
    "result": result_prompt,
    "question": question,
    "sum": arithmetic,
    "story": story_prompt,
}


def rows() -> list[dict[str, Any]]:
    """Every held-out prompt, no two alike, the same on every machine."""
    out, seen = [], set()
    for kind, count in COUNTS.items():
        rng = random.Random(f"{SEED}:{kind}")
        made = 0
        while made < count:
            row = MAKERS[kind](rng, made)
            text = row["messages"][0]["content"]
            if (kind, text) not in seen:
                seen.add((kind, text))
                out.append(row)
                made += 1
    return out


def write(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
