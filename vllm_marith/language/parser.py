"""Text to formula: a tokenizer and a precedence-climbing parser.

    sum      = product { ("+" | "-") product }
    product  = operand { ("*" | "/") operand }
    operand  = { "+" | "-" } ( number | name | "(" sum ")" | function "(" argument { "," argument } ")" )
    argument = sum [ ":" sum ]
    function = a word of `names.FUNCTIONS`

Text comes from anyone who can reach the server, so nothing is evaluated, every bound is held while reading
(the tokenizer is lazy: reading stops at the first bound), and signs are read in a loop, not by recursion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vllm_marith.language.building import add, divide, multiply, scale
from vllm_marith.language.errors import FormulaError
from vllm_marith.language.expression import Formula, Term
from vllm_marith.language.limits import TRUSTED, Limits
from vllm_marith.language.names import FUNCTIONS, UNIFORM, check_normalize, check_term_name
from vllm_marith.language.nodes import Node, Number, Uniform, size
from vllm_marith.language.operators import Argument, Pair, apply
from vllm_marith.language.validation import did_you_mean

# Gives the tree that a name stands for, or raises a FormulaError (without a place: the parser knows it).
Resolve = Callable[[str], Node]

_NUMBER: Final = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PRECEDENCE: Final = {"+": 1, "-": 1, "*": 2, "/": 2}
# Characters that keyboards and word processors put where an operator is meant.
_LOOKALIKES: Final = {
    "−": "-",
    "–": "-",
    "—": "-",
    "×": "*",
    "·": "*",
    "÷": "/",
    "∪": "union",
    "∩": "intersection",
}


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # "number", "name", "end", or the character itself
    text: str
    position: int


def parse_formula(
    text: str, terms: Mapping[str, Term | Mapping[str, Any]], normalize: str, limits: Limits | None
) -> Formula:
    """`Formula.parse`: names are looked up in `terms`; those without an entry are plain terms."""
    from vllm_marith.language.request import (
        term_from_json,
    )  # which reads formulas, and so imports this module

    limits = limits or TRUSTED
    defined = {check_term_name(name): term_from_json(name, value, limits) for name, value in terms.items()}
    used: dict[str, Term] = {}

    def resolve(name: str) -> Node:
        used[name] = defined.get(check_term_name(name)) or Term(name=name)
        return used[name].leaf(name)

    root = parse(text, resolve, limits)
    return Formula(root, used, check_normalize(normalize)).check()


def parse(text: str, resolve: Resolve, limits: Limits) -> Node:
    """The tree of a formula's text.

    Raises:
        FormulaError: with the place, for a mistake in the text, a name that `resolve` refuses, or a bound of
            `limits`.
    """
    if not isinstance(text, str):
        raise FormulaError(f"a formula must be a string, not a {type(text).__name__}")
    if len(text) > limits.max_formula_chars:
        raise FormulaError(f"the formula has {len(text)} characters; {limits.max_formula_chars} is the most")
    if not text.strip():
        raise FormulaError("the formula is empty")
    return _Parser(text, resolve, limits).read()


class _Parser:
    """One pass over one text.  `token` is the next token that has not been used yet."""

    def __init__(self, text: str, resolve: Resolve, limits: Limits) -> None:
        self.text = text
        self.resolve = resolve
        self.limits = limits
        self.nodes = 0  # terms, numbers and operators so far
        self.names: set[str] = set()
        self.position = 0  # of the first character after `token`
        self.token = self._next_token()

    def read(self) -> Node:
        root = self._expression(1, nesting=0)
        if self.token.kind != "end":
            raise self._unexpected()
        return root

    # -- grammar ------------------------------------------------------------------------------------------

    def _expression(self, lowest: int, nesting: int) -> Node:
        """Operands joined by operators of precedence `lowest` and above."""
        left = self._operand(nesting)
        while (precedence := _PRECEDENCE.get(self.token.kind, 0)) >= lowest:
            operator = self._take()
            self._count(operator)
            right = self._expression(precedence + 1, nesting)
            left = self._apply(operator, left, right)
        return left

    def _operand(self, nesting: int) -> Node:
        negative = False
        while self.token.kind in ("+", "-"):
            negative ^= self._take().kind == "-"
        node = self._primary(nesting)
        return scale(-1.0, node) if negative else node

    def _primary(self, nesting: int) -> Node:
        token = self.token
        if token.kind == "number":
            return self._number(self._take())
        if token.kind == "(":
            self._enter(token, nesting)
            node = self._expression(1, nesting + 1)
            self._close(token)
            return node
        if token.kind == "name":
            self._take()
            return self._call(token, nesting) if self.token.kind == "(" else self._name(token)
        raise self._refusal("expected a term or a number", token.position)

    def _call(self, function: _Token, nesting: int) -> Node:
        if function.text not in FUNCTIONS:
            raise self._unknown_function(function)
        opening = self.token
        self._enter(opening, nesting)
        self._count(function)
        arguments = [self._argument(nesting + 1)]
        while self.token.kind == ",":
            self._take()
            arguments.append(self._argument(nesting + 1))
        self._close(opening)
        return self._placed(function.position, lambda: apply(function.text, arguments))

    def _argument(self, nesting: int) -> Argument:
        node = self._expression(1, nesting)
        if self.token.kind != ":":
            return node
        self._take()
        return Pair(node, self._expression(1, nesting))

    def _name(self, token: _Token) -> Node:
        if token.text == UNIFORM:
            self._count(token)
            return Uniform()
        node = self._placed(token.position, lambda: self.resolve(token.text))
        self._count(token, size(node))
        if isinstance(node, Number):
            return node
        self.names.add(token.text)
        if len(self.names) > self.limits.max_terms:
            raise self._refusal(f"the formula has more than {self.limits.max_terms} terms", token.position)
        return node

    def _number(self, token: _Token) -> Node:
        self._count(token)
        value = float(token.text)
        if not math.isfinite(value):
            raise self._refusal("the number is too large", token.position)
        return Number(value)

    def _apply(self, operator: _Token, left: Node, right: Node) -> Node:
        match operator.kind:
            case "+":
                return self._placed(operator.position, lambda: add(left, right))
            case "-":
                return self._placed(operator.position, lambda: add(left, scale(-1.0, right)))
            case "*":
                return self._placed(operator.position, lambda: multiply(left, right))
            case "/" if isinstance(right, Number):
                return self._placed(operator.position, lambda: divide(left, right.value))
            case _:
                raise self._refusal("a formula can only be divided by a number", operator.position)

    # -- bounds and refusals ------------------------------------------------------------------------------

    def _enter(self, opening: _Token, nesting: int) -> None:
        """Use the token that opens a parenthesis."""
        if nesting >= self.limits.max_depth:
            raise self._refusal(f"nested more than {self.limits.max_depth} deep", opening.position)
        self._take()

    def _close(self, opening: _Token) -> None:
        if self.token.kind == "end":
            raise self._refusal("this parenthesis is never closed", opening.position)
        if self.token.kind != ")":
            raise self._unexpected()
        self._take()

    def _count(self, token: _Token, nodes: int = 1) -> None:
        self.nodes += nodes
        if self.nodes > self.limits.max_nodes:
            raise self._refusal(
                f"the formula has more than {self.limits.max_nodes} terms, numbers and operators",
                token.position,
            )

    def _unexpected(self) -> FormulaError:
        """An operand is complete and what follows cannot go on from it."""
        if self.token.kind == ")":
            return self._refusal("this parenthesis was never opened", self.token.position)
        if self.token.kind == ",":
            return self._refusal("a comma only separates the operands of a function", self.token.position)
        if self.token.kind == ":":
            return self._refusal(
                "a colon only stands in mixture(weight: operand, ...) and schedule(position: weight, ...)",
                self.token.position,
            )
        return self._refusal("expected an operator (+ - * /)", self.token.position)

    def _unknown_function(self, function: _Token) -> FormulaError:
        meant = did_you_mean(function.text, sorted(FUNCTIONS))
        hint = (
            f"; did you mean '{meant}'?" if meant else f"; the functions are {', '.join(sorted(FUNCTIONS))}"
        )
        return self._refusal(f"unknown function '{function.text[:64]}'{hint}", function.position)

    def _placed(self, position: int, build: Callable[[], Node]) -> Node:
        """`build()`; what it refuses is refused at `position`."""
        try:
            return build()
        except FormulaError as error:
            raise FormulaError(error.message, self.text, position) from None

    def _refusal(self, message: str, position: int) -> FormulaError:
        return FormulaError(message, self.text, position)

    # -- tokens -------------------------------------------------------------------------------------------

    def _take(self) -> _Token:
        taken, self.token = self.token, self._next_token()
        return taken

    def _next_token(self) -> _Token:
        text, start = self.text, self.position
        while start < len(text) and text[start] in " \t\r\n":
            start += 1
        if start == len(text):
            self.position = start
            return _Token("end", "", start)
        character = text[start]
        if match := _NUMBER.match(text, start):
            self.position = match.end()
            following = text[match.end() : match.end() + 1]
            if following and (following == "." or following == "_" or following.isalnum()):
                raise self._refusal(
                    f"expected an operator after the number {match.group()[:40]}, as in 2*name", match.end()
                )
            return _Token("number", match.group(), start)
        if match := _NAME.match(text, start):
            self.position = match.end()
            return _Token("name", match.group(), start)
        if character in "+-*/(),:":
            self.position = start + 1
            return _Token(character, character, start)
        meant = _LOOKALIKES.get(character)
        hint = f"; did you mean '{meant}'?" if meant else ""
        raise self._refusal(f"unexpected character {character!r}{hint}", start)
