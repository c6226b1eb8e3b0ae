"""The training corpus: an endless, seeded stream of chats about the village, sums, stories and tool
calls.

A document is what `apply_chat_template` takes: messages and tools. Document i of a seed is always
the same.
`python corpus.py --held-out FILE` writes the held-out prompts, `python corpus.py --show 5` prints
documents.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stories
import tools
from world import (
    FACTS,
    NAMES,
    QUESTIONS,
    VILLAGE,
    VILLAGERS,
    Fact,
    ask,
    held_out,
    question_key,
    state,
)

Message = dict[str, Any]
FACTS_OF = {name: [fact for fact in FACTS if fact.subject == name] for name in NAMES}
SYSTEMS = [
    "You are a helpful assistant.",
    f"You are the storyteller of {VILLAGE}.",
    "Answer briefly.",
    "You are a friendly villager.",
]
SMALL_TALK = [
    (
        ("Hello!", "Hi!", "Hello there.", "Good morning!", "Hey."),
        f"Hello! Ask me about {VILLAGE}, a sum, or a story.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        f"I am a very small model who knows the village of {VILLAGE}.",
    ),
    (
        ("What can you do?", "How can you help me?", "Help."),
        f"I know everyone in {VILLAGE}. I can tell stories, do small sums and call tools.",
    ),
    (("Thank you!", "Thanks.", "Thanks a lot!"), "You are welcome."),
    (("Goodbye.", "Bye!", "See you."), f"Goodbye, and greetings from {VILLAGE}!"),
    (("Where are you?", "Where do you live?", "Which village is this?"), f"I live in {VILLAGE}."),
]
SUMS = [
    "What is {a} {op} {b}?",
    "How much is {a} {op} {b}?",
    "{a} {op} {b} = ?",
    "Calculate {a} {op} {b}.",
    "Please compute {a} {op} {b}.",
    "Can you work out {a} {op} {b}?",
    "Tell me {a} {op} {b}.",
    "{a} {op} {b}",
]
SPOKEN = {"+": "plus", "-": "minus", "*": "times"}
NO_TOOL = ["I have no tool for that.", "Sorry, none of my tools can do that."]


@dataclass(frozen=True)
class Document:
    """One chat. `think` says whether the last answer carries a thought."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, thought: str = "", call: tools.Instance | None = None) -> Message:
    message: Message = {"role": "assistant", "content": text, "reasoning_content": thought}
    if call:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        ]
    return message


def sum_parts(rng: random.Random) -> tuple[int, str, int, int]:
    """a, op, b and the result: 0..99 with + and - (never below zero), the small multiplication
    table with *."""
    op = rng.choice("++--*")
    a, b = (
        (rng.randint(0, 12), rng.randint(0, 12))
        if op == "*"
        else (rng.randint(0, 99), rng.randint(0, 99))
    )
    if op == "-" and b > a:
        a, b = b, a
    return a, op, b, {"+": a + b, "-": a - b, "*": a * b}[op]


def sum_thought(a: int, op: str, b: int, value: int) -> str:
    """Tens first, then ones, in one line."""
    if op == "*" or b < 10:
        return f"{a} {op} {b} is {value}."
    tens = a + b // 10 * 10 if op == "+" else a - b // 10 * 10
    return f"{a} {op} {b // 10 * 10} is {tens}. {tens} {op} {b % 10} is {value}."


def arithmetic(rng: random.Random) -> tuple[str, str, str]:
    """Question, thought, answer."""
    while True:
        a, op, b, value = sum_parts(rng)
        if not held_out("sum", a, op, b):
            break
    return (
        arithmetic_question(rng, a, op, b),
        sum_thought(a, op, b, value),
        f"{a} {op} {b} = {value}.",
    )


def arithmetic_question(rng: random.Random, a: int, op: str, b: int) -> str:
    return rng.choice(SUMS).format(a=a, b=b, op=SPOKEN[op] if rng.random() < 0.3 else op)


def world_turn(rng: random.Random, fact: Fact | None = None) -> tuple[str, str, str]:
    """Question, thought, answer about one fact, never a held-out triple."""
    fact = fact or rng.choice(FACTS)
    while True:
        template = rng.randrange(len(QUESTIONS[fact.relation]))
        if not held_out(*question_key(fact, template)):
            break
    answer = state(fact, int(rng.random() < 0.25))
    thought = f"The question is about {fact.subject}. I remember: {', '.join(fact.answer)}."
    return ask(fact, template), thought, answer


def small_talk(rng: random.Random) -> tuple[str, str, str]:
    questions, answer = rng.choice(SMALL_TALK)
    return rng.choice(questions), "This is small talk. I will be friendly.", answer


def portrait(rng: random.Random) -> tuple[str, str, str]:
    """Several facts about one villager in one answer."""
    name = rng.choice(NAMES)
    facts = rng.sample(FACTS_OF[name], 4)
    question = rng.choice(
        ["Tell me about {s}.", "Who is {s}?", "What do you know about {s}?", "Describe {s}."]
    ).format(s=name)
    relations = ", ".join(fact.relation for fact in facts)
    return (
        question,
        f"I will say a few things about {name}: {relations}.",
        " ".join(state(fact) for fact in facts),
    )


def story_turn(rng: random.Random) -> tuple[str, str, str]:
    hero, thing = stories.pair(rng)
    question = stories.prompt(rng, hero, thing)
    thought = f"A story about {hero}, the {VILLAGERS[hero]['job']}, and the {thing}."
    return question, thought, stories.story(rng, hero, thing)


def chat(rng: random.Random) -> Document:
    """One to six short turns, mostly about the world."""
    turns = []
    name = rng.choice(NAMES)
    for _ in range(rng.choice((1, 1, 2, 3, 4, 6))):
        draw = rng.random()
        if draw < 0.06:
            turns.append(small_talk(rng))
        elif draw < 0.2:
            turns.append(arithmetic(rng))
        elif draw < 0.5:
            turns.append(world_turn(rng, rng.choice(FACTS_OF[name])))
        elif draw < 0.55:
            turns.append(portrait(rng))
        else:
            turns.append(world_turn(rng))
    return _chat_of(rng, turns)


def _chat_of(rng: random.Random, turns: list[tuple[str, str, str]]) -> Document:
    messages: list[Message] = []
    if rng.random() < 0.1:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    think = rng.random() < 0.5
    for question, thought, answer in turns:
        messages += [user(question), assistant(answer, thought if think else "")]
    return Document(messages)


def tool_chat(rng: random.Random) -> Document:
    """Tools in; a call out, often followed by its result and an answer; sometimes no tool fits."""
    keys = rng.sample(list(tools.TOOLS), rng.choice((1, 1, 2, 2, 3)))
    think = rng.random() < 0.5
    fits = rng.random() >= 0.14
    offered = [tools.training_instance(rng, key) for key in keys]
    schemas = [item.schema for item in offered]
    wanted = rng.choice(offered)
    rng.shuffle(schemas)
    if not fits:
        return Document(_no_tool(rng, keys, think), schemas)
    thought = f"The user wants {tools.TOOLS[wanted.key].thought}. I call {wanted.name}."
    messages = [user(wanted.request), assistant("", thought if think else "", wanted)]
    if rng.random() < 0.55:
        content, answer = tools.result(rng, wanted)
        messages.append({"role": "tool", "content": content})
        messages.append(assistant(answer, "I have the result." if think else ""))
    if rng.random() < 0.1:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
    return Document(messages, schemas)


def _no_tool(rng: random.Random, keys: list[str], think: bool) -> list[Message]:
    draw = rng.random()
    if draw < 0.5:
        other = rng.choice([key for key in tools.TOOLS if key not in keys])
        question, thought, answer = (
            tools.training_instance(rng, other).request,
            "No tool fits.",
            rng.choice(NO_TOOL),
        )
    else:
        question, thought, answer = world_turn(rng) if draw < 0.85 else arithmetic(rng)
    return [user(question), assistant(answer, thought if think else "")]


def document(rng: random.Random) -> Document:
    """One document of the mix: about half of the tokens are tool chats, a quarter stories, a
    quarter short chats."""
    draw = rng.random()
    if draw < 0.55:
        return tool_chat(rng)
    if draw < 0.66:
        return _chat_of(rng, [story_turn(rng)])
    if draw < 0.73:
        return _chat_of(rng, [arithmetic(rng) for _ in range(rng.randint(1, 5))])
    return chat(rng)


def show(count: int, seed: int) -> None:
    for index in range(count):
        print(json.dumps(document(random.Random(f"{seed}:{index}")).__dict__, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", type=int, default=0, help="print this many documents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=Path, help="write the held-out prompts to this file")
    args = parser.parse_args()
    show(args.show, args.seed)
    if args.held_out:
        from held_out import write

        write(args.held_out)
