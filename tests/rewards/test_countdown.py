"""The Countdown verifier: right, wrong, and whatever else a model writes."""

import fractions
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.rewards.countdown import ExpressionError, value_of
from tw_jax.rewards.graders import grade_countdown

REFERENCE = json.dumps({"numbers": [3, 5, 7, 7], "target": 56})


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{(3+5)*7}",
        r"\boxed{(3 + 5) \times 7 = 56}",
        r"So: $\boxed{7 \cdot \left(5+3\right)}$",
        "first try 3+5\n(3+5)×7",
        "7*7+(5+3)-(3-3)\n(3+5)*7 = 56",
        r"\boxed{$7*(3+5)$}",
        r"\boxed{07*(3+5)}",
        r"\boxed{" + "(" * 900 + "(3+5)*7" + ")" * 900 + "}",
    ],
)
def test_right_answers(text):
    assert grade_countdown(text, REFERENCE).correct


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no_answer"),
        (r"\boxed{56}", "wrong"),  # not one of the numbers
        (r"\boxed{(5+3)*7*7/7}", "wrong"),  # 7 three times
        (r"\boxed{7*7+7}", "wrong"),
        (r"\boxed{8*7}", "wrong"),
        (r"\boxed{(3+5)*7 = 57}", "wrong"),
        (r"\boxed{56 = (3+5)*7}", "wrong"),
        (r"\boxed{7/(7-7)}", "wrong"),
        (r"\boxed{7**7}", "wrong"),
        (r"\boxed{(3+5)7}", "wrong"),
        (r"\boxed{-7*(-3-5)}", "wrong"),
        (r"\boxed{((3+5)*7}", "wrong"),
        (r"\boxed{(3+5)*7)}", "wrong"),
        (r"\boxed{()}", "wrong"),
        (r"\boxed{3 5}", "wrong"),
        (r"\boxed{+}", "wrong"),
        (r"\boxed{__import__('os')._exit(1)}", "wrong"),
        (r"\boxed{9^{9^{9^9}}}", "wrong"),
        (r"\boxed{" + "1" * 100_000 + "}", "wrong"),
        (r"\boxed{(3+5)*٧}", "wrong"),  # a digit, but not one of ours
        ("(" * 100_000, "wrong"),
    ],
)
def test_other_answers(text, reason):
    grade = grade_countdown(text, REFERENCE)
    assert not grade.correct and grade.reason == reason


@pytest.mark.parametrize(
    "reference",
    [
        "56",
        "{}",
        "[3]",
        '{"numbers": [], "target": 1}',
        '{"numbers": [1.5], "target": 1}',
        '{"numbers": [true], "target": 1}',
        '{"numbers": [-1], "target": 1}',
        '{"numbers": "12", "target": 1}',
        '{"numbers": [1], "target": "1"}',
        "[" * 100_000,
    ],
)
def test_unreadable_references_are_said(reference):
    grade = grade_countdown(r"\boxed{1}", reference)
    assert grade.reason == grade.failure == "unreadable_reference" and grade.message


@st.composite
def expressions(draw, depth=4):
    """An expression as text, its numbers, and its value by another way of reckoning."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        number = draw(st.integers(0, 99))
        return str(number), [number], fractions.Fraction(number)
    left, left_numbers, a = draw(expressions(depth - 1))
    right, right_numbers, b = draw(expressions(depth - 1))
    operator = draw(st.sampled_from("+-*/"))
    value = None
    if a is not None and b is not None and not (operator == "/" and b == 0):
        value = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[
            operator
        ]()
    return f"({left}){operator} ({right})", left_numbers + right_numbers, value


@given(expressions())
def test_values_are_those_of_exact_arithmetic(case):
    text, numbers, value = case
    if value is None:
        with pytest.raises(ExpressionError):
            value_of(text, numbers)
    else:
        assert value_of(text, numbers) == value
        with pytest.raises(ExpressionError):
            value_of(text, numbers[1:])  # one number too few


@given(st.lists(st.integers(0, 20), min_size=2, max_size=8), st.data())
def test_products_come_first_and_the_rest_from_left_to_right(numbers, data):
    operators = data.draw(st.lists(st.sampled_from("+-*/"), min_size=len(numbers)))
    pairs = list(zip(operators, numbers[1:], strict=False))
    text = str(numbers[0]) + "".join(f"{operator}{number}" for operator, number in pairs)
    summands = [fractions.Fraction(numbers[0])]
    for operator, number in pairs:
        if operator == "/" and number == 0:
            with pytest.raises(ExpressionError):
                value_of(text, numbers)
            return
        if operator in "+-":
            summands.append(fractions.Fraction(number if operator == "+" else -number))
        else:
            summands[-1] *= number if operator == "*" else fractions.Fraction(1, number)
    assert value_of(text, numbers) == sum(summands)


@given(st.text(max_size=60), st.text(alphabet="0123456789+-*/() =", max_size=40))
def test_nothing_a_model_writes_raises(text, arithmetic):
    for written in (text, arithmetic, f"\\boxed{{{arithmetic}}}"):
        grade_countdown(written, REFERENCE)
