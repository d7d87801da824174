"""Every line of every worked problem, checked against Python's integers.

The checker below reads the text alone and shares no code with the generators.
"""

import re

import pytest

from tw_jax.tasks.multiplication import Multiplication, MultiplicationConfig
from tw_jax.tasks.sum_of_products import SumOfProducts, SumOfProductsConfig
from tw_jax.tasks.task import Problem, Split
from tw_jax.tasks.worked_arithmetic import partial_products, running_sums

SPLITS: tuple[Split, ...] = ("train", "heldout")
PROBLEMS = 300


def number(text: str) -> int:
    return int(text[::-1])


def check_partial_product(text: str, first: str, second: str, place: int) -> int:
    """Checks `x*d+c=lh,...>p` for one digit of the second factor; returns the partial product."""
    steps, product = text.split(">")
    carry = 0
    for digit, step in zip(first, steps.split(","), strict=True):
        x, d, c, low, high = re.fullmatch(r"(\d)\*(\d)\+(\d)=(\d)(\d)", step).groups()
        assert (x, d, int(c)) == (digit, second[place], carry)
        assert int(x) * int(d) + carry == 10 * int(high) + int(low)
        carry = int(high)
    assert len(product) == len(first) + len(second)
    assert number(product) == number(first) * int(second[place]) * 10**place
    return number(product)


def check_sums(lines: list[str], addends: list[int], width: int) -> int:
    """Checks `a+b=c` lines that add up the addends one after another; returns the total."""
    total = addends[0]
    for line, addend in zip(lines, addends[1:], strict=True):
        a, b, c = re.fullmatch(r"(\d+)\+(\d+)=(\d+)", line).groups()
        assert {len(a), len(b), len(c)} == {width}
        assert (number(a), number(b)) == (total, addend)
        assert number(c) == number(a) + number(b)
        total = number(c)
    return total


def bodies_of(lines: list[str], threads: int) -> list[str]:
    bodies = []
    for position, line in enumerate(lines[:threads], start=1):
        header, body = line.split(": ")
        assert header == str(position)
        bodies.append(body)
    return bodies


def check_parallel_text(problem: Problem, plans: list[str]) -> None:
    """The parallel response is the sequential one's lines in the canonical block."""
    lines = problem.sequential.split("\n")
    threads, ending = lines[: len(plans)], lines[len(plans) :]
    expected = "<Parallel>\n<Outlines>\n"
    for position, plan in enumerate(plans, start=1):
        expected += f"<Outline>{position}: {plan}</Outline>\n"
    expected += "</Outlines>\n<Thread>\n" + "\n</Thread><Thread>\n".join(threads)
    expected += "\n</Thread>\n</Parallel>\n" + "\n".join(ending)
    assert problem.parallel == expected


@pytest.mark.parametrize("digits", [2, 3, 4])
@pytest.mark.parametrize("split", SPLITS)
def test_multiplication_is_right_in_every_step(digits: int, split: Split) -> None:
    task = Multiplication(MultiplicationConfig(digits=digits))
    for index in range(PROBLEMS):
        problem = task.problem(split, index, seed=7)
        first, second = re.fullmatch(r"(\d+)\*(\d+)=", problem.prompt).groups()
        assert (len(first), len(second)) == (digits, digits)
        lines = problem.sequential.split("\n")
        addends = [
            check_partial_product(body, first, second, place)
            for place, body in enumerate(bodies_of(lines, digits))
        ]
        total = check_sums(lines[digits:-1], addends, 2 * digits)
        assert total == number(first) * number(second)
        assert lines[-1] == f"#{problem.answer}"
        assert number(problem.answer) == total and len(problem.answer) == 2 * digits
        check_parallel_text(problem, plans=list(second))


@pytest.mark.parametrize("digits", [1, 2, 3])
@pytest.mark.parametrize("split", SPLITS)
def test_sum_of_products_is_right_in_every_step(digits: int, split: Split) -> None:
    task = SumOfProducts(SumOfProductsConfig(digits=digits, heldout_fraction=0.3))
    width = task.config.sum_digits
    seen_products = set()
    for index in range(PROBLEMS):
        problem = task.problem(split, index, seed=7)
        questions = problem.prompt.removesuffix("=").split("+")
        seen_products.add(len(questions))
        lines = problem.sequential.split("\n")
        results = []
        bodies = bodies_of(lines, len(questions))
        for label, question, body in zip("ABCD", questions, bodies, strict=False):
            copied, working = body.split(":")
            assert copied == question
            first, second = re.fullmatch(label + r"(\d+)\*(\d+)", question).groups()
            assert (len(first), len(second)) == (digits, digits)
            parts = working.split(";")
            addends = [
                check_partial_product(part, first, second, place)
                for place, part in enumerate(parts[:digits])
            ]
            product = check_sums(parts[digits:], addends, 2 * digits)
            assert product == number(first) * number(second)
            results.append(product)
        total = check_sums(lines[len(questions) : -1], results, width)
        assert lines[-1] == f"#{problem.answer}"
        assert number(problem.answer) == total and len(problem.answer) == width
        check_parallel_text(problem, plans=list("ABCD"[: len(questions)]))
    assert seen_products == {2, 3, 4}


def test_the_documented_multiplication() -> None:
    """The example in the docstring of `tw_jax.tasks.multiplication`."""
    values, workings = partial_products(313, 291, digits=3)
    assert workings == [
        "3*1+0=30,1*1+0=10,3*1+0=30>313000",
        "3*9+0=72,1*9+2=11,3*9+1=82>071820",
        "3*2+0=60,1*2+0=20,3*2+0=60>006260",
    ]
    assert running_sums(values, 6) == ["313000+071820=384820", "384820+006260=380190"]
    assert 313 * 291 == 91083


def test_sums_fit_their_width() -> None:
    problem = SumOfProducts(SumOfProductsConfig()).longest_problem()
    assert problem.prompt == "A99*99+B99*99+C99*99+D99*99="
    assert problem.answer == "40293" and 4 * 99 * 99 == 39204
