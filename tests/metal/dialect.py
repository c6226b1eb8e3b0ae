"""What Metal 3.1 accepts and C++ does not say: a check over the text of a kernel.

No Metal compiler runs here, so this reads the source as tokens: no types, no overloads, no
templates beyond their arguments. It knows the rules that a C++ compiler cannot find broken.
The rules are those of Apple's Metal Shading Language Specification 3.1, sections 1.4 to 1.5
(what of C++14 is left out), 2.2 (types), 4 (address spaces) and 5 (functions).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

THREADGROUP_BYTES = 32 * 1024
"""Memory of a threadgroup on every Apple GPU (Metal Feature Set Tables)."""

BUFFERS = 31
"""Buffers that a function's arguments can name (Metal Feature Set Tables)."""


class Finding(NamedTuple):
    """A rule broken: ``line`` counts from 1."""

    line: int
    rule: str
    text: str


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
BANNED = {
    "double": "double",
    "new": "allocation", "malloc": "allocation", "calloc": "allocation",
    "realloc": "allocation", "free": "allocation", "delete": "allocation",
    "try": "exception", "catch": "exception", "throw": "exception",
    "dynamic_cast": "rtti", "typeid": "rtti",
    "virtual": "virtual", "goto": "goto", "thread_local": "static",
    "asm": "asm", "__asm__": "asm", "__asm": "asm",
    "concept": "c++20", "requires": "c++20", "consteval": "c++20", "constinit": "c++20",
    "co_await": "c++20", "co_yield": "c++20", "co_return": "c++20",
}  # fmt: skip
SIZES = {
    **dict.fromkeys(("bool", "char", "uchar", "int8_t", "uint8_t"), 1),
    **dict.fromkeys(("short", "ushort", "int16_t", "uint16_t"), 2),
    **dict.fromkeys(("half", "bfloat", "float16_t", "bfloat16_t"), 2),
    **dict.fromkeys(("int", "uint", "float", "int32_t", "uint32_t", "atomic_int"), 4),
    **dict.fromkeys(("atomic_uint", "atomic_float", "unsigned"), 4),
    **dict.fromkeys(("long", "ulong", "size_t", "int64_t", "uint64_t", "complex64_t"), 8),
}

_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r]+|//[^\n]*|/\*.*?\*/)|(?P<newline>\n)
    |(?P<directive>\#(?:\\\n|[^\n])*)
    |(?P<attribute>\[\[.*?\]\])
    |(?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'
    |0[xX][0-9a-fA-F']+\w*|(?:\d[\d']*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\w*|\w+
    |<<=|>>=|->|::|\+\+|--|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)""",
    re.S | re.X,
)  # ">>" stays two tokens: it may close two templates
_NAME = re.compile(r"[A-Za-z_]\w*$")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclass
class Function:
    """A function with a body, as tokens."""

    name: str
    line: int
    kernel: bool
    template: list[list[Token]]
    parameters: list[list[Token]]
    body: list[Token]
    method: bool

    @property
    def template_names(self) -> list[str]:
        return [_declared(p) for p in self.template]

    def takes(self, count: int) -> bool:
        optional = sum(any(t.text == "=" for t in p) for p in self.parameters)
        return len(self.parameters) - optional <= count <= len(self.parameters)


@dataclass
class Declaration:
    """``line``, the words before the names, and each name's stars, array sizes and value."""

    line: int
    specifiers: list[str]
    type: str
    names: list[tuple[str, str, list[list[Token]], list[Token]]] = field(default_factory=list)
    called: bool = False


def check(source: str) -> list[Finding]:
    """All that the rules find in a complete source, in the order of its lines."""
    return sorted(set(_Checker(source).findings))


def threadgroup_bytes(source: str) -> dict[str, int | None]:
    """Bytes of threadgroup memory of each instantiated kernel; None where a size is not known."""
    return _Checker(source).threadgroup_bytes


class _Checker:
    def __init__(self, source: str):
        self.findings: list[Finding] = []
        self.functions: list[Function] = []
        self.constants: dict[str, list[Token]] = {}
        self.instances: list[tuple[str, list[list[Token]]]] = []
        self.macros: dict[str, list[str]] = {}
        self.threadgroup_bytes: dict[str, int | None] = {}
        tokens = self._tokens(source)
        self._words(tokens)
        self._outside(tokens, in_class=False)
        for function in self.functions:
            self._function(function)
        self._recursion()
        self._memory()

    def found(self, line: int, rule: str, text: str) -> None:
        self.findings.append(Finding(line, rule, text))

    # Words.

    def _tokens(self, source: str) -> list[Token]:
        tokens: list[Token] = []
        line = 1
        for match in _TOKEN.finditer(source):
            text, kind = match.group(), match.lastgroup
            if kind == "directive":
                self._directive(text, line)
            elif kind in ("attribute", "text"):
                words = self.macros.get(text, [text])
                tokens += [Token(word, line) for word in words]
            line += text.count("\n")
        return tokens

    def _directive(self, text: str, line: int) -> None:
        if match := re.match(r"#\s*include\s*(\S+)", text):
            if not re.match(r"<(metal_|simd/)", match[1]):
                self.found(line, "include", f"{match[1]} is not of Metal's library")
        elif match := re.match(r"#\s*define\s+(\w+)[ \t]+([\w ]+)$", text):
            words = match[2].split()
            if set(words) <= SPECIFIERS:
                self.macros.setdefault(match[1], words)
            elif len(words) == 1 and words[0].isdigit():
                self.constants[match[1]] = [Token(words[0], line)]

    def _words(self, tokens: list[Token]) -> None:
        for i, (text, line) in enumerate(tokens):
            before = tokens[i - 1].text if i else ""
            after = tokens[i + 1].text if i + 1 < len(tokens) else ""
            rule = BANNED.get(text)
            if rule and not (text == "delete" and before == "="):
                self.found(line, rule, f"{text} is not in Metal")
            if text == "std" and after == "::":
                self.found(line, "std", "std:: is not in Metal")
            if re.fullmatch(r"(\d+\.\d*|\.\d+|\d+(?=e))(e[+-]?\d+)?l", text.lower()):
                self.found(line, "double", f"{text} is a long double")
            if text == "[" and (before == "return" or not re.search(r"[\w\])>*&]$", before)):
                self.found(line, "lambda", "lambdas are not in Metal 3.1")
            elif text == "[" and before == "auto":
                self.found(line, "c++17", "structured bindings are not in Metal 3.1")
            shape = [t.text for t in tokens[i : i + 5]]
            if shape[:2] == ["(", "*"] and shape[3:] == [")", "("] and _NAME.match(shape[2]):
                self.found(line, "function-pointer", f"{shape[2]} is a function pointer")

    # Program scope, namespaces and classes.

    def _outside(self, tokens: list[Token], in_class: bool) -> None:
        start = i = 0
        while i < len(tokens):
            text = tokens[i].text
            if text in "([":
                i = _end(tokens, i)
            elif text == ";":
                self._outside_statement(tokens[start:i], in_class)
                start = i + 1
            elif text == "{":
                end = _end(tokens, i)
                if self._outside_block(tokens[start:i], tokens[i + 1 : end], in_class):
                    start = end + 1
                i = end
            elif text in ("public", "private", "protected"):
                start = i + 2
            i += 1

    def _outside_block(self, head: list[Token], body: list[Token], in_class: bool) -> bool:
        template, head = _template(head)
        words = [t.text for t in head]
        opening = _top(words, "(")
        if "namespace" in words or words[:1] == ["extern"]:
            self._outside(body, in_class)
        elif "enum" in words:
            for piece in _split(body):
                self.constants[piece[0].text] = piece[2:] or [Token("?", 0)]
            return False
        elif words[:1] in (["struct"], ["class"], ["union"]) and words[-1] != ")":
            self._outside(body, in_class=True)
            return False
        elif opening is None or ("=" in words[:opening] and "operator" not in words):
            return False  # an initializer
        elif words[-1] not in (")", "const", "noexcept", *SPACES) and ":" in words:
            return False  # a member initialized with braces
        else:
            self._define(head, opening, template, body, in_class)
        return True

    def _define(
        self,
        head: list[Token],
        opening: int,
        template: list[list[Token]],
        body: list[Token],
        method: bool,
    ) -> None:
        words = [t.text for t in head]
        if words[opening - 1] == "operator":
            opening += 2
        closing = _end(head, opening)
        kernel = "kernel" in words or any(w.startswith("[[kernel") for w in words)
        function = Function(
            words[opening - 1], head[opening].line, kernel, template,
            _split(head[opening + 1 : closing]), body, method,
        )  # fmt: skip
        self.functions.append(function)
        result = words[: opening - 1]
        if "operator" not in words and {"*", "&"} & set(result) and not SPACES & set(result):
            self._unspaced(function.line, f"what {function.name} returns")
        self._signature(function)

    def _outside_statement(self, tokens: list[Token], in_class: bool) -> None:
        words = [t.text for t in tokens]
        if words[:1] == ["template"] and words[1:2] != ["<"]:
            self._instance([w for w in tokens if not w.text.startswith("[[")])
            return
        _, tokens = _template(tokens)
        self._alias(tokens)
        declaration = _declaration(tokens)
        if declaration is None or declaration.called or "friend" in declaration.specifiers:
            return
        self._pointers(declaration)
        name = declaration.names[0][0]
        if in_class and "static" not in declaration.specifiers:
            return
        if "constant" not in declaration.specifiers:
            self.found(declaration.line, "program-scope", f"{name} must be in constant memory")
        for name, _, _, value in declaration.names:
            self.constants[name] = value

    def _instance(self, tokens: list[Token]) -> None:
        # template decltype(name<args>) name<args>
        opening = _top([t.text for t in tokens], "(")
        if opening is None:
            return
        inner = tokens[opening + 1 : _end(tokens, opening)]
        angle = [t.text for t in inner].index("<") if "<" in [t.text for t in inner] else None
        arguments = _split(inner[angle + 1 : -1]) if angle is not None else []
        self.instances.append((inner[0].text, arguments))

    # Functions.

    def _signature(self, function: Function) -> None:
        slots = []
        for parameter in function.parameters:
            words = [t.text for t in parameter if not t.text.startswith("[[")]
            words = words[: words.index("=")] if "=" in words else words
            if not words:
                continue
            outside = [words[i] for i in _outside_angles(words)]
            if {"*", "&", "&&"} & set(outside) and not SPACES & set(words):
                self._unspaced(parameter[0].line, f"{' '.join(words)} of {function.name}")
            attributes = " ".join(t.text for t in parameter if t.text.startswith("[["))
            slots += [int(n) for n in re.findall(r"\bbuffer\((\d+)\)", attributes)]
        if not function.kernel:
            return
        if slots and (len(slots) > BUFFERS or max(slots) >= BUFFERS):
            self.found(function.line, "buffers", f"{function.name} names over {BUFFERS} buffers")
        for parameter in function.template:
            if parameter[0].text not in _KINDS:
                text = " ".join(t.text for t in parameter)
                self.found(parameter[0].line, "template", f"{text}: types, integers and bools only")

    def _function(self, function: Function) -> None:
        variables = {_declared(p) for p in function.parameters}
        for tokens in _statements(function.body):
            self._casts(tokens)
            self._alias(tokens)
            declaration = _declaration(tokens)
            if declaration is None:
                continue
            self._pointers(declaration)
            self._sizes(declaration, variables)
            if {"static", "const", "constexpr", "constant"} & set(declaration.specifiers) == {
                "static"
            }:
                name = declaration.names[0][0]
                self.found(declaration.line, "static", f"{name} is static and can change")
            self._threadgroup(function, declaration)

    def _sizes(self, declaration: Declaration, variables: set[str]) -> None:
        """What is named in no constant's value is taken for a constant of another file."""
        for name, _, arrays, value in declaration.names:
            for size in arrays:
                if unknown := {t.text for t in size} & variables:
                    text = f"{name}[{' '.join(t.text for t in size)}]: {min(unknown)} can change"
                    self.found(declaration.line, "array-size", text)
            fixed = "const" in declaration.specifiers and not {t.text for t in value} & variables
            if fixed or "constexpr" in declaration.specifiers:
                variables.discard(name)
            else:
                variables.add(name)

    def _threadgroup(self, function: Function, declaration: Declaration) -> None:
        if "threadgroup" not in declaration.specifiers:
            return
        for name, stars, _, value in declaration.names:
            if stars:
                continue
            if not function.kernel:
                text = f"{name} is declared in {function.name}, which is not a kernel"
                self.found(declaration.line, "threadgroup", text)
            if value:
                self.found(declaration.line, "threadgroup", f"{name} cannot be initialized")

    def _pointers(self, declaration: Declaration) -> None:
        if SPACES & set(declaration.specifiers):
            return
        for name, stars, _, _ in declaration.names:
            if stars:
                self._unspaced(declaration.line, name)

    def _alias(self, tokens: list[Token]) -> None:
        words = [t.text for t in tokens]
        if words[:1] in (["using"], ["typedef"]):
            equals = Token("=", 0)  # read as a variable that has a value
            named = [*tokens[words.index("=") + 1 :], tokens[1]] if "=" in words else tokens[1:]
            declaration = _declaration([*named, equals])
            if declaration is not None:
                self._pointers(declaration)

    def _casts(self, tokens: list[Token]) -> None:
        words = [t.text for t in tokens]
        for i, word in enumerate(words):
            if word in ("static_cast", "reinterpret_cast", "const_cast", "as_type"):
                inner = words[i + 2 : _angle(words, i + 1)]
            elif word == "(":
                inner = words[i + 1 : _end(tokens, i)]
                if not inner or inner[-1] not in ("*", "&") or not _type_only(inner[:-1]):
                    continue
            else:
                continue
            if {"*", "&"} & set(inner) and not SPACES & set(inner):
                self._unspaced(tokens[i].line, f"the cast to {' '.join(inner)}")

    def _unspaced(self, line: int, what: str) -> None:
        self.found(line, "address-space", f"{what}: a pointer or reference without address space")

    def _recursion(self) -> None:
        graph = {id(f): set(self._calls(f)) for f in self.functions}
        for function in self.functions:
            seen: set[int] = set()
            ahead = list(graph[id(function)])
            while ahead:
                step = ahead.pop()
                if step not in seen:
                    seen.add(step)
                    ahead += graph[step]
            if id(function) in seen:
                self.found(function.line, "recursion", f"{function.name} calls itself")

    def _calls(self, function: Function) -> Iterator[int]:
        words = [t.text for t in function.body]
        for i, word in enumerate(words):
            if not _NAME.match(word) or words[i - 1 : i] in (["."], ["->"], ["::"]):
                continue
            at = _angle(words, i + 1) + 1 if words[i + 1 : i + 2] == ["<"] else i + 1
            if at <= 0 or words[at : at + 1] != ["("]:
                continue
            explicit = [w for w in words[i + 2 : at - 1] if w != ","]
            count = len(_split(function.body[at + 1 : _end(function.body, at)]))
            called = [f for f in self.functions if f.name == word and f.takes(count)]
            # Overloads of one count, and other instances of a template, cannot be told apart.
            other = explicit and explicit != function.template_names
            if len(called) == 1 and not (other and function in called):
                yield id(called[0])

    # Threadgroup memory.

    def _memory(self) -> None:
        kernels = {f.name: f for f in self.functions if f.kernel}
        plain = [(f.name, []) for f in kernels.values() if not f.template]
        for name, arguments in self.instances + plain:
            if name not in kernels:
                continue
            total = self._instance_bytes(kernels[name], arguments)
            self.threadgroup_bytes[name] = total
            if total is not None and total > THREADGROUP_BYTES:
                text = f"{name} takes {total} bytes of threadgroup memory, of {THREADGROUP_BYTES}"
                self.found(kernels[name].line, "threadgroup-bytes", text)

    def _instance_bytes(self, kernel: Function, arguments: list[list[Token]]) -> int | None:
        scope = _Scope({name: value for name, value in self.constants.items() if value})
        for name, parameter, argument in zip(
            kernel.template_names, kernel.template, [*arguments, *[[]] * 99], strict=False
        ):
            scope.values[name] = argument or parameter[_default(parameter) :]
        total = 0
        for tokens in _statements(kernel.body):
            words = [t.text for t in tokens]
            if words[:1] == ["using"] and "=" in words:
                scope.values[words[1]] = tokens[words.index("=") + 1 :]
            elif words[:1] == ["typedef"]:
                scope.values[words[-1]] = tokens[1:-1]
            declaration = _declaration(tokens)
            for name, stars, arrays, value in declaration.names if declaration else ():
                if "threadgroup" in declaration.specifiers and not stars:
                    parts = [scope.size(declaration.type), *map(scope.number, arrays)]
                    if None in parts:
                        return None
                    product = 1
                    for part in parts:
                        product *= part
                    total += product
                elif "constexpr" in declaration.specifiers or "const" in declaration.specifiers:
                    scope.values[name] = value
        return total


_KINDS = {"typename", "class", "int", "uint", "bool", "short", "ushort", "long", "ulong", "size_t"}
_KINDS |= {"const", "int32_t", "uint32_t", "char", "uchar", "unsigned", "constexpr"}

_PRECEDENCE = [
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<", ">", "<=", ">="),
    ("<<", ">>"), ("+", "-"), ("*", "/", "%"),
]  # fmt: skip


class _Scope:
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


def _end(tokens: Sequence[Token], start: int) -> int:
    """Where the bracket that opens at ``start`` closes; the end if it does not."""
    opening = tokens[start].text
    closing, depth = _PAIRS[opening], 0
    for i in range(start, len(tokens)):
        depth += (tokens[i].text == opening) - (tokens[i].text == closing)
        if not depth:
            return i
    return len(tokens)


def _angle(words: Sequence[str], start: int) -> int:
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


def _outside_angles(words: Sequence[str]) -> Iterator[int]:
    """Where words stand that are in no template arguments."""
    i = 0
    while i < len(words):
        if words[i] == "<" and (end := _angle(words, i)) > 0:
            i = end
        else:
            yield i
        i += 1


def _top(words: Sequence[str], wanted: str) -> int | None:
    """The first ``wanted`` that stands in no template arguments."""
    return next((i for i in _outside_angles(words) if words[i] == wanted), None)


def _split(tokens: Sequence[Token]) -> list[list[Token]]:
    """The pieces between commas that stand in no bracket and no template arguments."""
    words = [t.text for t in tokens]
    pieces: list[list[Token]] = [[]]
    i = 0
    while i < len(tokens):
        end = i
        if words[i] in _PAIRS:
            end = _end(tokens, i)
        elif words[i] == "<":
            end = max(i, _angle(words, i))
        if words[i] == ",":
            pieces.append([])
        else:
            pieces[-1] += tokens[i : end + 1]
        i = end + 1
    return [piece for piece in pieces if piece]


def _template(tokens: list[Token]) -> tuple[list[list[Token]], list[Token]]:
    parameters: list[list[Token]] = []
    while len(tokens) > 1 and (tokens[0].text, tokens[1].text) == ("template", "<"):
        end = _angle([t.text for t in tokens], 1)
        parameters += _split(tokens[2:end])
        tokens = tokens[end + 1 :]
    return parameters, tokens


def _default(parameter: Sequence[Token]) -> int:
    words = [t.text for t in parameter]
    return words.index("=") + 1 if "=" in words else len(words)


def _declared(parameter: Sequence[Token]) -> str:
    words = [t.text for t in parameter if not t.text.startswith("[[")]
    for end in ("=", "["):
        words = words[: words.index(end)] if end in words else words
    return next((w for w in reversed(words) if _NAME.match(w)), "")


def _type_only(words: Sequence[str]) -> bool:
    names = [w for w in words if w not in SPECIFIERS and w not in ("*", "&", "::")]
    return len(names) <= 2 and all(_NAME.match(w) and w not in NOT_TYPES for w in names) and (
        bool(names) or {"unsigned", "signed"} & set(words) != set()
    )  # fmt: skip


def _statements(body: Sequence[Token]) -> Iterator[list[Token]]:
    """Each statement of a function, in inner blocks too, and what ``for`` declares."""
    start = i = 0
    while i < len(body):
        text = body[i].text
        if text in "([":
            i = _end(body, i)
        elif text == ";":
            yield from _simple(list(body[start:i]))
            start = i + 1
        elif text == "{":
            end = _end(body, i)
            before = body[i - 1].text if i else ";"
            if i == start or before in (")", "else", "do", ":"):
                yield from _simple(list(body[start:i]))
                yield from _statements(body[i + 1 : end])
                start = end + 1
            elif {"struct", "union", "enum"} & {t.text for t in body[start:i]}:
                yield from _statements(body[i + 1 : end])
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
            end = _end(tokens, opening)
            yield from _statements(tokens[opening + 1 : end])
            yield from _simple(tokens[end + 1 :])
            return
    if tokens:
        yield tokens


def _declaration(tokens: Sequence[Token]) -> Declaration | None:
    tokens = [t for t in tokens if not t.text.startswith("[[")]
    words = [t.text for t in tokens]
    i, specifiers, kind = 0, [], ""
    while i < len(words):
        word = words[i]
        if word in SPECIFIERS:
            specifiers.append(word)
        elif word == "alignas" and words[i + 1 : i + 2] == ["("]:
            i = _end(tokens, i + 1)
        elif kind or not _NAME.match(word) or word in NOT_TYPES:
            break
        elif word == "decltype" and words[i + 1 : i + 2] == ["("]:
            i = _end(tokens, i + 1)
            kind = "decltype"
        else:
            i, kind = _type(words, i)
        i += 1
    else:
        return None
    if not kind and not {"unsigned", "signed"} & set(specifiers):
        return None
    found = Declaration(tokens[0].line, specifiers, kind or "int")
    for piece in _split(tokens[i:]):
        if not _declarator(piece, found):
            break
    return found if found.names else None


def _type(words: Sequence[str], i: int) -> tuple[int, str]:
    start = i
    while True:
        if words[i + 1 : i + 2] == ["<"] and (end := _angle(words, i + 1)) > 0:
            i = end
        if words[i + 1 : i + 2] == ["::"] and _NAME.match("".join(words[i + 2 : i + 3])):
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
    if i == len(words) or not _NAME.match(words[i]) or words[i] in NOT_TYPES:
        return False
    name, arrays = words[i], []
    i += 1
    while words[i : i + 1] == ["["]:
        end = _end(piece, i)
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
