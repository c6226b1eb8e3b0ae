"""What Metal 3.1 accepts and C++ does not say: a check over the text of a kernel.

No Metal compiler runs here, so this reads the source as tokens: no types, no overloads, no
templates beyond their arguments. It knows the rules that a C++ compiler cannot find broken.
The rules are those of Apple's Metal Shading Language Specification 3.1: what of C++14 it leaves
out, types, address spaces, functions. Where it leaves a doubt, what MLX ships is right, for Apple's
compiler takes it: threadgroup arrays in inner blocks, arrays as parameters without a space.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cxx_numbers import Scope
from cxx_text import (
    NAME,
    SPACES,
    SPECIFIERS,
    TOKEN,
    Declaration,
    Token,
    angle_end,
    declaration_of,
    declared,
    default_at,
    end_of,
    first_outside,
    outside_angles,
    split,
    statements,
    template_of,
    type_only,
)

THREADGROUP_BYTES = 32 * 1024
"""Memory of a threadgroup on every Apple GPU (Metal Feature Set Tables)."""

BUFFERS = 31
"""Buffers that a function's arguments can name (Metal Feature Set Tables)."""


class Finding(NamedTuple):
    """A rule broken: ``line`` counts from 1."""

    line: int
    rule: str
    text: str


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
KINDS = {"typename", "class", "int", "uint", "bool", "short", "ushort", "long", "ulong", "size_t"}
KINDS |= {"const", "int32_t", "uint32_t", "char", "uchar", "unsigned", "constexpr"}


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
        return [declared(p) for p in self.template]

    def takes(self, count: int) -> bool:
        optional = sum(any(t.text == "=" for t in p) for p in self.parameters)
        return len(self.parameters) - optional <= count <= len(self.parameters)


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
        for match in TOKEN.finditer(source):
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
            if shape[:2] == ["(", "*"] and shape[3:] == [")", "("] and NAME.match(shape[2]):
                self.found(line, "function-pointer", f"{shape[2]} is a function pointer")

    # Program scope, namespaces and classes.

    def _outside(self, tokens: list[Token], in_class: bool) -> None:
        start = i = 0
        while i < len(tokens):
            text = tokens[i].text
            if text in "([":
                i = end_of(tokens, i)
            elif text == ";":
                self._outside_statement(tokens[start:i], in_class)
                start = i + 1
            elif text == "{":
                end = end_of(tokens, i)
                if self._outside_block(tokens[start:i], tokens[i + 1 : end], in_class):
                    start = end + 1
                i = end
            elif text in ("public", "private", "protected"):
                start = i + 2
            i += 1

    def _outside_block(self, head: list[Token], body: list[Token], in_class: bool) -> bool:
        template, head = template_of(head)
        words = [t.text for t in head]
        opening = first_outside(words, "(")
        if "namespace" in words or words[:1] == ["extern"]:
            self._outside(body, in_class)
        elif "enum" in words:
            for piece in split(body):
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
        closing = end_of(head, opening)
        kernel = "kernel" in words or any(w.startswith("[[kernel") for w in words)
        function = Function(
            words[opening - 1], head[opening].line, kernel, template,
            split(head[opening + 1 : closing]), body, method,
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
        _, tokens = template_of(tokens)
        self._alias(tokens)
        declaration = declaration_of(tokens)
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
        opening = first_outside([t.text for t in tokens], "(")
        if opening is None:
            return
        inner = tokens[opening + 1 : end_of(tokens, opening)]
        angle = [t.text for t in inner].index("<") if "<" in [t.text for t in inner] else None
        arguments = split(inner[angle + 1 : -1]) if angle is not None else []
        self.instances.append((inner[0].text, arguments))

    # Functions.

    def _signature(self, function: Function) -> None:
        slots = []
        for parameter in function.parameters:
            words = [t.text for t in parameter if not t.text.startswith("[[")]
            words = words[: words.index("=")] if "=" in words else words
            if not words:
                continue
            outside = [words[i] for i in outside_angles(words)]
            if {"*", "&", "&&"} & set(outside) and not SPACES & set(words):
                self._unspaced(parameter[0].line, f"{' '.join(words)} of {function.name}")
            attributes = " ".join(t.text for t in parameter if t.text.startswith("[["))
            slots += [int(n) for n in re.findall(r"\bbuffer\((\d+)\)", attributes)]
        if not function.kernel:
            return
        if slots and (len(slots) > BUFFERS or max(slots) >= BUFFERS):
            self.found(function.line, "buffers", f"{function.name} names over {BUFFERS} buffers")
        for parameter in function.template:
            if parameter[0].text not in KINDS:
                text = " ".join(t.text for t in parameter)
                self.found(parameter[0].line, "template", f"{text}: types, integers and bools only")

    def _function(self, function: Function) -> None:
        variables = {declared(p) for p in function.parameters}
        for tokens in statements(function.body):
            self._casts(tokens)
            self._alias(tokens)
            declaration = declaration_of(tokens)
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
            declaration = declaration_of([*named, equals])
            if declaration is not None:
                self._pointers(declaration)

    def _casts(self, tokens: list[Token]) -> None:
        words = [t.text for t in tokens]
        for i, word in enumerate(words):
            if word in ("static_cast", "reinterpret_cast", "const_cast", "as_type"):
                inner = words[i + 2 : angle_end(words, i + 1)]
            elif word == "(":
                inner = words[i + 1 : end_of(tokens, i)]
                if not inner or inner[-1] not in ("*", "&") or not type_only(inner[:-1]):
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
            if not NAME.match(word) or words[i - 1 : i] in (["."], ["->"], ["::"]):
                continue
            at = angle_end(words, i + 1) + 1 if words[i + 1 : i + 2] == ["<"] else i + 1
            if at <= 0 or words[at : at + 1] != ["("]:
                continue
            explicit = [w for w in words[i + 2 : at - 1] if w != ","]
            count = len(split(function.body[at + 1 : end_of(function.body, at)]))
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
        scope = Scope({name: value for name, value in self.constants.items() if value})
        for name, parameter, argument in zip(
            kernel.template_names, kernel.template, [*arguments, *[[]] * 99], strict=False
        ):
            scope.values[name] = argument or parameter[default_at(parameter) :]
        total = 0
        for tokens in statements(kernel.body):
            words = [t.text for t in tokens]
            if words[:1] == ["using"] and "=" in words:
                scope.values[words[1]] = tokens[words.index("=") + 1 :]
            elif words[:1] == ["typedef"]:
                scope.values[words[-1]] = tokens[1:-1]
            declaration = declaration_of(tokens)
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
