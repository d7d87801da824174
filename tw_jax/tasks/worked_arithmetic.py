"""Schoolbook arithmetic written out digit by digit, and the response texts it is put into.

Every number is written least-significant digit first and padded with zeros to a fixed width, so
that carries run in reading order and digits of equal weight stand at equal offsets: 27 at width 2
is "72". A digit step `x*d+c=lh` reads: digit x times multiplier d plus carry c is 10*h + l.
"""

import re
from collections.abc import Sequence

from tw_jax.tasks.task import Problem, Style

# A correct response ends with this mark and the answer's digits.
ANSWER_MARK = "#"
_END_OF_TEXT = "<eos>"
_ANSWER = re.compile(r"[0-9]+")


def reversed_digits(number: int, width: int) -> str:
    """`number` with its least-significant digit first, zero-padded to `width`."""
    return f"{number:0{width}d}"[::-1]


# Text of a digit step by [digit][multiplier][carry]; the new carry is its last character.
_STEPS = tuple(
    tuple(
        tuple(
            f"{digit}*{multiplier}+{carry}={reversed_digits(digit * multiplier + carry, 2)}"
            for carry in range(9)
        )
        for multiplier in range(10)
    )
    for digit in range(10)
)


def partial_products(first: int, second: int, digits: int) -> tuple[list[int], list[str]]:
    """Multiplies `first` by each digit of `second`, least-significant digit first.

    Returns:
      The partial products, each times its power of ten, and their workings: the digit steps, then
      `>` and the partial product at width `2 * digits`.
    """
    first_digits = [int(digit) for digit in reversed_digits(first, digits)]
    values, workings = [], []
    for place, multiplier in enumerate(map(int, reversed_digits(second, digits))):
        carry, steps = 0, []
        for digit in first_digits:
            step = _STEPS[digit][multiplier][carry]
            carry = int(step[-1])
            steps.append(step)
        value = first * multiplier * 10**place
        values.append(value)
        workings.append(f"{','.join(steps)}>{reversed_digits(value, 2 * digits)}")
    return values, workings


def running_sums(addends: Sequence[int], width: int) -> list[str]:
    """Adds numbers one after another: one `a+b=c` per addend after the first."""
    lines, total = [], addends[0]
    for addend in addends[1:]:
        before, total = total, total + addend
        lines.append("+".join(reversed_digits(n, width) for n in (before, addend)))
        lines[-1] += f"={reversed_digits(total, width)}"
    return lines


def worked_problem(
    prompt: str, answer: str, plans: Sequence[str], bodies: Sequence[str], join_lines: Sequence[str]
) -> Problem:
    """Puts one working into both styles.

    Args:
      prompt: the question.
      answer: digits of the result.
      plans: text of each outline.
      bodies: independent workings, one per plan.
      join_lines: what remains to be done when all bodies are known.
    """
    numbered = [f"{number}: {body}" for number, body in enumerate(bodies, start=1)]
    ending = "\n".join([*join_lines, ANSWER_MARK + answer])
    outlines = "".join(
        f"<Outline>{number}: {plan}</Outline>\n" for number, plan in enumerate(plans, start=1)
    )
    threads = "".join(f"<Thread>\n{line}\n</Thread>" for line in numbered)
    return Problem(
        prompt=prompt,
        answer=answer,
        sequential="\n".join([*numbered, ending]),
        parallel=f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}\n</Parallel>\n{ending}",
    )


def stated_answer(response_text: str) -> str | None:
    """The digits between the last answer mark and the end of the text; None if anything else."""
    text, _, _ = response_text.partition(_END_OF_TEXT)
    _, mark, stated = text.rpartition(ANSWER_MARK)
    return stated if mark and _ANSWER.fullmatch(stated) else None


def forcing_prefix(style: Style, problem: Problem) -> str:
    """The characters up to and including the first in which the other style's response differs.

    A control tag counts as one character, since it is one token.
    """
    if style == "parallel":
        return "<Parallel>"
    return problem.sequential[:1]
