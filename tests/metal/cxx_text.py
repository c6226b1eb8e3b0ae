"""C++ as text: tokens, brackets, statements and declarations, without knowing a type."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Token(NamedTuple):
    text: str
    line: int


SPACES = {"device", "constant", "threadgroup", "thread", "ray_data", "object_data"}
SPECIFIERS = SPACES | {"const", "constexpr", "static", "volatile", "inline", "METAL_FUNC"} | {
    "typename", "unsigned", "signed", "struct", "extern", "thread_local", "mutable", "friend",
}  # fmt: skip
NOT_TYPES = {
    "return", "else", "case", "goto", "new", "delete", "throw", "using", "typedef", "break", "do",
    "continue", "if", "for", "while", "switch", "template", "namespace", "static_assert", "enum",
    "public", "private", "default", "operator", "union", "class", "sizeof", "try", "catch",
}  # fmt: skip
TOKEN = re.compile(
    r"""(?P<skip>[ \t\r]+|//[^\n]*|/\*.*?\*/)|(?P<newline>\n)
    |(?P<directive>\#(?:\\\n|[^\n])*)
    |(?P<attribute>\[\[.*?\]\])
    |(?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'
    |0[xX][0-9a-fA-F']+\w*|(?:\d[\d']*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\w*|\w+
    |<<=|>>=|->|::|\+\+|--|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)""",
    re.S | re.X,
)  # ">>" stays two tokens: it may close two templates
NAME = re.compile(r"[A-Za-z_]\w*$")
PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclass
class Declaration:
    """``line``, the words before the names, and each name's stars, array sizes and value."""

    line: int
    specifiers: list[str]
    type: str
    names: list[tuple[str, str, list[list[Token]], list[Token]]] = field(default_factory=list)
    called: bool = False


def end_of(tokens: Sequence[Token], start: int) -> int:
    """Where the bracket that opens at ``start`` closes; the end if it does not."""
    opening = tokens[start].text
    closing, depth = PAIRS[opening], 0
    for i in range(start, len(tokens)):
        depth += (tokens[i].text == opening) - (tokens[i].text == closing)
        if not depth:
            return i
    return len(tokens)


def angle_end(words: Sequence[str], start: int) -> int:
    """Where the template arguments that open at ``start`` close; -2 if they are none."""
    depth = parens = 0
    for i in range(start, len(words)):
        parens += (words[i] in "([{") - (words[i] in ")]}")
        if parens < 0 or words[i] in (";", "&&", "||"):
            return -2
        if not parens:
            depth += (words[i] == "<") - (words[i] == ">")
            if not depth:
                return i
    return -2


def outside_angles(words: Sequence[str]) -> Iterator[int]:
    """Where words stand that are in no template arguments."""
    i = 0
    while i < len(words):
        if words[i] == "<" and (end := angle_end(words, i)) > 0:
            i = end
        else:
            yield i
        i += 1


def first_outside(words: Sequence[str], wanted: str) -> int | None:
    """The first ``wanted`` that stands in no template arguments."""
    return next((i for i in outside_angles(words) if words[i] == wanted), None)


def split(tokens: Sequence[Token]) -> list[list[Token]]:
    """The pieces between commas that stand in no bracket and no template arguments."""
    words = [t.text for t in tokens]
    pieces: list[list[Token]] = [[]]
    i = 0
    while i < len(tokens):
        end = i
        if words[i] in PAIRS:
            end = end_of(tokens, i)
        elif words[i] == "<":
            end = max(i, angle_end(words, i))
        if words[i] == ",":
            pieces.append([])
        else:
            pieces[-1] += tokens[i : end + 1]
        i = end + 1
    return [piece for piece in pieces if piece]


def template_of(tokens: list[Token]) -> tuple[list[list[Token]], list[Token]]:
    parameters: list[list[Token]] = []
    while len(tokens) > 1 and (tokens[0].text, tokens[1].text) == ("template", "<"):
        end = angle_end([t.text for t in tokens], 1)
        parameters += split(tokens[2:end])
        tokens = tokens[end + 1 :]
    return parameters, tokens


def default_at(parameter: Sequence[Token]) -> int:
    words = [t.text for t in parameter]
    return words.index("=") + 1 if "=" in words else len(words)


def declared(parameter: Sequence[Token]) -> str:
    words = [t.text for t in parameter if not t.text.startswith("[[")]
    for end in ("=", "["):
        words = words[: words.index(end)] if end in words else words
    return next((w for w in reversed(words) if NAME.match(w)), "")


def type_only(words: Sequence[str]) -> bool:
    names = [w for w in words if w not in SPECIFIERS and w not in ("*", "&", "::")]
    return len(names) <= 2 and all(NAME.match(w) and w not in NOT_TYPES for w in names) and (
        bool(names) or {"unsigned", "signed"} & set(words) != set()
    )  # fmt: skip


def statements(body: Sequence[Token]) -> Iterator[list[Token]]:
    """Each statement of a function, in inner blocks too, and what ``for`` declares."""
    start = i = 0
    while i < len(body):
        text = body[i].text
        if text in "([":
            i = end_of(body, i)
        elif text == ";":
            yield from _simple(list(body[start:i]))
            start = i + 1
        elif text == "{":
            end = end_of(body, i)
            before = body[i - 1].text if i else ";"
            if i == start or before in (")", "else", "do", ":"):
                yield from _simple(list(body[start:i]))
                yield from statements(body[i + 1 : end])
                start = end + 1
            elif {"struct", "union", "enum"} & {t.text for t in body[start:i]}:
                yield from statements(body[i + 1 : end])
                start = end + 1
            i = end
        elif text == ":" and body[start].text in ("case", "default"):
            start = i + 1
        i += 1
    yield from _simple(list(body[start:]))


def _simple(tokens: list[Token]) -> Iterator[list[Token]]:
    while tokens and tokens[0].text in ("else", "do"):
        tokens = tokens[1:]
    if tokens and tokens[0].text in ("for", "while", "if", "switch"):
        opening = next((i for i, t in enumerate(tokens[:3]) if t.text == "("), None)
        if opening is not None:
            end = end_of(tokens, opening)
            yield from statements(tokens[opening + 1 : end])
            yield from _simple(tokens[end + 1 :])
            return
    if tokens:
        yield tokens


def declaration_of(tokens: Sequence[Token]) -> Declaration | None:
    tokens = [t for t in tokens if not t.text.startswith("[[")]
    words = [t.text for t in tokens]
    i, specifiers, kind = 0, [], ""
    while i < len(words):
        word = words[i]
        if word in SPECIFIERS:
            specifiers.append(word)
        elif word == "alignas" and words[i + 1 : i + 2] == ["("]:
            i = end_of(tokens, i + 1)
        elif kind or not NAME.match(word) or word in NOT_TYPES:
            break
        elif word == "decltype" and words[i + 1 : i + 2] == ["("]:
            i = end_of(tokens, i + 1)
            kind = "decltype"
        else:
            i, kind = _type(words, i)
        i += 1
    else:
        return None
    if not kind and not {"unsigned", "signed"} & set(specifiers):
        return None
    found = Declaration(tokens[0].line, specifiers, kind or "int")
    for piece in split(tokens[i:]):
        if not _declarator(piece, found):
            break
    return found if found.names else None


def _type(words: Sequence[str], i: int) -> tuple[int, str]:
    start = i
    while True:
        if words[i + 1 : i + 2] == ["<"] and (end := angle_end(words, i + 1)) > 0:
            i = end
        if words[i + 1 : i + 2] == ["::"] and NAME.match("".join(words[i + 2 : i + 3])):
            i += 2
        else:
            return i, "".join(words[start : i + 1])


def _declarator(piece: list[Token], found: Declaration) -> bool:
    words = [t.text for t in piece]
    stars, i = "", 0
    while i < len(words) and (words[i] in ("*", "&", "&&") or words[i] in SPECIFIERS):
        stars += words[i] if words[i] not in SPECIFIERS else ""
        found.specifiers += [words[i]] if words[i] in SPECIFIERS else []
        i += 1
    if i == len(words) or not NAME.match(words[i]) or words[i] in NOT_TYPES:
        return False
    name, arrays = words[i], []
    i += 1
    while words[i : i + 1] == ["["]:
        end = end_of(piece, i)
        arrays.append(piece[i + 1 : end])
        i = end + 1
    after = words[i] if i < len(words) else ""
    if after not in ("", "=", "(", "{", ":"):
        return False
    if "&" in stars and not after:
        return False  # an expression
    found.called |= after == "("
    found.names.append((name, stars, arrays, piece[i + 1 :]))
    return True
