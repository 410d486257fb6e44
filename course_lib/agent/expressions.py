"""Arithmetic as people and models write it, parsed: no `eval`, no names but those given, and limits on size and depth.

    expression := term (("+" | "-") term)*            term  := factor (("*" | "/" | "//" | "%" | nothing) factor)*
    factor     := ("+" | "-") factor | power          power := atom ("!" )* (("^" | "**") factor)?
    atom       := NUMBER | NAME | NAME "(" expression ("," expression)* ")" | "(" expression ")"

Where nothing stands between two factors, as in `2x`, `3(4+1)`, they are multiplied. A postfix `%` that no factor follows is per cent.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

LONGEST = 500  # characters
DEEPEST = 40  # levels of nesting
_TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([^\W\d_]\w*)|(\*\*|//|[-+*/%^()!,=])|(\S))"
)
_AS_ASCII = str.maketrans({"×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "—": "-", "[": "(", "]": ")"})

Tree = tuple[Any, ...]  # ("number", text) | ("name", name) | (operator, tree, tree) | ("call", name, trees)


class ExpressionError(ValueError):
    """The text is no expression; the message is for whoever wrote it."""


def parse(text: str, *, functions: Collection[str]) -> Tree:
    """The tree of an expression: ("number", text), ("name", name), ("neg", a), ("!", a), ("+", a, b) …, ("call", name, (a, …)).

    Raises:
        ExpressionError: it is empty, too long or too deep, or no arithmetic; the message says where.
    """
    if len(text) > LONGEST:
        raise ExpressionError(f"the expression has {len(text)} characters; the limit is {LONGEST}")
    parser = _Parser(list(_tokens(text)), frozenset(functions))
    tree = parser.expression()
    if parser.token:
        raise ExpressionError(f"{parser.token!r} is not expected at character {parser.place + 1} of {text!r}")
    return tree


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """(kind, token, place) of each: kind is number, name, or the sign itself."""
    plain = unicodedata.normalize("NFKC", text).translate(
        _AS_ASCII
    )  # NFKC: full-width digits and brackets, superscripts
    if len(plain) > 2 * LONGEST:  # some characters stand for many
        raise ExpressionError(f"the expression is longer than {LONGEST} characters")
    for match in _TOKEN.finditer(plain):
        number, name, sign, other = match.groups()
        if other:
            raise ExpressionError(f"{other!r} is no part of arithmetic (character {match.start(4) + 1} of {text!r})")
        place = match.end() - len(number or name or sign)
        yield ("number" if number else "name" if name else sign), number or name or sign, place


@dataclass
class _Parser:
    tokens: list[tuple[str, str, int]]
    functions: frozenset[str]
    at: int = 0
    depth: int = field(default=0)

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    @property
    def token(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    @property
    def place(self) -> int:
        return self.tokens[self.at][2] if self.at < len(self.tokens) else 0

    def take(self) -> str:
        token = self.token
        self.at += 1
        return token

    def expression(self) -> Tree:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ExpressionError(f"the expression is nested more than {DEEPEST} levels deep")
        tree = self.term()
        while self.kind in ("+", "-"):
            tree = (self.take(), tree, self.term())
        self.depth -= 1
        return tree

    def term(self) -> Tree:
        tree = self.factor()
        while True:
            if self.kind == "%" and not self._begins_factor(self.at + 1):
                self.take()
                tree = ("/", tree, ("number", "100"))
            elif self.kind in ("*", "/", "//", "%"):
                tree = (self.take(), tree, self.factor())
            elif self.kind in ("name", "("):  # 2x, 3(4+1)
                tree = ("*", tree, self.factor())
            else:
                return tree

    def factor(self) -> Tree:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ExpressionError(f"the expression is nested more than {DEEPEST} levels deep")
        if self.kind in ("+", "-"):
            sign = self.take()
            tree = self.factor()
            tree = ("neg", tree) if sign == "-" else tree
        else:
            tree = self.atom()
            while self.kind == "!":
                self.take()
                tree = ("!", tree)
            if self.kind in ("^", "**"):
                self.take()
                tree = ("^", tree, self.factor())
        self.depth -= 1
        return tree

    def atom(self) -> Tree:
        kind = self.kind
        if kind == "number":
            return ("number", self.take())
        if kind == "name":
            name = self.take()
            if name in self.functions and self.kind == "(":
                return ("call", name, self._arguments())
            return ("name", name)
        if kind == "(":
            self.take()
            tree = self.expression()
            self._close()
            return tree
        raise ExpressionError(
            f"a number is missing before {self.token!r}" if kind else "the expression ends where a number is missing"
        )

    def _arguments(self) -> tuple[Tree, ...]:
        self.take()
        arguments = [self.expression()]
        while self.kind == ",":
            self.take()
            arguments.append(self.expression())
        self._close()
        return tuple(arguments)

    def _close(self) -> None:
        if self.kind != ")":
            raise ExpressionError(
                f"a closing bracket is missing before {self.token!r}" if self.kind else "a closing bracket is missing"
            )
        self.take()

    def _begins_factor(self, at: int) -> bool:
        return at < len(self.tokens) and self.tokens[at][0] in ("number", "name", "(")
