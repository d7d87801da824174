r"""Verifies answers of the game Countdown: an expression of given numbers that makes a target.

Expressions are read here, token by token; nothing is ever evaluated by Python. `+`, `-`, `*`, `/`
(also `×`, `÷`, `\times`, `\cdot`, `\div`) and parentheses, over non-negative integers. Division
is exact: intermediate results may be fractions.
"""

import collections
import dataclasses
import fractions
import json
import re
from collections.abc import Sequence

_LONGEST_EXPRESSION_CHARS = 2000
_SPELLINGS = {
    "×": "*",
    "·": "*",
    "÷": "/",
    "−": "-",
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "\\left": "",
    "\\right": "",
    "$": "",
}
_TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*/()]))")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


@dataclasses.dataclass(frozen=True)
class CountdownProblem:
    """What an answer is checked against.

    Attributes:
      numbers: each may be used once.
      target: what the expression must make.
    """

    numbers: tuple[int, ...]
    target: int


class ExpressionError(ValueError):
    """Text that is no expression over the numbers, or that divides by zero."""


def read_reference(reference: str) -> CountdownProblem:
    """Reads `{"numbers": [3, 5, 7], "target": 56}`.

    Raises:
      ValueError: it is something else.
    """
    try:
        fields = json.loads(reference)
        numbers, target = fields["numbers"], fields["target"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError('expected {"numbers": [...], "target": ...}') from None
    if not isinstance(numbers, list) or not numbers:
        raise ValueError("numbers must be a list that is not empty")
    if any(type(number) is not int or number < 0 for number in (*numbers, target)):
        raise ValueError("numbers and target must be integers, none of them negative")
    return CountdownProblem(tuple(numbers), target)


def solves(expression: str, problem: CountdownProblem) -> bool:
    """Whether an expression uses each number at most once and makes the target.

    `= TARGET` may stand behind it. Whatever is no such expression solves nothing.
    """
    expression, equals, stated = expression.rpartition("=")
    if not equals:
        expression = stated
    elif stated.strip().strip("$").strip() != str(problem.target):
        return False
    try:
        return value_of(expression, problem.numbers) == problem.target
    except ExpressionError:
        return False


def value_of(expression: str, numbers: Sequence[int]) -> fractions.Fraction:
    """The value of an expression that uses each of the numbers at most once.

    Raises:
      ExpressionError: it is none.
    """
    return _value(_postfix(_tokens(expression, numbers)))


def _tokens(expression: str, numbers: Sequence[int]) -> list[str]:
    """Tokens in text order; the numbers are checked here, so that no value can get large."""
    if len(expression) > _LONGEST_EXPRESSION_CHARS:
        raise ExpressionError("too long")
    for spelled, plain in _SPELLINGS.items():
        expression = expression.replace(spelled, plain)
    left = collections.Counter(map(str, numbers))
    tokens, place, expression = [], 0, expression.rstrip()
    while place < len(expression):
        match = _TOKEN.match(expression, place)
        if match is None:
            raise ExpressionError(f"unexpected text at character {place}")
        if match[1]:
            number = match[1].lstrip("0") or "0"
            if not left[number]:
                raise ExpressionError(f"{number} is not among the numbers that are left")
            left[number] -= 1
            tokens.append(number)
        else:
            tokens.append(match[2])
        place = match.end()
    return tokens


def _postfix(tokens: Sequence[str]) -> list[str]:
    """Dijkstra's shunting yard: no recursion, so no nesting is too deep."""
    output: list[str] = []
    waiting: list[str] = []
    expects_operand = True
    for token in tokens:
        begins_operand = token == "(" or token.isdigit()
        if begins_operand != expects_operand:
            raise ExpressionError(f"{token!r} stands where something else must")
        if token.isdigit():
            output.append(token)
            expects_operand = False
        elif token == "(":
            waiting.append(token)
        elif token == ")":
            while waiting and waiting[-1] != "(":
                output.append(waiting.pop())
            if not waiting:
                raise ExpressionError("a parenthesis is closed that was not opened")
            waiting.pop()
        else:
            while waiting and _PRECEDENCE.get(waiting[-1], 0) >= _PRECEDENCE[token]:
                output.append(waiting.pop())
            waiting.append(token)
            expects_operand = True
    if expects_operand or "(" in waiting:
        raise ExpressionError("the expression is not complete")
    return output + waiting[::-1]


def _value(postfix: Sequence[str]) -> fractions.Fraction:
    values: list[fractions.Fraction] = []
    for token in postfix:
        if token.isdigit():
            values.append(fractions.Fraction(int(token)))
            continue
        right, left = values.pop(), values.pop()
        if token == "/" and not right:
            raise ExpressionError("division by zero")
        values.append(_applied(token, left, right))
    return values[0]


def _applied(
    operator: str, left: fractions.Fraction, right: fractions.Fraction
) -> fractions.Fraction:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left / right
