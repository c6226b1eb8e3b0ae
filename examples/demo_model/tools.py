"""Tool chats' raw material: a schema, a request in words, the right call, a result, an answer.

The tools themselves are rows of `tool_table.py`. Knows nothing about chat formats.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from tool_table import TOOLS
from world import held_out


@dataclass(frozen=True)
class Instance:
    """One tool as one prompt sees it: its schema, the request in words, the right call."""

    key: str
    schema: dict[str, Any]
    request: str
    arguments: dict[str, Any]
    words: dict[str, str]

    @property
    def name(self) -> str:
        return self.schema["function"]["name"]


def schema(rng: random.Random, key: str) -> dict[str, Any]:
    """A JSON schema with this prompt's choice of function name."""
    tool = TOOLS[key]
    properties = {
        param.name: {"type": param.type} | ({"enum": list(param.enum)} if param.enum else {})
        for param in tool.params.values()
    }
    required = [param.name for arg, param in tool.params.items() if arg not in tool.optional]
    parameters = {"type": "object", "properties": properties, "required": required}
    name = rng.choice(tool.names)
    function = {"name": name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def spoken(value: Any) -> str:
    """A value as a user says it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def instance(rng: random.Random, key: str) -> Instance:
    """A request for this tool and the call that is right for it."""
    tool = TOOLS[key]
    offered = schema(rng, key)
    request = rng.choice(tool.requests)
    values = {
        arg: param.draw(rng) for arg, param in tool.params.items() if "{" + arg + "}" in request
    }
    values = {
        arg: int(v) if isinstance(v, float) and v.is_integer() else v for arg, v in values.items()
    }
    words = {arg: spoken(v) for arg, v in values.items()}
    text = request.format(**words)
    arguments = {tool.params[arg].name: v for arg, v in values.items()}
    return Instance(key, offered, text[0].upper() + text[1:], arguments, words)


def call_key(item: Instance) -> tuple[str, ...]:
    """What the held-out split hashes for a tool call: the tool and every value, whatever the
    phrasing."""
    return ("tool", item.key, *(f"{arg}={value}" for arg, value in sorted(item.words.items())))


def training_instance(rng: random.Random, key: str) -> Instance:
    """An instance whose combination of tool and values is not held out."""
    while True:
        item = instance(rng, key)
        twice = len(set(item.words.values())) < len(item.words)  # "from the lake to the lake"
        if not twice and not held_out(*call_key(item)):
            return item


def result(rng: random.Random, item: Instance) -> tuple[str, str]:
    """What the tool returns (JSON) and the sentence that reports it."""
    tool = TOOLS[item.key]
    values = {name: draw(rng) for name, draw in tool.results.items()}
    words = {name: spoken(v) for name, v in values.items()}
    text = rng.choice(tool.answers).format(**(item.words | words))
    return json.dumps(values), text[0].upper() + text[1:]
