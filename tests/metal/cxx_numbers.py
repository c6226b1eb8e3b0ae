"""Sizes and integer constants of C++ as text."""

import re
from collections.abc import Sequence

from cxx_text import Token

SIZES = {
    **dict.fromkeys(("bool", "char", "uchar", "int8_t", "uint8_t"), 1),
    **dict.fromkeys(("short", "ushort", "int16_t", "uint16_t"), 2),
    **dict.fromkeys(("half", "bfloat", "float16_t", "bfloat16_t"), 2),
    **dict.fromkeys(("int", "uint", "float", "int32_t", "uint32_t", "atomic_int"), 4),
    **dict.fromkeys(("atomic_uint", "atomic_float", "unsigned"), 4),
    **dict.fromkeys(("long", "ulong", "size_t", "int64_t", "uint64_t", "complex64_t"), 8),
}

_PRECEDENCE = [
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<", ">", "<=", ">="),
    ("<<", ">>"), ("+", "-"), ("*", "/", "%"),
]  # fmt: skip


class Scope:
    """Evaluates C's integer expressions over named ones; None for what it does not know."""

    def __init__(self, values: dict[str, list[Token]]):
        self.values = values
        self.depth = 0

    def size(self, name: str) -> int | None:
        name = name.removeprefix("metal::")
        if match := re.fullmatch(r"vec<(.+),(\d)>", name):
            return _vector(self.size(match[1]), int(match[2]))
        if name in SIZES:
            return SIZES[name]
        if (match := re.fullmatch(r"([a-z]+)([234])", name)) and match[1] in SIZES:
            return _vector(SIZES[match[1]], int(match[2]))
        tokens = self.values.get(name)
        return self.size("".join(t.text for t in tokens)) if tokens else None

    def number(self, tokens: Sequence[Token]) -> int | None:
        self.depth += 1
        try:
            words = [t.text for t in tokens]
            for i in range(len(words) - 1):
                if words[i] == words[i + 1] == ">":
                    words[i : i + 2] = [">>", ""]
            value, rest = self._ternary([w for w in words if w])
            return None if rest or value is None else int(value)
        except (IndexError, ZeroDivisionError):
            return None
        finally:
            self.depth -= 1

    def _ternary(self, words: list[str]) -> tuple[int | None, list[str]]:
        condition, words = self._binary(words, 0)
        if words[:1] != ["?"]:
            return condition, words
        yes, words = self._ternary(words[1:])
        no, words = self._ternary(words[1:])
        return (None if condition is None else yes if condition else no), words

    def _binary(self, words: list[str], level: int) -> tuple[int | None, list[str]]:
        if level == len(_PRECEDENCE):
            return self._unary(words)
        left, words = self._binary(words, level + 1)
        while words and words[0] in _PRECEDENCE[level]:
            operator = words[0]
            right, words = self._binary(words[1:], level + 1)
            left = None if left is None or right is None else _apply(operator, left, right)
        return left, words

    def _unary(self, words: list[str]) -> tuple[int | None, list[str]]:
        word, rest = words[0], words[1:]
        if word in ("-", "!", "+", "~"):
            value, rest = self._unary(rest)
            signs = {"-": lambda v: -v, "!": lambda v: int(not v), "+": int, "~": lambda v: ~v}
            return (None if value is None else signs[word](value)), rest
        if word == "(":
            value, rest = self._ternary(rest)
            return value, rest[1:]
        if word == "static_cast" or (word in SIZES and rest[:1] == ["("]):
            return self._unary(rest[rest.index("(") :])
        if word == "sizeof":
            close = rest.index(")")
            return self.size("".join(rest[1:close])), rest[close + 1 :]
        if re.match(r"\d", word):
            return int(word.rstrip("uUlL").replace("'", ""), 0), rest
        if word in ("true", "false"):
            return int(word == "true"), rest
        if self.depth > 32 or rest[:1] in (["("], ["::"], ["<"]) or not self.values.get(word):
            return None, [] if rest[:1] != [")"] else rest
        return self.number(self.values[word]), rest


def _apply(operator: str, left: int, right: int) -> int:
    both = {
        "||": lambda: bool(left or right), "&&": lambda: bool(left and right),
        "|": lambda: left | right, "^": lambda: left ^ right, "&": lambda: left & right,
        "==": lambda: left == right, "!=": lambda: left != right,
        "<": lambda: left < right, ">": lambda: left > right,
        "<=": lambda: left <= right, ">=": lambda: left >= right,
        "<<": lambda: left << right, ">>": lambda: left >> right,
        "+": lambda: left + right, "-": lambda: left - right, "*": lambda: left * right,
        "/": lambda: int(left / right), "%": lambda: left - right * int(left / right),
    }  # fmt: skip
    return int(both[operator]())


def _vector(item: int | None, count: int) -> int | None:
    return None if item is None else item * (4 if count == 3 else count)
